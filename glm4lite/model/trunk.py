"""What every GLM-4 model has, and the trunk: embeddings, decoder layers and the final norm, through whatever stores
and runners the layers have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from glm4lite.base.errors import ConfigError
from glm4lite.model.attention import Visibility, packed_mask
from glm4lite.model.cache import HomeCache, HomeCaches, KVCache, PastKeyValues, as_cache
from glm4lite.model.config import Glm4Config
from glm4lite.model.inputs import beside_problem, embeds_problem, ids_problem
from glm4lite.model.layer_cache import LayerCache
from glm4lite.model.layers import TORCH, DecoderLayer, LayerRunner, RMSNorm
from glm4lite.model.lora import adapters_of
from glm4lite.model.outputs import (
    BaseModelOutputWithPast,
    ModelOutput,
)
from glm4lite.model.packed_cache import KVType, PackedLayerCache, bytes_per_token
from glm4lite.model.rotary import RotaryEmbedding
from glm4lite.model.stages import Stages
from glm4lite.model.step import Span, Step

Output = TypeVar("Output", bound=ModelOutput)


CPU_CHUNK, GPU_CHUNK = 512, 2048
"""Tokens of a prompt computed at a time: they bound the memory of activations."""
GPU_ROWS = 64
"""Most rows of a step that go through a GPU's layers as a recording, whose memory stays taken."""


