"""docs/api.md is true: each row of its tables is one call, made on Transformers' classes and on ours.

A row "works" where both give the same, "differs" where a check says how, "refused" where ours raises the sentence given
and Transformers' takes the call. The same random weights lie in both.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glm4lite
from glm4lite.hub.sources import nano_folder
from tests.glm4lite.test_parity import SMALL, pair, tokens

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
IDS, MASK = tokens(), torch.ones(2, 21, dtype=torch.long)
MASK[1, :6] = 0  # padding on the left
LABELS = {0: "no", 1: "maybe", 2: "yes"}
CHAT = [{"role": "user", "content": "What is 37 * 24?"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


class Library:
    """One of the two, with what a row's call may need. Each call makes models of its own, for it may change them."""

    def __init__(self, ours: bool, folder: Path) -> None:
        self.ours, self.folder = ours, folder
        self.module: Any = glm4lite if ours else transformers
        self.Config: Any = self.module.Glm4Config
        self.GenerationConfig: Any = self.module.GenerationConfig

    def model(self, head: str = "ForCausalLM", **changes: Any) -> Any:
        """A model of three layers in eval mode, the same weights in both libraries."""
        if head == "Model":
            return self.model(**changes).model
        return pair(head, **changes)[0 if self.ours else 1]

    def saved(self) -> Path:
        """A folder with a checkpoint of bfloat16, a tokenizer and a chat template: the embedded nano."""
        return nano_folder()

    def loaded(self, head: str = "ForCausalLM", **options: Any) -> Any:
        return getattr(self.module, f"Glm4{head}").from_pretrained(self.saved(), **options)

    def tokenizer(self) -> Any:
        of = self.module.Tokenizer if self.ours else transformers.AutoTokenizer
        return of.from_pretrained(self.saved())


Call = Callable[[Library], Any]


class Row:
    def __init__(self, verdict: str, check: Callable[[Library, Library], None]) -> None:
        self.verdict, self.check = verdict, check


ROWS: dict[str, Row] = {}


def works(name: str, call: Call) -> None:
    """Both libraries give the same."""

    def check(ours: Library, theirs: Library) -> None:
        same(call(ours), call(theirs))

    _add(name, Row("works", check))


def differs(name: str, call: Call, how: Callable[[Any, Any], bool]) -> None:
    """`how` says of what ours and theirs gave that it is as documented."""

    def check(ours: Library, theirs: Library) -> None:
        found, reference = call(ours), call(theirs)
        assert how(found, reference), f"{found} beside {reference}"

    _add(name, Row("differs", check))


def refused(name: str, call: Call, message: str, theirs_too: bool = False) -> None:
    """Ours raises one sentence. Theirs takes it, or (`theirs_too`) fails as well, or needs more than a test has."""

    def check(ours: Library, theirs: Library) -> None:
        with pytest.raises((ValueError, AttributeError, glm4lite.Glm4liteError), match=message) as caught:
            call(ours)
        assert "\n" not in str(caught.value)
        if not theirs_too:
            call(theirs)

    _add(name, Row("refused", check))


def _add(name: str, row: Row) -> None:
    assert name not in ROWS, name
    ROWS[name] = row


