"""glm4lite: GLM-4 models on consumer GPUs and CPUs, int4 and int8, with tool calling.

    from glm4lite import ChatSession, load

Names are imported on first use: `import glm4lite` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BUILTIN_TOOLS": "tools",
    "ChatSession": "session",
    "Completion": "completion",
    "Engine": "engine",
    "GenerationConfig": "generation",
    "Glm4Config": "config",
    "Glm4ForCausalLM": "model",
    "Glm4ForSequenceClassification": "heads",
    "Glm4ForTokenClassification": "heads",
    "Glm4Model": "model",
    "Glm4PreTrainedModel": "pretrained",
    "Glm4liteError": "errors",
    "KVCache": "cache",
    "Message": "messages",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
    "Tool": "tools",
    "load": "loader",
    "tool": "tools",
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
    from glm4lite.cache import KVCache
    from glm4lite.completion import Completion
    from glm4lite.config import Glm4Config
    from glm4lite.engine import Engine
    from glm4lite.errors import Glm4liteError
    from glm4lite.generation import GenerationConfig
    from glm4lite.heads import Glm4ForSequenceClassification, Glm4ForTokenClassification
    from glm4lite.loader import load
    from glm4lite.messages import Message
    from glm4lite.model import Glm4ForCausalLM, Glm4Model
    from glm4lite.pretrained import Glm4PreTrainedModel
    from glm4lite.sampling import SamplingParams
    from glm4lite.session import ChatSession
    from glm4lite.tokenizer import Tokenizer
    from glm4lite.tools import BUILTIN_TOOLS, Tool, tool


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glm4lite' has no attribute {name!r}")
    return getattr(import_module(f"glm4lite.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
