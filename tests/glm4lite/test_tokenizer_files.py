"""The tokenizer's settings and files: set, saved, read by both libraries, downloaded."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from glm4lite import Tokenizer
from glm4lite.base.errors import CheckpointError, HubError, TokenizerError
from tests.commands import python
from tests.glm4lite.hub_server import HubServer, Repo
from tests.glm4lite.served import NANO
from tests.glm4lite.small_tokenizer import byte_backend
from tests.glm4lite.tokenizer_pair import PAIRS, both, folder, opened, values

transformers = pytest.importorskip("transformers")


@pytest.fixture
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained("nano")


def test_special_tokens_can_be_set_to_what_the_vocabulary_holds() -> None:
    reference, ours = (copy.deepcopy(one) for one in opened("nano"))
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
        ours.padding_side = "up"
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


@pytest.mark.parametrize("name", PAIRS)
def test_saving_writes_the_files_as_they_were(name: str, tmp_path: Path) -> None:
    ours = Tokenizer.from_pretrained(folder(name))
    files = ours.save_pretrained(tmp_path)
    for file in map(Path, files):
        assert file.read_bytes() == (folder(name) / file.name).read_bytes()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
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
    reference, ours = both(tmp_path)
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


def test_of_a_hub_repo_only_the_small_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Repo.of(NANO).files
    repos = {"org/nano": Repo(files), "org/words": Repo(Repo.of(folder("prefixed")).files), "org/none": Repo({})}
    with HubServer(repos) as server:
        for source, code in (("org/nano", ""), ("org/words", ""), ("org/none", "has no tokenizer.json")):
            found = in_a_process(server.url, tmp_path, source)
            assert code in found["error"] if code else found["ids"] == found["offline"]
        assert not [name for name in server.fetched if name.endswith(".safetensors")]


def in_a_process(endpoint: str, home: Path, source: str) -> dict[str, Any]:
    """What the tokenizer of a repo makes of a text, in a process of its own: huggingface_hub reads HF_ENDPOINT once."""
    import subprocess

    script = (
        "import json, sys\nfrom glm4lite import Tokenizer\nfrom glm4lite.base.errors import HubError\n"
        "try:\n    first = Tokenizer.from_pretrained(sys.argv[1], revision='main')\n"
        "    again = Tokenizer.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "    print(json.dumps({'ids': first.encode('a <|user|>'), 'offline': again.encode('a <|user|>')}))\n"
        "except HubError as error:\n    print(json.dumps({'error': str(error)}))\n"
    )
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        [*python(), "-c", script, source],
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
