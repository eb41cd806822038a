"""The model against Transformers' own classes, on random weights: logits, losses, heads, masks, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import pytest
import torch

from glm4lite.base.errors import ConfigError
from glm4lite.model.cache import KVCache
from glm4lite.model.config import Glm4Config
from glm4lite.pretrained.base import Glm4PreTrainedModel
from glm4lite.pretrained.models import Glm4ForCausalLM, Glm4ForSequenceClassification, Glm4ForTokenClassification

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": [1],
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "glm4": {},
    "glm4 without bias": {"attention_bias": False},
    "glm4 tied": {"tie_word_embeddings": True},
    "glm4 kv1": {"num_key_value_heads": 1},
    "glm4 kv4": {"num_key_value_heads": 4},
    "glm4 kv8": {"num_key_value_heads": 8},
    "glm4 full rotary": {"partial_rotary_factor": 1.0},
    "glm4 yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}, "max_position_embeddings": 128},
    "glm": {"model_type": "glm"},
    "glm edge": {"model_type": "glm", "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    "glm without bias, kv4": {"model_type": "glm", "attention_bias": False, "num_key_value_heads": 4},
    "glm yarn": {"model_type": "glm", "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
}
PREFIX = {"glm4": "Glm4", "glm": "Glm"}


@overload
def pair(
    head: Literal["ForCausalLM"], dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Glm4ForCausalLM, Any]: ...


@overload
def pair(head: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Glm4PreTrainedModel, Any]: ...


def pair(head: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Glm4PreTrainedModel, Any]:
    """Our model and the reference's with the same random weights (norms and biases too)."""
    torch.manual_seed(0)
    values = {**SMALL, **changes}
    model_type = values.pop("model_type", "glm4")
    oracle_config = getattr(transformers, PREFIX[model_type] + "Config")(**values, attn_implementation="eager")
    oracle = getattr(transformers, PREFIX[model_type] + head)(oracle_config).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    ours_class = {
        "ForCausalLM": Glm4ForCausalLM,
        "ForSequenceClassification": Glm4ForSequenceClassification,
        "ForTokenClassification": Glm4ForTokenClassification,
    }[head]
    ours = ours_class(Glm4Config.from_dict(oracle_config.to_dict())).eval()
    ours.load_state_dict(oracle.state_dict())
    return ours.to(dtype), oracle.to(dtype)


