"""What bench/peers.py says: medians with spread, ratios of each round, and how they stand to the project's targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")
Rounds = Sequence[Mapping[str, Any] | None]  # of one engine; None: that round failed


@dataclass(frozen=True)
class Target:
    """glm4lite (a row) over a peer (a row; None: the share of memory bandwidth), as a ratio."""

    name: str
    own: str
    peer: str | None
    rate: str
    must: float
    aim: float


TARGETS = (
    Target("decode tok/s against llama.cpp Q4_0", "glm4lite-int4", "q4_0", RATES[1], 1.30, 1.70),
    Target("decode GB/s against measured read bandwidth", "glm4lite-int4", None, "bound_fraction", 0.70, 0.90),
    Target("prefill (128 tokens) against llama.cpp Q4_0", "glm4lite-int4", "q4_0", RATES[0], 2.0, 3.0),
    Target("int8 decode against llama.cpp Q8_0", "glm4lite-int8", "q8_0", RATES[1], 1.2, 1.5),
)


def ratios(own: Rounds, peer: Rounds, rate: str) -> list[float]:
    """Of every round that both have."""
    return [mine[rate] / theirs[rate] for mine, theirs in zip(own, peer, strict=True) if mine and theirs]


def targets(results: Mapping[str, Rounds]) -> list[dict[str, Any]]:
    """Median, spread and verdict of each target whose engines were measured."""
    found = []
    for target in TARGETS:
        own, peer = results.get(target.own, ()), results.get(target.peer or "", ())
        if target.peer is None:
            values = [one[target.rate] for one in own if one]
        else:
            values = ratios(own, peer, target.rate) if own and peer else []
        if values:
            median = statistics.median(values)
            entry = {"target": target.name, "must": target.must, "aim": target.aim, "median": median}
            found.append(entry | {"min": min(values), "max": max(values), "met": median >= target.must})
    return found


def engine_table(
    names: Mapping[str, str], own: Mapping[str, str], results: Mapping[str, Rounds], notes: Mapping[str, str]
) -> list[str]:
    """Markdown. names: row -> what people call it; own: row -> the glm4lite row it is compared with; notes: row -> why
    it was not measured."""
    lines = [
        "| engine | prefill tok/s | glm4lite / it | decode tok/s | glm4lite / it |",
        "|---|---|---|---|---|",
    ]
    for row, name in names.items():
        if row in notes:
            lines.append(f"| {name} | {notes[row]} | | | |")
            continue
        rounds = results[row]
        cells = []
        for rate in RATES:
            cells.append(spread([one[rate] for one in rounds if one], ".2f"))
            compared = own[row] != row and own[row] in results
            cells.append(spread(ratios(results[own[row]], rounds, rate), ".2f") if compared else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def target_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: the project's targets and what was measured."""
    lines = ["| target | must | aim | measured | met |", "|---|---|---|---|---|"]
    for one in found:
        measured = f"{one['median']:.2f} ({one['min']:.2f} to {one['max']:.2f})"
        met = "yes" if one["met"] else "NO"
        lines.append(f"| {one['target']} | {one['must']:.2f} | {one['aim']:.2f} | {measured} | {met} |")
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Median (min to max); a dash where nothing was measured."""
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
