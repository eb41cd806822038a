"""What commands do around their work: where events and reports go, threads, interrupts."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from glm4lite.base.errors import ConfigError
from glm4lite.cli.streams import streams

if TYPE_CHECKING:
    from glm4lite.cli.terminal import Renderer
    from glm4lite.loading.planner import PlacementReport
    from glm4lite.measure.benchmark import Benchmark
    from glm4lite.measure.evaluate import Evaluation


def nano_remark(command: str) -> str:
    """What a first user should know about the model that comes with the package."""
    return (
        "nano is a tiny demonstration model that comes with glm4lite: it calls tools and makes small talk, no more. "
        f"For a 9B: glm4lite {command} zai-org/GLM-4-9B-0414"
    )


def use_threads(count: str | None) -> None:
    """Threads of torch and of the kernels; what this machine does not have is refused, also in the environment."""
    from glm4lite_quant.kernels import check_environment, native

    check_environment()
    if count is None:
        return
    try:
        number = int(count)
    except ValueError:
        raise ConfigError(f"--threads is {count[:100]!r}; use a whole number of at least 1") from None
    native.set_threads(number)


@contextmanager
def rendering(as_json: bool, raw: bool = False) -> Iterator[Renderer]:
    """Where events go; the terminal is left in order whatever happens. `raw`: Markdown is not drawn."""
    from glm4lite.cli.terminal import JsonLines, Notices, Terminal

    own = streams()
    renderer: Renderer = JsonLines(own.out, own.err) if as_json else Terminal(own.out, own.err, not raw)
    logging.getLogger().addHandler(notices := Notices(own.err, renderer.end_line))
    try:
        yield renderer
    finally:
        logging.getLogger().removeHandler(notices)
        renderer.close()


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) end the program as Ctrl-C does: what is half written is removed.

    Those that are ignored (`nohup`) stay so. A server has its own way to end on SIGTERM, which a closed terminal takes.
    """

    def leave(number: int, _: object) -> None:
        if signal.getsignal(signal.SIGTERM) not in (leave, signal.SIG_IGN):
            signal.raise_signal(signal.SIGTERM)
            return
        for ours in numbers:
            signal.signal(ours, signal.SIG_IGN)  # a shell and a terminal may both say so, while we tidy up
        sys.exit(128 + number)

    names = ("SIGTERM", "SIGHUP")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is leave:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def interrupt_stops(answering: Any) -> Iterator[None]:
    """Ctrl-C ends the answer, not the program; a second one during the same answer interrupts for good."""

    def on_interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, previous)
        answering.stop()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def print_report(report: Benchmark | Evaluation | PlacementReport, as_json: bool) -> None:
    """One JSON object, or aligned lines."""
    from glm4lite.cli.terminal import json_line

    if as_json:
        streams().out.write(json_line(report.to_json()))
    else:
        print_facts(list(report.lines()))


def print_facts(facts: list[tuple[str, str]]) -> None:
    from glm4lite.cli.printable import printable_line

    width = max(len(name) for name, _ in facts)
    streams().out.writelines(f"{name:<{width}}  {printable_line(value)}\n" for name, value in facts)
