"""Small files of what a user chose: a dataclass as JSON, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from glm4lite.base.errors import Glm4liteError
from glm4lite_ui.saved.store import write_whole

FORMAT = 1
_LARGEST = 8 << 20  # bytes


def read_kept(path: Path, adapter: TypeAdapter[Any]) -> Any:
    """FileNotFoundError, or ValueError in one line for what cannot be read."""
    try:
        if not path.exists():
            raise FileNotFoundError
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ValueError(f"it is no file of at most {_LARGEST >> 20} MiB")
        data = json.loads(path.read_bytes())
        json.dumps(data, ensure_ascii=False).encode()  # refuses half a sign
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError("a newer glm4lite wrote it, or it is damaged")
        return adapter.validate_python(data)
    except FileNotFoundError:
        raise
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0]) from None


def keep(path: Path, data: Any) -> None:
    """Writes a dataclass, in a folder that is made where there is none. Raises Glm4liteError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise Glm4liteError(f"{path.parent}: nothing can be kept here: {error.strerror}") from None
    text = json.dumps({"format": FORMAT, **asdict(data)}, ensure_ascii=False, indent=1)
    write_whole(path, text.encode("utf-8", "replace"), path.name)
