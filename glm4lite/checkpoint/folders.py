"""What a folder is that is no checkpoint: an adapter, another format, half a download, the folder above one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from glm4lite.base.errors import ConfigError
from glm4lite.base.files import CONFIG, INDEX, SINGLE, UNREADABLE, names_in, read_json, some

ADAPTER = "adapter_config.json"

_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp")
_SAVING = ".save.partial-"  # how the folder begins in which a save's files are before they take their places
_CACHED = "models--"  # how huggingface_hub begins a repository's folder in its cache


def other_weights(folder: Path) -> str | None:
    """One sentence on the adapter, or the weights of another format, that a folder holds instead of a model."""
    if os.path.lexists(folder / ADAPTER):
        return _adapter(folder)
    other = [name for name in names_in(folder) if Path(name).suffix in UNREADABLE]
    if not other:
        return None
    kind = UNREADABLE[Path(other[0]).suffix]
    why = " (which can run code when opened)" if kind == "pickle" else ""
    return (
        f"{folder} holds only {kind} weights{why}: {some(other[:1])}; use the model's safetensors version, "
        "or convert it with transformers' save_pretrained on a machine where you trust it"
    )


def unfinished(folder: Path) -> str | None:
    """The name of a file that a download left before its end, beside the others or where huggingface_hub keeps it."""
    places = [folder, folder / ".cache/huggingface/download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    return next((name for place in places for name in names_in(place) if name.endswith(_UNFINISHED)), None)


def described(folder: Path) -> str | None:
    """One sentence on a folder that lacks its config.json or weights, with what to do; None where nothing is known."""
    saving = next((name for name in names_in(folder) if name.startswith(_SAVING)), None)
    if saving is not None:
        before = folder / saving / "replaced"
        return f"a save into {folder} was not finished; save the model again (what was there before is in {before})"
    if os.path.lexists(folder / "training_args.bin") and not os.path.lexists(folder / CONFIG):
        return (
            f"{folder} holds weights, but no {CONFIG}, as Transformers' Trainer leaves them of a model that is not its "
            f"own: write it with model.config.save_pretrained(folder), or the whole model with save_pretrained"
        )
    other = other_weights(folder)
    if other is not None:
        return other
    partial = unfinished(folder)
    if partial is not None:
        return f"{folder} holds a download that was not finished ({some([partial])}); download it again"
    shards = [name for name in names_in(folder) if name.endswith(".safetensors")]
    if shards and not any(os.path.lexists(folder / name) for name in (INDEX, SINGLE)):
        if len(shards) == 1:
            return f"{folder} holds {some(shards)}, but a file of all weights is read as {SINGLE}; rename it"
        return f"{folder} lacks {INDEX}, which tells what lies in {some(shards)}; download it too"
    return None if (folder / CONFIG).exists() else _above(folder)


def _adapter(folder: Path) -> str:
    try:
        fields = read_json(folder / ADAPTER)
    except ConfigError:
        fields = {}
    base, kind = fields.get("base_model_name_or_path"), fields.get("peft_type", "LORA")
    of = some([base]) if isinstance(base, str) and base else "another model"
    if kind != "LORA":
        merged = "PeftModel.from_pretrained(model, folder).merge_and_unload() and save_pretrained"
        return (
            f"{folder} holds a {some([str(kind)])} adapter of {of}, not a model; merge it into that one first, with "
            f"peft's {merged}, and give the folder saved"
        )
    return f"{folder} holds a LoRA adapter of {of}, not a model; give that model, and the adapter as --lora {folder}"


def _above(folder: Path) -> str | None:
    """Where the checkpoints are that lie in a folder's folders, those of huggingface_hub's cache among them."""
    repos = [_repo_id(name) for name in names_in(folder) if name.startswith(_CACHED)]
    if repos:
        return f"{folder} is a cache of the Hub's models; give the id of one: {some(repos)}"
    inside = list(_checkpoints(folder))
    if folder.name.startswith(_CACHED):
        copies = f", or {inside[0]}" if inside else ""
        return f"{folder} is the Hub cache's folder of {_repo_id(folder.name)}; give that id{copies}"
    if inside:
        found = some([str(path) for path in inside])
        return f"{folder} is no checkpoint itself, but {found} may be; give such a folder"
    return None


def _repo_id(name: str) -> str:
    return name.removeprefix(_CACHED).replace("--", "/")


def _checkpoints(folder: Path) -> Iterator[Path]:
    places = [folder / "snapshots", folder] if folder.name.startswith(_CACHED) else [folder]
    for place in places:
        for name in names_in(place):
            if any((place / name / file).exists() for file in (CONFIG, ADAPTER)):
                yield place / name
