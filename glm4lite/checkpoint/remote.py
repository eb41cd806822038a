"""The headers of a Hub repo's safetensors, by HTTP range requests: what a model needs is known before it is downloaded.

Fetched are config.json, the index and the first bytes of each shard; the first two land in huggingface_hub's cache.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from glm4lite.base.errors import CheckpointError, HubError
from glm4lite.base.files import CONFIG, INDEX, read_json
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.shard import header_entries, header_length, tensors_of
from glm4lite.hub.client import beginning, explained
from glm4lite.hub.download import Snapshot, whole_in_cache
from glm4lite.hub.options import HubOptions
from glm4lite.hub.patience import asked

_USUALLY_ENOUGH = 100_000
_AT_ONCE = 8


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
    snapshot = Snapshot.of(repo_id, HubOptions())
    snapshot.bring([name for name in (CONFIG, INDEX) if name in snapshot.repo.files])
    tensors: dict[str, StoredTensor] = {}
    for found in headers_of(snapshot).values():
        tensors |= found
    return Checkpoint.of(Path(repo_id), read_json(snapshot.folder / CONFIG), tensors)


def headers_of(snapshot: Snapshot) -> dict[str, dict[str, StoredTensor]]:
    """Shard -> its tensors, each at its place in the file. HubError, CheckpointError."""
    files = snapshot.weights()
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return dict(zip(files, threads.map(lambda file: _header(snapshot, file), files), strict=True))


def _header(snapshot: Snapshot, file: str) -> dict[str, StoredTensor]:
    repo_id, path = snapshot.repo.repo_id, Path(snapshot.repo.repo_id, file)
    with explained(repo_id, snapshot.repo.host.address()):
        try:
            url, sent = snapshot.repo.url(file), snapshot.repo.headers()
            data = asked(lambda: beginning(url, sent, _USUALLY_ENOUGH))
            end = 8 + header_length(path, data)
            if end > len(data):
                data = asked(lambda: beginning(url, sent, end))
            return tensors_of(path, header_entries(path, data[8:end]), end)
        except CheckpointError as error:
            raise HubError(f"{repo_id} has no usable safetensors headers ({error})") from None


def _cached(repo_id: str) -> Checkpoint | None:
    """The repo as it lies in the cache, None where parts are missing or damaged."""
    with explained(repo_id):
        folder = whole_in_cache(repo_id, HubOptions())
    try:
        return None if folder is None else Checkpoint.open(folder)
    except CheckpointError:
        return None
