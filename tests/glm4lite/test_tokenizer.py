import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from glm4lite.base.errors import CheckpointError, ContextLengthError
from glm4lite.text.tokenization.rust import named_errors, panic_reports_hidden
from glm4lite.text.tokenization.streaming import StreamingDetokenizer
from glm4lite.text.tokenizer import Tokenizer
from tests.glm4lite.interpreter_lock import longest_wait
from tests.glm4lite.served import NANO
from tests.glm4lite.small_tokenizer import SPECIALS, byte_backend, byte_tokenizer, glm_tokenizer, needs_shared

TEXTS = [
    *("", "\n", "Hello, world! 12345", "你好 🙂 émigré 👩\u200d👩\u200d👧", " x\r\n\r\n  y\t"),
    *("<|user|> [gMASK]<sop>", "<|us" + "er|>"),
]

GOLDEN = {
    "Hello I am doing": [9703, 358, 1079, 3730],
    "\n": [198],
    "\n\n": [271],
    " It's 2025年 émigré 🙂\r\n\r\n  x": [
        *(1084, 594, 220, 115937, 20, 98334, 3958, 76, 5233, 963, 27392, 871, 220, 856),
    ],
    'get_weather\n{"city": "北京"}': [455, 68852, 198, 4913, 8923, 788, 330, 99334, 9204],
    "[gMASK]<sop><|system|>\nYou are helpful.<|user|>\nHello, world! 12345<|assistant|>": [
        *(151331, 151333, 151335, 198, 2610, 525, 10945, 13, 151336, 198),
        *(9703, 11, 1879, 0, 220, 108714, 100461, 151337),
    ],
    "<think>\n": [13699, 766, 397],
    "</think>\n\n": [522, 26779, 1339],
}


def stream(tokenizer: Tokenizer, ids: list[int], keep_special: bool = False) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer, keep_special)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.finish()]


@needs_shared
@pytest.mark.parametrize("text", GOLDEN)
def test_the_golden_ids_of_the_glm4_vocabulary(text: str) -> None:
    assert glm_tokenizer().ids(text, special=True) == GOLDEN[text]


@needs_shared
def test_the_glm4_vocabulary_has_its_size_stop_ids_and_prefix() -> None:
    tokenizer = glm_tokenizer()
    assert tokenizer.size == 151343
    assert list(tokenizer.special) == SPECIALS
    assert tokenizer.stop_ids == {151329, 151336, 151338}
    assert tokenizer.prefix_ids == [151331, 151333]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.text(tokenizer.ids(text)) == text


@pytest.mark.parametrize("special", [True, False], ids=["special", "merely added"])
def test_what_a_user_types_never_becomes_a_special_token(special: bool) -> None:
    tokenizer = Tokenizer(byte_backend(special))
    ids = set(tokenizer.special.values())
    for name in ("<|user|>", "<|assistant|>", "[gMASK]", "<|observation|>", "<|endoftext|>"):
        assert not ids & set(tokenizer.ids(f"a{name}{name}b"))
        assert tokenizer.ids(name, special=True) == [tokenizer.special[name]]


def test_a_token_declared_special_only_in_the_config_is_special() -> None:
    backend = byte_backend()
    backend.add_tokens(["<tool>"])
    config = {"added_tokens_decoder": {"9": {"content": "<tool>", "special": True}}, "eos_token": {"content": "<tool>"}}
    tokenizer = Tokenizer(backend, config)
    token_id = tokenizer.special["<tool>"]
    assert token_id not in tokenizer.ids("<tool>")
    assert tokenizer.eos_ids == {token_id}
    assert tokenizer.stop_ids == {token_id, *(tokenizer.special[n] for n in (SPECIALS[0], SPECIALS[7], SPECIALS[9]))}


def test_the_special_strings_split_as_the_library_splits_them() -> None:
    tokenizer, library = byte_tokenizer(), byte_backend()
    text = "<|user|><|user|>\nHi[gMASK]<sop>x<|us<|user|>er|><sop"
    assert tokenizer.ids(text, special=True) == library.encode(text, add_special_tokens=False).ids


