"""What a user did or has that cannot work. The command line prints the message on one line and exits with 2."""

import difflib
import reprlib
from collections.abc import Iterable

from glm4lite.base.sentences import Sentence

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 76


class Glm4liteError(Exception):
    """Base of every error a user can cause: one line naming the thing, what was found and what to do.

    raise Glm4liteError("{name} is larger than {size} MiB", name=name, size=64)   # of the page, in any language
    raise Glm4liteError(f"{name}: tensor {tensor} is missing")                    # in English alone
    """

    def __init__(self, *said: object, **values: object) -> None:
        super().__init__(*([Sentence(str(said[0]), **values)] if values else said))


def said_by(error: BaseException) -> Sentence:
    """What an error says, its kind where that is nothing; of another library's error one line of 500 characters."""
    said = error.args[0] if len(error.args) == 1 else None
    return said if isinstance(said, Sentence) else Sentence(one_line(error, 500) or type(error).__name__)


def one_line(text: object, most: int | None = None) -> str:
    """Any text (another library's error, say) as one printable line, for a message; of a long one the first `most`."""
    try:
        written = str(text)
    except Exception:  # an error of somebody's code may not even tell itself
        written = f"({type(text).__name__} without text)"
    line = " ".join(written[:most].encode("utf-8", "replace").decode("utf-8").split())
    return line if line.isprintable() else "".join(letter if letter.isprintable() else "\ufffd" for letter in line)


def shown(value: object) -> str:
    """A value of any size for a message: one line of 80 characters, for which only its beginning is read."""
    text = one_line(_SHORT.repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence about an argument or a setting that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, [*known], 1)
    return f"{what} knows no {shown(name)}" + (f"; did you mean {near[0]!r}?" if near else "")


class ConfigError(Glm4liteError):
    """config.json (or an argument of the same name) is missing something or holds what cannot be used."""


class CheckpointError(Glm4liteError):
    """A checkpoint folder, shard or tensor is missing, corrupt or does not fit the model."""


class HubError(Glm4liteError):
    """A model could not be found or downloaded."""


class TokenizerError(Glm4liteError, ValueError):
    """A tokenizer was asked for what it cannot do, or was given what it cannot read."""


class TemplateError(Glm4liteError):
    """A chat template is missing, raised, or did not finish."""


class ToolError(Glm4liteError):
    """A tool was declared wrongly, or says that it cannot do what it was asked."""


class ContextLengthError(Glm4liteError):
    """A prompt does not fit the model's context; raised before any work."""


class DeviceError(Glm4liteError):
    """A GPU failed, or memory ran out, while the model computed. What was computed before is kept."""


class ModelError(Glm4liteError):
    """A model computes no numbers, so there is no next token."""


class SamplingError(Glm4liteError):
    """A sampling parameter is out of range."""


class SchemaError(Glm4liteError):
    """An answer cannot be held to a JSON schema, or what it was held to cannot be read."""


class BenchmarkError(Glm4liteError):
    """What was asked to be measured cannot be."""


class EvaluationError(Glm4liteError):
    """A text cannot be used to evaluate a model, or two models cannot be compared."""


class WorkerClosed(Glm4liteError):
    """The program is ending: the model answers nothing more."""


class NoModel(Glm4liteError):
    """The model was unloaded: nothing can be computed until one is loaded."""

    def __init__(self) -> None:
        super().__init__("no model is loaded; load one first")


class ModelReplaced(Glm4liteError):
    """Another model was loaded between a prompt's tokens and their turn: they mean nothing to it."""

    def __init__(self) -> None:
        super().__init__("another model was loaded meanwhile; ask again")


class QueueFull(Glm4liteError):
    """More questions wait for the model than it takes; `retry_after` is in how many seconds to ask again."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            "{waiting} requests wait for the model already; try again in {seconds} s",
            waiting=waiting,
            seconds=retry_after,
        )
        self.retry_after = retry_after
