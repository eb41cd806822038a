"""The rules of the structure: imports point one way, heavy packages stay in their file, the file map is true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "glm4lite": ROOT / "glm4lite",
    "glm4lite_quant": ROOT / "quant" / "glm4lite_quant",
    "glm4lite_ui": ROOT / "ui" / "glm4lite_ui",
}


# The files of ui/ that know Gradio; all others do without.
PAGE = ("layout", "serving")

# module -> the only places that may import it
ALLOWED = {
    "ctypes": {f"quant/glm4lite_quant/kernels/{name}.py" for name in ("native", "decoder")}
    | {"glm4lite/sandbox/kernel.py"},
    "mcp": {f"glm4lite/{name}.py" for name in ("mcp_tools", "mcp_client/connection", "mcp_client/transport")},
    "transformers": set(),
    "bitsandbytes": {"quant/glm4lite_quant/bnb.py"},
    "gradio": {f"ui/glm4lite_ui/{name}.py" for name in PAGE},
    "triton": {f"quant/glm4lite_quant/kernels/triton_{name}.py" for name in ("gpu", "kernels", "step", "step_kernels")},
    "fastapi": {
        "glm4lite/server/app.py",
        "ui/glm4lite_ui/routes.py",
        "ui/glm4lite_ui/serving.py",
        "ui/glm4lite_ui/transfer.py",
    },
    "uvicorn": {"glm4lite/server/launch.py", "glm4lite/server/connection.py"},
    "pypdf": {"ui/glm4lite_ui/untrusted/documents.py"},
    "prompt_toolkit": {f"glm4lite/cli/chat/{name}.py" for name in ("keyboard", "history")},
    "pickle": set(),
    "huggingface_hub": {"glm4lite/weights/hub_client.py", "glm4lite/weights/hub_errors.py"},
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def sources() -> Iterator[tuple[str, str, ast.Module]]:
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            yield package, file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_quant_is_usable_without_glm4lite() -> None:
    for package, file, tree in sources():
        if package == "glm4lite_quant":
            assert "glm4lite" not in imported(tree), file


def test_glm4lite_does_not_know_its_page() -> None:
    for package, file, tree in sources():
        if package != "glm4lite_ui":
            assert "glm4lite_ui" not in imported(tree), file


def test_heavy_and_dangerous_modules_are_imported_only_in_their_own_file() -> None:
    for _, file, tree in sources():
        for module, homes in ALLOWED.items():
            assert module not in imported(tree) or file in homes, f"{file} imports {module}"


def test_nothing_is_evaluated_unpickled_or_given_to_a_shell() -> None:
    for _, file, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS | {"torch.load", "os.system"}, f"{file}:{node.lineno} calls {name}"
            assert not any(word.arg == "shell" for word in node.keywords), f"{file}:{node.lineno} uses a shell"


def test_users_are_not_answered_with_assert() -> None:
    for _, file, tree in sources():
        found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not found, f"{file}:{found}"


def test_the_readmes_file_map_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## File map\n.*?```\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no file map"
    paths = [line.split()[0] for line in block[1].splitlines() if line.strip()]
    for path in paths:
        assert (ROOT / path).exists(), f"{path} is in the map but not in the project"
    for entry in ROOT.iterdir():
        if entry.name.startswith(".") or entry.name in {"build", "dist"} or entry.name.endswith(".egg-info"):
            continue
        assert any(path.rstrip("/").split("/")[0] == entry.name for path in paths), f"{entry.name} is not in the map"
    for file in (ROOT / "glm4lite").glob("*.py"):
        assert f"glm4lite/{file.name}" in paths, f"glm4lite/{file.name} is not in the map"
