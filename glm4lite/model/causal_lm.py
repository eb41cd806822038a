"""The language model: the trunk and the head that gives the logits of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4lite.model.cache import KVCache, PastKeyValues
from glm4lite.model.config import Glm4Config
from glm4lite.model.inputs import keep_problem, labels_problem
from glm4lite.model.lora import BASE, adapters_of
from glm4lite.model.outputs import CausalLMOutputWithPast
from glm4lite.model.step import Span
from glm4lite.model.trunk import ModelWithTrunk, draw

SCORED_ROWS = 32
"""Rows of a scored prompt whose logits are in memory at once: twice 19 MB at GLM-4's vocabulary, less than the values
of one layer that a plan counts for the prompt's chunk and that are free by then."""


class CausalLM(ModelWithTrunk):
    """The trunk and the language-model head."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.model = self.trunk_class(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        draw(self.lm_head.weight, self.config.initializer_range)
        self.tie_weights()

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache; `forward` takes it as past_key_values."""
        return self.model.new_cache(batch)

    @property
    def context(self) -> int:
        """Tokens of the longest conversation: the model's, or what the memory budget has room for."""
        return self.model.context

    def adapter_number(self, name: str | None) -> int:
        """What `Span.adapter` says of an adapter that was loaded to be chosen; None: none of them.

        Raises ValueError for a name that none has.
        """
        if name is None:
            return BASE
        if name not in self.model.adapters:
            raise ValueError(f"the model has no adapter {name[:100]!r} to choose")
        return 1 + self.model.adapters.index(name)

    @property
    def chunk(self) -> int:
        """Tokens of a prompt in one forward pass."""
        return self.model.chunk

    @torch.inference_mode()
    def step(self, spans: Sequence[Span]) -> list[Tensor]:
        """Computes new ids of several sequences: logits float32 [kept, vocabulary] of each, in order.

        The weights are read once for all of them; where GPUs hold all layers, once more for prompts. Where the native
        kernels compute all layers and the head, each sequence's logits have the bits that they have alone, however its
        ids are cut into steps.

        Each span's cache is extended in place; after an error layers may hold differently many of the new ids
        (`KVCache.truncate`). `Trunk.interrupt` is called between the layers; a few rows go through all of them at once.
        Of scored rows (`Span.scored`) no more logits exist at once than SCORED_ROWS have. Raises what
        `KVCache.reserve` does before anything is computed.
        """
        if not spans:
            return []
        states, kept = self.model.step(spans), list[Tensor]()
        for span, rows in zip(spans, states.split([span.looked_at + span.kept for span in spans]), strict=True):
            if span.scored is not None and span.looked_at:
                for row, few in zip(
                    span.scored.rows[::SCORED_ROWS], rows[: span.looked_at].split(SCORED_ROWS), strict=True
                ):
                    with adapters_of([(len(few), span.adapter)]):
                        span.scored.take(row, self.lm_head(few).float())
            kept.append(rows[span.looked_at :])
        with adapters_of([(span.kept, span.adapter) for span in spans]):
            logits: Tensor = self.lm_head(torch.cat(kept) if any(span.looked_at for span in spans) else states).float()
        return list(logits.split([span.kept for span in spans]))

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
        """Arguments as Trunk. labels [B, T], shifted inside, -100 is ignored.

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


def causal_lm_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in float32 of logits[:, t] against labels[:, t + 1]; labels of -100 do not count."""
    if problem := labels_problem(labels, logits.shape[:2], logits.shape[2]):
        raise ValueError(problem)
    shifted = F.pad(labels.long(), (0, 1), value=-100)[:, 1:]
    flat, targets = logits.float().flatten(0, 1), shifted.flatten().to(logits.device)
    return F.cross_entropy(flat, targets) if items is None else F.cross_entropy(flat, targets, reduction="sum") / items
