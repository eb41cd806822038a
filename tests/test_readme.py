"""What the README shows can be run as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "README.zh.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/architecture.md",
    "docs/batch.md",
    "docs/clients.md",
    "docs/scale.md",
    "docs/security.md",
    "nano/README.md",
)
EXAMPLES = [
    code
    for page in PAGES[:2]
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[0])
def test_a_python_example_runs(
    code: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLM4LITE_INDEXES", str(tmp_path))
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    if "session.send" in code:
        assert "Done(" in capsys.readouterr().out


def test_links_lead_to_files() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def sections(page: str) -> list[str]:
    return re.split(r"^##+ .*\n", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_chinese_readme_has_the_sections_commands_and_figures_of_the_english_one() -> None:
    *english, _ = sections("README.md")  # without the file map
    chinese = sections("README.zh.md")
    assert len(chinese) == len(english)
    for ours, theirs in zip(chinese, english, strict=True):
        commands = re.findall(r"^glm4lite .*?(?=  |$)", ours, re.MULTILINE)
        assert [command for command in commands if command not in theirs] == []
        words = set(re.findall(r"`[^`\n{]+`", ours)) - {"`GLM4LITE_CHATS`"}
        assert sorted(word for word in words if word.isascii() and word[1:-1] not in theirs) == []
        figures = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]| 亿)", ours))
        assert sorted(figures - set(re.findall(r"\d+\.\d+", theirs))) == []


def test_files_that_are_named_exist() -> None:
    named = re.compile(r"`((?:glm4lite|quant|ui|tests|bench|docs|examples|nano)/[\w./-]+)`")
    for page in PAGES:
        for path in named.findall((ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page} names {path}"
