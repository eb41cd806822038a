"""Options that several commands share, and what a command does with the number of threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glm4lite.base.errors import ConfigError
from glm4lite.cli.paths import models

if TYPE_CHECKING:
    from glm4lite.checkpoint.lora.folder import Loras
    from glm4lite.text.grammar import Schema

_LIKE_A_SIZE = re.compile(r"[\d.]+ *[A-Za-z]{0,3}", re.ASCII)


def among(*words: str) -> Callable[[str], list[str]]:
    """For a shell's completion: those that go on from what is typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        help="A folder, a Hub repository such as zai-org/GLM-4-9B-0414, a short name (list --known), or nano.",
        autocompletion=lambda incomplete: list(models(incomplete)),
    ),
]
NamedModel = Annotated[
    str,
    typer.Option(
        "--model",
        help="A folder, a Hub repository or nano; requests call a folder by its last name.",
        autocompletion=lambda incomplete: list(models(incomplete)),
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        help="int4, int8, nf4, fp4 or none.",
        show_default="int4, or as the checkpoint is stored",
        autocompletion=among("int4", "int8", "nf4", "fp4", "none"),
    ),
]
# Read as text, so that what is no number is answered in one line too.
Bits = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="Instead of --quant: bits a weight on average, such as 3.5, spent where the answers need them.",
        show_default="none",
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Instead of --quant: what weights, cache and work memory may take together, such as 12GiB.",
        show_default="none",
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADAPTER[=SCALE]",
        help="A LoRA adapter (folder or repository of PEFT's or mlx-lm's) that is always on; may be repeated.",
        show_default="none",
    ),
]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=ADAPTER[=SCALE]",
        help="A LoRA adapter that a request chooses by naming MODEL:NAME as its model; may be repeated.",
        show_default="none",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", "-p", help="Answer this, with what stdin holds below it, and leave; @FILE adds a file, - is stdin."
    ),
]
Lines = Annotated[bool, typer.Option("--lines", help="Each line of stdin is a turn, not all of it one message.")]
Json = Annotated[bool, typer.Option("--json", help="Every line of stdout is one event as JSON.")]
Raw = Annotated[bool, typer.Option("--raw", help="Write the answer's text as it is; do not draw its Markdown.")]
NoHistory = Annotated[bool, typer.Option("--no-history", help="Keep nothing of what is typed.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Tools = Annotated[
    list[str] | None,
    typer.Option("--tools", metavar="FILE", help="The @tool functions of a file or folder; `python`: run Python code."),
]
NoTools = Annotated[bool, typer.Option("--no-tools", help="Not calculator, current_time and unit_convert.")]
Mcp = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="A file with mcpServers, whose tools are offered.")
]
Docs = Annotated[
    list[Path] | None,
    typer.Option(metavar="FOLDER", help="A folder whose files are searched; may be repeated.", show_default="none"),
]
Search = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="A SearXNG server, such as http://127.0.0.1:8888; the web's pages may be opened then.",
        show_default="none",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST[:PORT]",
        help="Pages of this host may be opened, also in your own network; may be repeated.",
        show_default="public hosts with --search",
    ),
]
Approve = Annotated[
    str,
    typer.Option(
        metavar="WHEN",
        help="ask: for tools that want it; every: before every call; all: nothing is asked.",
        autocompletion=among("ask", "every", "all"),
    ),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the checkpoint's")]
TopP = Annotated[float | None, typer.Option(show_default="the checkpoint's")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Longest answer, in tokens, its thought included.", show_default="what the context leaves"),
]
Think = Annotated[
    str | None,
    typer.Option(
        metavar="off|N",
        help="Longest thought, in tokens; off is none.",
        show_default="as long as the model thinks",
        autocompletion=among("off"),
    ),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: repeat less, the prompt included.", show_default="the checkpoint's")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="-2 to 2: repeat less, the more often a token came.", show_default="0")
]
PresencePenalty = Annotated[float | None, typer.Option(help="-2 to 2: say new things.", show_default="0")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")]
SchemaFile = Annotated[
    Path | None,
    typer.Option("--schema", metavar="FILE", help="A JSON schema that the answer follows; nothing but JSON is said."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", autocompletion=among("auto", "cpu", "cuda"))]
Dtype = Annotated[
    str, typer.Option(help="auto, bfloat16 or float32.", autocompletion=among("auto", "bfloat16", "float32"))
]
# Read as text, so that what is no number is answered in one line too.
Threads = Annotated[str | None, typer.Option(metavar="N", help="CPU threads.", show_default="all cores")]
KV = Annotated[
    str,
    typer.Option(
        help="Cache of keys and values: float, int8, or auto (int8 where it would not fit).",
        autocompletion=among("auto", "float", "int8"),
    ),
]
GpuMemory = Annotated[
    str | None, typer.Option(help="What may be used of each GPU, such as 8GiB.", show_default="what is free")
]
Ram = Annotated[
    str | None,
    typer.Option(help="What may be held in RAM, such as 3GiB; the rest streams.", show_default="what is free"),
]
# Read as text, so that what is no number is answered in one line too.
Context = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens to have memory for.", show_default="8192 with a budget")
]
Speculate = Annotated[
    str,
    typer.Option(
        metavar="auto|off|N",
        help="Guess up to N (1 to 15) tokens and verify them in one step; auto: where answers stay what they are.",
        autocompletion=among("auto", "off"),
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A small model of the same family that guesses what the large one says.",
        show_default="none",
    ),
]
Parallel = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Answers computed at once.", show_default="4 on a CPU, 1 with a GPU"),
]
KeepPrefixes = Annotated[
    str | None,
    typer.Option(
        metavar="[SIZE]",
        help="Keep what is computed for prompts in a folder (which tells what was said) and read it after a restart.",
        show_default="off; SIZE is 4GiB",
    ),
]
JsonObject = Annotated[bool, typer.Option("--json", help="Stdout is one JSON object.")]


def loras(lora: list[str] | None, modules: list[str] | None = None) -> Loras:
    """The adapters that are asked for. Raises ConfigError."""
    from glm4lite.checkpoint.lora.folder import Loras

    return Loras.of(lora, modules)


def thinking_budget(think: str | None) -> int | None:
    """Tokens of the longest thought; None: not said. Raises ConfigError."""
    if think is None or think == "off":
        return None if think is None else 0
    if not think.isascii() or not think.isdecimal() or len(think) > 9:
        raise ConfigError(f"--think is {think[:50]!r}; use off, or a number of tokens")
    return int(think)


def with_sizes(arguments: list[str]) -> list[str]:
    """Arguments in which --keep-prefixes has a value: its SIZE may be left out, which no option of typer's can."""
    given = list[str]()
    for number, argument in enumerate(arguments):
        if argument == "--":
            return given + arguments[number:]
        after = arguments[number + 1] if number + 1 < len(arguments) else ""
        alone = argument == "--keep-prefixes" and not _LIKE_A_SIZE.fullmatch(after)
        given.append(f"{argument}=4GiB" if alone else argument)
    return given


def schema_of(file: Path | None) -> Schema | None:
    """The JSON schema of a file; SchemaError where it holds none."""
    from glm4lite.base.errors import SchemaError
    from glm4lite.base.files import read_json
    from glm4lite.text.grammar import checked_schema

    return None if file is None else checked_schema(read_json(file, SchemaError))


def use_threads(count: str | None) -> None:
    """Threads of torch and of the kernels; what this machine does not have is refused, also in the environment."""
    from glm4lite_quant.kernels import native
    from glm4lite_quant.kernels.picking import check_environment

    check_environment()
    if (number := thread_count(count)) is not None:
        native.set_threads(number)


def thread_count(count: str | None) -> int | None:
    """What --threads asks for; ConfigError for what is no number."""
    if count is None:
        return None
    try:
        return int(count)
    except ValueError:
        raise ConfigError(f"--threads is {count[:100]!r}; use a whole number of at least 1") from None
