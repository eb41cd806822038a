"""`generate`: a batch of prompts, padded on the left, continued one token a step until every sequence has ended."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from glm4lite.base.errors import ConfigError, ContextLengthError, ModelError, shown
from glm4lite.model.cache import KVCache, as_cache
from glm4lite.model.inputs import embeds_problem, ids_problem, tensor_problem
from glm4lite.model.outputs import GenerateDecoderOnlyOutput
from glm4lite.pretrained.generation.config import (
    DEFAULT_NEW_TOKENS,
    DEFAULT_TOP_K,
    GenerationConfig,
    is_setting,
    unknown,
)
from glm4lite.pretrained.generation.processors import LogitsProcessor, processors
from glm4lite.pretrained.generation.stopping import Decoder, StoppingCriterion, criteria, stopped

if TYPE_CHECKING:
    from glm4lite.model.causal_lm import CausalLM

# Arguments of Transformers' generate for what this one does not do, with the values that ask for nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "synced_gpus": (False,),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "custom_generate": (),
    "trust_remote_code": (False,),
    "use_model_defaults": (True,),
}


class Streamer(Protocol):
    """Given the prompt, then the ids of each step, on the CPU; Transformers' TextStreamer is one."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@torch.no_grad()
def generate(
    model: CausalLM,
    defaults: GenerationConfig,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriterion] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    *,
    streamer: Streamer | None = None,
    tokenizer: Decoder | None = None,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    **settings: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continues each of the sequences [B, T], as Transformers' `generate` does for decoder-only models.

    Args:
        defaults: the model's own settings.
        inputs: ids [B, T] (also as `input_ids`), padded on the left where their lengths differ. None: `bos_token_id`.
        generation_config: settings, ours or Transformers' object; each may also be given by its name, which wins.
        logits_processor: called with ids [B, T] and scores [B, V] of the next id, before sampling's own filters.
        stopping_criteria: called with ids and the scores so far; true, or a bool for each sequence, ends it.
        prefix_allowed_tokens_fn: called with a sequence's number and its ids; only the ids it returns are possible.
        streamer: gets the prompt and each new id (one sequence only).
        tokenizer: what decodes ids, for `stop_strings`.
        inputs_embeds: vectors [B, T, H], computed instead of the ids; only new ids are returned, behind `inputs` where
            these are given too.
        attention_mask: [B, T], 0 where the prompt is padding. None: where ids are the pad id and that ends no text.
        past_key_values: a cache of the first positions of `inputs`, which are not computed again.
        settings: fields of GenerationConfig.

    Returns:
        ids [B, T + new], sequences that ended earlier filled with the pad id; with return_dict_in_generate an output
        with `sequences` and what output_scores, output_logits, output_attentions and output_hidden_states ask for.
        With num_return_sequences = n each prompt has n rows in turn.

    Raises:
        ConfigError: a setting is out of range, not known, or not supported (beam search), by name.
        ContextLengthError: the prompt leaves no room in the model's context.
        ModelError: the model's output is not finite.
        ValueError: tensors that do not fit the model or each other.
    """
    config = _settings(defaults, generation_config, settings)
    prompt = _Prompt.of(model, _only(inputs, input_ids), inputs_embeds, attention_mask, position_ids, config)
    new_tokens = _most_new_tokens(model, config, prompt)
    prompt = prompt.repeated(config.num_return_sequences or 1)
    if streamer is not None and len(prompt.ids) > 1:
        raise ValueError("a streamer takes one sequence, not a batch")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer must have put and end, as TextStreamer, found {shown(streamer)}")
    given = _callables("logits_processor", logits_processor)
    rules = _callables("stopping_criteria", stopping_criteria)
    if prefix_allowed_tokens_fn is not None:
        given.insert(0, _allowed(prefix_allowed_tokens_fn))
    batch = _Batch(
        model,
        config,
        prompt,
        _cache_of(model, prompt, past_key_values, config),
        processors(config, prompt.ids.shape[1], prompt.length, new_tokens, prompt.mask, given),
        criteria(config, tokenizer, rules),
        new_tokens,
    )
    if streamer is None:
        return batch.run(lambda ids: None)
    streamer.put(prompt.ids.cpu())
    done = batch.run(lambda ids: streamer.put(ids.cpu()))
    streamer.end()
    return done


def _callables(name: str, given: Any) -> list[Any]:
    """A list of functions; ValueError for a function alone, and for anything else."""
    if given is not None and (not isinstance(given, list | tuple) or not all(map(callable, given))):
        raise ValueError(f"{name} must be a list of functions (ids, scores), found {shown(given)}")
    return list(given or ())


def transition_scores(sequences: Tensor, scores: Sequence[Tensor], normalize_logits: bool = False) -> Tensor:
    """The score [B, new] of each new id, from `generate`'s sequences and scores; log probabilities if normalized."""
    given = list(scores or ())
    shapes = {tuple(step.shape) for step in given if isinstance(step, Tensor)}
    if not given or len(shapes) != 1 or next(iter(shapes))[:1] != sequences.shape[:1]:
        raise ValueError(
            "scores must hold a tensor [batch, vocabulary] a step, as generate returns them with "
            "return_dict_in_generate=True and output_scores=True"
        )
    stacked = torch.stack(given, 1)
    if stacked.dim() != 3 or stacked.shape[1] > sequences.shape[1] or int(sequences.max()) >= stacked.shape[2]:
        raise ValueError(f"scores of shape {list(stacked.shape)} do not belong to sequences {list(sequences.shape)}")
    if normalize_logits:
        stacked = stacked.log_softmax(-1)
    return stacked.gather(2, sequences[:, -stacked.shape[1] :, None]).squeeze(2)


