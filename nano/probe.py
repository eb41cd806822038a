"""A quick check while training: how many held-out turns are predicted without a mistake, teacher-forced."""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from glm4lite.pretrained.models import Glm4ForCausalLM
from nano import dialogues
from nano.render import IGNORED, Encoded, encode


@dataclass(frozen=True)
class Probe:
    """An encoded held-out dialogue and the category of each turn."""

    row: Encoded
    categories: tuple[str, ...]


def held_out(tokenizer: Tokenizer, count: int, seed: int = 1234) -> list[Probe]:
    """The held-out dialogues of the check."""
    rng = random.Random(f"probe {seed}")
    probes = []
    for _ in range(count):
        dialogue = dialogues.generate(rng, held_out=True)
        row = encode(tokenizer, dialogue, rng)
        probes.append(Probe(row, tuple(step.category for step in dialogue.steps)))
    return probes


@torch.no_grad()
def exact(model: Glm4ForCausalLM, probes: list[Probe]) -> dict[str, str]:
    """Per category "right/all": turns of which every taught token is the likeliest one."""
    right: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    device = model.lm_head.weight.device
    for probe in probes:
        with torch.autocast(device.type, torch.bfloat16):
            ids = torch.tensor([probe.row.ids], device=device)
            guess = model.lm_head(model.model(ids, use_cache=False).last_hidden_state)[0].argmax(-1).cpu()
        labels = torch.tensor(probe.row.labels)
        turns = torch.tensor(probe.row.turns)
        wrong = (guess != labels) & (labels != IGNORED)
        for turn, category in enumerate(probe.categories):
            total[category] += 1
            right[category] += not bool(wrong[turns == turn].any())
    return {name: f"{right[name]}/{total[name]}" for name in sorted(total)}
