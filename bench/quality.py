"""How far quantized weights move a model's predictions: mean KL divergence from its float32 self, against their bits.

    python -m bench.quality FOLDER TEXT [TEXT ...] [--windows 4] [--only NAMES] [--plot FILE.svg]

FOLDER is a checkpoint small enough for float32, each TEXT a UTF-8 file that is not the calibration text. Windows of 512
tokens, the second half of each scored. All linears of the layers are quantized, the embedding and the head are not;
weights are multiplied in float32, so that only their own error counts. Bits are those of a weight with its scales. The
types of llama.cpp are made by its own code (bench/ggml.py) with the same importance; without it they are left out. A
table, a plot of it, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import ggml
from glm4lite import Glm4ForCausalLM, load
from glm4lite.checkpoint.calibration import Calibrator
from glm4lite.checkpoint.calibration_text import CalibrationIds, calibration_ids
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.codec_choice import MOST, Aim, Option, candidates_of, seen, solve
from glm4lite.checkpoint.load_plan import make_load_plan, read_config, skeleton
from glm4lite.checkpoint.prepare import model_class, prepare
from glm4lite.checkpoint.sensitivity import measured
from glm4lite.checkpoint.streaming import Meter
from glm4lite.model.layers import layer_of
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import Codec, Inputs, QuantConfig, QuantTensor

WINDOW = 512
# The quantiles of bitsandbytes' NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
Rule = Callable[[str, Tensor], Tensor]


def nf4(_: str, weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (NF4[torch.bucketize(blocks / scale, (NF4[1:] + NF4[:-1]) / 2)] * scale).view_as(weight)


def plain(method: str) -> Rule:
    return lambda _, weight: QuantTensor.quantize(weight, QuantConfig(4, method=method)).dequantize()


def calibrated(inputs: Mapping[str, Inputs], bits: int, group: int, feedback: bool = True) -> Rule:
    def rule(name: str, weight: Tensor) -> Tensor:
        out, given = QuantTensor.empty(weight.shape[0], weight.shape[1], QuantConfig(bits, group)), inputs[name]
        out.quantize_rows(0, weight, given if feedback else Inputs(given.mean_square))
        return out.dequantize()

    return rule


def by_module(rules: Mapping[str, Rule]) -> Rule:
    return lambda name, weight: rules[name](name, weight)


def peer(kind: str, importance: Mapping[str, Tensor] | None) -> Rule:
    return lambda name, weight: ggml.requantized(weight, kind, None if importance is None else importance[name])


@dataclass(frozen=True)
class Contender:
    """A way to quantize; `family` are those that one curve of the plot joins ("": none)."""

    name: str
    bits: float
    rule: Rule
    family: str = ""


OURS, MIXED, ALONE = "glm4lite", "glm4lite, a codec for each", "glm4lite, without feedback"
PEER, BARE = "llama.cpp, importance", "llama.cpp, without importance"


def mixed(folder: Path, inputs: Mapping[str, Inputs], sizes: Sequence[float]) -> Iterator[Contender]:
    """Each linear of the layers has the codec that pays, for so many bits on average."""
    checkpoint = Checkpoint.open(folder)
    prepared = prepare(checkpoint, QuantConfig(), model_class(checkpoint))
    plan, candidates = candidates_of(prepared, Aim(MOST))
    source = calibration_ids(checkpoint, prepared.config, None)
    second = measured(checkpoint, plan, prepared.config, source, candidates, Meter("measure", 1, None)).losses
    losses, fills = seen(second), [fill for fill in plan.fills if fill.quant is not None and layer_of(fill.module)]
    weights = [fill.shape[0] * fill.shape[1] for fill in fills]
    options = [
        [Option(int(count * _size(one)), losses[fill.module][one]) for one in candidates[fill.module]]
        for fill, count in zip(fills, weights, strict=True)
    ]
    for size in sizes:
        picked = solve(options, int(size * sum(weights)))
        codecs = [candidates[fill.module][at] for fill, at in zip(fills, picked, strict=True)]
        chosen = [several[at] for several, at in zip(options, picked, strict=True)]
        rules = {
            fill.module: calibrated(inputs, one.bits, one.group_size) for fill, one in zip(fills, codecs, strict=True)
        }
        name = f"mixed {size:g}, {sum(one.loss for one in chosen):.3f} expected"
        yield Contender(name, sum(one.nbytes for one in chosen) / sum(weights), by_module(rules), MIXED)


def _size(codec: Codec) -> float:
    """Bits of a weight with its scales; those of the rows are left out, as a few of a wide row."""
    return codec.bits + (16 if codec.bits < 8 else 8) / codec.group_size


def contenders(folder: Path) -> list[Contender]:
    inputs = inputs_of(folder)
    importance = {name: given.mean_square for name, given in inputs.items()}
    found = []
    for bits, group in product((2, 3, 4, 5, 6), (32, 64, 128)):
        name, size = f"{bits} bits, groups of {group}", bits + 16 / group
        found.append(Contender(name, size, calibrated(inputs, bits, group), OURS))
        found.append(Contender(f"{name}, alone", size, calibrated(inputs, bits, group, feedback=False), ALONE))
    found += mixed(folder, inputs, (3.0625, 3.4375, 4.25, 4.5, 5.5))
    found.append(Contender("4 bits, random ids", 4.5, calibrated(inputs_of(folder, random=True), 4, 32)))
    found += [Contender(f"4 bits, {method}", 4.5, plain(method)) for method in ("minmax", "search")]
    found.append(Contender("NF4, blocks of 64", 4.5, nf4))
    if ggml.absent():
        print(ggml.absent())
        return found
    found += [Contender(kind, ggml.bits(kind), peer(kind, importance), PEER) for kind in ggml.KINDS]
    return [*found, *(Contender(f"{kind}, bare", ggml.bits(kind), peer(kind, None), BARE) for kind in ("Q4_0", "Q4_K"))]


def inputs_of(folder: Path, random: bool = False) -> dict[str, Inputs]:
    """Module name -> what calibration tells of its inputs."""
    checkpoint = Checkpoint.open(folder)
    config = read_config(checkpoint)
    every = QuantConfig(4, exceptions=(("embed_tokens", None), ("lm_head", None), ("*norm*", None)))
    plan = make_load_plan(skeleton(config, Glm4ForCausalLM), checkpoint, every)
    source = calibration_ids(checkpoint, config, None)
    if random:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, source.ids.shape, generator=generator)
        source = CalibrationIds(ids, source.record)
    calibrator, found = Calibrator(checkpoint, plan, config, source, lambda: None), {}
    for fill in plan.fills:
        if fill.quant is not None and (given := calibrator.take(fill)[1]) is not None:
            found[fill.module] = Inputs.of(given)
    return found


class Judge:
    """A model in float32, the texts, and what it says of them unquantized."""

    def __init__(self, folder: Path, texts: list[Path], windows: int) -> None:
        self.model: Glm4ForCausalLM = load(folder, dtype="float32")
        tokenizer = Tokenizer.from_folder(folder)
        self.windows = {text.name: self._windows(tokenizer, text, windows) for text in texts}
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        self.weights = {name: module.weight.detach().clone() for name, module in self.linears.items()}
        self.expected = {name: self._log_probabilities(ids) for name, ids in self.windows.items()}

    def divergence(self, rule: Rule) -> dict[str, float]:
        """Text -> mean KL divergence of the model with its weights so quantized."""
        for name, module in self.linears.items():
            module.weight.data = rule(name, self.weights[name])
        found = {}
        for name, ids in self.windows.items():
            p, q = self.expected[name], self._log_probabilities(ids)
            found[name] = float((p.exp() * (p - q)).sum(-1).mean())
        return found

    def _windows(self, tokenizer: Tokenizer, text: Path, count: int) -> Tensor:
        """Evenly spread over the text."""
        prefix, ids = tokenizer.prefix_ids, tokenizer.ids(text.read_text(encoding="utf-8"))
        size = WINDOW - len(prefix)
        if len(ids) < count * size:
            raise SystemExit(f"{text} has {len(ids)} tokens, {count * size} are needed")
        step = len(ids) // count
        return torch.tensor([prefix + ids[i * step : i * step + size] for i in range(count)])

    def _log_probabilities(self, windows: Tensor) -> Tensor:
        keep = WINDOW // 2
        found = [self.model(ids[None], use_cache=False, logits_to_keep=keep).logits[0] for ids in windows]
        return torch.stack(found).float().log_softmax(-1)


def frontier(rows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bits, divergence) those that no other with as few bits is below."""
    best: list[tuple[float, float]] = []
    for bits, value in sorted(rows):
        if not best or value < best[-1][1]:
            best.append((bits, value))
    return best


