"""A repo's shards as they are needed: fetched into a folder, read from there, and dropped behind the last use.

So a checkpoint of 19 GB is quantized with one of its shards on the disk at a time. What the next layer needs of a shard
(a layer's tensors may lie in two) is kept when the next one comes: the file is replaced by one that has the same bytes
at the same places, and holes where nothing is needed any more. While one shard is quantized the next is fetched, as far
as there is room for it: the disk never holds more than the whole result and the largest shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from glm4lite.base.errors import CheckpointError, HubError
from glm4lite.base.files import COMPANIONS, CONFIG, INDEX, read_json, some
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.base.whole_file import replace
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.remote import headers_of
from glm4lite.checkpoint.shard import read_header
from glm4lite.hub.arriving import Arriving
from glm4lite.hub.download import Snapshot, check_disk
from glm4lite.hub.transfer import Transfer, Wanted
from glm4lite.memory.system import booted

_COPY_BYTES = 4 << 20
_CLOCK_S = 5.0  # the time of the start is counted back from now


class Arrivals:
    """The shards of one commit.

    Example::

        arrivals = Arrivals(snapshot)
        checkpoint = arrivals.checkpoint(folder)       # nothing of the weights is there yet
        arrivals.bring(["lm_head.weight"], later=[])   # now its shard is
    """

    def __init__(self, snapshot: Snapshot) -> None:
        """Fetches the small files, which lie in the cache from then on, and the shards' headers. HubError."""
        self._snapshot = snapshot
        snapshot.bring([name for name in (CONFIG, *COMPANIONS, INDEX) if name in snapshot.repo.files])
        self._headers = headers_of(snapshot)
        self._folder = Path()
        self._ahead: tuple[Path, Transfer] | None = None

    @property
    def identity(self) -> str:
        """What tells that two runs are of the same weights."""
        files = self._snapshot.repo.files
        return repr([(name, files[name].size, sorted(files[name].digests)) for name in sorted(self._headers)])

    @property
    def largest(self) -> int:
        """Bytes of the largest shard."""
        return max(self._snapshot.repo.files[name].size for name in self._headers)

    def checkpoint(self, folder: Path) -> Checkpoint:
        """The checkpoint whose shards will come into `folder`; its small files are the cache's."""
        self._folder = folder
        tensors: dict[str, StoredTensor] = {}
        for file, header in self._headers.items():
            tensors |= {name: stored.at(folder / file) for name, stored in header.items()}
        return Checkpoint.of(self._snapshot.folder, read_json(self._snapshot.folder / CONFIG), tensors)

    def begin(self) -> None:
        """Removes shards of an earlier run that may not have reached the disk before the machine was switched off.

        They are not synced: most are dropped before they would be written at all.
        """
        note, now = self._folder / "boot", booted()
        try:
            before = float(note.read_text(encoding="ascii"))
        except (OSError, ValueError):
            before = 0.0
        if abs(now - before) > _CLOCK_S:
            for path in self._folder.glob("*.safetensors*"):
                path.unlink()
        note.write_text(f"{now}", encoding="ascii")

    def bring(self, checkpoint: Checkpoint, names: Iterable[str], later: Sequence[str]) -> None:
        """Fetches the shards that hold `names` and are not here; `later`: what will be needed after these.

        Raises:
            HubError: one cannot be fetched, is not what its header said, or there is no room for it.
        """
        names = list(names)
        for file in sorted(_files(checkpoint, names)):
            ahead = self._ahead
            if ahead is None or ahead[0] != file:
                if not file.exists():
                    self._make_room(checkpoint, [*names, *later])
                    self._fetch(file)
                continue
            self._make_room(checkpoint, [*names, *later])
            self._ahead = None
            self._snapshot.finish(ahead[1])

    def look_ahead(self, checkpoint: Checkpoint, later: Sequence[str], written: Callable[[str], int]) -> None:
        """Begins to fetch the next shard, beside what is done with those that are here.

        later: what will be needed, in order. written: how many bytes are made of one of them.
        """
        if self._ahead is not None:
            return
        lacking = ((at, file) for at, name in enumerate(later) for file in sorted(_files(checkpoint, [name])))
        place, path = next(((at, file) for at, file in lacking if not file.exists()), (0, None))
        if path is None:
            return
        here = sum(one.stat().st_size for one in self._here() if not one.is_symlink())
        room = self.largest - here + sum(map(written, later[place:]))
        if room > 0 and not (self._snapshot.folder / path.name).exists():
            self._ahead = path, self._snapshot.begin([self._snapshot.wanted(path.name, path)], self._arrived, room)

    def stop(self) -> None:
        """What is being fetched is left to the next run."""
        if self._ahead is not None:
            self._ahead[1].stop()
            self._ahead = None

    def drop(self, checkpoint: Checkpoint, later: Iterable[str]) -> None:
        """Removes the shards of which nothing is needed any more."""
        needed = _files(checkpoint, later)
        for path in self._here():
            if path not in needed:
                checkpoint.release(path)
                path.unlink()

    def _here(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))

    def _make_room(self, checkpoint: Checkpoint, needed: Sequence[str]) -> None:
        for path in self._here():
            kept = [part for name in needed for part in checkpoint.parts(name) if part.path == path]
            if not kept:
                checkpoint.release(path)
                path.unlink()
            elif 2 * sum(one.nbytes for one in kept) <= path.stat().st_size:  # else there is little to gain
                checkpoint.release(path)
                _thin(path, kept)

    def _fetch(self, path: Path) -> None:
        snapshot, name = self._snapshot, path.name
        if (snapshot.folder / name).exists() and not snapshot.damaged([name]):
            try:
                path.symlink_to((snapshot.folder / name).resolve())
                return
            except (OSError, NotImplementedError):
                pass  # a system without links: it is fetched
        wanted = snapshot.wanted(name, path)
        check_disk(f"{name} of {snapshot.repo.repo_id}", [wanted], path.parent, "choose another folder")
        snapshot.fetch([wanted], self._arrived)

    def _arrived(self, wanted: Wanted, arriving: Arriving) -> None:
        """A shard is what its beginning, by which all was planned, said that it would be."""
        try:
            found = read_header(arriving.path)
        except CheckpointError as error:
            arriving.discard()
            raise HubError(f"{wanted.whose} is damaged where it comes from: {error}") from None
        planned = self._headers[wanted.name]
        other = [name for name in {*found, *planned} if _place(found.get(name)) != _place(planned.get(name))]
        if other:
            arriving.discard()
            raise HubError(f"{wanted.whose}: {wanted.name} has another header than a moment ago ({some(other)})")
        arriving.publish(wanted.target)


def _files(checkpoint: Checkpoint, names: Iterable[str]) -> set[Path]:
    """The shards that hold these tensors, of which another tool's may consist of several in several shards."""
    return {part.path for name in names for part in checkpoint.parts(name)}


def _place(stored: StoredTensor | None) -> object:
    return None if stored is None else (stored.dtype, stored.shape, stored.offset)


def _thin(path: Path, kept: Sequence[StoredTensor]) -> None:
    """Replaces a shard by one that holds these tensors alone, at the same places."""
    thinner, size = path.with_name(f"{path.name}.thin"), path.stat().st_size
    with path.open("rb") as source, thinner.open("wb") as target:
        for one in kept:
            source.seek(one.offset)
            target.seek(one.offset)
            left = one.nbytes
            while left and (data := source.read(min(left, _COPY_BYTES))):
                target.write(data)
                left -= len(data)
        target.truncate(size)
    replace(thinner, path)
