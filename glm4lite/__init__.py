"""glm4lite: GLM-4 models on consumer GPUs and CPUs, int4 and int8, with tool calling.

    from glm4lite import ChatSession, load

Names are imported on first use: `import glm4lite` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BUILTIN_TOOLS": "tools.builtin.tools",
    "ChatSession": "chat.session",
    "Completion": "chat.completion",
    "Engine": "engine.engine",
    "GenerationConfig": "pretrained.generation",
    "Glm4Config": "model.config",
    "Glm4ForCausalLM": "pretrained.models",
    "Glm4ForSequenceClassification": "pretrained.models",
    "Glm4ForTokenClassification": "pretrained.models",
    "Glm4Model": "pretrained.models",
    "Glm4PreTrainedModel": "pretrained.base",
    "Glm4liteError": "base.errors",
    "KVCache": "model.cache",
    "Message": "text.messages",
    "SamplingParams": "engine.sampling",
    "Tokenizer": "text.tokenizer",
    "Tool": "tools.tool",
    "load": "pretrained.load",
    "tool": "tools.tool",
}

__all__ = [
    "BUILTIN_TOOLS",
    "ChatSession",
    "Completion",
    "Engine",
    "GenerationConfig",
    "Glm4Config",
    "Glm4ForCausalLM",
    "Glm4ForSequenceClassification",
    "Glm4ForTokenClassification",
    "Glm4Model",
    "Glm4PreTrainedModel",
    "Glm4liteError",
    "KVCache",
    "Message",
    "SamplingParams",
    "Tokenizer",
    "Tool",
    "__version__",
    "load",
    "tool",
]

if TYPE_CHECKING:
    from glm4lite.base.errors import Glm4liteError
    from glm4lite.chat.completion import Completion
    from glm4lite.chat.session import ChatSession
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.sampling import SamplingParams
    from glm4lite.model.cache import KVCache
    from glm4lite.model.config import Glm4Config
    from glm4lite.pretrained.base import Glm4PreTrainedModel
    from glm4lite.pretrained.generation import GenerationConfig
    from glm4lite.pretrained.load import load
    from glm4lite.pretrained.models import (
        Glm4ForCausalLM,
        Glm4ForSequenceClassification,
        Glm4ForTokenClassification,
        Glm4Model,
    )
    from glm4lite.text.messages import Message
    from glm4lite.text.tokenizer import Tokenizer
    from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
    from glm4lite.tools.tool import Tool, tool


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glm4lite' has no attribute {name!r}")
    return getattr(import_module(f"glm4lite.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
