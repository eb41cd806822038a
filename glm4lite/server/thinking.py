"""What a request asks of the thought. Servers have several words for it; all of them are read, and must agree.

Whether the model thinks: `enable_thinking` (Qwen), `thinking.type` (GLM's API), `chat_template_kwargs` (vLLM, SGLang).
How long: `thinking_budget` (Qwen, SiliconFlow), `thinking_token_budget` (vLLM), `thinking_budget_tokens` and
`reasoning_budget_tokens` (llama.cpp), `thinking.budget_tokens` (Anthropic). 0 is no thought, and -1 no limit.
How much: `reasoning_effort` (OpenAI), which is a number of tokens where none is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glm4lite.server.errors import ApiError

Budget = Annotated[int, Field(ge=-1, lt=2**31)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: dict[str, int] = {"none": 0, "minimal": 128, "low": 1024, "medium": 4096}
"""The longest thought of each, in tokens; of what stands for more, as long as the model thinks by itself."""
EFFORT = "reasoning_effort"
BUDGETS = ("thinking_budget", "thinking_token_budget", "thinking_budget_tokens", "reasoning_budget_tokens")


class Thinking(BaseModel):
    """`{"type": "enabled", "budget_tokens": 1024}`."""

    model_config = ConfigDict(strict=True)
    type: Literal["enabled", "disabled"] | None = None
    budget_tokens: Budget | None = None

    @property
    def enabled(self) -> bool | None:
        return None if self.type is None else self.type == "enabled"


class TemplateVariables(BaseModel):
    """`chat_template_kwargs`: what the model's chat template reads by these names. Two say what is asked of the
    thought, whether a template reads them or not."""

    model_config = ConfigDict(strict=True, extra="allow")
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None

    def given(self) -> dict[str, Any]:
        """All that was sent and is not null."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


@dataclass(frozen=True)
class WantedThinking:
    """At most `budget` tokens of thought, None: no limit. `field` is the last one that says so."""

    field: str
    budget: int | None


def wanted_thinking(
    switches: Mapping[str, bool | None], budgets: Mapping[str, int | None], effort: str | None = None
) -> WantedThinking | None:
    """What the fields say together, None where none says anything. Raises ApiError where they contradict each other.

    `effort`: an Effort; a budget in tokens says more than it.
    """
    said = {} if effort is None else {EFFORT: effort != "none"}
    said |= {name: on for name, on in switches.items() if on is not None}
    limits = {name: limit for name, limit in budgets.items() if limit is not None and limit >= 0}
    if effort is not None and all(limit is None for limit in budgets.values()):
        limits |= {EFFORT: EFFORTS[effort]} if effort in EFFORTS else {}
    given = list(dict.fromkeys([*said, *limits]))
    wants = {*said.values(), *(limit > 0 for limit in limits.values())}
    if len(wants) > 1 or len(set(limits.values())) > 1:
        raise ApiError(f"{' and '.join(given)} contradict each other", param=given[-1])
    if not given:
        return None
    return WantedThinking(given[-1], next(iter(limits.values()), None) if True in wants else 0)
