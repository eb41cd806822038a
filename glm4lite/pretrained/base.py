"""Glm4PreTrainedModel: what Transformers gives every model class, for ours: loading, saving, sizes, switches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from glm4lite.base.errors import ConfigError, one_line, shown
from glm4lite.model.config import Glm4Config
from glm4lite_quant import BnbLinear, QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from glm4lite.base.events import Progress
    from glm4lite.checkpoint.formats.format import Quant
    from glm4lite.pretrained.generation import GenerationConfig


from glm4lite.model.trunk import ModelBase, Trunk


class Glm4PreTrainedModel(ModelBase):
    """What scripts written for Transformers expect of a GLM-4 class: loading, saving, embeddings, sizes.

    `config` may also be Transformers' own. Source: Transformers' PreTrainedModel; docs/api.md lists call by call what
    works, what differs, what is refused.
    """

    config_class: ClassVar[type[Glm4Config]] = Glm4Config
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]  # tells accelerate what lies on one device
    accepts_loss_kwargs: ClassVar[bool] = False  # tells Transformers' Trainer whether forward takes num_items_in_batch

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self._generation_config: GenerationConfig | None = None
        self._input_hook: RemovableHandle | None = None

    @overload
    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        quant: str | Quant | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        progress: Callable[[Progress], None] | None = None,
        *,
        output_loading_info: Literal[False] = False,
        **options: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        quant: str | Quant | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        progress: Callable[[Progress], None] | None = None,
        *,
        output_loading_info: Literal[True],
        **options: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        quant: str | Quant | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        progress: Callable[[Progress], None] | None = None,
        *,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Loads a folder of safetensors, "nano", or a Hub repository.

        The first arguments, and calibration, gpu_memory, ram, context and kv, are those of `glm4lite.load`. Beside them
        go Transformers' names (`glm4lite.pretrained.transformers_names`): torch_dtype, device_map, max_memory,
        quantization_config, revision, cache_dir, token, local_files_only, subfolder, config, and keys of the config
        with other values, such as num_labels=3.

        output_loading_info: also return missing_keys, unexpected_keys, mismatched_keys and error_msgs, as Transformers.

        Raises:
            Glm4liteError: one line saying which file, tensor, key or argument cannot be used, and what to do.
        """
        from glm4lite.loading.loader import load_class
        from glm4lite.pretrained.transformers_names import request

        own = {"quant": quant, "dtype": dtype, "device": device, "progress": progress}
        asked = request(source, {**own, "output_loading_info": output_loading_info, **options})
        model, plan = load_class(cls, asked.source, asked.options)
        if asked.generation_config is not None:
            model.generation_config = asked.generation_config
        return (model, plan.loading_info) if asked.loading_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> None:
        """Writes safetensors, config.json and generation_config.json; `from_pretrained` gives the same model back.

        Transformers opens what is not quantized, and what bitsandbytes quantized to 4 bits and left its head as it was.
        The folder may hold other files, which stay, and an older checkpoint, whose weights go, also one that this model
        is mapped from. An error or Ctrl-C leaves the old files.

        Args:
            is_main_process: False writes nothing, as one of several processes with the same model does.
            state_dict: written instead of the model's own; all of an unquantized model's tensors.
            max_shard_size: bytes, or "5GB" (10**9 each; "5GiB" is 2**30); a larger tensor gets a shard of its own.

        Raises:
            Glm4liteError: the folder cannot be written, or an argument asks for what glm4lite does not have.
        """
        from glm4lite.loading.saving import save_model
        from glm4lite.pretrained.transformers_names import check_saving

        check_saving({"push_to_hub": push_to_hub, **options})
        if is_main_process:
            save_model(self, save_directory, max_shard_size, state_dict, self._saved_generation_config())

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> None:
        """Refused: save_pretrained, then huggingface-hub's own command."""
        command = f"hf upload {one_line(repo_id)} folder"
        raise ConfigError(f"push_to_hub is not supported: call save_pretrained(folder), then run `{command}`")

    @property
    def generation_config(self) -> GenerationConfig:
        """What `generate` takes where the call does not say: from generation_config.json, else config's ids."""
        from glm4lite.pretrained.generation import GenerationConfig

        if self._generation_config is None:
            stored, ids = self.stored_generation_config, ("eos_token_id", "bos_token_id", "pad_token_id")
            values = stored or {name: getattr(self.config, name) for name in ids}
            self._generation_config = GenerationConfig.from_stored(values)
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | Mapping[str, Any]) -> None:
        from glm4lite.pretrained.generation import GenerationConfig

        self._generation_config = GenerationConfig.of(value)

    def _saved_generation_config(self) -> Mapping[str, Any] | None:
        """As it was stored; as it is where it was looked at, since it may have been changed then."""
        if not self.can_generate():
            return None
        if self._generation_config is None and self.stored_generation_config:
            return self.stored_generation_config
        return self.generation_config.to_dict()

    @property
    def name_or_path(self) -> str:
        """What it was loaded from, "" for a model made of a config."""
        return self.config.name_or_path

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights; return_buffers=False leaves out those that are no parameters, as quantized ones."""
        found = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in found)

    def can_generate(self) -> bool:
        """Whether the class has `generate`."""
        return hasattr(self, "generate")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Numbers in the weights; a quantized weight counts as the matrix it stands for, a tied one once."""
        embedding = self.get_input_embeddings()
        left_out = {id(own) for own in (embedding, *embedding.parameters())} if exclude_embeddings else set()
        plain = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        counted = sum(p.numel() for p in plain if id(p) not in left_out)
        if only_trainable:
            return counted
        return counted + sum(_numel(module) for module in self.modules() if id(module) not in left_out)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the embedding [vocabulary, hidden]; a tied head keeps the old one until `tie_weights`."""
        self.base_model.embed_tokens = value

    def get_decoder(self) -> Trunk:
        """The trunk, under the name that scripts for several families have for it."""
        return self.base_model

    def enable_input_require_grads(self) -> None:
        """The embedding's output asks for gradients, for adapters over frozen weights with gradient checkpointing."""
        self.disable_input_require_grads()
        self._input_hook = self.get_input_embeddings().register_forward_hook(_with_gradients)

    def disable_input_require_grads(self) -> None:
        """Takes back `enable_input_require_grads`."""
        if self._input_hook is not None:
            self._input_hook.remove()
            self._input_hook = None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head: anything from [..., hidden_size] to [..., vocab_size]. ValueError where there is none."""
        if self.get_output_embeddings() is None:
            raise ValueError(f"{type(self).__name__} has no output embeddings")
        self.add_module("lm_head", value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Rows are added to the embedding and the head, or cut off; returns the embedding.

        mean_resizing: new rows are drawn from the old rows' mean and covariance, as Transformers does, so that they
        say as little as possible; else from N(0, initializer_range). Raises ValueError for a quantized embedding.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear | None):
            raise ValueError("a quantized embedding or head cannot be resized; load with quant='none'")
        for name, number in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if number is not None and not isinstance(number, int):
                raise ValueError(f"{name} must be a whole number, found {shown(number)}")
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        if size < 1 or multiple < 1:
            raise ValueError(f"a vocabulary needs at least one row, found {new_num_tokens}, {pad_to_multiple_of}")
        size = -(-size // multiple) * multiple
        if size != embedding.num_embeddings:
            resized = partial(_resized, size=size, std=None if mean_resizing else self.config.initializer_range)
            embedding.weight, embedding.num_embeddings = resized(embedding.weight), size
            if embedding.padding_idx is not None and embedding.padding_idx >= size:
                embedding.padding_idx = None
            if head is not None:
                head.weight = embedding.weight if self.config.tie_word_embeddings else resized(head.weight)
                head.out_features = size
            self.config.vocab_size = size
        return embedding

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again for their gradients."""
        return self.base_model.checkpointed is not None

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training, layers are computed again for the gradients instead of keeping their activations: one of every
        so many. Raises ValueError for offload, which is not there.
        """
        if offload:
            raise ValueError("gradient_checkpointing_enable(offload=True) is not supported; leave it out")
        if not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise ValueError(f"every_n_layers must be a whole number from 1, found {shown(every_n_layers)}")
        options = {"use_reentrant": False} | dict(gradient_checkpointing_kwargs or {})
        self.base_model.checkpointed = partial(checkpoint, **options)
        self.base_model.checkpoint_every = every_n_layers

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """The newer name of `gradient_checkpointing_disable`."""
        self.base_model.checkpointed = None

    def gradient_checkpointing_disable(self) -> None:
        """Activations are kept for the gradients again."""
        self.base_model.checkpointed = None

    def post_init(self) -> None:
        """What a class of a script's own calls last, with its own modules beside the trunk: all get initial values."""
        self._init_weights()
        self.tie_weights()


