"""LoRA adapters, by PEFT's own: what it trains and saves, loaded here, gives what its merged model gives."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4ForCausalLM as Reference

from glm4lite import load
from glm4lite.base.errors import CheckpointError, ConfigError, Glm4liteError, SamplingError
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.codec_choice import Aim
from glm4lite.checkpoint.lora.factors import values
from glm4lite.checkpoint.lora.folder import Loras, open_folder
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.loading.load_options import LoadOptions
from glm4lite.loading.loader import load_class
from glm4lite.loading.plan_report import plan
from glm4lite.loading.requirements import requirements_of
from glm4lite.measure.info import model_facts
from glm4lite.model.layers import layer_of
from glm4lite.model.lora import LowRank
from glm4lite.model.step import Span
from glm4lite.pretrained.models import Glm4ForCausalLM
from glm4lite.runtime.disk_offload import offload_to_disk
from glm4lite.server import ModelNames
from glm4lite_quant.format import NAMES
from glm4lite_quant.kernels import native
from tests.commands import run
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint
from tests.glm4lite.packed import Layout, gptq, write_packed
from tests.glm4lite.served import served

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 133, 7, 81, 300, 22, 4, 17, 250, 31, 66]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two float32 layers."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    return plain(folder)


def plain(folder: Path, changed: dict[str, Tensor] | None = None) -> Path:
    config = tiny_config(torch_dtype="float32")
    tensors = {name: tensor.float() for name, tensor in tiny_tensors(config).items()} | (changed or {})
    return write_checkpoint(folder, config, tensors)


@pytest.fixture(scope="module")
def quantized(base: Path) -> Path:
    return quantize_checkpoint(base, base.parent / "int8", "int8")


@pytest.fixture(scope="module")
def decoded(base: Path, quantized: Path) -> Path:
    """What the quantized weights stand for, as an ordinary folder."""
    model = load(quantized, device="cpu")
    weights = {name: getattr(module, "weight_tensor", None) for name, module in model.named_modules()}
    return plain(base.parent / "decoded", {f"{name}.weight": one.dequantize() for name, one in weights.items() if one})


def trained(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter that PEFT writes, with random values where training would leave some."""
    torch.manual_seed(seed)  # peft draws the first factors
    model = peft.get_peft_model(
        Reference.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    made = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 0.5 if "magnitude" in name else 0.2
            noise = torch.randn(parameter.shape, generator=made) * spread
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
    model.save_pretrained(str(folder))
    return folder


def by_peft(base: Path, *adapters: Path) -> Tensor:
    """Logits of PEFT's model, with the adapters on, not merged."""
    model: Any = Reference.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    with torch.no_grad():
        return model.eval()(IDS).logits


def by_us(base: Path, *adapters: str | Path, **settings: Any) -> Tensor:
    with torch.no_grad():
        return load(base, device="cpu", lora=adapters, **settings)(IDS).logits


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL},
    "patterns": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"o_proj": 2, r"layers\.1\.self_attn\.q_proj": 6, "q_proj": 3},
        "alpha_pattern": {"mlp.down_proj": 3, "model.layers.0.self_attn.k_proj": 16},
    },
    "dora": {"r": 4, "use_dora": True, "target_modules": ALL},
    "lora_bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "lora_bias where the model has none": {"r": 4, "lora_bias": True, "target_modules": ALL},
    "bias": {"r": 4, "bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "modules_to_save": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding and head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def adapters(base: Path) -> Callable[..., Path]:
    """Those of OPTIONS, trained once."""
    made: dict[tuple[str, int], Path] = {}

    def get(option: str, seed: int = 0) -> Path:
        if (option, seed) not in made:
            folder = base.parent / f"adapter {option} {seed}"
            made[option, seed] = trained(base, folder, seed, **OPTIONS[option])
        return made[option, seed]

    return get


@pytest.fixture(params=OPTIONS)
def adapter(request: pytest.FixtureRequest, adapters: Callable[..., Path]) -> Path:
    return adapters(request.param)


def test_merged_into_a_plain_checkpoint_it_is_what_peft_computes(base: Path, adapter: Path) -> None:
    expected = by_peft(base, adapter)
    assert (expected - by_us(base)).abs().max() > 0.05
    torch.testing.assert_close(by_us(base, adapter), expected, atol=2e-4, rtol=1e-3)


def test_beside_quantized_weights_it_is_what_peft_computes(
    quantized: Path, decoded: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "backend", lambda: None)  # the kernels that round nothing
    found, expected = by_us(quantized, adapter), by_peft(decoded, adapter)
    if any(one in adapter.name for one in ("modules_to_save", "embedding")):  # tensors that are quantized as the rest
        assert (found - expected).norm() < 0.05 * (expected - by_us(quantized)).norm()
    else:
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_beside_weights_of_which_each_has_its_own_bits_it_is_what_peft_computes(
    base: Path, adapters: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = quantize_checkpoint(base, tmp_path / "mixed", aim=Aim(5.0))
    model = load(mixed, device="cpu")
    weights = {name: getattr(module, "weight_tensor", None) for name, module in model.named_modules()}
    assert len({one.bits for one in weights.values() if one}) > 1
    same = plain(tmp_path / "same", {f"{name}.weight": one.dequantize() for name, one in weights.items() if one})
    adapter = adapters("dora")
    monkeypatch.setattr(native, "backend", lambda: None)  # the kernels that round nothing
    torch.testing.assert_close(by_us(mixed, adapter), by_peft(same, adapter), atol=2e-4, rtol=1e-3)


def test_the_native_layers_compute_it_too(quantized: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding the activations to int8 costs as much as without an adapter."""
    if native.backend() is None:
        pytest.skip("no native library")
    plain, found = by_us(quantized), by_us(quantized, adapter)
    monkeypatch.setattr(native, "backend", lambda: None)
    exact, usual = by_us(quantized, adapter), (by_us(quantized) - plain).norm() / plain.norm()
    assert (found - exact).norm() / exact.norm() < 3 * usual
    assert (found - exact).norm() < 0.1 * (found - plain).norm()


def test_several_adapters_add_up_each_times_its_scale(base: Path, adapters: Callable[..., Path]) -> None:
    one, other = adapters("plain"), adapters("patterns", seed=1)
    torch.testing.assert_close(by_us(base, one, other), by_peft(base, one, other), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(by_us(base, f"{one}=0", f"{other}=0"), by_us(base))
    config = json.loads((one / "adapter_config.json").read_text())
    half = shutil.copytree(one, one.parent / "half")
    (half / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))
    torch.testing.assert_close(by_us(base, f"{one}=0.5"), by_us(base, half))


def rewritten(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """An adapter with other tensors, and other values in its config."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, to / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(values | config))
    return to


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_an_adapter_of_mlx_lm_is_read(base: Path, adapters: Callable[..., Path], kind: str, tmp_path: Path) -> None:
    """Its layout, as its tuner documents it: lora_a [K, r], lora_b [r, N], the scale as it is."""
    source, made = adapters(kind), tmp_path / "mlx"
    made.mkdir()
    names = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b", ".lora_magnitude_vector": ".m"}
    tensors = {}
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        ending = next(one for one in names if name.endswith(one))
        short = name.removeprefix("base_model.model.").removesuffix(ending) + names[ending]
        tensors[short] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
    save_file(tensors, made / "adapters.safetensors")
    scale = OPTIONS[kind].get("lora_alpha", 8) / 4
    kinds = {"plain": "lora", "dora": "dora"}
    config = {"fine_tune_type": kinds[kind], "num_layers": 2, "lora_parameters": {"rank": 4, "scale": scale}}
    (made / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(by_us(base, made), by_us(base, source))


def test_older_and_split_names_are_the_same_weights(base: Path, adapters: Callable[..., Path], tmp_path: Path) -> None:
    """query_key_value has one A for q, k and v; gate_proj and up_proj have one each."""
    made = torch.Generator().manual_seed(3)
    layer, old = "base_model.model.model.layers.1", "base_model.model.transformer.encoder.layers.1"
    a, q, k, v = (torch.randn(*shape, generator=made) / 4 for shape in ((4, 64), (64, 4), (32, 4), (32, 4)))
    new: dict[str, Tensor] = {}
    for name, b in (("q", q), ("k", k), ("v", v)):
        new |= {f"{layer}.self_attn.{name}_proj.lora_A.weight": a, f"{layer}.self_attn.{name}_proj.lora_B.weight": b}
    ga, ua = (torch.randn(4, 64, generator=made) / 4 for _ in range(2))
    gb, ub = (torch.randn(96, 4, generator=made) / 4 for _ in range(2))
    split = {
        f"{layer}.mlp.gate_proj.lora_A.weight": ga,
        f"{layer}.mlp.gate_proj.lora_B.weight": gb,
        f"{layer}.mlp.up_proj.lora_A.weight": ua,
        f"{layer}.mlp.up_proj.lora_B.weight": ub,
    }
    fused = {
        f"{layer}.mlp.gate_up_proj.lora_A.weight": torch.cat([ga, ua]),
        f"{layer}.mlp.gate_up_proj.lora_B.weight": torch.block_diag(gb, ub),
    }
    older = {
        f"{old}.self_attention.query_key_value.lora_A.weight": a,
        f"{old}.self_attention.query_key_value.lora_B.weight": torch.cat([q, k, v]),
    }
    renamed = {
        name.replace(f"{layer}.mlp.gate_up_proj", f"{old}.mlp.dense_h_to_4h"): one for name, one in fused.items()
    }
    ranks = {"rank_pattern": {"gate_up_proj": 8, "dense_h_to_4h": 8}, "alpha_pattern": {"gate_up_proj": 16}}
    ranks["alpha_pattern"]["dense_h_to_4h"] = 16
    plain = adapters("plain")

    def by(tensors: dict[str, Tensor]) -> Tensor:
        return by_us(base, rewritten(plain, tmp_path / "one", lambda _: tensors, **ranks))

    expected = by(new | fused)
    assert (expected - by_us(base)).abs().max() > 0.05
    torch.testing.assert_close(by(older | renamed), expected)
    torch.testing.assert_close(by(new | split), expected)


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_calibrating_and_quantizing_see_the_adapter(
    base: Path, adapters: Callable[..., Path], quant: str, tmp_path: Path
) -> None:
    """Loaded, written by `quantize`, or merged by PEFT before: the same weights."""
    adapter = adapters("plain")
    model: Any = Reference.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    changed = {name: tensor for name, tensor in merged.state_dict().items() if "rotary" not in name}
    expected = by_us(plain(tmp_path / "merged", changed), quant=quant)
    found = by_us(base, adapter, quant=quant)
    assert (found - expected).norm() < 0.02 * expected.norm()
    written = quantize_checkpoint(base, tmp_path / "written", quant, lora=adapter)
    torch.testing.assert_close(by_us(written), found, atol=0, rtol=0)


def test_codes_of_another_tool_stay_and_the_adapter_is_beside_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "backend", lambda: None)
    packed, same = write_packed(tmp_path, Layout(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}))
    adapter = trained(same, tmp_path / "adapter", **OPTIONS["plain"])
    expected = by_peft(same, adapter)
    error = (by_us(packed, adapter) - expected).norm() / (expected - by_us(same)).norm()
    assert "12 keep their codes" in caplog.text
    assert error < 0.06
    torch.testing.assert_close(by_us(packed, adapter, quant="none"), expected, atol=0.1, rtol=0.02)
    folder = quantize_checkpoint(packed, tmp_path / "again", "int8", lora=adapter)
    assert (by_us(folder) - expected).norm() < 0.1 * expected.norm()


def test_plan_and_info_count_what_lies_beside_the_weights(
    base: Path, quantized: Path, adapters: Callable[..., Path]
) -> None:
    adapter = adapters("plain")
    model = load(quantized, device="cpu", lora=adapter)
    beside = sum(one.nbytes for one in model.modules() if isinstance(one, LowRank))
    for always, choices in (((adapter,), ()), ((), (f"sql={adapter}",))):
        loras = Loras.of(always, choices)
        with_it, without = plan(quantized, loras=loras), plan(quantized)
        assert with_it.needs.weight_bytes - without.needs.weight_bytes == beside > 0
        assert with_it.model == f"{quantized} + {adapter if always else f'sql={adapter}'}"
        facts = dict(model_facts(str(quantized), loras=loras))
        assert facts["weights, int8"] == readable(with_it.needs.weight_bytes)
        assert facts["adapter" if always else "adapter sql"] == f"{adapter}: rank 4, 12 weights"
    merged = requirements_of(Checkpoint.open(base), "int4", Loras.of(adapter))
    assert merged.weight_bytes == requirements_of(Checkpoint.open(base), "int4").weight_bytes
    done = run("plan", str(quantized), "--lora", f"{adapter}=0.5", "--json")
    assert json.loads(done.stdout)["weight_bytes"] == with_it.needs.weight_bytes
    done = run("info", str(quantized), "--lora", f"{adapter}=0.5")
    assert f"{adapter}: rank 4, 12 weights, times 0.5" in done.stdout
    assert (
        run("info", "--lora", str(adapter)).stderr == "error: adapters are described with their model; give that too\n"
    )


def test_layers_on_disk_have_their_adapters_in_memory(
    quantized: Path, adapters: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapters("dora")
    model = load(quantized, device="cpu", lora=adapter)
    offload = dict(enumerate(model.model.layers))
    stored = Checkpoint.open(quantized)
    planes: dict[int, dict[str, Any]] = {number: {} for number in offload}
    for name in stored.names():
        found = layer_of(name)
        if found is not None and found[1].rpartition(".")[2] in NAMES:
            module, _, plane = found[1].rpartition(".")
            planes[found[0]].setdefault(module, {})[plane] = stored.stored(name)
    before = by_us(quantized, adapter)
    offload_to_disk(offload, planes)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, atol=0, rtol=0)


def test_rows_of_a_step_take_adapters_of_their_own_to_the_bit(quantized: Path, adapters: Callable[..., Path]) -> None:
    names = ("plain", "dora", "patterns")
    options = LoadOptions(device="cpu", loras=Loras((), tuple(f"{name}={adapters(name)}" for name in names)))
    model, _ = load_class(Glm4ForCausalLM, quantized, options)
    assert model.model.adapters == names

    def alone(number: int) -> Tensor:
        return model.step([Span(IDS[0].tolist(), model.new_cache(), 2, adapter=number)])[0]

    every = [alone(number) for number in range(4)]
    spans = [Span(IDS[0].tolist(), model.new_cache(), 2, adapter=number) for number in range(4)]
    for together, own in zip(model.step(spans), every, strict=True):
        torch.testing.assert_close(together, own, atol=0, rtol=0)
    for name, own in zip(names, every[1:], strict=True):
        torch.testing.assert_close(own, by_us(quantized, adapters(name))[0, -2:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(every[0], by_us(quantized)[0, -2:], atol=1e-5, rtol=1e-4)


def test_adapters_may_be_chosen_over_weights_that_are_not_quantized_and_over_one_that_is_on(
    base: Path, adapters: Callable[..., Path]
) -> None:
    on, chosen = adapters("lora_bias where the model has none"), adapters("dora")
    options = LoadOptions(device="cpu", loras=Loras((str(on),), (f"it={chosen}",)))
    model, _ = load_class(Glm4ForCausalLM, base, options)
    found = [model.step([Span(IDS[0].tolist(), model.new_cache(), adapter=number)])[0][0] for number in range(2)]
    torch.testing.assert_close(found[0], by_peft(base, on)[0, -1], atol=2e-4, rtol=1e-3)
    assert (found[1] - found[0]).abs().max() > 0.05


REFUSED: dict[str, dict[str, Any]] = {
    "sets trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "sets layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "sets alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "peft_type is 'IA3'": {"peft_type": "IA3"},
    "init_lora_weights is 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "sets some_new_thing": {"some_new_thing": 3},
    "has rank 4, but adapter_config.json says 8": {"r": 8},
    "lora_alpha is 'nan'": {"lora_alpha": "nan"},
    "no pattern of module names": {"rank_pattern": {"(a+)+b": 4}},
    "says use_dora=True": {"use_dora": True},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(
    base: Path, adapters: Callable[..., Path], said: str, tmp_path: Path
) -> None:
    folder = rewritten(adapters("plain"), tmp_path / "one", dict, **REFUSED[said])
    with pytest.raises(Glm4liteError, match=re.escape(said)) as error:
        load(base, device="cpu", lora=folder)
    assert "\n" not in str(error.value)


LAYER = "base_model.model.model.layers.0"
WRONG: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "does not have": lambda t: {name.replace("layers.0", "layers.7"): one for name, one in t.items()},
    "changes a weight of [64, 32], the model's model.layers.0.self_attn.q_proj is [64, 64]": lambda t: (
        t | {f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
    ),
    "has rank 3": lambda t: t | {f"{LAYER}.self_attn.q_proj.lora_B.weight": torch.zeros(64, 3)},
    "holds NaN or infinity": lambda t: t | {f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.full((4, 64), torch.nan)},
    "has the type I32": lambda t: t | {f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64).int()},
    "lacks its lora_A or lora_B": lambda t: {n: one for n, one in t.items() if not n.endswith("q_proj.lora_B.weight")},
    "not that of a matrix": lambda t: t | {f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.zeros(4)},
    "which DIR does not have": lambda t: t | {f"{LAYER}.self_attn.strange": torch.zeros(4)},
    "holds no tensors": lambda t: {},
}


@pytest.mark.parametrize("said", WRONG)
def test_an_adapter_of_another_model_or_a_damaged_one_is_told_in_a_line(
    base: Path, adapters: Callable[..., Path], said: str, tmp_path: Path
) -> None:
    folder = rewritten(adapters("plain"), tmp_path / "one", WRONG[said])
    with pytest.raises(CheckpointError) as error:
        load(base, device="cpu", lora=folder)
    assert said in str(error.value).replace(str(base), "DIR")
    assert "\n" not in str(error.value)


def test_what_lies_beside_the_weights_is_not_lost_by_saving(
    base: Path, quantized: Path, adapters: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapters("plain")
    with pytest.raises(CheckpointError, match="has a LoRA adapter beside its weight"):
        load(quantized, device="cpu", lora=adapter).save_pretrained(tmp_path / "beside")
    load(base, device="cpu", lora=adapter).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(by_us(tmp_path / "merged"), by_us(base, adapter), atol=0, rtol=0)


def test_what_is_no_adapter_is_named(base: Path, adapters: Callable[..., Path], tmp_path: Path) -> None:
    def said(lora: Any) -> str:
        with pytest.raises(Glm4liteError) as error:
            load(base, device="cpu", lora=lora)
        return str(error.value)

    assert "holds a model, not an adapter" in said(base)
    pickled = shutil.copytree(adapters("plain"), tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "only pickle weights" in said(pickled)
    assert "neither a folder nor a Hub repo id" in said(tmp_path / "none" / "here")
    assert "no scale behind its last =" in said(f"{pickled}=much")
    saving = adapters("modules_to_save")
    assert "have no scale" in said(f"{saving}=0.5")
    with pytest.raises(ConfigError, match="cannot be switched"):
        load_class(Glm4ForCausalLM, base, LoadOptions(device="cpu", loras=Loras((), (f"it={saving}",))))
    with pytest.raises(ConfigError, match="use NAME=FOLDER"):
        Loras((), ("folder",))


def test_a_mutated_adapter_is_read_or_refused(base: Path, adapters: Callable[..., Path], tmp_path: Path) -> None:
    """Header, values and config of both files; nothing else happens than an answer or one of our errors."""
    chance, source = random.Random(0), adapters("dora")
    whole = {name: (source / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}
    read, refusals = 0, list[str]()
    for number in range(400):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        for name, data in whole.items():
            mutated = bytearray(data)
            for _ in range(chance.randrange(3)):
                place = chance.randrange(min(len(mutated), 6000))
                mutated[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            (folder / name).write_bytes(mutated)
        try:
            found = open_folder(folder)
            for factors in found.factors[:2]:
                values(factors.a)
            read += 1
        except Glm4liteError as error:
            refusals.append(str(error))
    assert read > 20
    assert len(refusals) > 100
    assert not any("\n" in one for one in refusals)


def test_what_was_kept_of_one_adapter_is_not_taken_for_another(
    quantized: Path, adapters: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory and in the folder of kept prefixes; the adapter's identity is that of its bytes."""
    monkeypatch.setenv("GLM4LITE_PREFIXES", str(tmp_path / "prefixes"))
    one, other = adapters("plain"), adapters("dora")
    prompt = IDS[0].tolist() * 4

    def engine(*lora: str, modules: tuple[str, ...] = ()) -> Engine:
        return Engine.load(quantized, quant=None, device="cpu", keep_prefixes=True, lora=lora, lora_modules=modules)

    def prefilled(engine: Engine, adapter: str | None = None) -> int:
        generation = engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=1, adapter=adapter))
        list(engine.prefill(generation))
        list(generation)
        return generation.prefilled_tokens

    first = engine(modules=(f"a={one}", f"b={other}"))
    assert [prefilled(first, name) for name in (None, "a", "b")] == [len(prompt)] * 3
    assert [prefilled(first, name) for name in (None, "a", "b")] == [1] * 3
    first.unload()
    second = engine(modules=(f"x={other}", f"y={one}"))
    assert [prefilled(second, name) < len(prompt) for name in (None, "x", "y")] == [True] * 3
    second.unload()
    assert prefilled(engine(str(one))) == len(prompt)
    assert prefilled(engine(f"{one}=0.5")) == len(prompt)
    both = engine(modules=(f"a={one}", f"b={other}"))
    with pytest.raises(SamplingError, match="the model has no 'c'; it has a and b"):
        both.generate(prompt, SamplingParams(adapter="c"))


def test_a_server_answers_with_the_adapter_that_a_request_names(quantized: Path, adapters: Callable[..., Path]) -> None:
    engine = Engine.load(quantized, quant=None, device="cpu", lora_modules=[f"tuned={adapters('plain')}"])
    expected = {}
    for adapter in (None, "tuned"):
        params = engine.params(temperature=0, max_new_tokens=8, adapter=adapter)
        expected[adapter] = engine.tokenizer.text(list(engine.generate(IDS[0].tolist(), params)))
    assert expected[None] != expected["tuned"]
    with served(engine, names=ModelNames("base", ("other",), adapters=engine.adapters)) as site:
        listed = [card["id"] for card in site.http.get("/v1/models").json()["data"]]
        assert listed == ["base", "other", "base:tuned", "other:tuned"]

        def ask(model: str) -> Any:
            body = {"model": model, "prompt": IDS[0].tolist(), "temperature": 0, "max_tokens": 8}
            return site.http.post("/v1/completions", json=body).json()

        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(ask, ["base", "base:tuned", "other", "other:tuned"] * 2))
        for answer, adapter in zip(answers, [None, "tuned", None, "tuned"] * 2, strict=True):
            assert answer["choices"][0]["text"] == expected[adapter]
            assert answer["model"] == ("base:tuned" if adapter else "base")
        assert site.http.get("/v1/models/base:tuned").status_code == 200
        assert "does not exist" in ask("base:none")["error"]["message"]