def same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal values; tensors as near as float32 allows, dicts and lists by what is in them."""
    if isinstance(wanted, Tensor):
        assert isinstance(found, Tensor), where
        assert found.shape == wanted.shape, (where, found.shape, wanted.shape)
        torch.testing.assert_close(
            found.float(), wanted.float(), rtol=1e-3, atol=1e-4, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(wanted, Mapping):
        assert set(found) == set(wanted), (where, set(found) ^ set(wanted))
        for key in wanted:
            same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple) and not isinstance(wanted, str):
        assert len(found) == len(wanted), where
        for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same(one, other, f"{where}[{place}]")
    elif isinstance(wanted, nn.Module):
        same(dict(found.state_dict()), dict(wanted.state_dict()), where)
    else:
        assert found == wanted, (where, found, wanted)


def _set(thing: Any, **values: Any) -> Any:
    for key, value in values.items():
        setattr(thing, key, value)
    return thing


def _after(thing: Any, *calls: Callable[[Any], Any]) -> Any:
    for call in calls:
        call(thing)
    return thing


# --- Config -------------------------------------------------------------------------------------------------------

SHARED = [name for name in glm4lite.Glm4Config.model_fields if name in transformers.Glm4Config.__annotations__]
works("Glm4Config()", lambda lib: {name: getattr(lib.Config(), name) for name in SHARED})
works(
    "Glm4Config(hidden_size=64, rope_theta=5e5)", lambda lib: lib.Config(hidden_size=64, rope_theta=5e5).rope_parameters
)
works("Glm4Config(num_labels=3)", lambda lib: (lib.Config(num_labels=3).id2label, lib.Config(num_labels=3).label2id))
works("Glm4Config(id2label=LABELS)", lambda lib: lib.Config(id2label=LABELS).num_labels)
works("config.num_labels = 5", lambda lib: _set(lib.Config(id2label=LABELS), num_labels=5).id2label)
works("config.dtype", lambda lib: lib.Config(dtype="bfloat16").dtype)
works("config.torch_dtype", lambda lib: lib.Config(torch_dtype="bfloat16").torch_dtype)
works("config.use_return_dict", lambda lib: lib.Config(return_dict=False).use_return_dict)
works("config.get_text_config()", lambda lib: lib.Config(hidden_size=64).get_text_config().hidden_size)
works(
    "config.rope_scaling = {...}",
    lambda lib: (
        _set(
            lib.Config(),
            rope_scaling={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ).rope_parameters
    ),
)
works("config.update({...})", lambda lib: _after(lib.Config(), lambda c: c.update({"hidden_size": 64})).hidden_size)
works(
    "config.update_from_string(...)",
    lambda lib: _after(lib.Config(), lambda c: c.update_from_string("hidden_size=64,use_cache=false")).use_cache,
)
works("Glm4Config.from_pretrained(folder)", lambda lib: lib.Config.from_pretrained(lib.saved()).hidden_size)
works(
    "Glm4Config.from_pretrained(folder, num_labels=3)",
    lambda lib: lib.Config.from_pretrained(lib.saved(), num_labels=3).id2label,
)
works(
    "Glm4Config.from_pretrained(folder, foo=1, return_unused_kwargs=True)",
    lambda lib: lib.Config.from_pretrained(lib.saved(), foo=1, return_unused_kwargs=True)[1],
)
refused(
    "Glm4Config.from_pretrained(folder, foo=1)",
    lambda lib: lib.Config.from_pretrained(lib.saved(), foo=1),
    "Glm4Config knows no 'foo'",
)


def _round_trip(lib: Library) -> dict[str, Any]:
    config = lib.Config(hidden_size=64, id2label=LABELS, dtype="bfloat16")
    config.save_pretrained(lib.folder / "config")
    read = lib.Config.from_pretrained(lib.folder / "config")
    return {name: getattr(read, name) for name in SHARED if name != "architectures"} | {"num_labels": read.num_labels}


works("config.save_pretrained(folder)", _round_trip)
works("config.to_dict()", lambda lib: {key: lib.Config(num_labels=3).to_dict()[key] for key in (*SHARED, "model_type")})
works(
    "config.to_diff_dict()", lambda lib: {k: lib.Config().to_diff_dict()[k] for k in ("hidden_size", "rope_parameters")}
)
works("config.to_json_string()", lambda lib: '"hidden_size": 64' in lib.Config(hidden_size=64).to_json_string())
works(
    "config.to_json_file(path)",
    lambda lib: (
        lib.Config.from_json_file(
            _after(lib.folder / "one.json", lambda path: lib.Config(hidden_size=64).to_json_file(path))
        ).hidden_size
    ),
)
works("Glm4Config.from_dict({...})", lambda lib: lib.Config.from_dict(lib.Config(num_labels=3).to_dict()).num_labels)
differs(
    "Glm4Config(eos_token_id=None)",
    lambda lib: lib.Config(eos_token_id=None).eos_token_id,
    lambda ours, theirs: ours is None and theirs == [151329, 151336, 151338],
)
differs(
    "config.id2label = {...}",
    lambda lib: _set(lib.Config(), id2label=LABELS).label2id,
    lambda ours, theirs: ours == {"no": 0, "maybe": 1, "yes": 2} and theirs == {"LABEL_0": 0, "LABEL_1": 1},
)
refused("Glm4Config(hidden_act='prelu')", lambda lib: lib.Config(hidden_act="prelu"), "has weights of its own")
refused(
    "Glm4Config(rope_parameters={'rope_type': 'longrope', ...})",
    lambda lib: lib.Config(
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 32,
            "long_factor": [1.0] * 32,
        }
    ),
    "rope_type 'longrope' is not supported",
)
refused(
    "config.save_pretrained(folder, push_to_hub=True)",
    lambda lib: lib.Config().save_pretrained(lib.folder / "hub", push_to_hub=True),
    "push_to_hub is not supported",
    theirs_too=True,
)

# --- Forward ------------------------------------------------------------------------------------------------------


def _forward(head: str = "ForCausalLM", **arguments: Any) -> Call:
    def call(lib: Library) -> Any:
        with torch.no_grad():
            output = lib.model(head)(**{"input_ids": IDS, "use_cache": False} | arguments)
        return dict(output) if isinstance(output, Mapping) else output

    return call


def _signature(head: str) -> Call:
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache")

    def call(lib: Library) -> list[str]:
        parameters = inspect.signature(getattr(lib.module, f"Glm4{head}").forward).parameters
        return [name for name in parameters if name in names]

    return call


works("Glm4Model(config)(input_ids)", _forward("Model"))
works("model(input_ids)", _forward())
works(
    "model(input_ids, attention_mask=mask)",  # what stands at padding means nothing
    lambda lib: _forward(attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(0))(lib)["logits"][MASK.bool()],
)
works("model(input_ids, position_ids=...)", _forward(position_ids=torch.arange(5, 26)[None]))
works("model(inputs_embeds=...)", _forward(input_ids=None, inputs_embeds=torch.ones(1, 4, SMALL["hidden_size"])))
works("model(input_ids, labels=labels)", _forward(labels=IDS.masked_fill(MASK == 0, -100)))
works("model(input_ids, logits_to_keep=3)", _forward(logits_to_keep=3))
works("model(input_ids, logits_to_keep=tensor)", _forward(logits_to_keep=torch.tensor([2, 5])))
works("model(input_ids, output_hidden_states=True)", _forward(output_hidden_states=True))
works("model(input_ids, output_attentions=True)", _forward(output_attentions=True))
works("model(input_ids, return_dict=False)", _forward(return_dict=False))
works(
    "model(input_ids, use_cache=True).past_key_values.get_seq_length()",
    lambda lib: lib.model()(IDS).past_key_values.get_seq_length(),
)
works("model.forward: order of arguments", _signature("ForCausalLM"))
works("Glm4ForSequenceClassification.forward: order of arguments", _signature("ForSequenceClassification"))
works("Glm4ForTokenClassification.forward: order of arguments", _signature("ForTokenClassification"))


def _continued(cache: Callable[[Any], Any]) -> Call:
    @torch.no_grad()
    def call(lib: Library) -> Tensor:
        model = lib.model()
        past = cache(model(IDS[:, :10], use_cache=True).past_key_values)
        return model(IDS[:, 10:], past_key_values=past).logits

    return call


@torch.no_grad()
def _continued_dynamic(lib: Library) -> Tensor:
    model, cache = lib.model(), transformers.DynamicCache()
    model(IDS[:, :10], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 10
    return model(IDS[:, 10:], past_key_values=cache).logits


works("model(input_ids, past_key_values=output.past_key_values)", _continued(lambda cache: cache))
works("model(input_ids, past_key_values=DynamicCache())", _continued_dynamic)
works(
    "output.logits, output['logits'], output[0], output.to_tuple()",
    lambda lib: [
        f(lib.model()(IDS))
        for f in (lambda o: o.logits, lambda o: o["logits"], lambda o: o[0], lambda o: o.to_tuple()[0])
    ],
)
works(
    "list(output), len(output), 'loss' in output",
    lambda lib: [f(lib.model()(IDS, use_cache=False)) for f in (list, len, lambda o: "loss" in o)],
)
works(
    "config.output_hidden_states = True",
    lambda lib: len(_after(lib.model(), lambda m: _set(m.config, output_hidden_states=True))(IDS).hidden_states),
)
works(
    "config.use_cache = False",
    lambda lib: _after(lib.model(), lambda m: _set(m.config, use_cache=False))(IDS).past_key_values,
)
works(
    "config.return_dict = False",
    lambda lib: isinstance(_after(lib.model("Model"), lambda m: _set(m.config, return_dict=False))(IDS), tuple),
)
works(
    "Glm4ForSequenceClassification: labels of one class",
    _forward("ForSequenceClassification", labels=torch.tensor([0, 1])),
)
works(
    "Glm4ForSequenceClassification: labels of several classes",
    _forward("ForSequenceClassification", labels=torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
)
works(
    "Glm4ForSequenceClassification: regression",
    lambda lib: dict(
        lib.model("ForSequenceClassification", num_labels=1)(IDS, labels=torch.tensor([0.5, 1.0]), use_cache=False)
    ),
)
works("Glm4ForTokenClassification: labels of tokens", _forward("ForTokenClassification", labels=IDS % 2))
refused(
    "a batch without pad_token_id",
    lambda lib: lib.model("ForSequenceClassification", pad_token_id=None)(IDS),
    "a batch needs config.pad_token_id",
    theirs_too=True,
)
refused(
    "ids outside the vocabulary", lambda lib: lib.model()(IDS + 160), "this model's ids are 0 to 159", theirs_too=True
)
refused(
    "a mask of another length",
    lambda lib: lib.model()(IDS, attention_mask=MASK[:, 1:]),
    r"attention_mask must be \[2, 21\]",
    theirs_too=True,
)
refused("labels out of range", lambda lib: lib.model()(IDS, labels=IDS + 160), "classes are 0 to 159", theirs_too=True)
refused("model.half()", lambda lib: lib.model().half(), "float16 is refused")

# --- The model object -----------------------------------------------------------------------------------------------

works(
    "Glm4ForCausalLM(config)",
    lambda lib: {k: tuple(v.shape) for k, v in lib.module.Glm4ForCausalLM(lib.Config(**SMALL)).state_dict().items()},
)
works(
    "model.state_dict() and load_state_dict()",
    lambda lib: lib.model().load_state_dict(lib.model().state_dict()).missing_keys,
)
works("model.get_input_embeddings()", lambda lib: lib.model().get_input_embeddings().weight)
works(
    "model.set_input_embeddings(module)",
    lambda lib: (
        _after(lib.model(), lambda m: m.set_input_embeddings(nn.Embedding(7, 64))).get_input_embeddings().weight.shape
    ),
)
works("model.get_output_embeddings()", lambda lib: lib.model().get_output_embeddings().weight)
works(
    "model.set_output_embeddings(module)",
    lambda lib: (
        _after(lib.model(), lambda m: m.set_output_embeddings(nn.Linear(64, 7, bias=False))).lm_head.out_features
    ),
)
works(
    "model.resize_token_embeddings(170, pad_to_multiple_of=64)",
    lambda lib: _after(lib.model(), lambda m: m.resize_token_embeddings(170, 64)).config.vocab_size,
)
works("model.num_parameters()", lambda lib: [lib.model().num_parameters(exclude_embeddings=e) for e in (False, True)])
works("model.base_model", lambda lib: lib.model().base_model)
works("model.dtype, model.device", lambda lib: (lib.model().dtype, lib.model().device))
works("model.to(torch.bfloat16)", lambda lib: lib.model().to(torch.bfloat16).dtype)
works(
    "model.generation_config",
    lambda lib: (lib.loaded().generation_config.eos_token_id, lib.loaded().generation_config.pad_token_id),
)
works(
    "model.gradient_checkpointing_enable()",
    lambda lib: _after(lib.model(), lambda m: m.gradient_checkpointing_enable()).is_gradient_checkpointing,
)
works(
    "model.gradient_checkpointing_disable()",
    lambda lib: (
        _after(
            lib.model(), lambda m: m.gradient_checkpointing_enable(), lambda m: m.gradient_checkpointing_disable()
        ).is_gradient_checkpointing
    ),
)
works(
    "model.tie_weights()",
    lambda lib: (lambda m: m.lm_head.weight is m.get_input_embeddings().weight)(
        _after(lib.model(tie_word_embeddings=True), lambda m: m.tie_weights())
    ),
)
works(
    "model.can_generate()",
    lambda lib: [lib.model(head).can_generate() for head in ("ForCausalLM", "ForSequenceClassification")],
)
works(
    "model.main_input_name, model.base_model_prefix",
    lambda lib: (lib.model().main_input_name, lib.model().base_model_prefix),
)
works("isinstance(model, Glm4PreTrainedModel)", lambda lib: isinstance(lib.model(), lib.module.Glm4PreTrainedModel))


# --- generate -------------------------------------------------------------------------------------------------------


def _generated(*inputs: Any, **settings: Any) -> Call:
    def call(lib: Library) -> Any:
        model, given = (
            lib.model(),
            {key: value(lib) if inspect.isfunction(value) else value for key, value in settings.items()},
        )
        torch.manual_seed(0)
        return model.generate(*inputs, **given)

    return call


def _kept(**settings: Any) -> Call:
    """With return_dict_in_generate: what stands under the names that both have, without the cache."""

    def call(lib: Library) -> dict[str, Any]:
        output = _generated(IDS, max_new_tokens=4, return_dict_in_generate=True, **settings)(lib)
        return {key: value for key, value in output.items() if key != "past_key_values"}

    return call


class _Streamer:
    def __init__(self) -> None:
        self.seen = list[Any]()

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def _streamed(lib: Library) -> list[Any]:
    streamer = _Streamer()
    lib.model().generate(IDS[:1], max_new_tokens=4, streamer=streamer)
    return streamer.seen


def _scored(lib: Library) -> Tensor:
    model = lib.model()
    output = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    return model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)


def _gone_on(lib: Library) -> Tensor:
    model = lib.model()
    output = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None)
    return model.generate(output.sequences, past_key_values=output.past_key_values, max_new_tokens=4)


def _no_third(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.index_fill(1, torch.tensor([3]), -torch.inf)


def _at_25(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
    return torch.full((len(ids),), ids.shape[1] >= 25)


SAMPLED = {"do_sample": True, "max_new_tokens": 6}
GENERATED: dict[str, dict[str, Any]] = {
    "model.generate(input_ids, max_length=30)": {"max_length": 30},
    "generate(max_new_tokens=8)": {"max_new_tokens": 8},
    "generate(min_new_tokens=6, max_new_tokens=8)": {"min_new_tokens": 6, "max_new_tokens": 8},
    "generate(attention_mask=mask)": {"attention_mask": MASK, "max_new_tokens": 8},
    "generate(do_sample=True)": SAMPLED,
    "generate(temperature=0.7)": SAMPLED | {"temperature": 0.7},
    "generate(top_k=5)": SAMPLED | {"top_k": 5},
    "generate(top_p=0.8)": SAMPLED | {"top_p": 0.8},
    "generate(min_p=0.1)": SAMPLED | {"min_p": 0.1},
    "generate(typical_p=0.5)": SAMPLED | {"typical_p": 0.5},
    "generate(repetition_penalty=1.3)": {"repetition_penalty": 1.3, "max_new_tokens": 8},
    "generate(sequence_bias=[[[5], 9.0]])": {"sequence_bias": [[[5], 9.0]], "max_new_tokens": 8},
    "generate(no_repeat_ngram_size=2)": {"no_repeat_ngram_size": 2, "max_new_tokens": 8},
    "generate(num_return_sequences=3)": SAMPLED | {"num_return_sequences": 3},
    "generate(eos_token_id=[...], pad_token_id=...)": {
        "eos_token_id": [5, 9, 77],
        "pad_token_id": 2,
        "max_new_tokens": 12,
    },
    "generate(use_cache=False)": {"use_cache": False, "max_new_tokens": 4},
    "generate(logits_processor=[...])": {"logits_processor": [_no_third], "max_new_tokens": 8},
    "generate(stopping_criteria=[...])": {"stopping_criteria": [_at_25], "max_new_tokens": 8},
    "generate(prefix_allowed_tokens_fn=...)": {
        "prefix_allowed_tokens_fn": lambda lib: lambda row, ids: [4, 5, 6],
        "max_new_tokens": 4,
    },
    "generate(generation_config=GenerationConfig(...))": {
        "generation_config": lambda lib: lib.GenerationConfig(max_new_tokens=5)
    },
}
for name, settings in GENERATED.items():
    works(name, _generated(IDS, **settings))
works("generate(inputs_embeds=...)", _generated(inputs_embeds=torch.ones(1, 4, SMALL["hidden_size"]), max_new_tokens=4))
works("generate(return_dict_in_generate=True)", _kept())
works("generate(output_scores=True)", _kept(output_scores=True))
works("generate(output_logits=True)", _kept(output_logits=True))
works("generate(output_hidden_states=True)", _kept(output_hidden_states=True))
works("generate(past_key_values=output.past_key_values)", _gone_on)
works("generate(streamer=...)", _streamed)
works("model.compute_transition_scores(...)", _scored)
refused("generate(num_beams=2)", _generated(IDS, num_beams=2, max_new_tokens=2), "num_beams=2 is not supported")
refused(
    "generate(penalty_alpha=0.6, top_k=4)",
    _generated(IDS, penalty_alpha=0.6, top_k=4),
    "penalty_alpha=0.6 is not supported",
    theirs_too=True,
)
refused(
    "generate(assistant_model=...)",
    _generated(IDS, assistant_model=lambda lib: lib.model(), max_new_tokens=2),
    "assistant_model",
    theirs_too=True,
)
refused("generate(max_new_token=8)", _generated(IDS, max_new_token=8), "did you mean 'max_new_tokens'", theirs_too=True)


# --- Loading and saving -----------------------------------------------------------------------------------------------


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS % 100, use_cache=False).logits


def _loads(head: str = "ForCausalLM", **options: Any) -> Call:
    """The logits, in float32, of nano under these arguments of `from_pretrained`."""
    return lambda lib: _logits(lib.loaded(head, **{"dtype": torch.float32} | options))


def _type(**options: Any) -> Call:
    return lambda lib: lib.loaded(**options).dtype


def _info(lib: Library) -> dict[str, list[str]]:
    _, info = lib.loaded("ForSequenceClassification", output_loading_info=True)
    return {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def _saved(head: str = "ForCausalLM", **options: Any) -> Call:
    """Saved by one library and loaded by the other."""

    def call(lib: Library) -> Tensor:
        lib.model(head).save_pretrained(lib.folder / "saved", **options)
        other = transformers if lib.ours else glm4lite
        return _logits(getattr(other, f"Glm4{head}").from_pretrained(lib.folder / "saved", dtype=torch.float32).eval())

    return call


def _shards(lib: Library) -> list[str]:
    lib.model().save_pretrained(lib.folder / "shards", max_shard_size="100KB")
    return sorted(path.name for path in (lib.folder / "shards").iterdir())


works("Glm4ForCausalLM.from_pretrained(folder)", _loads())
works("from_pretrained(torch_dtype=torch.bfloat16)", _type(torch_dtype=torch.bfloat16))
works("from_pretrained(dtype='float32')", _type(dtype="float32"))
works("from_pretrained(dtype='auto')", _type(dtype="auto"))
works(
    "from_pretrained(low_cpu_mem_usage=True, use_safetensors=True)",
    _loads(low_cpu_mem_usage=True, use_safetensors=True),
)
works("from_pretrained(attn_implementation='eager')", _loads(attn_implementation="eager"))
works(
    "from_pretrained(trust_remote_code=False, local_files_only=True)",
    _loads(trust_remote_code=False, local_files_only=True),
)
works("from_pretrained(device_map='cpu')", _loads(device_map="cpu"))
works(
    "from_pretrained(config=config)",
    lambda lib: _logits(lib.loaded(config=lib.Config.from_pretrained(lib.saved()), dtype=torch.float32)),
)
works("from_pretrained(attention_dropout=0.5)", lambda lib: lib.loaded(attention_dropout=0.5).config.attention_dropout)
works(
    "Glm4ForSequenceClassification.from_pretrained(base, num_labels=3)",
    lambda lib: lib.loaded("ForSequenceClassification", num_labels=3).score.weight.shape,
)
works(
    "Glm4ForTokenClassification.from_pretrained(base, id2label=LABELS)",
    lambda lib: lib.loaded("ForTokenClassification", id2label=LABELS).config.num_labels,
)
works("from_pretrained(output_loading_info=True)", _info)
works("model.save_pretrained(folder)", _saved())
works(
    "Glm4ForSequenceClassification: save_pretrained(folder)",
    lambda lib: _saved("ForSequenceClassification", max_shard_size="1GB")(lib),
)
works("Glm4ForTokenClassification: save_pretrained(folder)", _saved("ForTokenClassification"))
works("save_pretrained(folder, max_shard_size='100KB')", _shards)
works(
    "model.config.save_pretrained(folder), model.generation_config.save_pretrained(folder)",
    lambda lib: [
        _after(
            lib.folder / "both",
            lambda folder: lib.model().config.save_pretrained(folder),
            lambda folder: lib.model().generation_config.save_pretrained(folder),
        ).is_dir(),
        sorted(path.name for path in (lib.folder / "both").iterdir()),
    ],
)
refused("from_pretrained(dtype=torch.float16)", lambda lib: lib.loaded(dtype=torch.float16), "float16 is refused")
refused(
    "from_pretrained(trust_remote_code=True)",
    lambda lib: lib.loaded(trust_remote_code=True),
    "trust_remote_code=True is not supported",
)
refused(
    "from_pretrained(attn_implementation='flash_attention_2')",
    lambda lib: lib.loaded(attn_implementation="flash_attention_2"),
    "attn_implementation='flash_attention_2' is not supported",
    theirs_too=True,
)
refused(
    "from_pretrained(device_map={'model': 0, 'lm_head': 'cpu'})",
    lambda lib: lib.loaded(device_map={"model": 0, "lm_head": "cpu"}),
    "device_map names cpu, cuda:0: which layers lie on which device is planned here",
    theirs_too=True,
)
refused(
    "from_pretrained(use_safetensors=False)",
    lambda lib: lib.loaded(use_safetensors=False),
    "use_safetensors=False is not supported",
    theirs_too=True,
)
refused(
    "from_pretrained(torch_dtyp=...)",
    lambda lib: lib.loaded(torch_dtyp="float32"),
    "did you mean 'torch_dtype'",
    theirs_too=True,
)
refused(
    "save_pretrained(folder, safe_serialization=False)",
    lambda lib: lib.model().save_pretrained(lib.folder / "x", safe_serialization=False),
    "safe_serialization=False is not supported",
)
refused("model.push_to_hub(...)", lambda lib: lib.model().push_to_hub("me/model"), "hf upload", theirs_too=True)

# --- Tokenizer --------------------------------------------------------------------------------------------------------

TEXTS = ["What is 37 * 24?", "<|user|>\nHello, 你好 🙂", ""]


def _tokenized(*inputs: Any, **options: Any) -> Call:
    return lambda lib: dict(lib.tokenizer()(*inputs, **options))


def _templated(*inputs: Any, **options: Any) -> Call:
    def call(lib: Library) -> Any:
        made = lib.tokenizer().apply_chat_template(*inputs, **options)
        return dict(made) if isinstance(made, Mapping) else made

    return call


works("Tokenizer.from_pretrained(folder)", lambda lib: lib.tokenizer().get_vocab())
works("tokenizer(text)", _tokenized(TEXTS[1]))
works("tokenizer([text, ...])", _tokenized(TEXTS))
works("tokenizer(texts, padding=True, return_tensors='pt')", _tokenized(TEXTS[:2], padding=True, return_tensors="pt"))
works("tokenizer(texts, padding='max_length', max_length=24)", _tokenized(TEXTS, padding="max_length", max_length=24))
works("tokenizer(text, truncation=True, max_length=4)", _tokenized(TEXTS[0], truncation=True, max_length=4))
works("tokenizer(text, add_special_tokens=False)", _tokenized(TEXTS[0], add_special_tokens=False))
works("tokenizer(text, return_offsets_mapping=True)", _tokenized(TEXTS[1], return_offsets_mapping=True))
works("tokenizer(texts, padding_side='right')", _tokenized(TEXTS[:2], padding=True, padding_side="right"))
works("tokenizer.encode(text)", lambda lib: lib.tokenizer().encode(TEXTS[1]))
works("tokenizer.decode(ids)", lambda lib: lib.tokenizer().decode(lib.tokenizer().encode(TEXTS[1])))
works(
    "tokenizer.decode(ids, skip_special_tokens=True)",
    lambda lib: lib.tokenizer().decode(lib.tokenizer().encode(TEXTS[1]), skip_special_tokens=True),
)
works(
    "tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)",
    lambda lib: lib.tokenizer().batch_decode(
        [lib.tokenizer().encode(text) for text in TEXTS], skip_special_tokens=True, clean_up_tokenization_spaces=False
    ),
)
works("tokenizer.tokenize(text)", lambda lib: lib.tokenizer().tokenize(TEXTS[1]))
works(
    "tokenizer.convert_tokens_to_ids(...), convert_ids_to_tokens(...)",
    lambda lib: (
        lib.tokenizer().convert_tokens_to_ids(["<|user|>", "?"]),
        lib.tokenizer().convert_ids_to_tokens([5, 7]),
    ),
)
works(
    "tokenizer.pad(...)",
    lambda lib: dict(lib.tokenizer().pad([{"input_ids": [1, 2]}, {"input_ids": [3]}], return_tensors="pt")),
)
works(
    "tokenizer.pad_token_id, eos_token_id, bos_token_id, unk_token_id",
    lambda lib: [getattr(lib.tokenizer(), f"{name}_token_id") for name in ("pad", "eos", "bos", "unk")],
)
works(
    "len(tokenizer), vocab_size, all_special_ids",
    lambda lib: (len(lib.tokenizer()), lib.tokenizer().vocab_size, sorted(lib.tokenizer().all_special_ids)),
)
works(
    "tokenizer.padding_side, model_input_names, is_fast",
    lambda lib: (lib.tokenizer().padding_side, lib.tokenizer().model_input_names, lib.tokenizer().is_fast),
)
works("apply_chat_template(messages, tokenize=False)", _templated(CHAT, tokenize=False))
works(
    "apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)",
    _templated(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True),
)
works("apply_chat_template(messages, tools=[...])", _templated(CHAT, tools=[TOOL], tokenize=False))
works("apply_chat_template(messages, enable_thinking=False)", _templated(CHAT, enable_thinking=False, tokenize=False))
differs(
    "apply_chat_template([{'content': '<|user|>', ...}])",
    _templated([{"role": "user", "content": "<|user|>"}], return_dict=False),
    lambda ours, theirs: ours.count(theirs[2]) == 1 and theirs.count(theirs[2]) == 2,
)
works(
    "tokenizer.save_pretrained(folder)",
    lambda lib: (
        _after(lib.folder / "tokenizer", lambda folder: lib.tokenizer().save_pretrained(folder))
        and transformers.AutoTokenizer.from_pretrained(lib.folder / "tokenizer")(TEXTS)["input_ids"]
    ),
)
refused("tokenizer.add_tokens([...])", lambda lib: lib.tokenizer().add_tokens(["new"]), "add_tokens")
refused("tokenizer(text, paddin=True)", lambda lib: lib.tokenizer()(TEXTS[0], paddin=True), "did you mean 'padding'")
refused(
    "tokenizer.push_to_hub(...)",
    lambda lib: lib.tokenizer().push_to_hub("me/tokenizer"),
    "huggingface_hub",
    theirs_too=True,
)


@pytest.fixture
def libraries(tmp_path: Path) -> tuple[Library, Library]:
    found = Library(True, tmp_path / "ours"), Library(False, tmp_path / "theirs")
    for library in found:
        library.folder.mkdir()
    return found


# --- what scripts do besides ---------------------------------------------------------------------------------------

PACKED = torch.cat((torch.arange(9), torch.arange(12)))[None]
works("model(input_ids, position_ids=packed, use_cache=False)", _forward(position_ids=PACKED, use_cache=False))
works(
    "model(input_ids, labels=labels, num_items_in_batch=12)",
    lambda lib: lib.model()(IDS, labels=IDS, num_items_in_batch=12).loss,
)


def _dynamic_of_config(lib: Library) -> Any:
    model = lib.model()
    cache = transformers.DynamicCache(config=model.config)
    model(IDS[:, :15], past_key_values=cache)
    return model(IDS[:, 15:], past_key_values=cache).logits, cache.get_seq_length()


works("model(input_ids, past_key_values=DynamicCache(config=config))", _dynamic_of_config)
refused("model([[1, 2]])", lambda lib: lib.model()([[1, 2]]), "must be a torch tensor, found list", theirs_too=True)


def _static(lib: Library) -> Any:
    model = lib.model()
    return model(IDS, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=32)).logits


refused("model(input_ids, past_key_values=StaticCache(...))", _static, "found StaticCache; leave it out, or give Dyn")


def _every_second(lib: Library) -> Any:
    model = lib.model()
    model.activation_checkpointing_enable(every_n_layers=2)
    return model.train()(IDS, labels=IDS).loss


works("model.activation_checkpointing_enable(every_n_layers=2)", _every_second)
works(
    "model.vocab_size, model.get_decoder()",
    lambda lib: (lambda model: (model.vocab_size, model.get_decoder() is model.model))(lib.model()),
)
works("model.name_or_path", lambda lib: str(lib.loaded().name_or_path))


def _input_gradients(lib: Library) -> bool:
    model = lib.model().requires_grad_(False)
    model.enable_input_require_grads()
    return bool(model(IDS).logits.requires_grad)


works("model.enable_input_require_grads()", _input_gradients)
works("torch.compile(model)", lambda lib: torch.compile(lib.model(), backend="eager")(IDS, use_cache=False).logits)

works(
    "GenerationConfig.from_pretrained(folder, max_new_tokens=8)",
    lambda lib: (lambda config: (config.max_new_tokens, config.eos_token_id))(
        lib.GenerationConfig.from_pretrained(lib.saved(), max_new_tokens=8)
    ),
)


def _updated(lib: Library) -> Any:
    config = lib.GenerationConfig(do_sample=False)
    unused = config.update(max_new_tokens=8, foo=1)
    values = config.to_diff_dict()
    return unused, {name: values[name] for name in ("max_new_tokens", "do_sample")}


works("generation_config.update(max_new_tokens=8), to_diff_dict()", _updated)
works(
    "GenerationConfig.from_model_config(config)",
    lambda lib: lib.GenerationConfig.from_model_config(lib.model().config).eos_token_id,
)
works(
    "generate(input_ids, inputs_embeds=...)",
    _generated(
        IDS,
        inputs_embeds=torch.ones(2, 24, SMALL["hidden_size"]),
        attention_mask=torch.ones(2, 24, dtype=torch.long),
        max_new_tokens=4,
    ),
)


def _pipeline(lib: Library) -> Any:
    pipe = transformers.pipeline("text-generation", model=lib.loaded(dtype=torch.float32), tokenizer=lib.tokenizer())
    return pipe(CHAT, max_new_tokens=5, do_sample=False)


works('pipeline("text-generation", model, tokenizer=tokenizer)', _pipeline)
refused("generate(bad_words_ids=[[5]])", _generated(IDS, bad_words_ids=[[5]]), "give Transformers' NoBadWordsLogitsPr")
refused(
    "generate(cache_implementation='static')",
    _generated(IDS, cache_implementation="static", max_new_tokens=2, disable_compile=True),
    "cache_implementation='static' is not supported",
)


def _saved_as_accelerate_does(lib: Library) -> list[str]:
    model = lib.model()
    model.save_pretrained(lib.folder / "accelerate", save_function=torch.save, state_dict=model.state_dict())
    return sorted(path.name for path in (lib.folder / "accelerate").glob("*.safetensors"))


works("save_pretrained(folder, save_function=accelerator.save, state_dict=...)", _saved_as_accelerate_does)


def _saved_by_trainer(lib: Library) -> set[str]:
    folder = lib.folder / "trainer"
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True)
    transformers.Trainer(lib.model(), arguments).save_model(str(folder))
    return {path.name for path in folder.iterdir()} & {"config.json", "model.safetensors"}


differs(
    "Trainer(model, ...).save_model(folder)",
    _saved_by_trainer,
    lambda ours, theirs: ours == {"model.safetensors"} and theirs == ours | {"config.json"},
)


def documented() -> dict[str, str]:
    """The rows of docs/api.md: call -> verdict."""
    rows = re.findall(r"^\| `` ?(.+?) ?`` \| (\w+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a call stands in two rows"
    return dict(rows)


def test_the_document_has_a_row_for_each_check_and_no_other() -> None:
    assert documented() == {name: row.verdict for name, row in ROWS.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_the_row_is_true(name: str, libraries: tuple[Library, Library]) -> None:
    torch.manual_seed(0)
    ROWS[name].check(*libraries)