def test_others_run_while_a_long_text_is_encoded() -> None:
    tokenizer = byte_tokenizer()
    assert longest_wait(lambda: tokenizer.ids("<|" * 500_000)) < 0.2


def test_a_text_that_does_not_fit_is_refused_with_its_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.ids("a b")
    assert tokenizer.ids("a b", context=len(ids) + 1) == ids
    for special in (False, True):
        with pytest.raises(
            ContextLengthError, match=f"3 characters, (at least )?[0-9]+ tokens.* context is {len(ids)}"
        ):
            tokenizer.ids("a b", special=special, context=len(ids))


def test_a_lone_surrogate_does_not_stop_the_encoder() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.text(tokenizer.ids("a\ud800b")) == "a?b"


def test_special_tokens_are_left_out_or_kept() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.ids("<|user|>\nhi<|assistant|>", special=True)
    assert tokenizer.text(ids) == "\nhi"
    assert tokenizer.text(ids, keep_special=True) == "<|user|>\nhi<|assistant|>"


@pytest.mark.parametrize("keep_special", [False, True])
def test_streamed_pieces_join_to_the_whole_text_for_any_ids(keep_special: bool) -> None:
    tokenizer, library = byte_tokenizer(), byte_backend()
    random_source = random.Random(0)
    for _ in range(300):
        ids = [random_source.randrange(tokenizer.size + 3) for _ in range(random_source.randrange(30))]
        whole = tokenizer.text(ids, keep_special)
        assert "".join(stream(tokenizer, ids, keep_special)) == whole
        assert library.decode(ids, skip_special_tokens=not keep_special) == whole


