"""The classes that Transformers documents for GLM-4: the model's own, with the methods of Glm4PreTrainedModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, overload

from torch import Tensor

from glm4lite.model.causal_lm import CausalLM
from glm4lite.model.classifiers import SequenceClassifier, TokenClassifier
from glm4lite.model.outputs import GenerateDecoderOnlyOutput
from glm4lite.model.trunk import Trunk
from glm4lite.pretrained.base import Glm4PreTrainedModel


class Glm4Model(Glm4PreTrainedModel, Trunk):
    """The trunk: embeddings, layers, final norm. From ids [B, T] to `last_hidden_state` [B, T, hidden_size].

    Source: Transformers' Glm4Model and GlmModel, which the tests compare it with. The residual stream is float32.
    """


class Glm4ForCausalLM(Glm4PreTrainedModel, CausalLM):
    """The trunk and the language-model head. From ids [B, T] to logits [B, T, vocab_size]; `generate` goes on from ids.

        model = Glm4ForCausalLM.from_pretrained("nano", quant="int4")
        output = model(torch.tensor([[1, 2, 3]]), logits_to_keep=1)
        again = model(torch.tensor([[4]]), past_key_values=output.past_key_values)

    Source: Transformers' Glm4ForCausalLM and GlmForCausalLM, which the tests compare it with.
    """

    accepts_loss_kwargs = True
    loss_type: ClassVar[str] = "ForCausalLM"  # tells Transformers' Trainer that a row's first label does not count
    trunk_class = Glm4Model
    model: Glm4Model

    @overload
    def generate(
        self,
        inputs: Tensor | None = None,
        *arguments: Any,
        return_dict_in_generate: Literal[True],
        **options: Any,
    ) -> GenerateDecoderOnlyOutput: ...

    @overload
    def generate(self, inputs: Tensor | None = None, *arguments: Any, **options: Any) -> Tensor: ...

    def generate(
        self, inputs: Tensor | None = None, *arguments: Any, **options: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continues the sequences `inputs` [B, T], padded on the left; see `generation.loop.generate`."""
        from glm4lite.pretrained.generation import generate

        return generate(self, self.generation_config, inputs, *arguments, **options)

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
        from glm4lite.pretrained.generation.loop import transition_scores

        return transition_scores(sequences, scores, normalize_logits)


class Glm4ForSequenceClassification(Glm4PreTrainedModel, SequenceClassifier):
    """One label (or value) per sequence, read at its last token that is not padding: logits [B, num_labels].

    A checkpoint without a `score` starts from random values there, which is said.
    """

    trunk_class = Glm4Model
    model: Glm4Model


class Glm4ForTokenClassification(Glm4PreTrainedModel, TokenClassifier):
    """One label per token, of padding too: logits [B, T, num_labels]."""

    trunk_class = Glm4Model
    model: Glm4Model
