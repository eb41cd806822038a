"""Draws the loss curve: `python -m nano.curve` reads train_log.jsonl and writes loss.svg."""

from __future__ import annotations

import json
import math
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 320, 56, 40


def points(log: Path) -> list[tuple[float, float]]:
    """(minutes, loss) of every logged step."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(entry["minutes"], entry["loss"]) for entry in entries if "loss" in entry]


def draw(curve: list[tuple[float, float]]) -> str:
    """An SVG with a logarithmic loss axis."""
    last = max(minutes for minutes, _ in curve)
    low = math.floor(math.log10(min(loss for _, loss in curve)))
    high = math.ceil(math.log10(max(loss for _, loss in curve)))

    def x(minutes: float) -> float:
        return LEFT + (WIDTH - LEFT - 12) * minutes / last

    def y(loss: float) -> float:
        return 12 + (HEIGHT - BOTTOM - 12) * (high - math.log10(loss)) / (high - low)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']  # fmt: skip
    for power in range(low, high + 1):
        parts.append(f'<path d="M{LEFT} {y(10**power):.1f}H{WIDTH - 12}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    for minutes in range(0, int(last) + 1, 10):
        parts.append(f'<text x="{x(minutes):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{minutes}</text>')
    line = " ".join(f"{x(minutes):.1f},{y(loss):.1f}" for minutes, loss in curve)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1565c0" stroke-width="1.5"/>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">minutes of training</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">loss</text>'
    )
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (HERE / "loss.svg").write_text(draw(points(HERE / "train_log.jsonl")), encoding="utf-8")
