"""Packages that only a part of glm4lite needs: what to say where one of them is missing.

They come with the extras of pyproject.toml (`pip install 'glm4lite[ui]'`); all else works without them.
"""

from __future__ import annotations

from importlib.util import find_spec

from glm4lite.base.errors import Glm4liteError


class MissingPackageError(Glm4liteError, ImportError):
    """A part of glm4lite is used whose packages are not installed; the message says how to install them."""


def require(what: str, *packages: str, extra: str | None = None) -> None:
    """Looks whether the packages (names of imports) are installed, without importing them: that may take seconds.

    Args:
        what: What needs them, as the message says it: "the web chat".
        packages: Names of the packages as they are imported.
        extra: The extra of glm4lite that brings them; None where the packages are installed by their own names.

    Raises:
        MissingPackageError: Some are not there: "the web chat needs gradio: pip install 'glm4lite[ui]'".
    """
    missing = [package for package in packages if not _installed(package)]
    if missing:
        command = f"pip install 'glm4lite[{extra}]'" if extra else f"pip install {' '.join(missing)}"
        raise MissingPackageError(f"{what} needs {', '.join(missing)}: {command}")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # an import hook or an entry of sys.modules that refuses it
        return False
