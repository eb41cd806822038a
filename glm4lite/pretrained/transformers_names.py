"""`from_pretrained`'s arguments under Transformers' names -> LoadOptions: each is mapped, or refused with the reason.

None always stands for "not said". Source: PreTrainedModel.from_pretrained of Transformers 5, and the names that
version 4 had.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glm4lite.base.errors import ConfigError, shown, unknown_name
from glm4lite.hub.options import HubOptions
from glm4lite.loading.load_options import LoadOptions
from glm4lite.memory.budget import Budget
from glm4lite.model.config import Glm4Config
from glm4lite.pretrained.quantization_names import BNB_DEFAULTS, bitsandbytes, requested

if TYPE_CHECKING:
    from glm4lite.pretrained.generation import GenerationConfig

logger = logging.getLogger("glm4lite")

_LIMITS = ("gpu_memory", "ram", "context", "kv")
_OWN = ("quant", "dtype", "device", "progress", "calibration", *_LIMITS)
_PLANNED = ("auto", "balanced", "balanced_low_0", "sequential")

_ALWAYS = ("low_cpu_mem_usage", "offload_state_dict", "offload_buffers")
"""Switches for less memory while loading: it is always as small as it can be."""

_ONE_PROCESS = "a model runs in one process here; several GPUs share its layers with device_map='auto'"
_NO_CODE = "nothing is run that a checkpoint or the Hub brings along"
_OFF: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "attn_implementation": (
        ("eager", "sdpa"),
        "attention is torch's or the native kernels', as the layers need",
    ),
    "trust_remote_code": ((False,), _NO_CODE),
    "use_safetensors": ((True,), "only safetensors are read, since pickle files can run code"),
    "weights_only": ((True,), "only safetensors are read, which hold nothing else"),
    "variant": ((), "only model.safetensors or its index is read; save the variant under those names"),
    "state_dict": ((), "make the model of its config, Glm4ForCausalLM(config), and call load_state_dict"),
    "key_mapping": (({},), "tensors are found under the names that GLM-4 checkpoints have"),
    "tp_plan": ((), _ONE_PROCESS),
    "tp_size": ((), _ONE_PROCESS),
    "device_mesh": ((), _ONE_PROCESS),
    "distributed_config": ((), _ONE_PROCESS),
    "gguf_file": ((), "give the file itself as the model"),
    "from_tf": ((False,), "only safetensors are read"),
    "from_flax": ((False,), "only safetensors are read"),
    "adapter_kwargs": (({},), "merge the adapter into its model first"),
    "adapter_name": (("default",), "merge the adapter into its model first"),
    "use_kernels": ((False,), _NO_CODE),
    "allow_all_kernels": ((False,), _NO_CODE),
    "kernel_config": ((), _NO_CODE),
    "fusion_config": (({},), "which layers run as one call is chosen by device and weights"),
    "experts_implementation": ((), "GLM-4 has no experts"),
    "disable_mmap": ((False,), "give ram, for example ram='16GiB': stored weights are then held in memory"),
    "proxies": (({},), "set HTTPS_PROXY in the environment"),
    "mirror": ((), "set HF_ENDPOINT in the environment"),
    "use_auth_token": ((), "its name is token"),
    "tqdm_class": ((), "give progress, which is called with the bytes read"),
}
"""What glm4lite has not: the values that ask for nothing else than it does, and why others are refused."""


_KNOWN = frozenset(
    {
        *_OWN,
        *(field.name for field in fields(HubOptions)),
        *_ALWAYS,
        *_OFF,
        *BNB_DEFAULTS,
        *("pretrained_model_name_or_path", "torch_dtype", "device_map", "max_memory", "offload_folder"),
        *("quantization_config", "config", "output_loading_info", "ignore_mismatched_sizes", "generation_config"),
    }
)
"""All names but the keys of the config."""


@dataclass(frozen=True)
class Request:
    """What `from_pretrained` was asked for."""

    source: str | Path
    options: LoadOptions
    loading_info: bool
    generation_config: GenerationConfig | None


def request(source: str | Path | None, given: Mapping[str, Any]) -> Request:
    """The arguments that were given by name, Transformers' and ours.

    Raises:
        ConfigError: an argument is not known, contradicts another, or asks for what glm4lite does not have.
        HubError: an argument for the Hub cannot be used.
    """
    for name in given:
        if name not in _KNOWN and not _is_override(name):
            config_keys = (*Glm4Config.model_fields, *Glm4Config.OLDER_NAMES)
            raise ConfigError(unknown_name("from_pretrained", name, (*_KNOWN, *config_keys)))
    overrides = {name: value for name, value in given.items() if _is_override(name)}
    names = {name: value for name, value in given.items() if value is not None and name not in overrides}
    source = _source(source, names.pop("pretrained_model_name_or_path", None))
    _check_off(names, _OFF)
    for name in _ALWAYS:
        _switch(names, name)
    own = {name: names.pop(name) for name in _OWN if name in names}
    own |= _placement(names, own)
    own |= _precision(names, own)
    hub = HubOptions.taken_from(names)
    config = names.pop("config", None)
    if isinstance(config, str | os.PathLike):
        config, overrides = Glm4Config.from_pretrained(os.fspath(config), **vars(hub), **overrides), {}
    elif config is not None and not isinstance(config, Glm4Config):
        config = _transformers_config(config)
    own["budget"] = Budget.of(**{name: own.pop(name) for name in _LIMITS if name in own})
    mismatched = _switch(names, "ignore_mismatched_sizes")
    options = LoadOptions(**own, config=config, overrides=overrides, ignore_mismatched_sizes=mismatched, hub=hub)
    generation = names.get("generation_config")
    if generation is not None:
        from glm4lite.pretrained.generation import GenerationConfig

        generation = GenerationConfig.of(generation)
    return Request(source, options, _switch(names, "output_loading_info"), generation)


def _is_override(name: str) -> bool:
    """Whether it is a key of the config."""
    return Glm4Config.knows(name) and name not in _KNOWN


def _source(source: str | Path | None, named: str | Path | None) -> str | Path:
    if source is not None and named is not None:
        raise ConfigError("the model is given twice, by position and as pretrained_model_name_or_path; leave one out")
    found = named if source is None else source
    if not isinstance(found, str | Path):
        raise ConfigError(f"the model is {shown(found)}; give a folder, a Hub repo id, or nano")
    return found


_SAVING_OFF: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "push_to_hub": ((False,), "save, then run `hf upload` of huggingface-hub"),
    "safe_serialization": ((True,), "only safetensors are written, since pickle files can run code"),
    "variant": ((), "weights are written as model.safetensors, or as shards and their index"),
    "token": ((), "nothing is sent to the Hub"),
    "save_peft_format": ((True, False), ""),  # of adapters, which are not there
    "save_original_format": ((True, False), ""),  # tensors have the checkpoint's names anyway
    "distributed_checkpoint": ((False,), _ONE_PROCESS),
}


def check_saving(given: Mapping[str, Any]) -> None:
    """The arguments of `save_pretrained` that ask for nothing else than it does. ConfigError for others."""
    names = dict(given)
    names.pop("save_function", None)  # of accelerate's scripts: what would write pickle files, here and there unused
    _check_off(names, _SAVING_OFF)
    for name in names:
        own = ("save_directory", "is_main_process", "state_dict", "max_shard_size")
        raise ConfigError(unknown_name("save_pretrained", name, (*own, *_SAVING_OFF)))


def _check_off(names: dict[str, Any], off: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Takes out what changes nothing; ConfigError for what glm4lite does not have."""
    for name, (allowed, why) in off.items():
        value = names.pop(name, None)
        plain = isinstance(value, bool | str | dict)
        if value is not None and not (plain and any(type(value) is type(one) and value == one for one in allowed)):
            secret = name in ("token", "use_auth_token")
            raise ConfigError(f"{name if secret else f'{name}={shown(value)}'} is not supported: {why}")


