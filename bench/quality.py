"""How far 4-bit weights move a model's predictions: mean KL divergence from its float32 self, by way of quantizing.

`python -m bench.quality FOLDER TEXT [TEXT ...] [--windows 4]`: FOLDER is a checkpoint small enough for float32, each
TEXT a UTF-8 file that is not the calibration text. Windows of 512 tokens, the second half of each scored. All linears
of the layers are quantized, the embedding and the head are not; weights are multiplied in float32, so that only their
own error counts. Needs the `gguf` package. A table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import torch
from torch import Tensor, nn

from glm4lite import Glm4ForCausalLM, load
from glm4lite.checkpoint.calibration import Calibrator
from glm4lite.checkpoint.calibration_text import CalibrationIds, calibration_ids
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.load_plan import make_load_plan, read_config, skeleton
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import Inputs, QuantConfig, QuantTensor

WINDOW = 512
# The quantiles of bitsandbytes' NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
Rule = Callable[[str, Tensor], Tensor]


def q4_0(_: str, weight: Tensor) -> Tensor:
    kind = gguf.GGMLQuantizationType.Q4_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind).copy())


def nf4(_: str, weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (NF4[torch.bucketize(blocks / scale, (NF4[1:] + NF4[:-1]) / 2)] * scale).view_as(weight)


def plain(method: str) -> Rule:
    return lambda _, weight: QuantTensor.quantize(weight, QuantConfig(4, method=method)).dequantize()


def calibrated(inputs: Mapping[str, Inputs], group: int = 32, bits: int = 4, feedback: bool = True) -> Rule:
    def rule(name: str, weight: Tensor) -> Tensor:
        out, given = QuantTensor.empty(weight.shape[0], weight.shape[1], QuantConfig(bits, group)), inputs[name]
        out.quantize_rows(0, weight, given if feedback else Inputs(given.mean_square))
        return out.dequantize()

    return rule


def keys_and_values_in_int8(rule: Rule) -> Rule:
    int8 = QuantConfig(8)

    def mixed(name: str, weight: Tensor) -> Tensor:
        small = name.endswith(("k_proj", "v_proj"))
        return QuantTensor.quantize(weight, int8).dequantize() if small else rule(name, weight)

    return mixed


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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    judge = Judge(arguments.folder, arguments.texts, arguments.windows)
    inputs = inputs_of(arguments.folder)
    rules: dict[str, Rule] = {
        "Q4_0 (4.5 bits)": q4_0,
        "NF4 in blocks of 64 (4.5)": nf4,
        "min/max (4.5)": plain("minmax"),
        "plain search (4.5)": plain("search"),
        "calibrated without feedback (4.5)": calibrated(inputs, feedback=False),
        "calibrated (4.5)": calibrated(inputs),
        "calibrated, random ids (4.5)": calibrated(inputs_of(arguments.folder, random=True)),
        "calibrated without feedback, groups of 64 (4.25)": calibrated(inputs, 64, feedback=False),
        "calibrated, groups of 64 (4.25)": calibrated(inputs, 64),
        "calibrated without feedback, 3 bits (3.5)": calibrated(inputs, bits=3, feedback=False),
        "calibrated, 3 bits (3.5)": calibrated(inputs, bits=3),
        "calibrated, k and v int8 (the default)": keys_and_values_in_int8(calibrated(inputs)),
    }
    results = {}
    for name, rule in rules.items():
        results[name] = judge.divergence(rule)
        print(f"{name:50}", "  ".join(f"{text} {value:.4f}" for text, value in results[name].items()), flush=True)
    print(json.dumps({"folder": str(arguments.folder), "kld": results}))


if __name__ == "__main__":
    main()
