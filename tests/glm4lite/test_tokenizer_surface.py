"""Tokenizer under Transformers' names, beside Transformers' own over the same files."""

import copy
import json
import pickle
import random
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite import Tokenizer
from glm4lite.base.errors import TokenizerError
from tests.glm4lite.small_tokenizer import byte_backend
from tests.glm4lite.tokenizer_pair import PAIRS, opened, values

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """Transformers' tokenizer and ours."""
    return opened(request.param)


@pytest.fixture
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained("nano")


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
    chosen: dict[str, Any] = {
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
    text = "".join(random.Random(2).choices(PIECES, k=10_000))
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


def test_a_part_that_only_this_checkpoint_names_is_an_attribute() -> None:
    reference, ours = opened("prefixed")
    assert ours.image_token == reference.image_token == "<|begin_of_image|>"
    assert ours.image_token_id == reference.image_token_id


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
