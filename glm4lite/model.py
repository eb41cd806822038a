"""GLM-4 in torch: one code path for `glm4` and `glm`, differences read from the config.

Parameter names are Hugging Face's, so checkpoints load with no table. Linears and the embedding may be replaced by
quantized ones (glm4lite.loader); nothing here knows about it. The residual stream and the norms are float32 whatever
the model's dtype: o_proj and down_proj outputs of GLM-4 pass 65 504, float16's largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4lite.activations import ACTIVATIONS
from glm4lite.attention import Visibility, attend, attend_with_weights, packed_mask
from glm4lite.cache import (
    Cache,
    HomeCache,
    KVCache,
    KVType,
    LayerCache,
    PackedLayerCache,
    PastKeyValues,
    as_cache,
    bytes_per_token,
)
from glm4lite.config import Glm4Config
from glm4lite.inputs import beside_problem, embeds_problem, ids_problem, keep_problem, labels_problem
from glm4lite.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, GenerateDecoderOnlyOutput
from glm4lite.pretrained import Glm4PreTrainedModel, draw
from glm4lite.rotary import RotaryEmbedding, apply_rotary
from glm4lite_quant.kernels.decoder import Heads

CPU_CHUNK, GPU_CHUNK = 512, 2048
"""Tokens of a prompt computed at a time: they bound the memory of activations."""


Caches = Sequence[HomeCache | None]


class WeightStore(Protocol):
    """Where a decoder layer's weights are when they are needed: the layer asks, and does not know."""

    @property
    def resident(self) -> bool:
        """Whether the layer's modules have their weights at all times."""

    def where(self, tokens: int) -> tuple[torch.device, torch.dtype] | None:
        """Where and in what so many tokens are computed; None: on the layer's own device, in its own type."""

    def acquire(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCache | None
    ) -> AbstractContextManager[tuple[DecoderLayer, Cache | None]]:
        """For an input on `device`: the layer that computes, which has its weights while this is open, and its cache.

        Raises CheckpointError where the disk fails.
        """

    def fused(self, layer: DecoderLayer) -> bool:
        """Whether the layer runs in the native library once its weights are there."""


class Resident:
    """The weights are in the layer's modules."""

    resident = True

    def where(self, tokens: int) -> None:
        return None

    def acquire(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCache | None
    ) -> AbstractContextManager[tuple[DecoderLayer, Cache | None]]:
        return nullcontext((layer, cache))

    def fused(self, layer: DecoderLayer) -> bool:
        return layer.runner.fuses(layer)


class LayerRunner(Protocol):
    """Computes layers faster than torch's code, where it can; `glm4lite.runner` gives a loaded model one."""

    few: int
    """Tokens that go through all layers in one call, which nothing can stop half-way."""

    def run(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        caches: Sequence[Cache | None],
    ) -> Tensor | None:
        """x after the layers, resident ones of one device; None, with nothing done, where torch's code has to run."""

    def fuses(self, layer: DecoderLayer) -> bool:
        """Whether the native library has code for this layer as it is."""

    def clear(self) -> None:
        """The model's tensors have moved."""


class TorchRunner:
    """Leaves everything to torch's code, which is the specification."""

    few = 0

    def run(self, *_: Any) -> None:
        return None

    def fuses(self, layer: DecoderLayer) -> bool:
        return False

    def clear(self) -> None:
        pass


