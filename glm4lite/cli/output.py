"""Where a command's events, remarks and reports go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from glm4lite.cli.streams import streams

if TYPE_CHECKING:
    from glm4lite.cli.terminal import Renderer
    from glm4lite.loading.plan_report import PlacementReport
    from glm4lite.measure.benchmark import Benchmark
    from glm4lite.measure.evaluate import Evaluation


def nano_remark(command: str) -> str:
    """What a first user should know about the model that comes with the package."""
    return (
        "nano is a tiny demonstration model that comes with glm4lite: it calls tools and makes small talk, no more. "
        f"For a 9B: glm4lite {command} zai-org/GLM-4-9B-0414"
    )


@contextmanager
def rendering(as_json: bool, raw: bool = False) -> Iterator[Renderer]:
    """Where events go; the terminal is left in order whatever happens. `raw`: Markdown is not drawn."""
    import logging

    from glm4lite.cli.terminal import JsonLines, Notices, Terminal

    own = streams()
    renderer: Renderer = JsonLines(own.out, own.err) if as_json else Terminal(own.out, own.err, not raw)
    logging.getLogger().addHandler(notices := Notices(own.err, renderer.end_line))
    try:
        yield renderer
    finally:
        logging.getLogger().removeHandler(notices)
        renderer.close()


def print_report(report: Benchmark | Evaluation | PlacementReport, as_json: bool) -> None:
    """One JSON object, or aligned lines."""
    from glm4lite.cli.terminal import json_line

    if as_json:
        streams().out.write(json_line(report.to_json()))
    else:
        print_facts(list(report.lines()))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    from glm4lite.cli.printable import printable_line

    width = max(len(name) for name, _ in facts)
    streams().out.writelines(f"{name:<{width}}  {printable_line(value)}\n" for name, value in facts)
