"""The second tab: what is loaded, where it lies, which kernels compute it; and loading another model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from glm4lite.inventory import devices, kernel_names
from glm4lite.weights.memory import readable
from glm4lite_ui.drawing import Drawing
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

    def facts(self) -> str:
        return fact_table(self.runtime)

    def load(self, source: str, quant: str) -> Iterator[dict[Any, Any]]:
        """Loads another model in place of this one, with a bar."""
        yield {self.parts.load: gr.Button(interactive=False)}