def _settings(defaults: GenerationConfig, given: Any, settings: dict[str, Any]) -> GenerationConfig:
    """The call's settings over the given object's, over the model's own."""
    for name, off in _REFUSED.items():
        value = settings.pop(name, None)
        if value is not None and value not in off:
            raise ConfigError(f"{name} is not supported by glm4lite's generate; leave it out")
    arguments = [
        name for name in inspect.signature(generate).parameters if name not in ("model", "defaults", "settings")
    ]
    known = [*GenerationConfig.model_fields, *arguments]
    for name in settings:
        if not is_setting(name):
            raise ConfigError(unknown(name, known))
    asked = GenerationConfig() if given is None else GenerationConfig.of(given)
    return asked.over(defaults).over(GenerationConfig(top_k=DEFAULT_TOP_K)).with_changes(**settings)


def _only(inputs: Tensor | None, input_ids: Tensor | None) -> Tensor | None:
    if inputs is not None and input_ids is not None:
        raise ValueError("give the prompt as inputs or as input_ids, not both")
    return inputs if input_ids is None else input_ids


@dataclass(frozen=True)
class _Prompt:
    """ids [B, T]; mask and positions [B, length]. Where vectors [B, length, H] are computed in place of the ids, these
    only begin the answer (or T = 0); else T = length.
    """

    ids: Tensor
    embeds: Tensor | None
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls,
        model: CausalLM,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        config: GenerationConfig,
    ) -> _Prompt:
        if embeds is not None:
            if problem := embeds_problem(embeds, model.config.hidden_size, model.dtype):
                raise ValueError(problem)
            none = torch.empty(embeds.shape[0], 0, dtype=torch.long, device=embeds.device)
            ids = none if ids is None else ids
        elif ids is None:
            if config.bos_token_id is None:
                raise ValueError("there is no prompt, and no bos_token_id to begin with; give input_ids")
            ids = torch.tensor([[config.bos_token_id]], device=model.device)
        none_given = isinstance(ids, Tensor) and embeds is not None and ids.shape[1:] == (0,)
        if not none_given and (problem := ids_problem(ids, model.config.vocab_size)):
            raise ValueError(problem)
        if embeds is not None and len(ids) != len(embeds):
            raise ValueError(f"input_ids has {len(ids)} sequences, inputs_embeds {len(embeds)}")
        ids = ids.long()
        shape = tuple((ids if embeds is None else embeds).shape[:2])
        for name, given in (("attention_mask", mask), ("position_ids", positions)):
            if given is not None and (problem := tensor_problem(name, given)):
                raise ValueError(problem)
        mask = _mask(ids, shape, config) if mask is None else mask.to(ids.device)
        if tuple(mask.shape) != shape:
            raise ValueError(f"attention_mask must be {list(shape)} as the prompt, found {list(mask.shape)}")
        if not bool(mask[:, -1].all()):
            warnings.warn("the prompt is padded on the right: pad on the left to generate", stacklevel=4)
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        elif tuple(positions.shape) not in (shape, (1, shape[1]), shape[1:]):
            raise ValueError(f"position_ids must be {list(shape)} as the prompt, found {list(positions.shape)}")
        return cls(ids, embeds, mask, positions.expand(*shape))

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def repeated(self, times: int) -> _Prompt:
        """Each sequence `times` times in turn."""
        if times == 1:
            return self
        ids, mask, positions = (part.repeat_interleave(times, 0) for part in (self.ids, self.mask, self.positions))
        return _Prompt(ids, None if self.embeds is None else self.embeds.repeat_interleave(times, 0), mask, positions)


