"""Failures of a library that is written in Rust (tokenizers): bare Exceptions, and panics, which are no Exceptions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from glm4lite.base.errors import CheckpointError, one_line

_PANIC = "PanicException"
"""The name of the BaseException that a panic becomes; the class itself cannot be imported."""


def named_errors(origin: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function returns; CheckpointError naming the file `origin` where it fails or panics."""
    try:
        return function(*arguments, **options)
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        why = one_line(error)[:200] or type(error).__name__
    raise CheckpointError(f"{origin}: cannot be read as a tokenizer, or not used as one ({why}); download it again")


@contextmanager
def panic_reports_hidden() -> Iterator[None]:
    """Around what may panic, while a model is loaded: Rust prints a report, pages long, before Python sees the error.

    stderr goes to a file meanwhile; what others wrote there is written out where nothing failed. Not for more than a
    moment, and not while a model answers: a process that is started then would keep that file as its stderr.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as reports:
        os.dup2(reports.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        reports.seek(0)
        if written := reports.read():
            os.write(2, written)
