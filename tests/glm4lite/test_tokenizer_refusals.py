"""What the tokenizer cannot do is refused by name."""

from typing import Any

import pytest

from glm4lite import Tokenizer
from glm4lite.base.errors import TokenizerError
from tests.glm4lite.tokenizer_pair import PAIRS, opened

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """Transformers' tokenizer and ours."""
    return opened(request.param)


@pytest.fixture
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained("nano")


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
    "a file as folder": (
        lambda t: t.save_pretrained(__file__),
        "refusals.py cannot be written: File exists",
    ),
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
    from glm4lite.text.tokenization.refusals import METHODS

    public = {name for name in dir(pair[0]) if not name.startswith("_")}
    assert public - set(dir(pair[1])) - set(METHODS) <= inner
