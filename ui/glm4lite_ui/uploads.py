"""Files that a page may name: those it uploaded itself."""

from __future__ import annotations

import os
from pathlib import Path

from glm4lite.errors import Glm4liteError


def uploaded(path: str | Path) -> Path:
    """The path of an upload; Glm4liteError for any other path, whoever names it."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if not Path(path).resolve().is_relative_to(folder):
        raise Glm4liteError("this file was not uploaded")
    return Path(path)