RESIDENT, TORCH = Resident(), TorchRunner()


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) in float32, cast to `dtype`, then times the weight (the reference's order)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(dtype)).to(dtype)


class Attention(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.dropout = config.attention_dropout
        hidden, bias = config.hidden_size, config.attention_bias
        kv_size = config.num_key_value_heads * config.head_dim
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rotary_dim)
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, hidden, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Cache | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, H] -> [B, T, H] and, where wanted, the attention weights [B, heads, T, S]."""
        q = apply_rotary(self._heads(self.q_proj(x)), *rotary)
        k = apply_rotary(self._heads(self.k_proj(x)), *rotary)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if want_weights:
            out, weights = attend_with_weights(q, k, v, visible.mask, self.scale, dropout)
        else:
            out = attend(q, k, v, visible.mask, self.scale, dropout)
        return self.o_proj(out.transpose(1, 2).flatten(-2)), weights


class MLP(nn.Module):
    """down(act(gate) * up), act: silu; rows 0..I-1 of gate_up_proj are the gate."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation_fn = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation_fn(gate) * up)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.store: WeightStore = RESIDENT
        self.runner: LayerRunner = TORCH
        self.dtype: torch.dtype | None = None  # of its linears' inputs, where that is not the embedding's

    def forward(
        self,
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: HomeCache | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x: the residual stream, float32 [B, T, H]; `dtype` is what the linears compute in."""
        if self.store is RESIDENT:  # no context: torch.compile does not follow one that gives a tuple
            return self._run(x, dtype, rotary, visible, cache, want_weights)
        with self.store.acquire(self, x.device, cache) as (layer, lent):
            return layer._run(x, dtype, rotary, visible, lent, want_weights)

    def _run(
        self,
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Cache | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        faster = None if want_weights else self.runner.run((self,), x, dtype, rotary, visible, (cache,))
        if faster is not None:
            return faster, None
        attended, weights = self.self_attn(self.input_layernorm(x, dtype), rotary, visible, cache, want_weights)
        if self.sandwich:
            attended = self.post_self_attn_layernorm(attended, dtype)
        x = x + attended
        out = self.mlp(self.post_attention_layernorm(x, dtype))
        if self.sandwich:
            out = self.post_mlp_layernorm(out, dtype)
        return x + out, weights

    @property
    def device(self) -> torch.device:
        """Where it is computed token by token."""
        return self.input_layernorm.weight.device

    def where(self, tokens: int, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
        """Where and in what so many tokens are computed; `dtype` where the layer has no type of its own."""
        return self.store.where(tokens) or (self.device, self.dtype or dtype)


class Glm4Model(Glm4PreTrainedModel):
    """The trunk: embeddings, layers, final norm. From ids [B, T] to `last_hidden_state` [B, T, hidden_size].

    Source: Transformers' Glm4Model and GlmModel, which the tests compare it with. The residual stream is float32.
    """

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        config = self.config
        padding = config.pad_token_id
        if padding is not None and not 0 <= padding < config.vocab_size:
            padding = None  # a finetune may cut the vocabulary below the pad id
        table = torch.empty(config.vocab_size, config.hidden_size)  # torch would draw its values, and these come after
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding, _weight=table)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.kv: KVType = "float"
        self.context = config.context_length  # tokens a cache may hold; a memory budget allows fewer
        self.runner: LayerRunner = TORCH
        self.checkpointed: Callable[..., Any] | None = None  # calls a layer so that it is computed again for gradients
        self.checkpoint_every = 1  # layers of which one is
        self._init_weights()

    def _layers(self) -> Iterator[DecoderLayer]:
        return (layer for layer in self.layers if isinstance(layer, DecoderLayer))

    @property
    def chunk(self) -> int:
        """Tokens of a prompt in one forward pass: more where a GPU decodes the weights, or is sent them, for each."""
        devices = {layer.where(GPU_CHUNK, self.dtype)[0].type for layer in self._layers()}
        return CPU_CHUNK if "cpu" in devices else GPU_CHUNK

    def _runs(self, tokens: int, together: bool) -> Iterator[slice]:
        """The layers in order: alone, or `together` as many as one call may take."""
        kinds = [_kind(layer, tokens) if together else None for layer in self._layers()]
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
        types = (layer.dtype or self.dtype for layer in self._layers())
        return sum(bytes_per_token(self.config, self.kv, dtype.itemsize) for dtype in types) // len(self.layers)

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache of the kind that `kv` asks for, in the native layout where native layers will read it."""
        return KVCache.of([self._layer_cache(layer, batch) for layer in self._layers()])

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
        if given is None:
            position_ids = torch.arange(past, past + length, device=embeds.device)[None]
        else:
            position_ids = given
            if attention_mask is None and cache is None:
                attention_mask = packed_mask(position_ids)
        weights_wanted = self._switch("output_attentions", output_attentions)
        collected = _Collected(self._switch("output_hidden_states", output_hidden_states), weights_wanted)
        stages = _Stages(self.rotary_emb, embeds, position_ids, attention_mask, past)
        x = self._through_layers(embeds, stages, cache, collected)
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

    def _through_layers(self, embeds: Tensor, stages: _Stages, cache: KVCache | None, collected: _Collected) -> Tensor:
        """[B, T, H] after the final norm."""
        length = embeds.shape[1]
        caches: Sequence[HomeCache | None] = [None] * len(self.layers) if cache is None else cache.layers
        few = cache is not None and cache.dynamic is None and length <= self.runner.few and not collected.wanted
        checkpointed = self.checkpointed if self.training else None
        x, stage = embeds.float(), stages.of(embeds.device, embeds.dtype)
        collected.hidden(embeds)
        for run in self._runs(length, few):
            layers = list(self._layers())[run]
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


class _Stage(NamedTuple):
    """What the layers of one device share in a forward pass."""

    device: torch.device
    dtype: torch.dtype
    rotary: tuple[Tensor, Tensor]
    visible: Visibility

    @property
    def inputs(self) -> tuple[torch.dtype, tuple[Tensor, Tensor], Visibility]:
        return self.dtype, self.rotary, self.visible


class _Stages:
    """The stages of one forward pass, each made when its first layer comes."""

    def __init__(
        self, rotary: RotaryEmbedding, embeds: Tensor, positions: Tensor, padding: Tensor | None, past: int
    ) -> None:
        self._rotary, self._positions, self._padding = rotary, positions, padding
        self._past, self._length = past, embeds.shape[1]
        self._made: dict[tuple[torch.device, torch.dtype], _Stage] = {}

    def of(self, device: torch.device, dtype: torch.dtype) -> _Stage:
        if (device, dtype) not in self._made:
            padding = None if self._padding is None else self._padding.to(device)
            visible = Visibility(padding, self._past, self._length, device)
            rotary = self._rotary(self._positions.to(device), dtype)
            self._made[device, dtype] = _Stage(device, dtype, rotary, visible)
        return self._made[device, dtype]


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


class Glm4ForCausalLM(Glm4PreTrainedModel):
    """The trunk and the language-model head. From ids [B, T] to logits [B, T, vocab_size]; `generate` goes on from ids.

        model = Glm4ForCausalLM.from_pretrained("nano", quant="int4")
        output = model(torch.tensor([[1, 2, 3]]), logits_to_keep=1)
        again = model(torch.tensor([[4]]), past_key_values=output.past_key_values)

    Source: Transformers' Glm4ForCausalLM and GlmForCausalLM, which the tests compare it with.
    """

    accepts_loss_kwargs = True
    loss_type: ClassVar[str] = "ForCausalLM"  # tells Transformers' Trainer that a row's first label does not count

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.model = Glm4Model(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        draw(self.lm_head.weight, self.config.initializer_range)
        self.tie_weights()

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache; `forward` takes it as past_key_values."""
        return self.model.new_cache(batch)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head: anything from [..., hidden_size] to [..., vocab_size]."""
        self.lm_head = value  # type: ignore[assignment]  # a quantized head is no nn.Linear either

    @property
    def context(self) -> int:
        """Tokens of the longest conversation: the model's, or what the memory budget has room for."""
        return self.model.context

    @property
    def chunk(self) -> int:
        """Tokens of a prompt in one forward pass."""
        return self.model.chunk

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache_position: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Arguments as Glm4Model. labels [B, T], shifted inside, -100 is ignored.

        num_items_in_batch: labels of all batches whose gradients are added up; the loss is this batch's share of their
        mean. None: the mean over this batch.

        logits_to_keep: an int n keeps the last n positions (0: all), a 1-D tensor picks positions. Logits of all
        positions of a long prompt take 600 KB each at GLM-4's vocabulary: generation asks for the last one only.
        """
        trunk = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cache_position=cache_position,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        if problem := keep_problem(logits_to_keep, trunk.last_hidden_state.shape[1]):
            raise ValueError(problem)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(trunk.last_hidden_state[:, keep])
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(loss, logits, trunk.past_key_values, trunk.hidden_states, trunk.attentions)
        return self._returned(output, return_dict)

    def generate(
        self, inputs: Tensor | None = None, *arguments: Any, **options: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continues the sequences `inputs` [B, T], padded on the left; see `glm4lite.generation.loop.generate`."""
        from glm4lite.generation import generate

        return generate(self, inputs, *arguments, **options)

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score [B, new] of each new id, from what `generate` returned with output_scores; it makes no beams."""
        if beam_indices is not None:
            raise ValueError("beam_indices belong to beam search, which glm4lite's generate does not have")
        from glm4lite.generation.loop import transition_scores

        return transition_scores(sequences, scores, normalize_logits)


def causal_lm_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in float32 of logits[:, t] against labels[:, t + 1]; labels of -100 do not count."""
    if problem := labels_problem(labels, logits.shape[:2], logits.shape[2]):
        raise ValueError(problem)
    shifted = F.pad(labels.long(), (0, 1), value=-100)[:, 1:]
    flat, targets = logits.float().flatten(0, 1), shifted.flatten().to(logits.device)
    return F.cross_entropy(flat, targets) if items is None else F.cross_entropy(flat, targets, reduction="sum") / items