def tokens(batch: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(2, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_float32_logits_equal_the_reference(variant: str) -> None:
    ours, oracle = pair("ForCausalLM", **VARIANTS[variant])
    ids = tokens(length=70)  # past YaRN's original context
    assert relative_error(ours(ids).logits, oracle(ids).logits) < 1e-4


@pytest.mark.parametrize("variant", ["glm4", "glm", "glm4 yarn"])
@torch.no_grad()
def test_bfloat16_logits_are_as_near_to_float32_as_the_references(variant: str) -> None:
    ours, oracle = pair("ForCausalLM", torch.bfloat16, **VARIANTS[variant])
    exact = pair("ForCausalLM", **VARIANTS[variant])[1]
    exact.load_state_dict({k: v.float() for k, v in oracle.state_dict().items()})
    ids = tokens()
    wanted = exact(ids).logits
    assert ours(ids).logits.dtype == torch.bfloat16
    error = (ours(ids).logits.float() - wanted).square().mean().sqrt()
    allowed = (oracle(ids).logits.float() - wanted).square().mean().sqrt()
    assert error <= 1.1 * allowed


@pytest.mark.parametrize("variant", ["glm4", "glm edge"])
def test_losses_and_gradients_equal_the_reference(variant: str) -> None:
    ours, oracle = pair("ForCausalLM", **VARIANTS[variant])
    ids = tokens()
    labels = ids.clone()
    labels[:, :5] = -100
    found, wanted = ours(ids, labels=labels).loss, oracle(ids, labels=labels).loss
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    found.backward()
    wanted.backward()
    references = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, references[name].grad) < 1e-3, name


def test_gradients_flow_through_the_cache() -> None:
    ours, _ = pair("ForCausalLM")
    ids = tokens()
    whole = torch.autograd.grad(ours(ids).logits[:, -1].sum(), ours.lm_head.weight)[0]
    first = ours(ids[:, :9])
    split = ours(ids[:, 9:], past_key_values=first.past_key_values).logits[:, -1].sum()
    torch.testing.assert_close(torch.autograd.grad(split, ours.lm_head.weight)[0], whole)


@pytest.mark.parametrize("labels", ["int", "float", "one"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_equals_the_reference(labels: str, side: str) -> None:
    ours, oracle = pair("ForSequenceClassification", num_labels=1 if labels == "one" else 3)
    ids = tokens(3)
    ids[1, :4] = 0  # the pad token
    ids[2] = 0  # a row of padding alone
    mask = (ids != 0).long()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    mask[2] = 1
    targets = {"int": torch.tensor([0, 2, 1]), "float": torch.rand(3, 3), "one": torch.rand(3)}[labels]
    found, wanted = (model(ids, attention_mask=mask, labels=targets) for model in (ours, oracle))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=1e-4)


def test_a_batch_without_a_pad_token_is_refused_for_sequence_classification() -> None:
    ours, _ = pair("ForSequenceClassification")
    ours.config.pad_token_id = None
    assert ours(tokens(1)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="pad_token_id"):
        ours(tokens(2))


@pytest.mark.parametrize("bias", [True, False])
def test_token_classification_equals_the_reference(bias: bool) -> None:
    ours, oracle = pair("ForTokenClassification", num_labels=4, token_classification_bias=bias)
    ids, labels = tokens(), tokens() % 4
    labels[:, :3] = -100
    found, wanted = (model(ids, labels=labels) for model in (ours, oracle))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_left_padding_changes_no_logits() -> None:
    ours, oracle = pair("ForCausalLM")
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, wanted = (model(ids, attention_mask=mask, position_ids=positions).logits for model in (ours, oracle))
    assert relative_error(found[mask.bool()], wanted[mask.bool()]) < 1e-4
    assert relative_error(found[0, 6:], ours(ids[:1, 6:]).logits[0]) < 1e-4


@torch.no_grad()
def test_left_padded_decoding_through_the_cache_equals_the_reference() -> None:
    ours, oracle = pair("ForCausalLM")
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = oracle(ids, attention_mask=mask, position_ids=positions).logits
    cache = None
    for start, end in ((0, 10), (10, 11), (11, 20), (20, 21)):
        out = ours(ids[:, start:end], mask[:, :end], positions[:, start:end], cache)
        cache = out.past_key_values
        assert relative_error(out.logits[1], wanted[1, start:end]) < 1e-4
        if end > 11:
            assert relative_error(out.logits[0], wanted[0, start:end]) < 1e-4


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, 20])])
@torch.no_grad()
def test_logits_to_keep_picks_the_references_positions(keep: int | torch.Tensor) -> None:
    ours, oracle = pair("ForCausalLM")
    found, wanted = (model(tokens(), logits_to_keep=keep).logits for model in (ours, oracle))
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) < 1e-4


@torch.no_grad()
def test_hidden_states_and_attentions_equal_the_reference() -> None:
    ours, oracle = pair("ForCausalLM")
    found, wanted = (m(tokens(), output_hidden_states=True, output_attentions=True) for m in (ours, oracle))
    for kind in ("hidden_states", "attentions"):
        assert len(found[kind]) == len(wanted[kind])
        for one, other in zip(found[kind], wanted[kind], strict=True):
            assert relative_error(one, other) < 1e-4
    assert relative_error(found.logits, ours(tokens()).logits) < 1e-5


@torch.no_grad()
def test_a_mask_for_each_head_is_obeyed_at_one_token_as_at_many() -> None:
    ours, _ = pair("ForCausalLM")
    ids = tokens()
    mask = torch.rand(2, 8, 21, 21, generator=torch.Generator().manual_seed(2)) < 0.7
    mask = mask.tril() | torch.eye(21, dtype=torch.bool)
    whole = ours(ids, attention_mask=mask).logits
    cache = ours(ids[:, :20], attention_mask=mask[:, :, :20, :20]).past_key_values
    last = ours(ids[:, 20:], attention_mask=mask[:, :, 20:], past_key_values=cache).logits
    assert relative_error(last[:, 0], whole[:, -1]) < 1e-5


