"""The headers of a Hub repo's safetensors, by HTTP range requests: what a model needs is known before it is downloaded.

Fetched are config.json, the index and the first bytes of each shard; the first two land in huggingface_hub's cache.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if os.environ.get("HF_ENDPOINT") and "huggingface_hub" not in sys.modules:
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # as in download.py

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from glm4lite.checkpoint import Checkpoint
from glm4lite.errors import CheckpointError, HubError, one_line
from glm4lite.weights.download import check_files, explained, listing
from glm4lite.weights.files import CONFIG, read_json
from glm4lite.weights.shard import StoredTensor, tensors_of


def remote_headers(repo_id: str) -> Checkpoint:
    """A checkpoint whose names, shapes and types are known, but whose tensors cannot be read.

    Where the repo lies wholly in the cache, that is opened and the Hub is not asked.

    Raises:
        HubError: the repo does not exist, is gated, holds no safetensors, or cannot be reached.
        CheckpointError: a shard's header contradicts itself.
    """
    cached = _cached(repo_id)
    if cached is not None:
        return cached
    with explained(repo_id), _without_bars():
        check_files(repo_id, listing(repo_id))
        config = read_json(Path(hf_hub_download(repo_id, CONFIG)))
        try:
            found = HfApi().get_safetensors_metadata(repo_id).files_metadata
        except (NotASafetensorsRepoError, SafetensorsParsingError, TypeError, ValueError, AttributeError) as error:
            # the last three: its parser checks no types
            raise HubError(f"{repo_id} has no usable safetensors headers ({one_line(error)[:200]})") from None
    tensors: dict[str, StoredTensor] = {}
    for file, metadata in sorted(found.items()):
        entries = {
            name: {"dtype": str(info.dtype), "shape": info.shape, "data_offsets": list(info.data_offsets)}
            for name, info in metadata.tensors.items()
        }
        tensors |= tensors_of(Path(repo_id, file), entries)
    return Checkpoint.of(Path(repo_id), config, tensors)


def _cached(repo_id: str) -> Checkpoint | None:
    """The repo as it lies in the cache, None where parts are missing."""
    config = try_to_load_from_cache(repo_id, CONFIG)
    if not isinstance(config, str):
        return None
    try:
        return Checkpoint.open(Path(config).parent)
    except CheckpointError:
        return None


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub would draw bars of its own."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
