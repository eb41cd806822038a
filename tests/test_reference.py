"""The API reference: whatever is public says what it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module

import pytest

import glm4lite
import glm4lite_quant

PUBLIC = [(module, name) for module in (glm4lite, glm4lite_quant) for name in module.__all__ if name[0] != "_"]
EVENTS = [
    (import_module("glm4lite.base.events"), name) for name in ("TextDelta", "ToolCallStarted", "Progress", "Done")
]


def documented(value: object) -> Iterator[tuple[str, object]]:
    """The value, and of a class all that a user may call or read and that is this project's."""
    yield "", value
    if not inspect.isclass(value):
        return
    for name in dir(value):
        member = inspect.getattr_static(value, name)
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(member) and member.__module__.startswith("glm4lite"):
            yield name, getattr(value, name)


@pytest.mark.parametrize(("module", "name"), PUBLIC + EVENTS, ids=lambda part: getattr(part, "__name__", part))
def test_a_public_name_and_its_methods_have_docstrings(module: object, name: str) -> None:
    silent = [member or name for member, value in documented(getattr(module, name)) if not inspect.getdoc(value)]
    assert not silent, f"{name}: no docstring of {', '.join(silent)}"
