"""Tokenizer under Transformers' names, beside Transformers' own over the same files."""

import copy
import functools
import json
import os
import pickle
import random
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import processors

from glm4lite import Glm4ForCausalLM, Tokenizer
from glm4lite.errors import CheckpointError, HubError, TemplateError, TokenizerError
from glm4lite.messages import Message
from glm4lite.tokenization.encoding import BatchEncoding
from tests.glm4lite.hub_server import HubServer, Repo
from tests.glm4lite.served import NANO
from tests.glm4lite.small_tokenizer import SHARED, SPECIALS, byte_backend, needs_shared

transformers = pytest.importorskip("transformers")

PIECES = [
    *(
        "hello world",
        " the",
        "你好，世界",
        "🙂👩\u200d👩\u200d👧",
        "\n\n\t",
        " " * 30,
        "123456",
        "émigré e\u0301",
        "عربي हिन्दी",
    ),
    *("\0\x07\u200b\ufeff", "don't I'm", "<|user|>", "[gMASK]<sop>", "<|endoftext|>", "<|us", "er|>", "<tool>", ""),
]


def write_prefixed(folder: Path) -> None:
    """As the fuller GLM-4 files: `[gMASK]<sop>` before a text, `</s>` behind it; a bos token, and a token that is added
    but not special.
    """
    backend = byte_backend()
    backend.add_tokens(["<tool>"])
    backend.add_special_tokens([tokenizers.AddedToken("</s>", lstrip=True)])
    ids = {name: backend.token_to_id(name) for name in ("[gMASK]", "<sop>", "</s>")}
    backend.post_processor = processors.TemplateProcessing(
        "[gMASK] <sop> $A </s>", "[gMASK] <sop> $A </s> $B:1 </s>:1", list(ids.items())
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<sop>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": True, "special": True},
        "pad_token": "<|endoftext|>",
        "image_token": "<|begin_of_image|>",
        "truncation_side": "left",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": True,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    prefixed = tmp_path_factory.mktemp("prefixed")
    write_prefixed(prefixed)
    found = {"nano": NANO, "prefixed": prefixed}
    if (SHARED / "tokenizer" / "tokenizer.json").is_file():
        found["glm4"] = tmp_path_factory.mktemp("glm4")
        shutil.copy(SHARED / "tokenizer" / "tokenizer.json", found["glm4"])
        config = json.loads((SHARED / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        del config["auto_map"]  # names code, which AutoTokenizer asks to run
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (found["glm4"] / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@functools.cache
def opened(folder: Path) -> tuple[Any, Tokenizer]:
    return transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_pretrained(folder)


@pytest.fixture(params=["nano", "prefixed", pytest.param("glm4", marks=needs_shared)])
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Any, Tokenizer]:
    """Transformers' tokenizer and ours."""
    return opened(folders[request.param])


@pytest.fixture
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained("nano")


def values(encoding: Any) -> dict[str, Any]:
    """What is in an encoding, with the type of each tensor."""
    return {
        name: (str(value.dtype), value.tolist()) if hasattr(value, "tolist") else value
        for name, value in dict(encoding).items()
    }


def outcome(function: Any, *arguments: Any, **options: Any) -> Any:
    """What a call returns, or None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*arguments, **options)
        except TokenizerError:
            return None
        except Exception:  # the reference lets the library's own through, which have no class
            if isinstance(function, Tokenizer):
                raise
            return None


def options_of(draw: random.Random) -> dict[str, Any]:
    chosen = {
        "padding": draw.choice([True, False, "longest", "max_length", "do_not_pad"]),
        "truncation": draw.choice([True, False, None, "only_first", "longest_first", "do_not_truncate"]),
        "max_length": draw.choice([None, 0, 2, 3, 10, 20]),
        "add_special_tokens": draw.random() < 0.7,
        "pad_to_multiple_of": draw.choice([None, None, 5]),
        "padding_side": draw.choice([None, "left", "right"]),
        "return_token_type_ids": draw.choice([None, True, False]),
        "return_attention_mask": draw.choice([None, None, False]),
        "return_offsets_mapping": draw.random() < 0.3,
        "return_length": draw.random() < 0.3,
        "return_special_tokens_mask": draw.random() < 0.3,
        "return_overflowing_tokens": draw.random() < 0.1,
    }
    if draw.random() < 0.2:
        chosen["split_special_tokens"] = True
    if draw.random() < 0.2:
        chosen["return_tensors"] = "pt"
    if chosen["padding"] == "max_length" and chosen["max_length"] is None:
        chosen["max_length"] = 12  # the shared vocabulary's own is 128000
    if (chosen["max_length"] or 0) >= 10:
        chosen["stride"] = draw.choice([0, 0, 1])
    return chosen


def test_ids_masks_and_offsets_are_transformers_for_any_text_and_argument(pair: tuple[Any, Tokenizer]) -> None:
    reference, ours = pair
    draw = random.Random(1)
    refused = 0
    for _ in range(400):
        texts: Any = ["".join(draw.choices(PIECES, k=draw.randint(0, 8))) for _ in range(draw.randint(1, 4))]
        second: Any = draw.choice([None, None, None, texts[::-1]])
        options = options_of(draw)
        if draw.random() < 0.2:
            texts, second = texts[0], second and second[0]
        wanted = outcome(reference, texts, second, **options)
        found = outcome(ours, texts, second, **options)
        assert (wanted is None) == (found is None), (texts, second, options)
        if found is None:
            refused += 1
            continue
        assert values(found) == values(wanted), (texts, second, options)
    assert refused < 200


def test_a_very_long_text_and_words_are_as_transformers_has_them(pair: tuple[Any, Tokenizer]) -> None:
    reference, ours = pair
    text = "".join(random.Random(2).choices(PIECES, k=30_000))
    assert ours.encode(text) == reference.encode(text)
    assert values(ours(text, truncation=True, max_length=50)) == values(reference(text, truncation=True, max_length=50))
    for words in (["Hello", "world", "<|user|>"], [["a", "b"], ["c"]]):
        assert values(ours(words, is_split_into_words=True)) == values(reference(words, is_split_into_words=True))


def test_tokens_and_texts_are_transformers(pair: tuple[Any, Tokenizer]) -> None:
    reference, ours = pair
    draw = random.Random(3)
    for _ in range(200):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 8)))
        assert ours.tokenize(text) == reference.tokenize(text)
        assert ours.convert_tokens_to_string(ours.tokenize(text)) == text.replace("</s>", " </s>")
        rows = [reference.encode(text), [draw.randrange(len(reference) + 30) for _ in range(12)]]
        for skip in (False, True):
            assert ours.batch_decode(rows, skip) == reference.batch_decode(rows, skip)
            assert ours.decode(torch.tensor(rows[1]), skip_special_tokens=skip) == reference.decode(rows[1], skip)
            assert ours.convert_ids_to_tokens(rows[1], skip) == reference.convert_ids_to_tokens(rows[1], skip)
        for clean_up in (False, True):
            found = ours.decode(rows[0], clean_up_tokenization_spaces=clean_up)
            assert found == reference.decode(rows[0], clean_up_tokenization_spaces=clean_up)
    names = ["<|user|>", "Ġthe", "no such token"]
    assert ours.convert_tokens_to_ids(names) == reference.convert_tokens_to_ids(names)
    assert ours.decode(ours.encode("a")[0]) == reference.decode(reference.encode("a")[0])
    assert ours.decode([]) == reference.decode([]) == ""


ATTRIBUTES = [
    *("vocab_size", "padding_side", "truncation_side", "model_max_length", "model_input_names", "is_fast"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "pad_token_id", "cls_token_id", "mask_token_id"),
    *(
        "all_special_tokens",
        "all_special_ids",
        "special_tokens_map",
        "extra_special_tokens",
        "extra_special_tokens_ids",
    ),
    *("pad_token_type_id", "split_special_tokens", "clean_up_tokenization_spaces", "added_tokens_encoder", "vocab"),
    *("max_len_single_sentence", "chat_template"),
]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_transformers(name: str, pair: tuple[Any, Tokenizer]) -> None:
    reference, ours = pair
    assert getattr(ours, name) == getattr(reference, name)


def test_counts_and_lookups_are_transformers(pair: tuple[Any, Tokenizer]) -> None:
    reference, ours = pair
    assert len(ours) == len(reference)
    assert ours.get_added_vocab() == reference.get_added_vocab()
    assert ours.num_special_tokens_to_add(pair=True) == reference.num_special_tokens_to_add(pair=True)
    ids = reference.encode("a <|user|> b")
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == reference.get_special_tokens_mask(
        ids, already_has_special_tokens=True
    )


def test_a_part_that_only_this_checkpoint_names_is_an_attribute(folders: dict[str, Path]) -> None:
    reference, ours = opened(folders["prefixed"])
    assert ours.image_token == reference.image_token == "<|begin_of_image|>"
    assert ours.image_token_id == reference.image_token_id


# --- setting


def test_special_tokens_can_be_set_to_what_the_vocabulary_holds(folders: dict[str, Path]) -> None:
    reference, ours = (copy.deepcopy(one) for one in opened(folders["nano"]))
    for tokenizer in (reference, ours):
        tokenizer.pad_token = "<eop>"
        tokenizer.bos_token_id = tokenizer.convert_tokens_to_ids("<sop>")
        tokenizer.padding_side = "right"
        tokenizer.extra_special_tokens = ["[MASK]"]
        tokenizer.add_special_tokens({"eos_token": "<|user|>"})
    for name in ("pad_token_id", "bos_token", "eos_token_id", "all_special_tokens", "special_tokens_map"):
        assert getattr(ours, name) == getattr(reference, name)
    assert values(ours(["a", "a b c"], padding=True)) == values(reference(["a", "a b c"], padding=True))
    ours.pad_token = None
    assert ours.pad_token_id is None
    with pytest.raises(TokenizerError, match=r"no pad token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        ours(["a"], padding=True)
    with pytest.raises(TokenizerError, match=r"pad_token cannot be '\[PAD\]'.*vocabulary"):
        ours.pad_token = "[PAD]"
    with pytest.raises(TokenizerError, match="padding_side must be 'left' or 'right', found 'up'"):
        ours.padding_side = "up"  # type: ignore[assignment]
    with pytest.raises(TokenizerError, match="add_special_tokens knows no 'pad_tokn'; did you mean 'pad_token'"):
        ours.add_special_tokens({"pad_tokn": "<eop>"})
    with pytest.raises(TokenizerError, match="eos_token_id cannot be 99999"):
        ours.eos_token_id = 99_999


def test_settings_of_from_pretrained_are_set(nano: Tokenizer) -> None:
    chosen = {"padding_side": "right", "pad_token": "<eop>", "model_max_length": 7, "truncation_side": "left"}
    reference = transformers.AutoTokenizer.from_pretrained(NANO, **chosen)
    ours = Tokenizer.from_pretrained(NANO, use_fast=True, trust_remote_code=False, **chosen)
    for options in ({"padding": True}, {"padding": "max_length", "truncation": True}):
        texts = ["a b c d e f g h i j", "a"]
        assert values(ours(texts, **options)) == values(reference(texts, **options))
    assert ours.name_or_path == str(NANO)
    assert nano.name_or_path == "nano"
    assert Tokenizer.from_pretrained("nano", chat_template="x").apply_chat_template([{}], tokenize=False) == "x"


# --- what is refused, by name

REFUSED: dict[str, tuple[Any, str]] = {
    "a misspelt argument": (lambda t: t("a", paddin=True), "the tokenizer knows no 'paddin'; did you mean 'padding'"),
    "no text": (lambda t: t(), "there is no text"),
    "an empty batch": (lambda t: t([]), "there is no text: the list is empty"),
    "a number": (lambda t: t(5), "a text must be a string, found 5"),
    "a number in a list": (lambda t: t(["a", None]), "a text must be a string, found None"),
    "ids": (lambda t: t([[1, 2, 3]]), r"a text must be a string, found \[1, 2, 3\]"),
    "words that are none": (lambda t: t("a b", is_split_into_words=True), "a text is a list of words, found 'a b'"),
    "pairs of another length": (lambda t: t(["a", "b"], ["c"]), "text_pair must be a list of 2 texts"),
    "tensors of tensorflow": (lambda t: t("a", return_tensors="tf"), "return_tensors must be 'pt' or 'np'.*'tf'"),
    "rows of several lengths": (
        lambda t: t(["a", "a b c"], return_tensors="pt"),
        "input_ids is no tensor: its rows differ in length.*padding=True",
    ),
    "a padding nobody knows": (lambda t: t("a", padding="longst"), "padding must be one of .*found 'longst'"),
    "a truncation nobody knows": (lambda t: t("a", truncation="left"), "truncation must be one of"),
    "a length below 0": (lambda t: t("a", max_length=-1), "max_length must not be below 0, found -1"),
    "half a length": (lambda t: t("a", max_length=1.5), "max_length must be a whole number, found 1.5"),
    "a side nobody knows": (lambda t: t("a", padding=True, padding_side="top"), "padding_side must be 'left'"),
    "a stride too long": (
        lambda t: t("a b c", truncation=True, max_length=2, stride=5),
        r"rows of 2 tokens, 0 of them added, cannot share 5 \(stride\)",
    ),
    "a multiple that does not fit": (
        lambda t: t("a", padding=True, truncation=True, max_length=7, pad_to_multiple_of=2),
        "cut to 7 tokens, which is no multiple of pad_to_multiple_of 2",
    ),
    "labels decoded": (lambda t: t.decode([1, -100]), "-100 is no token id; replace the -100 of labels"),
    "half an id": (lambda t: t.decode([1.5]), "a token id must be a whole number, found 1.5"),
    "a token's text as id": (lambda t: t.convert_ids_to_tokens(["a"]), "a token id must be a whole number, found 'a'"),
    "a file as folder": (lambda t: t.save_pretrained(__file__), "test_tokenizer_surface.py cannot be written"),
    "a text decoded": (lambda t: t.decode("abc"), "decode takes token ids, found 'abc'"),
    "a misspelt option of decode": (lambda t: t.decode([1], skip_specials=True), "did you mean 'skip_special_tokens'"),
    "code of the checkpoint": (
        lambda t: type(t).from_pretrained("nano", trust_remote_code=True),
        "from_pretrained: trust_remote_code=True is not supported: no code of a checkpoint is run",
    ),
    "the slow tokenizer": (lambda t: type(t).from_pretrained("nano", use_fast=False), "use_fast=False is not"),
    "a beginning token": (lambda t: type(t).from_pretrained("nano", add_bos_token=True), "add_bos_token=True is not"),
    "a misspelt setting": (
        lambda t: type(t).from_pretrained("nano", padding_sid="left"),
        "did you mean 'padding_side'",
    ),
    "an unknown pad token": (lambda t: type(t).from_pretrained("nano", pad_token="[PAD]"), r"pad_token cannot be"),
    "an upload": (lambda t: t.save_pretrained("x", push_to_hub=True), "push_to_hub=True is not supported"),
    "a mask of the assistant's words": (
        lambda t: t.apply_chat_template([{"role": "user"}], return_assistant_tokens_mask=True),
        "return_assistant_tokens_mask is not supported",
    ),
    "unsafe ids": (
        lambda t: t.apply_chat_template([{"role": "user"}], sanitize_control_tokens=False),
        "sanitize_control_tokens=False is not supported",
    ),
    "both ends": (
        lambda t: t.apply_chat_template([{}], add_generation_prompt=True, continue_final_message=True),
        "exclude each other",
    ),
    "a misspelt argument of a chat": (
        lambda t: t.apply_chat_template([{"role": "user", "content": "a"}], add_generation_promt=True),
        "knows no 'add_generation_promt'; did you mean 'add_generation_prompt'",
    ),
    "no conversation": (lambda t: t.apply_chat_template([]), "conversation must be a list of messages"),
    "a text as conversation": (lambda t: t.apply_chat_template("Hi"), "conversation must be a list .*found 'Hi'"),
    "a text as message": (lambda t: t.apply_chat_template(["Hi"]), "a message must be a dict.*found 'Hi'"),
    "an object in a message": (
        lambda t: t.apply_chat_template([{"role": "user", "content": object()}]),
        "messages, tools and the template's variables are text and numbers",
    ),
    "a tool that is none": (
        lambda t: t.apply_chat_template([{"role": "user"}], tools=[3]),
        "a tool must be a function",
    ),
    "nothing to continue": (
        lambda t: t.apply_chat_template([{"role": "user"}], continue_final_message=True),
        "the last message has no 'content' to continue",
    ),
    "an option of the call": (
        lambda t: t.apply_chat_template([{"role": "user", "content": ""}], tokenizer_kwargs={"stride": 3}),
        "tokenizer_kwargs knows no 'stride'",
    ),
    "encodings without ids": (lambda t: t.pad([{"labels": 1}]), "pad takes encodings that hold input_ids"),
    "examples that differ": (
        lambda t: t.pad([{"input_ids": [1]}, {"input_ids": [1], "labels": 0}]),
        "example 1 has input_ids, labels; the first has input_ids",
    ),
    "a mask of another length": (
        lambda t: t.pad([{"input_ids": [1, 2], "attention_mask": [1]}, {"input_ids": [1], "attention_mask": [1]}]),
        "row 0 of attention_mask must hold 2 numbers",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(what: str, nano: Tokenizer) -> None:
    use, message = REFUSED[what]
    with pytest.raises(TokenizerError, match=message) as caught:
        use(nano)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)  # as scripts expect


@pytest.mark.parametrize("name", ["add_tokens", "train_new_from_iterator", "push_to_hub", "batch_encode_plus"])
def test_a_method_that_is_not_there_says_why(name: str, nano: Tokenizer) -> None:
    assert not hasattr(nano, name)
    with pytest.raises(AttributeError, match=f"has no {name}: "):
        getattr(nano, name)


def test_a_name_that_is_nearly_right_is_told(nano: Tokenizer) -> None:
    with pytest.raises(AttributeError, match="knows no 'pad_tokenid'; did you mean 'pad_token_id'"):
        _ = nano.pad_tokenid


def test_every_public_name_of_transformers_is_there_or_refused(pair: tuple[Any, Tokenizer]) -> None:
    """Nothing is absent without a word: attributes that only its own machinery uses are listed here."""
    inner = {
        *("SPECIAL_TOKENS_ATTRIBUTES", "add_bos_token", "add_eos_token", "add_prefix_space", "backend", "init_inputs"),
        *("can_save_slow_tokenizer", "chat_control_tokens", "convert_added_tokens", "convert_to_native_format"),
        *("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "files_loaded", "init_kwargs"),
        *("get_response_parser", "model", "pretrained_vocab_files_map", "response_template", "slow_tokenizer_class"),
        *("set_truncation_and_padding", "update_post_processor", "verbose", "vocab_files_names"),
    }
    from glm4lite.tokenization.refusals import METHODS

    public = {name for name in dir(pair[0]) if not name.startswith("_")}
    assert public - set(dir(pair[1])) - set(METHODS) <= inner


# --- chats

CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "system", "content": " S1\n"},
        {"role": "user", "content": "U1 "},
        {"role": "assistant", "content": "<think>x</think>A1\n"},
        {"role": "user", "content": "你好 🙂 {{ x }} {% y %} & <b> [c]"},
    ],
    "calls": [
        {"role": "user", "content": "U"},
        {"role": "assistant", "metadata": "a", "content": '{"k": "<b>"}'},
        {"role": "observation", "content": "O"},
        {"role": "assistant", "content": "Done  "},
    ],
    "OpenAI's calls": [
        {"role": "user", "content": "U", "name": None},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a", "arguments": {"k": 1}}}]},
        {"role": "tool", "content": "O"},
    ],
    "a thought": [{"role": "user", "content": "U"}, {"role": "assistant", "reasoning": "R", "content": "Once  "}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a <b> [c]"}]}],
    "empty": [{"role": "user", "content": ""}],
}
SCHEMA = {
    "name": "a",
    "description": "<b>",
    "parameters": {"type": "object", "properties": {"类型": {"type": "string"}}},
}
TOOLS: dict[str, Any] = {"none": None, "empty": [], "some": [{"type": "function", "function": SCHEMA}, SCHEMA]}
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "prompt": {"add_generation_prompt": True, "enable_thinking": False},
    "continued": {"continue_final_message": True},
}
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((SHARED / "templates").glob("*.jinja"))}
SOURCES["nano"] = (NANO / "chat_template.jinja").read_text(encoding="utf-8")
SOURCES["ours"] = (  # what GLM-4's templates do not use: reasoning, OpenAI's calls, names, variables
    "{{ bos_token }}{{ documents | tojson if documents }}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.reasoning_content }}{{ m.content if m.content is string else m.content[0].text }}{{ m.tool_calls | tojson "
    "if m.tool_calls }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ '<think></think>' if enable_thinking is false }}{% endif %}"
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_chat_is_written_as_transformers_writes_it(
    source: str, tools: str, way: str, folders: dict[str, Path]
) -> None:
    reference, ours = opened(folders["nano"])
    compared = 0
    for name, chat in CHATS.items():
        if (name, way) == ("parts", "continued"):
            continue  # templates print the list; Transformers goes on from the middle of it
        options = {"tools": TOOLS[tools], "chat_template": SOURCES[source], **WAYS[way]}
        for tokenize in (False, True):
            wanted = outcome_of_chat(reference, chat, tokenize=tokenize, **options)
            found = outcome_of_chat(ours, chat, tokenize=tokenize, **options)
            assert found == wanted, name
            compared += found is not None
    assert compared > 4


def outcome_of_chat(tokenizer: Any, chat: Any, **options: Any) -> Any:
    try:
        found = tokenizer.apply_chat_template(copy.deepcopy(chat), **options)
    except (ValueError, TemplateError, TypeError, transformers.utils.chat_template_utils.jinja2.TemplateError):
        return None
    return found if isinstance(found, str) else values(found)


def test_batches_of_chats_are_filled_and_cut_as_transformers_does(folders: dict[str, Path]) -> None:
    reference, ours = opened(folders["nano"])
    chats = [CHATS["one turn"], CHATS["turns"], CHATS["empty"]]
    ways: list[dict[str, Any]] = [
        {},
        {"return_dict": False},
        {"padding": True, "return_tensors": "pt"},
        {"padding": True, "tokenizer_kwargs": {"padding_side": "right", "pad_to_multiple_of": 8}},
        {"padding": "max_length", "max_length": 20, "truncation": True, "return_tensors": "pt"},
        {"max_length": 4, "truncation": True},
        {"tokenize": False},
    ]
    for way in ways:
        for chat in (chats, chats[1]):
            wanted = reference.apply_chat_template(chat, add_generation_prompt=True, **way)
            found = ours.apply_chat_template(chat, add_generation_prompt=True, **way)
            assert type(found) is type(wanted) or isinstance(found, BatchEncoding)
            if isinstance(found, BatchEncoding):
                found, wanted = values(found), values(wanted)
            assert found == wanted, way


def test_control_tokens_of_what_is_said_stay_text_in_ids(folders: dict[str, Path]) -> None:
    """As Transformers' sanitize_control_tokens does it."""
    reference, ours = opened(folders["nano"])
    said = "a<|user|>[gMASK]<|assistant|>b"
    chat = [
        {"role": "system", "content": said},
        {"role": "user", "content": said},
        {"role": "assistant", "metadata": "f", "content": f'{{"k": "{said}"}}'},
        {"role": "observation", "content": said},
        {"role": "assistant", "content": said},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": said, "parameters": {}}}]
    wanted = reference.apply_chat_template(chat, tools=tools, sanitize_control_tokens=True)
    found = ours.apply_chat_template(chat, tools=tools)
    assert values(found) == values(wanted)
    assert sum(ours.is_special(i) for i in found["input_ids"]) == len(chat) + 3  # a turn each, the tools', the prefix
    text = ours.apply_chat_template(chat, tools=tools, tokenize=False)
    assert text == reference.apply_chat_template(chat, tools=tools, tokenize=False) == ours.decode(found["input_ids"])


@pytest.mark.parametrize("source", SOURCES)
def test_no_value_of_a_message_becomes_a_control_token(source: str, nano: Tokenizer) -> None:
    """Whatever key it stands under, and whatever the template does with it."""
    draw, compared = random.Random(7), 0
    keys = ["content", "metadata", "name", "reasoning_content", "thinking", "tool_calls", "other"]

    def controls(chat: list[dict[str, str]]) -> list[int] | None:
        try:
            ids = nano.apply_chat_template(chat, chat_template=SOURCES[source], return_dict=False)
        except TemplateError:
            return None
        return [token_id for token_id in ids if nano.is_special(token_id)]

    for _ in range(20):
        plain = [{"role": draw.choice(["user", "system", "assistant"]), "content": "x"} for _ in range(3)]
        for message in plain:
            message[draw.choice(keys)] = "SAID"
        hostile = [{key: value.replace("SAID", "".join(SPECIALS)) for key, value in one.items()} for one in plain]
        wanted = controls(plain)
        assert controls(hostile) == wanted
        compared += bool(wanted)
    assert compared > 5


def test_functions_and_glm4lites_own_objects_are_taken(nano: Tokenizer) -> None:
    def weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: The city's name.
        """
        return city

    schema = transformers.utils.get_json_schema(weather)
    chat = [{"role": "user", "content": "Hi"}]
    del schema["function"]["return"]  # which no template shows a model as an argument
    assert nano.apply_chat_template(chat, tools=[weather]) == nano.apply_chat_template(chat, tools=[schema])
    assert nano.apply_chat_template([Message("user", "Hi")]) == nano.apply_chat_template(chat)


def test_a_chat_template_can_be_set_chosen_by_name_and_taken_away(nano: Tokenizer) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    nano.chat_template = {"default": "d{{ messages[0].content }}", "tool_use": "t", "rag": "r{{ documents }}"}
    write = functools.partial(nano.apply_chat_template, chat, tokenize=False)
    assert write() == "dHi"
    assert write(tools=[SCHEMA]) == "t"
    assert write(chat_template="rag", documents=[{"title": "x"}]) == "r[{'title': 'x'}]"
    assert write(chat_template="{{ eos_token }}") == "<|endoftext|>"
    nano.chat_template = {"rag": "r"}
    with pytest.raises(TokenizerError, match="no default chat template; name one of rag"):
        write()
    nano.chat_template = None
    with pytest.raises(TokenizerError, match="has no chat template"):
        write()
    with pytest.raises(TemplateError, match="not valid Jinja"):
        write(chat_template="{% if %}")


def test_a_variable_that_no_template_reads_is_said(nano: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    nano.apply_chat_template([{"role": "user", "content": "Hi"}], reasoning_effort="high")
    assert "reasoning_effort changes nothing: the chat template does not read it" in caplog.text


# --- beside Transformers' own parts


def test_transformers_collators_fill_batches_with_it(pair: tuple[Any, Tokenizer]) -> None:
    for kind, options in (
        (transformers.DataCollatorWithPadding, {"pad_to_multiple_of": 4}),
        (transformers.DataCollatorForLanguageModeling, {"mlm": False}),
        (transformers.DataCollatorForTokenClassification, {}),
    ):
        rows = []
        for tokenizer in pair:
            features = [tokenizer(text) for text in ("a", "a b c d", "")]
            for feature in features:
                length = len(feature["input_ids"])
                feature["labels"] = [1] * length if kind is transformers.DataCollatorForTokenClassification else 1
                if kind is transformers.DataCollatorForLanguageModeling:
                    del feature["labels"]
            rows.append(values(kind(tokenizer, **options)(features)))
        assert rows[0] == rows[1]


def test_pad_keeps_kinds_and_fills_as_transformers_does(pair: tuple[Any, Tokenizer]) -> None:
    reference, ours = pair
    batch = {"input_ids": [[5, 6, 7], [8]], "special_tokens_mask": [[0, 0, 0], [1]], "labels": [1, 0]}
    cases: list[tuple[Any, dict[str, Any]]] = [
        (batch, {}),
        (batch, {"padding_side": "right", "return_tensors": "pt"}),
        (batch, {"padding": "max_length", "max_length": 6, "return_attention_mask": False}),
        (batch, {"padding": False}),
        ([{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3])}], {}),
        ([{"input_ids": [1, 2]}, {"input_ids": [3]}], {"return_tensors": "np", "pad_to_multiple_of": 3}),
        ({"input_ids": [1, 2, 3]}, {"padding": "max_length", "max_length": 5}),
        ({"input_ids": [[], []]}, {"padding": "max_length", "max_length": 2}),
    ]
    for given, options in cases:
        wanted = values(reference.pad(copy.deepcopy(given), **options))
        before = copy.deepcopy(given)
        assert values(ours.pad(given, **options)) == wanted, options
        assert str(given) == str(before)  # what was given is left as it was


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    return Glm4ForCausalLM.from_pretrained("nano")


def test_a_script_for_transformers_runs_with_only_the_import_changed(model: Glm4ForCausalLM, nano: Tokenizer) -> None:
    answers = []
    for tokenizer in (transformers.AutoTokenizer.from_pretrained(NANO), nano):
        chats = [[{"role": "user", "content": text}] for text in ("Hi", "What is 37 * 24?")]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = found[:, inputs.input_ids.shape[1] :]
        answers.append(tokenizer.batch_decode(new, skip_special_tokens=True))
        logits = model(**tokenizer(["a b", "a"], return_tensors="pt", padding=True).to("cpu")).logits
        assert logits.shape[:2] == (2, len(tokenizer("a b").input_ids))
    assert answers[0] == answers[1]
    assert all(answers[0])


def test_transformers_streamers_print_with_it(
    model: Glm4ForCausalLM, nano: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    inputs = nano.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False}
    ids = model.generate(**inputs, **options)
    answer = nano.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    streamer = transformers.TextStreamer(nano, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **options)
    assert capsys.readouterr().out == answer + "\n"
    pieces = transformers.TextIteratorStreamer(nano, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": pieces, **options})
    thread.start()
    assert "".join(pieces) == answer
    thread.join()


def test_stop_strings_are_found_with_it(model: Glm4ForCausalLM, nano: Tokenizer) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    inputs = nano.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    free = nano.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0])
    stop = free[-9:-5]
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, stop_strings=stop, tokenizer=nano)
    assert nano.decode(found[0]).endswith(stop)


# --- the encoding


def test_an_encoding_tells_where_its_tokens_lie_as_transformers_does(pair: tuple[Any, Tokenizer]) -> None:
    texts, seconds = ["Hello world, <|user|>", "你好 x"], ["a b", "c"]
    wanted, found = (tokenizer(texts, seconds) for tokenizer in pair)
    for row in (0, 1):
        for name in ("tokens", "word_ids", "sequence_ids"):
            assert getattr(found, name)(row) == getattr(wanted, name)(row)
        for place in range(3):
            for name in ("token_to_chars", "token_to_word", "token_to_sequence", "word_to_tokens", "word_to_chars"):
                told = getattr(found, name)(row, place)
                assert told is None or told == getattr(wanted, name)(row, place), name
            for name in ("char_to_token", "char_to_word"):
                assert getattr(found, name)(row, place, 1) == getattr(wanted, name)(row, place, 1), name
    assert found.char_to_token(3) == wanted.char_to_token(3)
    assert found.token_to_chars(0, len(found.tokens()) - 4) is not None
    assert found[1].ids == wanted[1].ids == found["input_ids"][1]
    assert found.n_sequences == 2
    assert found.is_fast


def test_an_encoding_is_a_mapping_with_attributes_that_can_be_copied_and_moved(nano: Tokenizer) -> None:
    encoding = nano(["a", "b c"], padding=True, return_tensors="pt")
    assert encoding.input_ids is encoding["input_ids"]
    assert {**encoding}.keys() == {"input_ids", "attention_mask"}
    assert encoding.to("meta") is encoding
    assert encoding.input_ids.device.type == "meta"
    with pytest.raises(TokenizerError, match=r"goes to a device.*not to torch\.float16"):
        encoding.to(torch.float16)  # type: ignore[arg-type]
    again = unpickled(nano("a b"))
    assert again.tokens() == nano("a b").tokens()
    with pytest.raises(AttributeError, match="the encoding has no 'labels'; it has input_ids, attention_mask"):
        _ = encoding.labels
    rows = nano.pad({"input_ids": [[1], [2, 3]]})
    assert rows[:1] == {"input_ids": [[nano.pad_token_id, 1]], "attention_mask": [[0, 1]]}
    with pytest.raises(TokenizerError, match="where its tokens lie is not known"):
        rows.tokens()
    assert nano(text_target="a b")["input_ids"] == nano("x", text_target="a b")["labels"]


def test_a_text_longer_than_the_model_takes_is_said_once(nano: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    nano.model_max_length = 3
    for _ in range(2):
        nano("one two three four")
    assert caplog.text.count("more than the model's 3") == 1


# --- files


def test_saving_writes_the_files_as_they_were(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in folders.items():
        ours = Tokenizer.from_pretrained(folder)
        files = ours.save_pretrained(tmp_path / name)
        for file in map(Path, files):
            assert file.read_bytes() == (folder / file.name).read_bytes()
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.encode("Hi <|user|>") == ours.encode("Hi <|user|>")
        assert again.chat_template == ours.chat_template


def test_changed_attributes_are_saved_and_read_by_both(tmp_path: Path) -> None:
    ours = Tokenizer.from_pretrained("nano", padding_side="right", pad_token="<eop>", model_max_length=9)
    ours.chat_template = "hello {{ messages[0].content }}"
    ours.extra_special_tokens = ["[MASK]", "<eop>"]
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "x"}')  # an older tokenizer's
    ours.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "elsewhere")
    (tmp_path / "tokenizer.json").symlink_to("elsewhere")
    kept = (tmp_path / "elsewhere").stat().st_mtime_ns
    ours.save_pretrained(tmp_path)  # onto itself, through no link
    assert (tmp_path / "elsewhere").stat().st_mtime_ns == kept
    assert not (tmp_path / "tokenizer.json").is_symlink()
    for again in (transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)):
        names = ("padding_side", "pad_token", "eos_token", "model_max_length", "chat_template", "extra_special_tokens")
        assert {name: getattr(again, name) for name in names} == {name: getattr(ours, name) for name in names}
        assert again(["a", "b c"], padding=True)["input_ids"] == ours(["a", "b c"], padding=True)["input_ids"]
    ours.chat_template = None
    ours.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    ours.chat_template = {"default": "a", "tool_use": "b"}
    ours.save_pretrained(tmp_path)
    for again in (transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)):
        assert again.chat_template == ours.chat_template


def test_older_files_name_their_special_tokens_in_a_map(tmp_path: Path) -> None:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<sop>"}'
    )
    names = {"eos_token": {"content": "<|user|>", "lstrip": False}, "pad_token": "<eop>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    reference, ours = opened(tmp_path)
    assert ours.special_tokens_map == reference.special_tokens_map
    assert ours.eos_ids == {reference.eos_token_id}


def test_a_special_token_that_the_vocabulary_lacks_is_named(tmp_path: Path) -> None:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<nothing>"}')
    with pytest.raises(TokenizerError, match=r"names '<nothing>', which tokenizer\.json does not hold"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"padding_side": "up"}, {"eos_token": 5}, {"extra_special_tokens": "<eop>"}, {"model_max_length": "long"},
     {"model_input_names": 3}, {"extra_special_tokens": {"x_token": 4}}],
    ids=json.dumps,
)  # fmt: skip
def test_a_configuration_of_unexpected_form_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: unexpected form"):
        Tokenizer.from_pretrained(tmp_path)


def test_of_a_hub_repo_only_the_small_files_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    files = Repo.of(NANO).files
    repos = {"org/nano": Repo(files), "org/words": Repo(Repo.of(folders["prefixed"]).files), "org/none": Repo({})}
    with HubServer(repos) as server:
        for source, code in (("org/nano", ""), ("org/words", ""), ("org/none", "has no tokenizer.json")):
            found = in_a_process(server.url, tmp_path, source)
            assert code in found["error"] if code else found["ids"] == found["offline"]
        assert not [name for name in server.fetched if name.endswith(".safetensors")]


def in_a_process(endpoint: str, home: Path, source: str) -> dict[str, Any]:
    """What the tokenizer of a repo makes of a text, in a process of its own: huggingface_hub reads HF_ENDPOINT once."""
    import subprocess
    import sys

    script = (
        "import json, sys\nfrom glm4lite import Tokenizer\nfrom glm4lite.errors import HubError\n"
        "try:\n    first = Tokenizer.from_pretrained(sys.argv[1], revision='main')\n"
        "    again = Tokenizer.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "    print(json.dumps({'ids': first.encode('a <|user|>'), 'offline': again.encode('a <|user|>')}))\n"
        "except HubError as error:\n    print(json.dumps({'error': str(error)}))\n"
    )
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        [sys.executable, "-c", script, source],
        env=kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_source_that_is_not_there_is_said() -> None:
    with pytest.raises(HubError, match="does not exist"):
        Tokenizer.from_pretrained("./nowhere")


# --- the safe way stays safe


def test_the_safe_way_and_the_documented_one_do_not_disturb_each_other(nano: Tokenizer) -> None:
    user = nano.special["<|user|>"]
    stop, wrong = threading.Event(), list[str]()

    def use() -> Iterator[None]:
        while not stop.is_set():
            if user in nano.ids("a <|user|> b" * 50):
                wrong.append("the safe way gave a special token")
            if user not in nano("a <|user|> b" * 50, padding="max_length", max_length=9)["input_ids"]:
                wrong.append("the documented way gave none")
            yield

    threads = [threading.Thread(target=lambda: [None for _ in use()]) for _ in range(4)]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    nano.backend_tokenizer.enable_truncation(max_length=1)
    assert len(nano("a b c")["input_ids"]) > 1


def unpickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - made here


@pytest.mark.parametrize("way", [copy.deepcopy, unpickled])
def test_a_copy_is_as_safe_and_as_useful(way: Any, nano: Tokenizer) -> None:
    chat = [{"role": "user", "content": "<|user|>"}]
    wanted = nano.apply_chat_template(chat)
    again = way(nano)
    assert again.special["<|user|>"] not in again.ids("<|user|>")
    assert again.encode("<|user|>") == [again.special["<|user|>"]]
    assert again.apply_chat_template(chat) == wanted


def test_ids_with_gaps_between_them_stay_what_they_are(tmp_path: Path) -> None:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] += 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("<|user|>") == [ours.special["<|user|>"]]
