"""Writes the API reference, made of the docstrings, into a folder: `python docs/reference.py FOLDER`.

It holds the public names of glm4lite, the modules that their docstrings send to, and glm4lite_quant. What pdoc warns of
(a name that does not resolve, an annotation that cannot be read) is an error, and so is a reference that leads nowhere.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pdoc

import glm4lite

MODULES = (
    "glm4lite",
    "glm4lite.base.events",
    "glm4lite.text.messages",
    "glm4lite.tools.tool",
    "glm4lite.tools.running",
    "glm4lite.pretrained.generation.loop",
    "glm4lite.model.outputs",
    "glm4lite.pretrained.transformers_names",
    "glm4lite.engine.speculation",
    "glm4lite.engine.draft_model",
    "glm4lite.runtime.kv_pool",
    "glm4lite.engine.worker",
    "glm4lite.research.loop",
    "glm4lite.research.source",
    "glm4lite.research.browser",
    "glm4lite.research.report",
    "glm4lite.base.errors",
    "glm4lite.base.extras",
    "glm4lite_quant",
)


def write(folder: Path) -> None:
    """One HTML page for each of MODULES, and an index with a search.

    Raises:
        UserWarning: Something cannot be documented.
        LookupError: A docstring names something of glm4lite's that is on no page.
    """
    for name in glm4lite.__all__:  # imported on first use, and pdoc looks only at what has been
        setattr(glm4lite, name, getattr(glm4lite, name))
    pdoc.render.configure(docformat="google", footer_text=f"glm4lite {glm4lite.__version__}", show_source=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*MODULES, output_directory=folder)
    if lost := dead_references(folder):
        raise LookupError(f"no page holds {', '.join(lost)}; mend the docstrings, or add a module to docs/reference.py")


def dead_references(folder: Path) -> list[str]:
    """Names of glm4lite's modules that stand as code on a page and are no link: "glm4lite.x.y"."""
    code = re.compile(r'(?<!">)<code>(glm4lite(?:_quant)?\.[\w.]+)(?:\(\))?</code>')
    return sorted({name for page in folder.rglob("*.html") for name in code.findall(page.read_text(encoding="utf-8"))})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