def test_float16_is_refused_whatever_asks_for_it() -> None:
    ours, _ = pair("ForCausalLM")
    for change in (ours.half, lambda: ours.to(torch.float16)):
        with pytest.raises(ConfigError, match="float16 is refused"):
            change()


@torch.no_grad()
def test_inputs_embeds_and_cache_position_stand_in_for_ids_and_positions() -> None:
    ours, _ = pair("ForCausalLM")
    ids = tokens()
    embeds = ours.model.embed_tokens(ids)
    torch.testing.assert_close(ours(inputs_embeds=embeds).logits, ours(ids).logits)
    shifted = ours(ids, cache_position=torch.arange(7, 28)).logits
    torch.testing.assert_close(shifted, ours(ids, position_ids=torch.arange(7, 28)[None]).logits)
    with pytest.raises(ValueError, match="exactly one"):
        ours(ids, inputs_embeds=embeds)


def greedy(model: Callable[..., Any], ids: torch.Tensor, count: int, use_cache: bool) -> list[int]:
    cache, fed = None, ids
    produced: list[int] = []
    for _ in range(count):
        out = model(fed, past_key_values=cache, use_cache=use_cache)
        produced.append(int(out.logits[0, -1].argmax()))
        new = torch.tensor([[produced[-1]]])
        cache, fed = (out.past_key_values, new) if use_cache else (None, torch.cat((fed, new), 1))
    return produced


@pytest.mark.parametrize("variant", ["glm4", "glm", "glm4 kv1"])
@torch.no_grad()
def test_64_greedy_tokens_equal_the_references_with_and_without_cache(variant: str) -> None:
    ours, oracle = pair("ForCausalLM", **VARIANTS[variant])
    ids = tokens(1, 9)
    wanted = oracle.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, 9:].tolist()
    oracle_config = oracle.generation_config
    oracle_config.eos_token_id = None
    wanted = oracle.generate(ids, max_new_tokens=64, do_sample=False)[0, 9:].tolist()
    assert greedy(ours, ids, 64, use_cache=True) == wanted
    assert greedy(ours, ids, 64, use_cache=False) == wanted


@torch.no_grad()
def test_chunked_prefill_equals_whole_prefill() -> None:
    ours, _ = pair("ForCausalLM")
    ids = tokens(1, 600)  # longer than one step of the cache's buffers
    whole = ours(ids).logits
    cache, parts = KVCache(3), []
    for chunk in ids.split(130, dim=1):
        parts.append(ours(chunk, past_key_values=cache).logits)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5
    assert cache.get_seq_length() == 600


@torch.no_grad()
def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been() -> None:
    ours, _ = pair("ForCausalLM")
    ids = tokens(1, 30)
    cache = ours(ids).past_key_values
    cache.truncate(12)
    again = ours(ids[:, 12:], past_key_values=cache).logits
    assert relative_error(again, ours(ids).logits[:, 12:]) < 1e-5


@pytest.mark.parametrize("shape", ["9b", "32b"])
@pytest.mark.slow
@torch.no_grad()
def test_two_layers_of_the_true_shapes_equal_the_reference(shape: str) -> None:
    sizes: dict[str, Any] = {
        "9b": {"hidden_size": 4096, "intermediate_size": 13696, "num_attention_heads": 32, "attention_bias": True},
        "32b": {"hidden_size": 6144, "intermediate_size": 23040, "num_attention_heads": 48, "attention_bias": False},
    }[shape]
    torch.manual_seed(0)
    config = {**SMALL, **sizes, "head_dim": 128, "num_hidden_layers": 2, "initializer_range": 0.02}
    with torch.device("meta"):
        oracle = transformers.Glm4ForCausalLM(transformers.Glm4Config(**config, attn_implementation="eager"))
        ours = Glm4ForCausalLM(Glm4Config(**config))
    weights = {k: torch.empty_like(v, device="cpu").normal_(std=0.02) for k, v in oracle.state_dict().items()}
    weights.update({k: v + 1 for k, v in weights.items() if "norm" in k})
    oracle.load_state_dict(weights, assign=True)
    ours.load_state_dict(weights, assign=True)  # the same memory: 3.3 GB at the 32B's width
    oracle.model.rotary_emb = type(oracle.model.rotary_emb)(oracle.config)
    ids = tokens(1, 12)
    assert relative_error(ours(ids).logits, oracle(ids).logits) < 1e-4
