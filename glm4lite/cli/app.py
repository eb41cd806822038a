"""The `glm4lite` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from glm4lite import __version__
from glm4lite.cli.commands.batch import batch
from glm4lite.cli.commands.bench import bench
from glm4lite.cli.commands.chat import chat
from glm4lite.cli.commands.evaluate import evaluate
from glm4lite.cli.commands.export import export
from glm4lite.cli.commands.generate import generate
from glm4lite.cli.commands.info import info
from glm4lite.cli.commands.list import list_models, rm
from glm4lite.cli.commands.plan import plan
from glm4lite.cli.commands.prefixes import prefixes
from glm4lite.cli.commands.pull import pull
from glm4lite.cli.commands.quantize import quantize
from glm4lite.cli.commands.research import research
from glm4lite.cli.commands.serve import serve
from glm4lite.cli.failures import told
from glm4lite.cli.options import with_sizes
from glm4lite.cli.signals import leaving_on_signals
from glm4lite.cli.startup import settle
from glm4lite.cli.streams import owned_stdout

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Runs GLM-4 models locally.",
)


class _Command(TyperCommand):
    """A command whose --keep-prefixes may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_sizes(args))


def _add(command: Callable[..., Any], name: str | None = None) -> None:
    """A command of the program: stdout is its result's alone."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        with owned_stdout():
            return command(*arguments, **options)

    app.command(name=name, cls=_Command)(run)


for _command in (chat, research, generate, serve, batch, pull, quantize, export, info, plan, bench, prefixes, rm):
    _add(_command)
_add(list_models, "list")
_add(evaluate, "eval")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"glm4lite {__version__}")
        raise typer.Exit


def add_commands() -> None:
    """Commands of other packages, from the entry-point group `glm4lite.commands`: so that nothing here imports them."""
    for entry in entry_points(group="glm4lite.commands"):
        _add(entry.load(), entry.name)


def main() -> None:
    """Runs the command line; what a user or the system caused is one line on stderr and exit code 2."""
    # torch's threads would otherwise spin after each of their loops and take the cores from the kernels' own pool:
    # silu(linear(x)) of 64 rows took 8 to 14 ms with it and 5 ms without, on two cores. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        settle()
        add_commands()
        with leaving_on_signals():
            app(prog_name="glm4lite")  # also under python -m: completion is asked for by this name
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(told(error))
