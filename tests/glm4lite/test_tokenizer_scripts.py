"""Scripts for Transformers: its collators, streamers and generate with our tokenizer."""

import copy
import threading
from typing import Any

import pytest
import torch

from glm4lite import Glm4ForCausalLM, Tokenizer
from tests.glm4lite.served import NANO
from tests.glm4lite.tokenizer_pair import PAIRS, opened, values

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """Transformers' tokenizer and ours."""
    return opened(request.param)


@pytest.fixture
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained("nano")


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
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
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
