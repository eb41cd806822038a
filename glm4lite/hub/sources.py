"""Where a model is: the embedded one, a folder of the user's, one that `pull` made, or one downloaded."""

import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from glm4lite.base.errors import Glm4liteError, HubError
from glm4lite.base.events import Progress
from glm4lite.base.files import CONFIG
from glm4lite.base.sentences import Sentence
from glm4lite.hub.options import MODELSCOPE, HubOptions

logger = logging.getLogger("glm4lite")

NANO = "nano"
"""The name of the embedded checkpoint; a folder of that name is "./nano"."""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CHOICE = re.compile(r"[\w.+ -]+(/[\w.+ -]+)*", re.ASCII)
_LONGEST_ID = 96  # the Hub's rule, as the others of _is_repo_id
_HOW = Sentence("give a folder, a Hub repo id (organisation/name, for example zai-org/GLM-4-9B-0414), or nano")


def resolve(
    source: str | Path,
    progress: Callable[[Progress], None] | None = None,
    options: HubOptions = HubOptions(),
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint (of GGUF: the file); what is not on this machine is downloaded first (without
    `weights`: its small files).

    Raises:
        HubError: there is no such folder or repo, or it cannot be downloaded; the message says what to do.
    """
    found = locate(source)
    if isinstance(found, Path):
        asked = [name for name in ("revision", "force_download") if getattr(options, name) not in (None, False, "main")]
        if asked:
            logger.warning("%s is not used: %s is a folder of this machine", " and ".join(asked), found)
        return found / options.subfolder
    if is_url(found):
        from glm4lite.hub.urls import download_url

        return download_url(found, progress, options)
    from glm4lite.hub.download import OnlyGguf, download  # huggingface_hub takes a while to import
    from glm4lite.hub.gguf_files import download_gguf

    if is_choice(found):
        return download_gguf(found, progress, options)
    try:
        return download(found, progress, options, weights)
    except OnlyGguf:
        return download_gguf(found, progress, options)


def resolve_config(source: str | Path, options: HubOptions = HubOptions()) -> Path:
    """The folder that holds a checkpoint's config.json, of a Hub repo downloaded alone; of GGUF the file. HubError as
    `resolve`."""
    found = locate(source)
    if isinstance(found, Path) or is_url(found) or is_choice(found):
        return resolve(source, None, options)
    from glm4lite.hub.download import OnlyGguf, download_config  # huggingface_hub takes a while to import

    try:
        return download_config(found, options)
    except OnlyGguf:
        return resolve(source, None, options)


def resolve_adapter(
    source: str | Path, progress: Callable[[Progress], None] | None = None, options: HubOptions = HubOptions()
) -> Path:
    """The folder of a LoRA adapter; one that is not on this machine is downloaded.

    Raises:
        HubError: there is no such folder or repo, or it cannot be downloaded.
    """
    folder = _existing(str(source)) if str(source).strip() else None
    if folder is not None:
        return folder
    if isinstance(source, Path) or not _is_repo_id(str(source).removeprefix(MODELSCOPE)):
        raise HubError(
            "{name} is neither a folder nor a Hub repo id; give the folder of an adapter", name=repr(_cut(str(source)))
        )
    _check_environment()
    from glm4lite.hub.download import download_adapter  # huggingface_hub takes a while to import

    return download_adapter(str(source), progress, options)


def locate(source: str | Path) -> Path | str:
    """The folder of a checkpoint; or what is not looked for yet: the id of a Hub repo, `ms:` and that of one of
    ModelScope, either with `:` and which of its GGUF files is meant, or the URL of a file. A short name becomes the id
    that it stands for.

    Raises:
        HubError: there is no such folder, and it is no repo's id; or the environment says nonsense about the Hub.
    """
    if source == NANO:
        return nano_folder()
    text = str(source)
    if not text.strip():
        raise HubError("the model's name is empty; {how}", how=_HOW)
    folder = _existing(text)
    if folder is not None:
        return folder
    if is_url(text) and not isinstance(source, Path):
        _check_environment()
        return text
    named = None if isinstance(source, Path) else _named(text)
    if named is not None:
        return named
    if isinstance(source, Path) or _looks_like_a_path(text):
        raise HubError("{name} does not exist; {how}", name=_cut(text), how=_HOW)
    if not _is_repo_id(text.removeprefix(MODELSCOPE).partition(":")[0]):
        raise HubError("{name} is neither a folder nor a Hub repo id; {how}", name=repr(_cut(text)), how=_HOW)
    _check_environment()
    return text


def is_url(text: str) -> bool:
    """Whether it is the address of a file, and not a name."""
    return text.startswith(("https://", "http://"))


def is_choice(text: str) -> bool:
    """Whether a repo's name says which of its GGUF files is meant."""
    return ":" in text.removeprefix(MODELSCOPE) and not is_url(text)


def _named(text: str) -> Path | str | None:
    """What a short name stands for: a model that `pull --quant` made, or a known one's repo."""
    from glm4lite.base.user_folder import models_folder
    from glm4lite.hub.known import known

    if "/" in text or "\\" in text or text.startswith((".", "~")):
        return None
    with suppress(Glm4liteError, OSError):
        made = models_folder() / text
        if (made / CONFIG).exists():
            return made
    found = known(text)
    return None if found is None else found.repo_id


def _check_environment() -> None:
    """huggingface_hub and its client fail over these without a word about which it was, some when they are imported."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        value = os.environ.get(name)
        if value is not None and not value.strip().isdecimal():
            raise HubError(f"{name} is {value[:100]!r}; use a whole number of seconds")
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        value = os.environ.get(name)
        if value and not os.access(value, os.R_OK):
            raise HubError(f"{name} is {value[:100]!r}, which cannot be read; correct it or unset it")
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is not None and not _is_url(endpoint):
        raise HubError(f"HF_ENDPOINT is {endpoint[:100]!r}; use a URL such as https://huggingface.co, or unset it")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _existing(text: str) -> Path | None:
    """The folder of that name, None where there is none; HubError for a file or what cannot be looked at."""
    try:
        path = Path(text).expanduser()
        if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
            return path
        exists = path.exists()
    except RuntimeError:  # "~name" of a user who does not exist
        return None
    except OSError as error:
        raise HubError(
            "{name} cannot be opened ({problem}); {how}", name=_cut(text), problem=error.strerror or error, how=_HOW
        ) from None
    if exists:
        raise HubError("{path} is a file; give the folder that holds config.json and the safetensors files", path=path)
    return None


def nano_folder() -> Path:
    """The embedded checkpoint's folder.

    Raises:
        HubError: the package was installed without it.
    """
    folder = Path(str(resources.files("glm4lite").joinpath(NANO)))
    if not (folder / "config.json").exists():
        raise HubError(f"the embedded checkpoint is not in {folder}; install glm4lite again, or name another model")
    return folder


def _looks_like_a_path(text: str) -> bool:
    repo, colon, choice = text.removeprefix(MODELSCOPE).partition(":")
    if text.startswith((".", "/", "~")) or "\\" in text or text.endswith("/") or repo.count("/") > 1:
        return True
    return bool(colon) and not (_is_repo_id(repo) and _CHOICE.fullmatch(choice))


def _is_repo_id(text: str) -> bool:
    fits = len(text) <= _LONGEST_ID and _REPO_ID.fullmatch(text) is not None
    return fits and ".." not in text and "--" not in text and not text.endswith((".git", "-", "."))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_ID else f"{text[:_LONGEST_ID]}..."
