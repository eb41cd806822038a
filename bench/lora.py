"""What an adapter costs beside int4 weights: decode and prefill with and without one, one process, turns interleaved.

`python -m bench.lora [--shape 9b] [--layers N] [--rank 16] [--rounds 20] [--threads N] [--work FOLDER]` makes (or
takes) random int4 weights and a random adapter on all linears of the layers. The model holds both ways at once, so that
each round times the same weights in the same memory: some tokens without, as many with, the other way round in the next
round. The ratio of each round is of these two; its median and spread are told, and one JSON line last. With
`--cpu-time` seconds are those of one thread's processor time, which other programs disturb less.

The head is no part of the layers and is not adapted: with fewer layers it weighs more, so `--layers 40` is the 9B.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.make_checkpoint import SHAPES, make_config, write_checkpoint
from bench.peers import machine
from glm4lite import Glm4Config
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.loading.load_options import LoadOptions
from glm4lite.loading.loader import load_class
from glm4lite.model.lora import BASE
from glm4lite.model.step import Span
from glm4lite.pretrained.models import Glm4ForCausalLM
from glm4lite_quant import QuantConfig
from glm4lite_quant.kernels import native

MUST, AIM = 1.06, 1.03  # of the time without
CONTEXT, PROMPT = 128, 256


def write_adapter(folder: Path, config: Glm4Config, rank: int) -> None:
    """PEFT's files, with random values."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, pairs = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        **{"self_attn.q_proj": (heads, hidden), "self_attn.o_proj": (hidden, heads)},
        **{f"self_attn.{name}_proj": (pairs, hidden) for name in "kv"},
        **{"mlp.gate_up_proj": (2 * inner, hidden), "mlp.down_proj": (hidden, inner)},
    }
    made = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=made) / columns**0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=made) / rank**0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")


Clock = Callable[[], float]


def seconds(model: Glm4ForCausalLM, adapter: int, prompt: int, tokens: int, clock: Clock) -> float:
    """Of `tokens` steps behind CONTEXT tokens, or of one prompt."""
    cache = model.new_cache()
    if not prompt:
        model.step([Span([7] * CONTEXT, cache, adapter=adapter)])
    began = clock()
    for _ in range(1 if prompt else tokens):
        model.step([Span([7] * (prompt or 1), cache, adapter=adapter)])
    return clock() - began


def ratios(model: Glm4ForCausalLM, rounds: int, prompt: int, tokens: int, clock: Clock) -> tuple[list[float], float]:
    """The time with over that without, of each round; the seconds of one without."""
    found, plain = [], []
    for index in range(rounds):
        turns = ((BASE, 1), (1, BASE))[index % 2]
        taken = {adapter: seconds(model, adapter, prompt, tokens, clock) for adapter in turns}
        found.append(taken[1] / taken[BASE])
        plain.append(taken[BASE])
    return found, statistics.median(plain)


def told(name: str, values: list[float], plain_s: float) -> str:
    quarter = statistics.quantiles(values, n=4)
    middle, whole = f"{quarter[0]:.3f} to {quarter[2]:.3f}", f"{min(values):.3f} to {max(values):.3f}"
    return f"| {name} | {1000 * plain_s:.1f} ms | {statistics.median(values):.3f} | {middle} | {whole} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--work", type=Path, default=Path("bench-lora"), help="a folder for the files")
    given = parser.parse_args()
    given.threads = 1 if given.cpu_time else given.threads
    clock = time.thread_time if given.cpu_time else time.perf_counter
    native.set_threads(given.threads)
    config = make_config(given.shape, given.layers)
    name = f"{given.shape}-{config.num_hidden_layers}"
    base, adapter = given.work / f"{name}-int4", given.work / f"{name}-r{given.rank}"
    if not base.exists():
        write_checkpoint(base, config, QuantConfig())
    if not adapter.exists():
        write_adapter(adapter, config, given.rank)
    options = LoadOptions(device="cpu", loras=Loras(choices=(f"it={adapter}",)))
    model, _ = load_class(Glm4ForCausalLM, base, options)
    for warm in (BASE, 1):
        seconds(model, warm, 0, 2, clock)
    decode, decode_s = ratios(model, given.rounds, 0, given.tokens, clock)
    prefill, prefill_s = ratios(model, max(2, given.rounds // 4), PROMPT, 0, clock)
    print(f"{machine()}, {given.threads} threads, {time.strftime('%Y-%m-%d')}; {given.shape}, ", end="")
    print(f"{config.num_hidden_layers} layers, rank {given.rank}\n`python {' '.join(sys.argv)}`\n")
    print("| | without | with / without | half of the rounds | all |\n|---|---|---|---|---|")
    print(told(f"{given.tokens} tokens behind {CONTEXT}", decode, decode_s))
    print(told(f"a prompt of {PROMPT}", prefill, prefill_s))
    median = statistics.median(decode)
    print(f"\ndecode at most {MUST} (aim {AIM}): {'met' if median <= MUST else 'missed'}\n")
    facts = {"machine": machine(), "threads": given.threads, "layers": config.num_hidden_layers, "rank": given.rank}
    print(json.dumps({**facts, "decode": decode, "prefill": prefill, "decode_s": decode_s, "prefill_s": prefill_s}))


if __name__ == "__main__":
    main()
