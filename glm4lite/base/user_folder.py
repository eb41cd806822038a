"""Where this system keeps a program's data of one user."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from glm4lite.base.errors import Glm4liteError


def user_folder() -> Path:
    """The folder of glm4lite's data, which need not exist yet; Glm4liteError where the user has no home."""
    try:
        home = Path.home()
    except RuntimeError:
        raise Glm4liteError("this user has no home folder, so nothing can be kept") from None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "glm4lite"


def chats_folder() -> Path:
    """Where the terminal and the page keep chats: GLM4LITE_CHATS, else in the user's folder; Glm4liteError."""
    chosen = os.environ.get("GLM4LITE_CHATS")
    return Path(chosen) if chosen else user_folder() / "chats"


def prefixes_folder() -> Path:
    """Where `--keep-prefixes` keeps what was computed: GLM4LITE_PREFIXES, else in the user's folder; Glm4liteError."""
    chosen = os.environ.get("GLM4LITE_PREFIXES")
    return Path(chosen) if chosen else user_folder() / "prefixes"


def models_folder() -> Path:
    """Where `pull --quant` puts what it makes: GLM4LITE_MODELS, else in the user's folder; Glm4liteError."""
    chosen = os.environ.get("GLM4LITE_MODELS")
    return Path(chosen) if chosen else user_folder() / "models"


def indexes_folder() -> Path:
    """Where the text of folders is kept to be searched: GLM4LITE_INDEXES, else the user's cache; Glm4liteError.

    What is in it can be made again from the folders, so it may be deleted at any time.
    """
    chosen = os.environ.get("GLM4LITE_INDEXES")
    if chosen:
        return Path(chosen)
    data = user_folder()
    if sys.platform == "win32":
        return data / "cache" / "indexes"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "glm4lite" / "indexes"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm4lite" / "indexes"


def make_private(folder: Path) -> None:
    """The folder with those above it, for this user alone; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
