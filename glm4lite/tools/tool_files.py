"""The user's own tools: the `@tool` functions of a Python file, or of every file of a folder.

The file is imported, so it runs with all rights of the user, who named it on the command line.
"""

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from glm4lite.base.errors import ToolError, one_line
from glm4lite.tools.tool import Tool


def load_tools(path: str | Path) -> list[Tool]:
    """The tools of the file `path`, or of the `*.py` files of that folder whose name does not start with "_".

    Modules beside a file can be imported by it. Raises ToolError when there is no such file, when one cannot be
    imported (naming its line), and when no tool is found.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.glob("*.py") if not file.name.startswith("_"))
    elif place.is_file() and place.suffix == ".py":
        files = [place]
    else:
        found = f"{place} is no Python file" if place.exists() else f"there is no {place}"
        raise ToolError(f"--tools: {found}; name a .py file, a folder of such files, or python")
    tools = [tool for file in files for tool in _declared(_imported(file))]
    if not tools:
        raise ToolError(f"--tools: {place} has no @tool function (from glm4lite import tool)")
    return tools


def _declared(module: ModuleType) -> list[Tool]:
    """The tools whose function was written in this module; those it only imported belong to another."""
    found = [value for value in vars(module).values() if isinstance(value, Tool)]
    own = [tool for tool in found if getattr(tool.function, "__module__", module.__name__) == module.__name__]
    return list({id(tool): tool for tool in own}.values())  # one tool may have two names


def _imported(file: Path) -> ModuleType:
    """The file as a module of its own; its name cannot hide one that is installed."""
    file = file.resolve()
    name = f"glm4lite_tools_{file.stem}_{abs(hash(str(file))):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ToolError(f"--tools: {file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module  # where typing and pydantic look names up
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a file that ends the program has no tools
        del sys.modules[name]
        raise ToolError(f"--tools: {_where(file, error)}: {_what(error)}") from error
    return module


def _where(file: Path, error: BaseException) -> str:
    """The file, and its line that failed."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file} line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file} line {lines[-1]}" if lines else str(file)


def _what(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return one_line(error.msg)
    return one_line(error) if isinstance(error, ToolError) else one_line(f"{type(error).__name__}: {error}")
