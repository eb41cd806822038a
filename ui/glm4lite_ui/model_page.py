"""The second tab: what is loaded, where it lies, which kernels compute it; and loading another model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from glm4lite.errors import Glm4liteError
from glm4lite.events import Progress
from glm4lite.inventory import devices, kernel_names
from glm4lite.weights.memory import readable
from glm4lite_ui.drawing import Drawing
from glm4lite_ui.loading import Loading
from glm4lite_ui.markup import text_html
from glm4lite_ui.runtime import Runtime


def fact_table(runtime: Runtime) -> str:
    """Source, kernels, places, context: two columns of HTML."""
    rows = "".join(f"<tr><th>{text_html(name)}</th><td>{text_html(value)}</td></tr>" for name, value in _facts(runtime))
    return f'<table class="g-facts">{rows}</table>'


def _facts(runtime: Runtime) -> Iterator[tuple[str, str]]:
    model = runtime.engine.model
    config = model.config
    yield "Model", runtime.source
    yield "Shape", f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide"
    yield "Kernels", ", ".join(f"{name} ({count} layers)" for name, count in kernel_names(model).items())
    for device, held in devices(model).items():
        yield f"On {device}", f"{held['layers']} layers, {readable(held['weights'])} of weights"
    yield "Context", f"{model.context:,} tokens"
    yield "Kept conversations", f"{len(runtime.engine.prefixes)}, {readable(runtime.engine.prefixes.nbytes)}"
    tools = ", ".join(tool.name for tool in runtime.tools) or "none"
    yield "Tools", tools if runtime.engine.chat_template().takes_tools else "this model's template has no place for any"


class ModelHandlers:
    """The tab's events."""

    def __init__(self, runtime: Runtime, drawing: Drawing) -> None:
        self.runtime, self.parts = runtime, drawing.components.model
        self.loading = Loading(runtime)

    def facts(self) -> str:
        return fact_table(self.runtime)

    def load(self, source: str, quant: str) -> Iterator[dict[Any, Any]]:
        """Loads another model in place of this one, with a bar; leaving the page stops it, and this one stays."""
        source = source.strip()
        if not source:
            raise Glm4liteError("name a model: a folder, or a Hub repository")
        try:
            yield {self.parts.load: gr.Button(interactive=False)}
            for progress in self.loading.load(source, quant):
                yield {self.parts.progress: bar(progress)}
        except Glm4liteError as error:
            yield self._ended(str(error) if source in str(error) else f"{source}: {error}")
        else:
            yield self._ended(f"{source} is loaded.")

    def _ended(self, remark: str) -> dict[Any, Any]:
        return {
            self.parts.facts: fact_table(self.runtime),
            self.parts.progress: f"<p>{text_html(remark)}</p>",
            self.parts.load: gr.Button(interactive=True),
        }


def bar(progress: Progress | None) -> str:
    """How far a load is; None: it waits for the answer that is being given."""
    if progress is None:
        return "<p>Waiting for the engine…</p>"
    done, total = (readable(n) if progress.unit == "bytes" else f"{n:,}" for n in (progress.done, progress.total))
    unit = "" if progress.unit == "bytes" else f" {progress.unit}"
    share = f'<progress max="{progress.total}" value="{progress.done}"></progress>'
    return f"<p>{text_html(progress.stage)} {share} {text_html(f'{done} of {total}{unit}')}</p>"
