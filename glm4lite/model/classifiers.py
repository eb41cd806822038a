"""The classification models: the GLM-4 trunk with a linear `score` on top.

Source of pooling and losses: Transformers' GenericForSequenceClassification and GenericForTokenClassification.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4lite.model.cache import PastKeyValues
from glm4lite.model.config import Glm4Config
from glm4lite.model.inputs import labels_problem, tensor_problem
from glm4lite.model.outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from glm4lite.model.trunk import ModelWithTrunk, draw

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class SequenceClassifier(ModelWithTrunk):
    """One label (or value) per sequence, read at its last token that is not padding."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.model = self.trunk_class(self.config)
        config = self.config
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        draw(self.score.weight, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast:
        """Arguments as Trunk; labels [B] (or [B, num_labels]). Returns logits [B, num_labels].

        Raises ValueError for a batch when the config names no pad token.
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
        last = self._last_token(input_ids, trunk.last_hidden_state)
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(trunk.last_hidden_state[rows, last])
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutputWithPast(
            loss, logits, trunk.past_key_values, trunk.hidden_states, trunk.attentions
        )
        return self._returned(output, return_dict)

    def _last_token(self, input_ids: Tensor | None, hidden: Tensor) -> Tensor:
        """Index [B] of the rightmost token that is not padding; works for padding on either side."""
        batch, length = hidden.shape[:2]
        pad = self.config.pad_token_id
        if pad is None and batch > 1:
            raise ValueError("a batch needs config.pad_token_id: without it the last token of a row is not known")
        if pad is None or input_ids is None:
            if input_ids is None:
                warnings.warn("inputs_embeds show no padding: the last position of each row is used", stacklevel=3)
            return torch.full((batch,), length - 1, device=hidden.device)
        steps = torch.arange(length, device=hidden.device)
        return (steps * (input_ids != pad)).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Regression, one label or several, told apart (and remembered) as the reference does."""
        if problem := tensor_problem("labels", labels):
            raise ValueError(problem)
        labels, classes = labels.to(logits.device), self.config.num_labels
        kind = self.config.problem_type
        if kind is None:
            whole = labels.dtype in (torch.long, torch.int)
            single = "single_label_classification" if whole else "multi_label_classification"
            kind = "regression" if classes == 1 else single
        if problem := _problem(kind, labels, logits):
            raise ValueError(problem)
        self.config.problem_type = kind
        if kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1).long())
        return F.binary_cross_entropy_with_logits(logits, labels)


def _problem(kind: str, labels: Tensor, logits: Tensor) -> str:
    """What is wrong with the labels of sequences, "" where nothing is."""
    batch, classes = logits.shape
    if kind not in PROBLEMS:
        return f"config.problem_type must be one of {', '.join(PROBLEMS)}; found {kind!r}"
    if kind == "single_label_classification":
        flat = labels.view(-1) if labels.numel() == batch else labels
        return labels_problem(flat, (batch,), classes)
    if kind == "multi_label_classification" and (labels.shape != logits.shape or not labels.is_floating_point()):
        wanted, found = list(logits.shape), list(labels.shape)
        return f"labels of several classes must be floats of shape {wanted}, found {labels.dtype} of shape {found}"
    if kind == "regression" and labels.numel() != logits.numel():
        return f"labels must have the shape {list(logits.squeeze(-1).shape)}, found {list(labels.shape)}"
    return ""


class TokenClassifier(ModelWithTrunk):
    """One label per token."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.model = self.trunk_class(self.config)
        config = self.config
        given = (config.classifier_dropout, config.hidden_dropout, 0.1)
        self.dropout = nn.Dropout(next(rate for rate in given if rate is not None))
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=config.token_classification_bias)
        draw(self.score.weight, config.initializer_range)
        if self.score.bias is not None:
            nn.init.zeros_(self.score.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache_position: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput:
        """Arguments as Trunk; labels [B, T], -100 is ignored. Returns logits [B, T, num_labels]."""
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
        logits = self.score(self.dropout(trunk.last_hidden_state))
        loss = None
        if labels is not None:
            if problem := labels_problem(labels, logits.shape[:2], self.config.num_labels):
                raise ValueError(problem)
            flat = logits.float().view(-1, self.config.num_labels)
            loss = F.cross_entropy(flat, labels.view(-1).to(logits.device, torch.long))
        output = TokenClassifierOutput(loss, logits, trunk.hidden_states, trunk.attentions)
        return self._returned(output, return_dict)