def _mask(ids: Tensor, shape: tuple[int, ...], config: GenerationConfig) -> Tensor:
    """0 where an id can only be padding: it is the pad id, and that is no end of a text."""
    pad = config.pad_token_id
    if pad is None or pad in (config.eos_token_id or ()) or ids.shape != shape:
        return torch.ones(shape, dtype=torch.long, device=ids.device)
    return (ids != pad).long()


def _most_new_tokens(model: CausalLM, config: GenerationConfig, prompt: _Prompt) -> int:
    """How many ids each sequence may get."""
    room = model.context - prompt.length
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {prompt.length} tokens and the model's context is {model.context}; shorten it"
        )
    if config.max_new_tokens is not None:
        wanted = config.max_new_tokens
    elif config.max_length is not None:
        wanted = config.max_length - prompt.length
        if wanted < 1:
            raise ValueError(
                f"the prompt has {prompt.length} tokens and max_length is {config.max_length}, which counts them too; "
                "set max_new_tokens"
            )
    else:
        wanted = DEFAULT_NEW_TOKENS
        if room >= wanted:
            warnings.warn(f"{wanted} new tokens are the default; set max_new_tokens", stacklevel=4)
    if wanted > room:
        warnings.warn(f"the model's context of {model.context} tokens leaves room for {room} new ones", stacklevel=4)
    return min(wanted, room)


def _allowed(function: Callable[[int, Tensor], Sequence[int]]) -> LogitsProcessor:
    """A function of a sequence's number and ids that returns the ids which may follow, as a processor."""

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, float("-inf"))
        for row, sequence in enumerate(ids):
            found = function(row, sequence)
            allowed = found.tolist() if isinstance(found, Tensor) else list(found or ())
            if not allowed:
                raise ValueError(f"prefix_allowed_tokens_fn allows no id for sequence {row}")
            if not all(isinstance(one, int) and 0 <= one < scores.shape[1] for one in allowed):
                raise ValueError(
                    f"prefix_allowed_tokens_fn must return ids below {scores.shape[1]}, found {shown(found)}"
                )
            kept[row, allowed] = scores[row, allowed]
        return kept

    return apply


def _cache_of(model: CausalLM, prompt: _Prompt, given: Any, config: GenerationConfig) -> KVCache | None:
    if given is None:
        return model.new_cache(len(prompt.mask)) if config.use_cache is not False else None
    cache = as_cache(given, lambda: model.new_cache(len(prompt.mask)), model.config)
    if cache.get_seq_length() >= prompt.length:
        raise ValueError(
            f"past_key_values holds {cache.get_seq_length()} tokens, the prompt has {prompt.length}: "
            "generate takes the whole text, of which the cache is the beginning"
        )
    return cache