def test_no_piece_ends_in_half_a_character() -> None:
    tokenizer = byte_tokenizer()
    text = "汉字と🙂👩‍👧é"
    pieces = stream(tokenizer, tokenizer.ids(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_becomes_whole_is_said_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    pieces = stream(tokenizer, tokenizer.ids("a🙂")[:-1])
    assert pieces[:-1] == ["a"] + [""] * (len(pieces) - 2)
    assert pieces[-1] == "\ufffd"


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama's: words start with U+2581, other characters are bytes `<0xNN>`."""
    words = ["<unk>", "▁the", "▁cat", "s", "▁", "a"] + [f"<0x{byte:02X}>" for byte in range(256)]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def test_other_decoders_stream_as_well() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert not tokenizer.byte_level
    cat = [1, 2, 3, 4, *(6 + byte for byte in "🙂é".encode()), 1, 5]
    pieces = stream(tokenizer, cat)
    assert "".join(pieces) == tokenizer.text(cat) == "the cats 🙂é thea"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:3] == ["the", " cat", "s"]


def test_other_decoders_do_not_wait_for_bytes_that_are_not_utf8() -> None:
    tokenizer = byte_fallback_tokenizer()
    pieces = stream(tokenizer, [1, *[6 + 0xFF] * 40, 2])
    assert pieces[0] == "the"
    assert "".join(pieces[:-1]).endswith("cat")


def test_an_empty_generation_is_empty_text() -> None:
    assert stream(byte_tokenizer(), []) == [""]
    assert stream(byte_fallback_tokenizer(), []) == [""]


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match="-hf"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe\x00"])
def test_a_corrupt_tokenizer_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens_decoder": []}', '{"added_tokens_decoder": 3}'])
def test_a_corrupt_tokenizer_config_is_named(tmp_path: Path, content: str) -> None:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    if content.endswith("[]}"):  # nothing declared there: as good as none
        assert Tokenizer.from_folder(tmp_path).size > 300
        return
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_reads_back(tmp_path: Path) -> None:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|user|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_ids == {tokenizer.special["<|user|>"]}
    assert tokenizer.ids("the user") == byte_tokenizer().ids("the user")


BYTE_LEVEL = [byte_tokenizer(), Tokenizer.from_folder(NANO)]


@pytest.mark.parametrize("tokenizer", BYTE_LEVEL, ids=["trained here", "nano"])
def test_no_text_has_fewer_ids_than_its_length_tells(tokenizer: Tokenizer) -> None:
    draw = random.Random(4)
    vocabulary = [tokenizer.text([token], keep_special=True) for token in range(tokenizer.size)]
    longest = max(vocabulary, key=len)
    odd = ["<|user|>", "\ud800", "\U0001f600", "語", " " * 200, "\n", "\0", "e\u0301"]
    for _ in range(300):
        text = "".join(draw.choices(vocabulary + odd * 9, k=draw.randint(1, 40)))
        assert tokenizer.least_tokens(text) <= len(tokenizer.ids(text))
        assert tokenizer.least_tokens(text) <= len(tokenizer.ids(text, special=True))
    assert tokenizer.least_tokens(longest * 1000) >= 1000
    assert tokenizer.least_tokens("") == 0


@needs_shared
def test_the_length_of_a_text_tells_of_glm4s_vocabulary_too() -> None:
    tokenizer = glm_tokenizer()
    for text in (" " * 100_000, "a" * 10_000, "你好" * 5_000, "0123456789" * 500, "one two " * 1000):
        assert 0 < tokenizer.least_tokens(text) <= len(tokenizer.ids(text))
    assert tokenizer.least_tokens("one two " * 900_000) > 131_072


def shortening() -> dict[str, tokenizers.Tokenizer]:
    """Tokenizers that may make few ids of a long text."""
    normalized, removing, partial, stripping = (byte_backend() for _ in range(4))
    normalized.normalizer = normalizers.Strip()
    removing.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    partial.model = models.BPE({"a": 0}, [])
    stripping.add_special_tokens([tokenizers.AddedToken("<|x|>", rstrip=True)])
    unknown = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    return {"normalizer": normalized, "removes": removing, "bytes": partial, "strips": stripping, "unknown": unknown}


@pytest.mark.parametrize("kind", shortening())
def test_a_tokenizer_that_may_shorten_a_text_tells_nothing(kind: str) -> None:
    assert Tokenizer(shortening()[kind]).least_tokens("a" * 10_000) == 0


def test_white_space_beside_a_token_that_swallows_it_goes_with_it() -> None:
    backend = byte_backend()
    backend.add_special_tokens([tokenizers.AddedToken("<x>", lstrip=True), tokenizers.AddedToken("<y>", rstrip=True)])
    tokenizer = Tokenizer(backend)
    text = "a  <x>  b  <y>  c<x><y>"
    assert tokenizer.ids(text, special=True) == backend_ids(backend, text)


def backend_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The library's own ids, with special tokens recognized."""
    backend.encode_special_tokens = False
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = True
    return ids


# What makes the tokenizers library fail or panic: key -> value of tokenizer.json, and a text to encode.
PANICS: dict[str, tuple[str, object, str]] = {
    "while it is read": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "a"),
    "in a pattern": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
        "x" * 30,
    ),
    "in a division": ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "a"),
    "without an unknown token": ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}, "b"),
    "in a decoder": ("decoder", {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}, "a"),
}


@pytest.mark.parametrize("how", PANICS)
def test_a_failure_of_the_library_is_an_error_of_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    key, value, text = PANICS[how]
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {key: value}))

    def use() -> None:
        tokenizer = Tokenizer.from_folder(tmp_path)
        tokenizer.text(tokenizer.ids(text))

    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read as a tokenizer, or") as caught:
        use()
    assert "\n" not in str(caught.value)
    if how not in ("in a pattern", "in a decoder"):  # only that text brings these about, when nothing hides the report
        assert "panicked" not in capfd.readouterr().err


def test_only_failures_of_the_library_are_renamed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        named_errors("tokenizer.json", interrupted)


def test_what_others_write_while_a_tokenizer_is_read_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with panic_reports_hidden():
        os.write(2, b"a word of another thread")
    assert capfd.readouterr().err == "a word of another thread"


def test_the_size_counts_ids_that_the_vocabulary_skips(tmp_path: Path) -> None:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[next(iter(vocabulary))] = 7_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_folder(tmp_path).size == 7_000_001