def draw(weight: Tensor, std: float) -> None:
    """N(0, std) in place. Nothing on the meta device, where torch would import its compiler for it: a second."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class ModelBase(nn.Module):
    """A config, and what is asked of the embedding and the head. `config` may also be Transformers' own."""

    base_model_prefix: ClassVar[str] = "model"

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        if not isinstance(config, Glm4Config):
            if not hasattr(config, "to_dict"):
                raise ConfigError(f"config must be a Glm4Config, found {type(config).__name__}")
            config = Glm4Config.from_dict(config.to_dict(), type(config).__name__)
        self.config = config
        self.stored_generation_config: Mapping[str, Any] = {}  # of generation_config.json, as it was read

    def _switch(self, name: str, given: bool | None) -> bool:
        """An argument of forward, or what config says where it is None."""
        return bool(getattr(self.config, name) if given is None else given)

    def _returned(self, output: Output, return_dict: bool | None) -> Output:
        """The output; a tuple of what is in it where a script wants that (which no type here says)."""
        return output if self._switch("return_dict", return_dict) else cast(Output, output.to_tuple())

    @property
    def base_model(self) -> Trunk:
        """The trunk; of the trunk itself, that."""
        return cast(Trunk, getattr(self, self.base_model_prefix, self))

    @property
    def device(self) -> torch.device:
        """Where ids are looked up, so where inputs are expected."""
        return next(tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations between the layers, and of a float cache."""
        embedding = self.base_model.embed_tokens
        return embedding.weight.dtype if isinstance(embedding, nn.Embedding) else embedding.dtype

    def get_input_embeddings(self) -> nn.Module:
        """From ids to vectors: nn.Embedding, or its quantized form."""
        return self.base_model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The language-model head; None for classes that have none."""
        return getattr(self, "lm_head", None)

    def tie_weights(self) -> None:
        """With tie_word_embeddings the head is the embedding: one tensor under two names."""
        head, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        if self.config.tie_word_embeddings and isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding):
            head.weight = embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to()` and `.half()` come here: float16 is refused, whatever asks for it."""
        if fn(torch.empty(0)).dtype == torch.float16:
            raise ConfigError(
                "float16 is refused: GLM-4's activations reach 68000, float16 ends at 65504; use bfloat16 or float32"
            )
        return super()._apply(fn, recurse)

    def _init_weights(self) -> None:
        """The reference's initialization: N(0, initializer_range), biases 0, norms 1, the padding row 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw(module.weight, self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                draw(module.weight, self.config.initializer_range)
                if module.padding_idx is not None:
                    with torch.no_grad():
                        module.weight[module.padding_idx].zero_()


class DecoderLayers(nn.ModuleList):
    """A list of modules that says what they are."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[DecoderLayer]: ...

        @overload
        def __getitem__(self, index: slice) -> DecoderLayers: ...

        @overload
        def __getitem__(self, index: int) -> DecoderLayer: ...

        def __getitem__(self, index: int | slice) -> DecoderLayer | DecoderLayers: ...


class Trunk(ModelBase):
    """The trunk: embeddings, layers, final norm."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        config = self.config
        padding = config.pad_token_id
        if padding is not None and not 0 <= padding < config.vocab_size:
            padding = None  # a finetune may cut the vocabulary below the pad id
        table = torch.empty(config.vocab_size, config.hidden_size)  # torch would draw its values, and these come after
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding, _weight=table)
        self.layers = DecoderLayers(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.kv: KVType = "float"
        self.context = config.context_length  # tokens a cache may hold; a memory budget allows fewer
        self.runner: LayerRunner = TORCH
        self.checkpointed: Callable[..., Any] | None = None  # calls a layer so that it is computed again for gradients
        self.checkpoint_every = 1  # layers of which one is
        self.adapters: tuple[str, ...] = ()  # that a step's rows may choose, by number: the first is 1
        self.adapter_identities: Callable[[], tuple[bytes, Mapping[str, bytes]]] | None = None
        self.interrupt: Callable[[], None] | None = None  # called before each step through the layers; may raise
        self._init_weights()

    @property
    def chunk(self) -> int:
        """Tokens of a prompt in one forward pass: more where a GPU decodes the weights, or is sent them, for each."""
        devices = {layer.where(GPU_CHUNK, self.dtype)[0].type for layer in self.layers}
        return CPU_CHUNK if "cpu" in devices else GPU_CHUNK

    def _runs(self, tokens: int, together: bool) -> Iterator[slice]:
        """The layers in order: alone, or `together` as many as one call may take."""
        kinds = [_kind(layer, tokens) if together else None for layer in self.layers]
        few = {kind[0] for kind in kinds if kind is not None and tokens <= self.runner.few(kind[0])}
        kinds = [kind if kind is not None and kind[0] in few else None for kind in kinds]
        begin = 0
        for end in range(1, len(kinds) + 1):
            joins = end < len(kinds) and kinds[end] is not None and kinds[end] == kinds[end - 1]
            if not joins:
                yield slice(begin, end)
                begin = end

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.runner.clear()
        return super()._apply(fn, recurse)

    @property
    def cache_bytes(self) -> int:
        """What one token adds to the cache, each layer's in its own type."""
        types = (layer.dtype or self.dtype for layer in self.layers)
        return sum(bytes_per_token(self.config, self.kv, dtype.itemsize) for dtype in types) // len(self.layers)

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache of the kind that `kv` asks for, in the native layout where native layers will read it."""
        return KVCache.of([self._layer_cache(layer, batch) for layer in self.layers])

    def _layer_cache(self, layer: DecoderLayer, batch: int) -> HomeCache:
        native = batch == 1 and (layer.dtype or self.dtype) == torch.float32 and layer.store.fused(layer)
        int8 = self.kv == "int8"
        return PackedLayerCache(int8, self.context) if native or int8 else LayerCache(self.context)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, H]; attention_mask [B, past + T]; position_ids [B or 1, T].

        Positions count on from the cache unless given (`cache_position` [T] serves where `position_ids` is not): with
        left padding the caller derives them from the mask. Without mask and cache, positions that begin anew inside a
        row tell several sequences, which do not see each other.
        past_key_values: a KVCache, a DynamicCache of Transformers (which then holds the new keys and values too), or a
        (key, value) pair a layer. The switches that are None are config's; with return_dict=False a tuple comes back.

        Raises ValueError for inputs that do not fit the model or each other, naming the argument.
        """
        embeds = self._embedded(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache, embeds)
        past, length = 0 if cache is None else cache.get_seq_length(), embeds.shape[1]
        given = cache_position[None] if isinstance(cache_position, Tensor) else cache_position
        given = given if position_ids is None else position_ids
        if problem := beside_problem(embeds, given, attention_mask, past, self.config.num_attention_heads):
            raise ValueError(problem)
        if cache is not None:
            cache.reserve(length)
        if given is None:
            position_ids = torch.arange(past, past + length, device=embeds.device)[None]
        else:
            position_ids = given
            if attention_mask is None and cache is None:
                attention_mask = packed_mask(position_ids)
        weights_wanted = self._switch("output_attentions", output_attentions)
        collected = _Collected(self._switch("output_hidden_states", output_hidden_states), weights_wanted)

        def visibility(device: torch.device) -> Visibility:
            padding = None if attention_mask is None else attention_mask.to(device)
            return Visibility(padding, past, length, device)

        few = cache is not None and cache.dynamic is None and not collected.wanted
        caches = [None] * len(self.layers) if cache is None else cache.layers
        stages = Stages(self.rotary_emb, position_ids, visibility)
        x = self._through_layers(embeds, stages, caches, few, collected)
        output = BaseModelOutputWithPast(
            x, None if cache is None else cache.dynamic or cache, collected.hidden_states, collected.attentions
        )
        return self._returned(output, return_dict)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, T, H] of whichever is given."""
        if input_ids is not None and inputs_embeds is None:
            if problem := ids_problem(input_ids, self.config.vocab_size):
                raise ValueError(problem)
            looked_up: Tensor = self.embed_tokens(input_ids.to(self.device, torch.long))
            return looked_up
        if inputs_embeds is None or input_ids is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if problem := embeds_problem(inputs_embeds, self.config.hidden_size, self.dtype):
            raise ValueError(problem)
        return inputs_embeds

    def _cache(
        self,
        given: PastKeyValues | Sequence[tuple[Tensor, Tensor]] | None,
        use_cache: bool | None,
        embeds: Tensor,
    ) -> KVCache | None:
        """The caller's cache as a KVCache, or a new one where one is wanted."""
        batch = embeds.shape[0]
        if given is None:
            wanted = self._switch("use_cache", use_cache) and not (self.training and self.checkpointed)
            return self.new_cache(batch) if wanted else None
        cache = as_cache(given, lambda: self.new_cache(batch), self.config)
        if cache.batch not in (None, batch):
            raise ValueError(f"past_key_values holds {cache.batch} sequences, the input {batch}")
        return cache

    def step(self, spans: Sequence[Span]) -> Tensor:
        """The states [rows kept of all spans, H] after the final norm; see `CausalLM.step`."""
        whole = Step(spans)
        whole.reserve()
        groups = self.runner.groups(list(self.layers), spans)
        if len(groups) == 1:
            return self._stepped(whole)
        states = dict[int, Tensor]()
        for group in groups:
            found = self._stepped(Step([spans[at] for at in group]))
            states |= zip(group, found.split([spans[at].kept for at in group]), strict=True)
        return torch.cat([states[at] for at in range(len(spans))])

    def _stepped(self, step: Step) -> Tensor:
        """The states that are kept of one group of sequences."""
        with adapters_of(step.adapters):
            embeds = self._embedded(torch.tensor([step.ids], device=self.device), None)
            stages = Stages(self.rotary_emb, step.positions.to(embeds.device), step.visibility)
            return self._through_layers(embeds, stages, step.caches, True, _Collected(False, False))[0, step.kept]

    def _through_layers(
        self,
        embeds: Tensor,
        stages: Stages,
        caches: Sequence[HomeCaches | None],
        together: bool,
        collected: _Collected,
    ) -> Tensor:
        """[B, T, H] after the final norm. `together`: a few rows go through several layers in one call."""
        length = embeds.shape[1]
        checkpointed = self.checkpointed if self.training else None
        x, stage = embeds.float(), stages.of(embeds.device, embeds.dtype)
        collected.hidden(embeds)
        for run in self._runs(length, together):
            if self.interrupt is not None:
                self.interrupt()
            layers = list(self.layers)[run]
            stage = stages.of(*layers[0].where(length, embeds.dtype))
            x = x.to(stage.device)
            whole = self.runner.run(layers, x, *stage.inputs, caches[run]) if len(layers) > 1 else None
            if whole is not None:
                x = whole
                continue
            for number, layer, layer_cache in zip(range(run.start, run.stop), layers, caches[run], strict=True):
                call = checkpointed if checkpointed and number % self.checkpoint_every == 0 else _call
                x, weights = call(layer, x, *stage.inputs, layer_cache, collected.attentions is not None)
                collected.attention(weights)
                if layer is not self.layers[-1]:
                    collected.hidden(x.to(stage.dtype))
        x = self.norm(x.to(self.norm.weight.device), stage.dtype)
        collected.hidden(x)
        return x


def _call(layer: DecoderLayer, *inputs: Any) -> Any:
    return layer(*inputs)


def _kind(layer: DecoderLayer, tokens: int) -> tuple[torch.device, torch.dtype | None] | None:
    """Layers of one kind go together; None: alone, for its weights come and go, or somebody waits for it."""
    store, hooked = layer.store, layer._forward_hooks or layer._forward_pre_hooks
    if not store.resident or store.where(tokens) is not None or hooked:
        return None
    return layer.device, layer.dtype


class _Collected:
    """Hidden states and attention weights, kept only when asked for."""

    def __init__(self, hidden_states: bool, attentions: bool) -> None:
        self.hidden_states: tuple[Tensor, ...] | None = () if hidden_states else None
        self.attentions: tuple[Tensor, ...] | None = () if attentions else None
        self.wanted = hidden_states or attentions

    def hidden(self, state: Tensor) -> None:
        if self.hidden_states is not None:
            self.hidden_states += (state,)

    def attention(self, weights: Tensor | None) -> None:
        if self.attentions is not None and weights is not None:
            self.attentions += (weights,)


class ModelWithTrunk(ModelBase):
    """What has a trunk as `model` and something on top."""

    trunk_class: ClassVar[type[Trunk]] = Trunk  # what `model` is made of; a class with more methods where there is one