def _with_gradients(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _numel(module: nn.Module) -> int:
    """Of the matrix and the bias that a quantized module stands for; 0 for any other, whose parameters say it."""
    if isinstance(module, QuantEmbedding):
        return module.num_embeddings * module.embedding_dim
    if isinstance(module, QuantLinear | BnbLinear):
        return module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
    return 0


def _resized(weight: Tensor, size: int, std: float | None) -> nn.Parameter:
    """[V, H] -> [size, H]. Source of the mean resizing: John Hewitt, "Initializing new word embeddings", 2021."""
    old = weight.detach()
    added = size - len(old)
    if added <= 0:
        return nn.Parameter(old[:size].clone(), weight.requires_grad)
    if std is not None:
        rows = torch.randn(added, old.shape[1], device=old.device) * std
    else:
        rows = _like_rows(old.float(), added)
    return nn.Parameter(torch.cat((old, rows.to(old.dtype))), weight.requires_grad)


def _like_rows(rows: Tensor, count: int) -> Tensor:
    """`count` draws from a normal distribution with the rows' mean and 1e-9 of their covariance."""
    mean = rows.mean(0)
    centred = rows - mean
    # With z ~ N(0, 1) for each row, z @ centred / sqrt(V) has the rows' covariance, without a factorization.
    noise = torch.randn(count, len(rows), device=rows.device) @ centred / len(rows) ** 0.5
    return mean + noise * 1e-9**0.5
