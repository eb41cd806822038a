"""The GLM-4 models that have a short name: where they are, and their shapes, so that a list needs no network.

Shapes are those of the repos' config.json files; a model that is loaded is always what its own says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm4lite.hub.options import MODELSCOPE

_GLM4 = {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "vocab_size": 151552, "head_dim": 128}
_NINE = _GLM4 | {
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 13696,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
}
_THIRTY_TWO = _GLM4 | {
    "hidden_size": 6144,
    "num_hidden_layers": 61,
    "num_attention_heads": 48,
    "num_key_value_heads": 2,
    "intermediate_size": 23040,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
}
_CHAT = _NINE | {"model_type": "glm", "architectures": ["GlmForCausalLM"], "max_position_embeddings": 131072}


@dataclass(frozen=True)
class Known:
    """A model with a short name. about: what it is for, in a few words; config: its shape, as config.json says it."""

    name: str
    repo_id: str
    about: str
    config: Mapping[str, Any]

    @property
    def modelscope(self) -> str:
        """The same on ModelScope, where the organisation has another name."""
        return f"{MODELSCOPE}ZhipuAI/{self.repo_id.partition('/')[2]}"


KNOWN = (
    Known("glm-4-9b", "zai-org/GLM-4-9B-0414", "chat, tools", _NINE),
    Known("glm-z1-9b", "zai-org/GLM-Z1-9B-0414", "thinks before it answers", _NINE),
    Known("glm-4-32b", "zai-org/GLM-4-32B-0414", "chat, tools, code", _THIRTY_TWO),
    Known("glm-z1-32b", "zai-org/GLM-Z1-32B-0414", "thinks before it answers", _THIRTY_TWO),
    Known(
        "glm-z1-rumination",
        "zai-org/GLM-Z1-Rumination-32B-0414",
        "thinks long, with searches",
        _THIRTY_TWO | {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    Known("glm-4-32b-base", "zai-org/GLM-4-32B-Base-0414", "continues texts; no chat", _THIRTY_TWO),
    Known("glm-4-9b-chat", "zai-org/glm-4-9b-chat-hf", "chat (2024)", _CHAT),
    Known(
        "glm-4-9b-chat-1m",
        "zai-org/glm-4-9b-chat-1m-hf",
        "chat (2024), long contexts",
        _CHAT | {"num_key_value_heads": 4, "max_position_embeddings": 1048576},
    ),
)


def known(name: str) -> Known | None:
    """The model of a short name, or of its repo's name without the organisation; capitals do not matter."""
    asked = name.casefold()
    return next((one for one in KNOWN if asked in (one.name, one.repo_id.partition("/")[2].casefold())), None)


def on_modelscope(repo_id: str) -> str:
    """The same repo there, as far as it is known; else the one of the same name."""
    if repo_id.startswith(MODELSCOPE):
        return repo_id
    return next((one.modelscope for one in KNOWN if one.repo_id == repo_id), f"{MODELSCOPE}{repo_id}")
