"""The `glm4lite` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from glm4lite import __version__
from glm4lite.cli import answering, looking
from glm4lite.cli.running import leaving_on_signals
from glm4lite.errors import Glm4liteError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Runs GLM-4 models locally."
)
app.command()(answering.chat)
app.command()(answering.generate)
app.command()(answering.serve)
app.command()(looking.quantize)
app.command()(looking.info)
app.command()(looking.plan)
app.command()(looking.bench)
app.command(name="eval")(looking.evaluate_text)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"glm4lite {__version__}")
        raise typer.Exit


def _user_errors() -> tuple[type[BaseException], ...]:
    """Errors shown as one line. The quant package's own is known only once it (and torch) is imported."""
    quant = sys.modules.get("glm4lite_quant")
    return (Glm4liteError,) if quant is None else (Glm4liteError, quant.QuantError)


def _add_commands() -> None:
    """Commands of other packages, from the entry-point group `glm4lite.commands`: so that nothing here imports them."""
    for entry in entry_points(group="glm4lite.commands"):
        app.command(name=entry.name)(entry.load())


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    # torch's threads would otherwise spin after each of their loops and take the cores from the kernels' own pool:
    # silu(linear(x)) of 64 rows took 8 to 14 ms with it and 5 ms without, on two cores. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _speak_utf8()
    _add_commands()
    try:
        with leaving_on_signals():
            app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        from glm4lite.terminal import printable_line

        sys.stderr.write(f"error: {printable_line(error)}\n")
        sys.exit(2)


def _speak_utf8() -> None:
    """Answers are in any language, whatever the terminal's code page; bytes that are no text do not end a chat."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
