"""Many clients at once at a real server: each gets its own answer to the letter, whatever the others do and leave.

What a question's answer is, one run alone has told: greedy ones, and drawn ones with a seed. Clients take it whole or
streamed, go away in its middle or before it begins. At the end nothing runs, waits or is held.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from tests.commands import forked

TOOLS = [tool.schema() for tool in BUILTIN_TOOLS]
WORDS = ["the", "rain", "in", "Spain", "stays", "seven", "grey", "horses", "count", "37", "apples", "and", "24"]


@dataclass(frozen=True)
class Question:
    """One request; `stream` is left to the client that asks it."""

    path: str
    body: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Answer:
    """What of an answer is the same each time."""

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str | None = None


def chat(text: str, **more: Any) -> Question:
    body = {"model": "nano", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}
    return Question("/v1/chat/completions", body)


def completion(prompt: str, tokens: int, **more: Any) -> Question:
    body = {"model": "nano", "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
    return Question("/v1/completions", body)


def questions(rng: random.Random, each: int, longest: int) -> list[Question]:
    """`each` of every kind: calls, talk, texts of many lengths, stop texts, drawn ones, prompts of `longest` words."""

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    talk = ["Hello", "Who are you?", "Thank you very much", "What can you do?", "Good night", "你好", "How are you?"]
    found = list[Question]()
    for number in range(each):
        first, second = rng.randint(11, 99), rng.randint(11, 99)
        found += [
            chat(f"What is {first} * {second}?", tools=TOOLS),
            chat(talk[number % len(talk)]),
            completion(words(rng.randint(1, 30)), rng.choice([1, 5, 20, 60])),
            chat(talk[number % len(talk)], stop=["you", "!", "?"]),
            completion(words(rng.randint(1, 10)), 30, temperature=1.5, top_k=0, top_p=1, seed=number),
            completion(words(rng.randint(longest // 2, longest)), rng.choice([2, 16])),
        ]
    return found


class Left(Exception):
    """This client went away."""


async def ask(http: httpx.AsyncClient, question: Question, stream: bool, most: int | None = None) -> Answer:
    """The answer; of a stream no more than `most` events, and then the client leaves."""
    if not stream:
        response = await http.post(question.path, json=question.body)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        calls = [call["function"] for call in message.get("tool_calls", ())]
        pairs = tuple((call["name"], call["arguments"]) for call in calls)
        return Answer(message["content"] or "", pairs, choice["finish_reason"])
    text, reason, found = "", None, list[list[str]]()
    async with http.stream("POST", question.path, json={**question.body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if most is not None and (most := most - 1) < 0:
                return Answer(text)
            data = json.loads(line.removeprefix("data: "))
            assert "error" not in data, data
            choice = data["choices"][0]
            delta = choice.get("delta") or {"content": choice.get("text")}
            text += delta.get("content") or ""
            reason = choice["finish_reason"] or reason
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    found.append([call["function"]["name"], ""])
                found[call["index"]][1] += call["function"]["arguments"]
    return Answer(text, tuple((name, arguments) for name, arguments in found), reason)


@dataclass
class Load:
    """Clients that ask until the time is over, and what they saw."""

    http: httpx.AsyncClient
    expected: dict[Question, Answer]
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[Question, Answer, Answer]] = field(default_factory=list)

    async def run(self, clients: int, seconds: float, seed: int) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(random.Random(seed * 1000 + n), until) for n in range(clients)))

    async def _client(self, rng: random.Random, until: float) -> None:
        asked = list(self.expected)
        while time.monotonic() < until:
            question, way = rng.choice(asked), rng.choice(["whole", "whole", "stream", "stream", "leave", "give up"])
            try:
                if way == "give up":
                    async with asyncio.timeout(rng.random() ** 3):  # mostly at once, or while it waits
                        await self._asked(question, rng.random() < 0.5)
                elif way == "leave":
                    given = await ask(self.http, question, True, rng.randint(0, 6))
                    self._compare(question, given, given.finish_reason is not None)
                else:
                    await self._asked(question, way == "stream")
                self.counts[way] += 1
            except TimeoutError:
                self.counts["gave up"] += 1
            except httpx.HTTPStatusError as error:
                self.counts[f"status {error.response.status_code}"] += 1
                await asyncio.sleep(0.05)

    async def _asked(self, question: Question, stream: bool) -> None:
        self._compare(question, await ask(self.http, question, stream), True)

    def _compare(self, question: Question, given: Answer, whole: bool) -> None:
        expected = self.expected[question]
        if given != expected if whole else not expected.text.startswith(given.text):
            self.wrong.append((question, given, expected))


@contextmanager
def server(queue: int) -> Iterator[str]:
    """The address of `glm4lite serve`."""
    command = [*forked(), "serve", "nano", "--port", "0", "--queue", str(queue)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            line = next(line for line in process.stderr if "answers at" in line)
            yield line.split("answers at ")[1].split("/v1")[0]
        finally:
            process.terminate()
            assert "Traceback" not in process.stderr.read()


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("glm4lite_"): float(value) for name, value in pairs}


async def at_rest(http: httpx.AsyncClient) -> dict[str, float]:
    """The metrics once nothing runs or waits."""
    for _ in range(600):
        values = await metrics(http)
        if values["running"] == values["queue_waiting"] == 0:
            return values
        await asyncio.sleep(0.05)
    raise AssertionError(f"it does not come to rest: {values}")


def held(values: dict[str, float]) -> float:
    """Bytes of the process besides what it keeps on purpose, of which there is so much and no more."""
    return values["resident_bytes"] - values["kept_prefix_bytes"]


async def load(url: str, asked: list[Question], clients: int, seconds: float, growth: float) -> None:
    """Holds the load for a third of the time to warm, and then looks for what is wrong or grows."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        expected = {question: await ask(http, question, False) for question in asked}
        assert len(set(expected.values())) > len(asked) / 2, "answers must differ, or a mixed one would not be seen"
        running = Load(http, expected)
        await running.run(clients, seconds / 3, seed=1)
        before = await at_rest(http)
        await running.run(clients, 2 * seconds / 3, seed=2)
        after = await at_rest(http)
        assert running.wrong == []
        assert not [name for name in running.counts if name.startswith("status") and name != "status 429"]
        assert {"whole", "stream", "leave", "gave up"} <= running.counts.keys()
        assert after['jobs_total{result="failed"}'] == 0
        assert after['jobs_total{result="cancelled"}'] > 0
        assert held(after) - held(before) < growth
        assert {question: await ask(http, question, True) for question in asked} == expected


def test_clients_that_leave_and_stop_disturb_nobody() -> None:
    asked = questions(random.Random(0), each=3, longest=400)
    with server(queue=64) as url:
        asyncio.run(load(url, asked, clients=12, seconds=3, growth=48 << 20))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_64_clients_for_five_minutes_get_their_own_answers() -> None:
    asked = questions(random.Random(1), each=12, longest=1000)
    with server(queue=48) as url:  # fewer than clients, so that some are told to come again
        asyncio.run(load(url, asked, clients=64, seconds=300, growth=16 << 20))
