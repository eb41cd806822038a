"""What is wrong with the tensors that a script passes: one sentence each, "" where nothing is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensor_problem(name: str, value: Any) -> str:
    """Lists and arrays are refused: whoever passes them means a device and a type that they do not say."""
    if isinstance(value, Tensor):
        return ""
    what = f"{name} must be a torch tensor, found {type(value).__name__}"
    if isinstance(value, list | tuple) or hasattr(value, "__array__"):
        return f"{what}; make one with torch.tensor"
    if isinstance(value, str):
        return f"{what}; a tokenizer makes one of a text"
    return f"{what}; write **inputs for what a tokenizer returned" if hasattr(value, "keys") else what


def ids_problem(ids: Tensor, vocab_size: int) -> str:
    """Of token ids, which are [B, T]."""
    if problem := tensor_problem("input_ids", ids):
        return problem
    if ids.dim() != 2:
        return f"input_ids must be [batch, tokens], found a tensor of shape {list(ids.shape)}"
    if not _whole(ids):
        return f"input_ids must be whole numbers, found {ids.dtype}"
    if not ids.numel():
        return f"input_ids holds no tokens: its shape is {list(ids.shape)}"
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        return f"input_ids holds {low if low < 0 else high}; this model's ids are 0 to {vocab_size - 1}"
    return ""


def embeds_problem(embeds: Tensor, hidden: int, dtype: torch.dtype) -> str:
    """Of vectors in place of ids: [B, T, hidden], in the model's type."""
    if problem := tensor_problem("inputs_embeds", embeds):
        return problem
    shape = list(embeds.shape)
    if len(shape) != 3 or shape[2] != hidden or not embeds.numel():
        return f"inputs_embeds must be [batch, tokens, {hidden}], found a tensor of shape {shape}"
    casts = embeds.is_floating_point() and torch.is_autocast_enabled(embeds.device.type)
    if embeds.dtype != dtype and not casts:
        return f"inputs_embeds is {embeds.dtype}, the model {dtype}; give inputs_embeds.to(model.dtype)"
    return ""


def beside_problem(embeds: Tensor, positions: Tensor | None, mask: Tensor | None, past: int, heads: int) -> str:
    """Of positions [B or 1, T] and of a mask [B, past + T] or [B or 1, heads or 1, T, past + T]."""
    batch, length = embeds.shape[:2]
    if positions is not None:
        if problem := tensor_problem("position_ids", positions):
            return problem
        if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != length:
            return f"position_ids must be [{batch} or 1, {length}], found {list(positions.shape)}"
    if mask is None:
        return ""
    if problem := tensor_problem("attention_mask", mask):
        return problem
    shape, total = list(mask.shape), past + length
    beside = f" ({past} tokens of the cache and {length} new ones)" if past else ""
    if mask.dim() != 4:
        return "" if shape == [batch, total] else f"attention_mask must be [{batch}, {total}]{beside}, found {shape}"
    if shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] not in (1, length) or shape[3] != total:
        return f"attention_mask must be [{batch} or 1, {heads} or 1, {length}, {total}]{beside}, found {shape}"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"a 4-D attention_mask is bool (true: seen) or a float that is added to scores, found {mask.dtype}"
    return ""


def keep_problem(keep: int | Tensor, length: int) -> str:
    """Of logits_to_keep, for so many positions."""
    if isinstance(keep, int):
        return "" if keep >= 0 else f"logits_to_keep must be 0 (all) or more, found {keep}"
    if not isinstance(keep, Tensor) or keep.dim() != 1 or not _whole(keep):
        found = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        return f"logits_to_keep must be a number or a 1-D tensor of positions, found {found}"
    if keep.numel() and not -length <= int(keep.min()) <= int(keep.max()) < length:
        return f"logits_to_keep names position {int(keep.abs().max())}; the input has {length}"
    return ""


def labels_problem(labels: Tensor, shape: Iterable[int], classes: int) -> str:
    """Of labels that are numbers of classes; -100 does not count."""
    if problem := tensor_problem("labels", labels):
        return problem
    if list(labels.shape) != list(shape):
        return f"labels must have the shape {list(shape)}, found {list(labels.shape)}"
    if not _whole(labels):
        return f"labels must be whole numbers, found {labels.dtype}"
    labels = labels.long()
    counted = labels[labels != -100]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        wrong = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
        return f"labels holds {wrong}; classes are 0 to {classes - 1}, and -100 for what does not count"
    return ""


def _whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