def _switch(names: dict[str, Any], name: str) -> bool:
    value = names.pop(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}; use True or False")
    return value


# --- where


def _placement(names: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """device, gpu_memory and ram of device_map, max_memory and offload_folder."""
    found: dict[str, Any] = {}
    if "device_map" in names:
        found["device"] = _device(names.pop("device_map"))
        device = own.get("device", "auto")
        if device != "auto" and str(device) != str(found["device"]):
            raise ConfigError(f"device={str(device)!r} and device_map={found['device']!r} contradict each other")
    if "max_memory" in names:
        doubled = [name for name in ("gpu_memory", "ram") if name in own]
        if doubled:
            raise ConfigError(f"max_memory and {doubled[0]} say the same; leave one out")
        found |= _budget(names.pop("max_memory"), found.get("device", own.get("device", "auto")))
    if "offload_folder" in names:
        folder = names.pop("offload_folder")
        logger.warning("offload_folder %s is not used: layers on disk are read from the checkpoint", shown(folder))
    return found


def _device(device_map: Any) -> str:
    """Ours for Transformers' device_map: "auto", or the one device that it names."""
    if isinstance(device_map, Mapping):
        devices = {_device(value) for value in device_map.values()}
        if len(devices) != 1 or "auto" in devices:
            found = f"names {', '.join(sorted(devices))}" if devices else "is empty"
            raise ConfigError(
                f"device_map {found}: which layers lie on which device is planned here; use device_map='auto', with "
                "max_memory where a device should have less, or one device for all"
            )
        return devices.pop()
    if isinstance(device_map, bool) or not isinstance(device_map, str | int | torch.device):
        raise ConfigError(f"device_map is {shown(device_map)}; use 'auto', a device, or a dict of modules and devices")
    if isinstance(device_map, int):
        if device_map < 0:
            raise ConfigError(f"device_map is {device_map}; use 0 for the first GPU, or 'cpu'")
        return f"cuda:{device_map}"
    name = str(device_map)
    if name in ("disk", "meta"):
        raise ConfigError(f"device_map names {name!r}: give ram, for example ram='8GiB'; what exceeds it is on disk")
    if name.startswith("balanced"):
        logger.warning("device_map %r: layers are not spread evenly, but fill the GPUs one after the other", name)
    return "auto" if name in _PLANNED else name


def _budget(max_memory: Any, device: Any) -> dict[str, Any]:
    """{0: "8GiB", "cpu": "30GiB"} -> gpu_memory and ram; without a GPU in it none is used."""
    if not isinstance(max_memory, Mapping) or not max_memory:
        raise ConfigError(f"max_memory is {shown(max_memory)}; use a dict such as {{0: '8GiB', 'cpu': '30GiB'}}")
    gpus = {_ordinal(key): size for key, size in max_memory.items() if key != "cpu"}
    found: dict[str, Any] = {"ram": max_memory["cpu"]} if "cpu" in max_memory else {}
    if not gpus:
        return found | ({"device": "cpu"} if device == "auto" else {})
    sizes, count = list(gpus.values()), torch.cuda.device_count()
    if any(size != sizes[0] for size in sizes):
        raise ConfigError("max_memory gives the GPUs different sizes; glm4lite takes the same of each, see gpu_memory")
    if set(gpus) != set(range(len(gpus))) or (1 < len(gpus) < count):
        listed = ", ".join(map(str, sorted(gpus)))
        raise ConfigError(f"max_memory lists the GPUs {listed}; hide the others with CUDA_VISIBLE_DEVICES and list all")
    if len(gpus) == 1 < count and device == "auto":
        found["device"] = "cuda:0"
    return found | {"gpu_memory": sizes[0]}


def _ordinal(key: Any) -> int:
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    text = str(key).removeprefix("cuda:")
    if text.isascii() and text.isdigit():
        return int(text[:6])
    raise ConfigError(f"max_memory has a size for {shown(key)}; devices are 'cpu' and the numbers of GPUs")


# --- in what


def _precision(names: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """dtype and quant of torch_dtype, quantization_config and the older load_in_4bit."""
    dtype = _dtype(names, own)
    older = {name: names.pop(name) for name in BNB_DEFAULTS if name in names}
    config = names.pop("quantization_config", None)
    if config is not None and older:
        raise ConfigError(f"{next(iter(older))} and quantization_config say the same; leave one out")
    if config is None and not older.get("load_in_4bit") and not older.get("load_in_8bit"):
        alone = [name for name in older if not name.startswith("load_in_")]
        if alone:
            raise ConfigError(f"{alone[0]} says how to quantize, but nothing asks for it; add load_in_4bit=True")
        return {"dtype": dtype}
    if "quant" in own:
        what = "quantization_config" if config is not None else next(iter(older))
        raise ConfigError(f"quant and {what} say the same; leave one out")
    quant, compute = bitsandbytes(older) if config is None else requested(config)
    if compute is not None and dtype == "auto":
        dtype = compute
    elif compute is not None and str(dtype).removeprefix("torch.") != str(compute).removeprefix("torch."):
        logger.warning("bnb_4bit_compute_dtype is not used: products are computed in the activations' type, %s", dtype)
    return {"quant": quant, "dtype": dtype}


def _dtype(names: dict[str, Any], own: Mapping[str, Any]) -> Any:
    """Of dtype and of the older torch_dtype."""
    dtype, older = own.get("dtype", "auto"), names.pop("torch_dtype", "auto")
    if "auto" in (dtype, older):
        return older if dtype == "auto" else dtype
    if str(dtype).removeprefix("torch.") != str(older).removeprefix("torch."):
        raise ConfigError(f"dtype={shown(dtype)} and torch_dtype={shown(older)} contradict each other; leave one out")
    return dtype


def _transformers_config(config: Any) -> Glm4Config:
    if not hasattr(config, "to_dict"):
        raise ConfigError(f"config is {shown(config)}; give a Glm4Config, Transformers' own, or a folder")
    return Glm4Config.from_dict(config.to_dict(), type(config).__name__)