def plot(found: Sequence[Contender], results: Mapping[str, Mapping[str, float]]) -> str:
    """An SVG: bits against the mean divergence over the texts, logarithmic; the best of each family joined."""
    width, height, left, bottom = 760, 420, 60, 46
    values = {one.name: sum(results[one.name].values()) / len(results[one.name]) for one in found}
    exponents = [math.log10(value) for value in values.values()]
    low, high = math.floor(min(exponents) * 4) / 4, math.ceil(max(exponents) * 4) / 4
    least, most = 2.0, 7.0

    def place(bits: float, value: float) -> tuple[float, float]:
        right, down = (bits - least) / (most - least), (high - math.log10(value)) / (high - low)
        return left + (width - left - 12) * right, 12 + (height - bottom - 12) * down

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for value in (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3):
        if low <= math.log10(value) <= high:
            y = place(least, value)[1]
            parts.append(f'<path d="M{left} {y:.1f}H{width - 12}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for bits in range(int(least), int(most) + 1):
        parts.append(f'<text x="{place(bits, 1)[0]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{bits}</text>')
    for number, (family, color) in enumerate(
        ((OURS, "#1565c0"), (MIXED, "#2e7d32"), (ALONE, "#90caf9"), (PEER, "#c62828"), (BARE, "#999"))
    ):
        mine = [one for one in found if one.family == family]
        if not mine:
            continue
        line = frontier([(one.bits, values[one.name]) for one in mine])
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for one in mine:
            x, y = place(one.bits, values[one.name])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
            if family in (PEER, BARE):
                parts.append(f'<text x="{x + 5:.1f}" y="{y - 4:.1f}" font-size="9" fill="{color}">{one.name}</text>')
        parts.append(f'<text x="{width - 220}" y="{34 + 18 * number}" fill="{color}">{family}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">bits a weight</text>')
    middle = height / 2
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">mean KLD</text>')
    return "\n".join([*parts, "</svg>\n"])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--only", default="", help="parts of names with ; between them, of which each row has one")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    judge = Judge(arguments.folder, arguments.texts, arguments.windows)
    wanted = arguments.only.split(";")
    found = [one for one in contenders(arguments.folder) if any(part in one.name for part in wanted)]
    results = {}
    for one in sorted(found, key=lambda one: one.bits):
        results[one.name] = judge.divergence(one.rule)
        texts = "  ".join(f"{text} {value:.4f}" for text, value in results[one.name].items())
        print(f"{one.name:28} {one.bits:6.3f}  {texts}", flush=True)
    if arguments.plot:
        arguments.plot.write_text(plot(found, results), encoding="utf-8")
    print(json.dumps({"folder": str(arguments.folder), "kld": results}))


if __name__ == "__main__":
    main()
