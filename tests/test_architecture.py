"""The rules of the structure: imports point one way, heavy packages stay in their file, the file map is true."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "glm4lite": ROOT / "glm4lite",
    "glm4lite_quant": ROOT / "quant" / "glm4lite_quant",
    "glm4lite_ui": ROOT / "ui" / "glm4lite_ui",
}


# glm4lite's rooms, each of which may import those before it and nothing behind it. See docs/architecture.md.
ROOMS = (
    *("base", "hub", "gguf", "text", "tools", "untrusted", "model", "memory", "checkpoint", "runtime", "loading"),
    *("pretrained", "engine", "export", "chat", "research", "measure", "server", "cli"),
)

# module -> the only places that may import it
ALLOWED = {
    "ctypes": {
        "quant/glm4lite_quant/kernels/native.py",
        "quant/glm4lite_quant/kernels/decoder.py",
        "glm4lite/tools/sandbox/kernel.py",
        "glm4lite/base/windows_io.py",
    },
    "psutil": {"glm4lite/base/processes.py", "glm4lite/memory/system.py", "quant/glm4lite_quant/host.py"},
    "mcp": {f"glm4lite/tools/{name}.py" for name in ("mcp_servers", "mcp_client/connection", "mcp_client/transport")},
    "transformers": set(),
    "bitsandbytes": {"quant/glm4lite_quant/bnb.py"},
    "gradio": {"ui/glm4lite_ui/layout.py", "ui/glm4lite_ui/serving.py"},
    "triton": {f"quant/glm4lite_quant/kernels/triton_{name}.py" for name in ("gpu", "kernels", "step", "step_kernels")},
    "fastapi": {
        "glm4lite/server/app.py",
        "ui/glm4lite_ui/routes.py",
        "ui/glm4lite_ui/serving.py",
        "ui/glm4lite_ui/tool_routes.py",
        "ui/glm4lite_ui/transfer.py",
    },
    "llguidance": {"glm4lite/engine/constraint.py"},
    "uvicorn": {"glm4lite/server/launch.py", "glm4lite/server/connection.py"},
    "pypdf": {"glm4lite/untrusted/documents.py"},
    "prompt_toolkit": {f"glm4lite/cli/chat/{name}.py" for name in ("keyboard", "history")},
    "httpcore2": {"glm4lite/research/fetching.py"},
    "justhtml": {"glm4lite/untrusted/documents.py"},
    "sqlite3": {"glm4lite/research/index.py"},
    "pickle": set(),
    "ray": {"glm4lite/server/batch/cluster.py"},
    "huggingface_hub": {"glm4lite/hub/client.py", "glm4lite/hub/errors.py"},
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def sources() -> Iterator[tuple[str, str, ast.Module]]:
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            yield package, file.relative_to(ROOT).as_posix(), parsed(file)


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = file, parsed(file)
    return found


MODULES = modules()


def named_by(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports, anywhere: in functions and for type checkers too.

    `from package import module` names both: the package's own code runs first, so a circle may lead through it.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports_of(name: str) -> set[str]:
    """The modules of ours that a module imports."""
    return (named_by(MODULES[name][1]) & MODULES.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import each other: Tarjan's strongly connected components of more than one."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in graph[node]:
            if after not in index:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], index[after])
        if low[node] == index[node]:
            place = stack.index(node)
            if len(stack) - place > 1:
                found.append(set(stack[place:]))
            del stack[place:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_two_files_import_each_other() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert named_by(ast.parse("def f():\n    from a.b import c")) == {"a.b", "a.b.c"}
    assert circles({name: imports_of(name) for name in MODULES}) == []


def test_rooms_import_only_what_lies_below_them() -> None:
    for name in MODULES:
        package, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if package != "glm4lite" or not room or room == "__main__":
            continue
        assert room in ROOMS, f"{name}: the architecture has no such room"
        below = ROOMS[: ROOMS.index(room) + 1]
        for other in imports_of(name):
            whose, _, inside = other.partition(".")
            if whose == "glm4lite" and inside:  # the package itself gives its version
                assert inside.partition(".")[0] in below, f"{name} imports {other}, which lies above it"


def test_nothing_lies_flat() -> None:
    flat = {file.name for file in PACKAGES["glm4lite"].iterdir() if file.is_file()} - {"py.typed"}
    assert flat == {"__init__.py", "__main__.py"}


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


# Linux' files are read in one room, beside psutil, and where that has no answer: how a process is walled in, whose a
# connection is.
ASKS_LINUX = {
    "quant/glm4lite_quant/host.py",
    "glm4lite/tools/sandbox/jail.py",
    "ui/glm4lite_ui/here.py",
}


def test_what_the_system_knows_is_asked_in_one_room() -> None:
    for _, file, tree in sources():
        found = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.match(r"/(proc|sys)(/|$)", node.value)
        ]
        assert not found or file in ASKS_LINUX, f"{file} reads {found}"
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"os.cpu_count", "os.sysconf", "multiprocessing.cpu_count"} or file in ASKS_LINUX, file


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
    for room in ROOMS:
        assert f"glm4lite/{room}/" in paths, f"glm4lite/{room}/ is not in the map"
