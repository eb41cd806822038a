"""Programs that people use, over loopback against nano: chat, streams and tool loops. docs/clients.md lists them.

They are the extra `clients`; each test skips, and says so, where its package is missing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from glm4lite.engine.engine import Engine
from glm4lite.tools.builtin.tools import calculator as builtin
from tests.glm4lite.served import Served, scripted, served

GREETING = "Hello! How can I help you?"
QUESTION = "What is 37 * 24?"
DESCRIPTION = builtin.schema()["function"]["description"]


class City(BaseModel):
    """A city."""

    name: str
    people: int


class Weather(BaseModel):
    """The weather."""

    city: Literal["Lisbon", "Oslo"]
    degrees: int = Field(ge=-50, le=50)


WEATHER = "It has 18 degrees in Lisbon. How is the weather?"
PARIS = '{"name": "Paris", "people": 2100000}'


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with served(Engine.load("nano", quant="int8", device="cpu")) as server:
        yield server


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program tells others of what it does, or asks them for anything."""
    for name in ("LANGCHAIN_TRACING_V2", "LANGSMITH_TRACING"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def calculated(expression: str) -> str:
    return {"37*24": "888"}[expression.replace(" ", "")]


class TestLangChain:
    """langchain-openai, over chat completions and over Responses."""

    def model(self, server: Served, **more: Any) -> Any:
        package = pytest.importorskip("langchain_openai")
        return package.ChatOpenAI(model="nano", base_url=f"{server.url}/v1", api_key="none", max_retries=0, **more)

    @pytest.mark.parametrize("responses", [False, True])
    def test_it_chats_and_streams(self, nano: Served, responses: bool) -> None:
        model = self.model(nano, use_responses_api=responses)
        said = model.invoke("Hello")
        assert said.text == GREETING
        assert said.usage_metadata["output_tokens"] > 0
        assert "".join(chunk.text for chunk in model.stream("Hello")) == GREETING

    @pytest.mark.parametrize("responses", [False, True])
    def test_it_calls_a_tool_and_answers_from_its_result(self, nano: Served, responses: bool) -> None:
        model = self.model(nano, use_responses_api=responses)
        messages = pytest.importorskip("langchain_core.messages")
        with_tools = model.bind_tools([builtin.schema()])
        asked = [messages.HumanMessage(QUESTION)]
        said = with_tools.invoke(asked)
        [call] = said.tool_calls
        assert (call["name"], calculated(call["args"]["expression"])) == ("calculator", "888")
        result = messages.ToolMessage("888", tool_call_id=call["id"])
        assert "888" in with_tools.invoke([*asked, said, result]).text

    def test_it_gets_an_object_from_a_call(self) -> None:
        with served(scripted(f"City\n{PARIS}<|observation|>")) as server:
            model = self.model(server).with_structured_output(City, method="function_calling")
            assert model.invoke("The largest city of France?") == City(name="Paris", people=2_100_000)

    @pytest.mark.parametrize("responses", [False, True])
    def test_it_gets_an_object_of_a_schema(self, nano: Served, responses: bool) -> None:
        model = self.model(nano, use_responses_api=responses).with_structured_output(Weather, method="json_schema")
        assert isinstance(model.invoke(WEATHER), Weather)


class TestPydanticAI:
    """pydantic-ai, over chat completions, Responses and Messages."""

    @pytest.fixture(params=["chat", "responses", "messages"])
    def model(self, request: pytest.FixtureRequest, nano: Served) -> Any:
        pytest.importorskip("pydantic_ai")
        if request.param == "messages":
            from pydantic_ai.models.anthropic import AnthropicModel
            from pydantic_ai.providers.anthropic import AnthropicProvider

            there = AnthropicProvider(base_url=nano.url, api_key="none")
            # It knows this of Anthropic's own models, by their names.
            return AnthropicModel("nano", provider=there, profile={"supports_json_schema_output": True})
        from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
        from pydantic_ai.providers.openai import OpenAIProvider

        provider = OpenAIProvider(base_url=f"{nano.url}/v1", api_key="none")
        return (OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel)("nano", provider=provider)

    def test_it_chats_streams_and_calls_tools(self, model: Any) -> None:
        from pydantic_ai import Agent

        agent = Agent(model)

        async def streamed() -> str:
            async with agent.run_stream("Hello") as run:
                return "".join([piece async for piece in run.stream_text(delta=True)])

        async def everything() -> None:
            assert (await agent.run("Hello")).output == GREETING
            assert await streamed() == GREETING
            agent.tool_plain(description=DESCRIPTION, name="calculator")(calculated)
            assert "888" in (await agent.run(QUESTION)).output

        asyncio.run(everything())

    @pytest.mark.parametrize("form", ["NativeOutput", "ToolOutput"])
    def test_it_gets_an_object_of_a_schema(self, model: Any, form: str) -> None:
        import pydantic_ai

        agent = pydantic_ai.Agent(model, output_type=getattr(pydantic_ai, form)(Weather))
        assert isinstance(asyncio.run(agent.run(WEATHER)).output, Weather)


class TestOpenAIAgents:
    """openai-agents, over chat completions and Responses."""

    @pytest.mark.parametrize("name", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
    def test_it_chats_streams_and_calls_tools(self, nano: Served, name: str) -> None:
        agents = pytest.importorskip("agents")
        from openai import AsyncOpenAI

        async def everything() -> None:
            async with AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0) as client:
                model = getattr(agents, name)("nano", client)
                tool = agents.function_tool(
                    calculated, name_override="calculator", description_override=DESCRIPTION, strict_mode=False
                )
                agent = agents.Agent(name="nano", model=model)
                assert (await agents.Runner.run(agent, "Hello")).final_output == GREETING
                stream = agents.Runner.run_streamed(agent, "Hello")
                kinds = [event.type async for event in stream.stream_events()]
                assert "raw_response_event" in kinds
                assert stream.final_output == GREETING
                with_tool = agents.Agent(name="nano", model=model, tools=[tool])
                assert "888" in (await agents.Runner.run(with_tool, QUESTION)).final_output

        asyncio.run(everything())

    @pytest.mark.parametrize("name", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
    def test_it_gets_an_object_of_a_schema(self, nano: Served, name: str) -> None:
        agents = pytest.importorskip("agents")
        from openai import AsyncOpenAI

        async def asked() -> Any:
            async with AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0) as client:
                agent = agents.Agent(name="nano", model=getattr(agents, name)("nano", client), output_type=Weather)
                return (await agents.Runner.run(agent, WEATHER)).final_output

        assert isinstance(asyncio.run(asked()), Weather)


class TestInstructor:
    """instructor: objects by a forced call."""

    def test_it_gets_an_object(self) -> None:
        instructor = pytest.importorskip("instructor")
        with served(scripted(f"City\n{PARIS}<|observation|>")) as server:
            client = instructor.from_openai(server.client)
            asked = [{"role": "user", "content": "The largest city of France?"}]
            city = client.chat.completions.create(model="nano", response_model=City, messages=asked, max_retries=0)
            assert city.model_dump() == {"name": "Paris", "people": 2_100_000}

    @pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
    def test_it_gets_an_object_of_a_schema(self, nano: Served, mode: str) -> None:
        instructor = pytest.importorskip("instructor")
        client = instructor.from_openai(nano.client, mode=instructor.Mode[mode])
        asked = [{"role": "user", "content": WEATHER}]
        answer = client.chat.completions.create(model="nano", response_model=Weather, messages=asked, max_retries=0)
        assert isinstance(answer, Weather)


class TestLiteLLM:
    """litellm, over chat completions, Responses and Messages."""

    pytestmark = pytest.mark.slow  # importing it takes seconds

    def test_it_chats_streams_and_calls_tools(self, nano: Served) -> None:
        litellm = pytest.importorskip("litellm")
        to: dict[str, Any] = {"model": "openai/nano", "api_base": f"{nano.url}/v1", "api_key": "none"}
        hello = [{"role": "user", "content": "Hello"}]
        assert litellm.completion(messages=hello, **to).choices[0].message.content == GREETING
        stream = litellm.completion(messages=hello, stream=True, **to)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == GREETING
        asked = [{"role": "user", "content": QUESTION}]
        message = litellm.completion(messages=asked, tools=[builtin.schema()], **to).choices[0].message
        [call] = message.tool_calls
        assert calculated(json.loads(call.function.arguments)["expression"]) == "888"
        assert litellm.responses(input="Hello", **to).output[0].content[0].text == GREETING
        claude = {"model": "anthropic/nano", "api_base": nano.url, "api_key": "none"}
        assert litellm.completion(messages=hello, **claude).choices[0].message.content == GREETING

    def test_a_prompt_that_is_too_long_is_its_own_error(self, nano: Served) -> None:
        litellm = pytest.importorskip("litellm")
        to: dict[str, Any] = {"model": "openai/nano", "api_base": f"{nano.url}/v1", "api_key": "none"}
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(messages=[{"role": "user", "content": "one two " * 4000}], **to)
