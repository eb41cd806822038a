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
    "Research": "research.loop",
    "SamplingParams": "engine.sampling",
    "Tokenizer": "text.tokenizer",
    "Tool": "tools.tool",
    "load": "pretrained.load",
    "tool": "tools.tool",
}

if not TYPE_CHECKING:  # a checker cannot work this out, and would take it for a module without names
    __all__ = [*_HOMES, "__version__"]
else:  # the names once more: a checker follows import statements alone; a test compares both lists
    from glm4lite.base.errors import Glm4liteError as Glm4liteError
    from glm4lite.chat.completion import Completion as Completion
    from glm4lite.chat.session import ChatSession as ChatSession
    from glm4lite.engine.engine import Engine as Engine
    from glm4lite.engine.sampling import SamplingParams as SamplingParams
    from glm4lite.model.cache import KVCache as KVCache
    from glm4lite.model.config import Glm4Config as Glm4Config
    from glm4lite.pretrained.base import Glm4PreTrainedModel as Glm4PreTrainedModel
    from glm4lite.pretrained.generation import GenerationConfig as GenerationConfig
    from glm4lite.pretrained.load import load as load
    from glm4lite.pretrained.models import Glm4ForCausalLM as Glm4ForCausalLM
    from glm4lite.pretrained.models import Glm4ForSequenceClassification as Glm4ForSequenceClassification
    from glm4lite.pretrained.models import Glm4ForTokenClassification as Glm4ForTokenClassification
    from glm4lite.pretrained.models import Glm4Model as Glm4Model
    from glm4lite.research.loop import Research as Research
    from glm4lite.text.messages import Message as Message
    from glm4lite.text.tokenizer import Tokenizer as Tokenizer
    from glm4lite.tools.builtin.tools import BUILTIN_TOOLS as BUILTIN_TOOLS
    from glm4lite.tools.tool import Tool as Tool
    from glm4lite.tools.tool import tool as tool


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glm4lite' has no attribute {name!r}")
    return getattr(import_module(f"glm4lite.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted((*_HOMES, "__version__"))
