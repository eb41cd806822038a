"""What the command line settles first: the encoding, the streams, the width of the screen, other packages' warnings."""

from __future__ import annotations

import os
import re
import sys
import warnings

from glm4lite.base.errors import ConfigError, one_line
from glm4lite.cli.streams import settle_streams

MIN_COLUMNS = 20  # less is no screen but a container's or a build's idea of one


def settle() -> None:
    """Called before any work. Raises ConfigError where nothing can work, and for an argument that is not UTF-8."""
    _speak_utf8()
    settle_streams()
    _settle_width()
    _check_folder()
    if "error" in "".join(sys.warnoptions):  # PYTHONWARNINGS=error: other packages' warnings end no chat
        warnings.simplefilter("default")
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = one_line(argument)[:100]
            raise ConfigError(f"the argument {shown!r} is not UTF-8; glm4lite takes no other text") from None


def _check_folder() -> None:
    """Libraries fail in words of their own where the current folder was deleted."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the current folder cannot be used ({error.strerror}); change to another (cd)") from error


def _speak_utf8() -> None:
    """Begins anew in Python's UTF-8 mode where it was switched off and the locale knows ASCII alone.

    Texts and names on the command line, files and pipes are UTF-8 here; nothing less than a new start makes them so.
    """
    if sys.platform != "win32" and sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        environment = {**os.environ, "PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _settle_width() -> None:
    """rich and typer draw nothing on a screen of no width, and stop at a width that is no number."""
    for name in ("COLUMNS", "TERMINAL_WIDTH", "LINES"):
        value = os.environ.get(name, str(MIN_COLUMNS))
        if not re.fullmatch("[0-9]{1,4}", value) or int(value) < MIN_COLUMNS:
            del os.environ[name]
    if "COLUMNS" not in os.environ and _terminal_columns() < MIN_COLUMNS:
        os.environ["COLUMNS"] = "80"


def _terminal_columns() -> int:
    for number in (2, 1, 0):
        try:
            return os.get_terminal_size(number).columns
        except OSError:
            continue
    return MIN_COLUMNS