@dataclass
class _Batch:
    """The loop, and what it keeps."""

    model: CausalLM
    config: GenerationConfig
    prompt: _Prompt
    cache: KVCache | None
    processors: list[LogitsProcessor]
    rules: list[StoppingCriterion]
    new_tokens: int
    kept: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def run(self, emit: Callable[[Tensor], None]) -> Tensor | GenerateDecoderOnlyOutput:
        config, ids = self.config, self.prompt.ids
        eos, wanted = config.eos_token_id, self._wanted()
        pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
        if eos and len(ids) > 1 and not 0 <= pad < self.model.config.vocab_size:
            raise ValueError(
                f"pad_token_id is {pad}, which fills up sequences that end first; ids are 0 to "
                f"{self.model.config.vocab_size - 1}"
            )
        self.kept = dict.fromkeys(wanted, ())
        going, step = torch.ones(len(ids), dtype=torch.bool, device=ids.device), self._prefill(wanted)
        for count in range(1, self.new_tokens + 1):
            scores = self._processed(ids, step["logits"])
            self.kept = {name: (*kept, (step | {"scores": scores})[name]) for name, kept in self.kept.items()}
            token = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if config.do_sample else scores.argmax(-1)
            if eos:
                token = torch.where(going, token, pad)
            ids = torch.cat((ids, token[:, None]), 1)
            emit(token)
            going = going & ~stopped(self.rules, ids, self.kept.get("scores"))
            if count == self.new_tokens or not bool(going.any()):
                break
            step = self._next(ids, wanted)
        if not config.return_dict_in_generate:
            return ids
        cache = None if self.cache is None else self.cache.dynamic or self.cache
        return GenerateDecoderOnlyOutput(ids, past_key_values=cache, **self.kept)

    def _wanted(self) -> list[str]:
        """What is kept of every step."""
        names = ("scores", "logits", "attentions", "hidden_states")
        whole = self.config.return_dict_in_generate
        return [name for name in names if whole and getattr(self.config, f"output_{name}")]

    def _processed(self, ids: Tensor, logits: Tensor) -> Tensor:
        if not bool(logits.isfinite().all()):
            raise ModelError("the model's output is not finite: its weights are damaged, or do not fit its config.json")
        scores = logits
        for processor in self.processors:
            scores = processor(ids, scores)
            if not isinstance(scores, Tensor) or scores.shape != logits.shape:
                found = list(scores.shape) if isinstance(scores, Tensor) else shown(scores)
                raise ValueError(f"a logits processor must return scores {list(logits.shape)}, found {found}")
        if bool((scores.isnan() | (scores == float("inf"))).any()):
            raise ValueError("the logits processors leave scores that are not finite (nan or inf)")
        if bool((scores.amax(-1) == float("-inf")).any()):
            raise ValueError("the logits processors leave no id that may follow")
        return scores

    def _prefill(self, wanted: list[str]) -> dict[str, Any]:
        """The prompt, in pieces that bound the memory of its activations."""
        begin, end = self.cache.get_seq_length() if self.cache else 0, self.prompt.length
        piece = self.config.prefill_chunk_size or self.model.chunk
        if self.cache is None or not {"attentions", "hidden_states"}.isdisjoint(wanted):
            piece = end  # one output has all of it
        while end - begin > piece:
            self._forward(begin, begin + piece, self.prompt.ids, self.prompt.mask, [])
            begin += piece
        return self._forward(begin, end, self.prompt.ids, self.prompt.mask, wanted)

    def _next(self, ids: Tensor, wanted: list[str]) -> dict[str, Any]:
        """The newest ids; without a cache the whole text."""
        new = ids.shape[1] - self.prompt.ids.shape[1]
        mask = torch.nn.functional.pad(self.prompt.mask, (0, new), value=1)
        return self._forward(0 if self.cache is None else mask.shape[1] - 1, mask.shape[1], ids, mask, wanted)

    def _forward(self, begin: int, end: int, ids: Tensor, mask: Tensor, wanted: list[str]) -> dict[str, Any]:
        """Positions begin to end of the text, of which `ids` lack those that came as vectors: the last one's logits
        [B, V] in float32, and the `wanted` states.
        """
        after = end - self.prompt.length
        positions = self.prompt.positions
        if after > 0:
            further = torch.arange(1, after + 1, device=positions.device)
            positions = torch.cat((positions, positions[:, -1:] + further), 1)
        vectors = self.prompt.embeds if self.prompt.embeds is not None and begin < self.prompt.length else None
        given: dict[str, Tensor] = {}
        begun = self.prompt.ids.shape[1]
        if vectors is None:
            offset = self.prompt.length - begun
            given["input_ids"] = ids[:, begin - offset : end - offset]
        else:
            tail = ids[:, begun : begun + max(after, 0)]
            embedded = [self.model.get_input_embeddings()(tail.to(self.model.device))] if tail.shape[1] else []
            given["inputs_embeds"] = torch.cat([vectors[:, begin:end], *embedded], 1)
        output = self.model(
            **given,
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=None if self.cache is None else self.cache.dynamic or self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=1,
            output_attentions="attentions" in wanted,
            output_hidden_states="hidden_states" in wanted,
            return_dict=True,
        )
        # A copy: the model's own may be a view of the logits of a whole prompt.
        logits = output["logits"][:, -1].to(ids.device, torch.float32, copy=True)
        return {"logits": logits, "attentions": output.attentions, "hidden_states": output.hidden_states}
