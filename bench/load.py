"""Many clients at once against `glm4lite serve`: answers right and unmixed, memory flat, queue bounded?

    python -m bench.load --seconds 60

Each client asks nano for the product of two numbers, runs the call it gets and asks for the answer; one question in
five is left in the middle. Every wrong answer is asked again alone: one that is right then was disturbed by the others.
Prints a table, and one JSON line last; exit code 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from glm4lite.tools.builtin.tools import BUILTIN_TOOLS, calculator

TOOLS = [tool.schema() for tool in BUILTIN_TOOLS]
LEAVING = 0.2  # share of questions whose client goes away
GROWTH = 16 << 20  # bytes that memory may grow by between the first third and the last
POLL_S = 0.2


@dataclass
class Question:
    """Two numbers whose product is asked for."""

    first: int
    second: int

    @property
    def text(self) -> str:
        return f"What is {self.first} * {self.second}?"

    def right(self, answer: str) -> bool:
        return str(self.first * self.second) in re.findall(r"\d+", answer)


@dataclass
class Findings:
    """What happened; `wrong` are questions whose answer lacked the product."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[Question] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)


class Left(Exception):
    """This client went away."""


async def chat(http: httpx.AsyncClient, messages: list[dict[str, Any]], leave_after: int | None) -> dict[str, Any]:
    """The assistant's message, put together from a stream; after `leave_after` events the client leaves."""
    body = {"model": "nano", "messages": messages, "tools": TOOLS, "stream": True}
    content, calls = "", list[dict[str, Any]]()
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        seen = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            seen += 1
            if leave_after is not None and seen > leave_after:
                raise Left
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise RuntimeError(data["error"]["message"])
            delta = data["choices"][0]["delta"]
            content += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


async def ask(http: httpx.AsyncClient, question: Question, leave_after: int | None = None) -> str:
    """The answer to one question, its calls run here."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    message = await chat(http, messages, leave_after)
    messages.append(message)
    for call in message.get("tool_calls", ()):
        expression = json.loads(call["function"]["arguments"]).get("expression", "")
        try:
            result = str(calculator(expression))
        except Exception as error:
            result = f"Error: {error}"
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return str((await chat(http, messages, None))["content"])


async def client(http: httpx.AsyncClient, rng: random.Random, until: float, found: Findings) -> None:
    """Asks until the time is over."""
    while time.monotonic() < until:
        question = Question(rng.randint(11, 99), rng.randint(11, 99))
        leave_after = rng.randint(0, 3) if rng.random() < LEAVING else None
        started = time.monotonic()
        try:
            answer = await ask(http, question, leave_after)
        except Left:
            found.counts["left"] += 1
        except httpx.HTTPStatusError as error:
            found.counts["refused" if error.response.status_code == 429 else "failed"] += 1
            await asyncio.sleep(0.2)
        except (httpx.HTTPError, RuntimeError, ValueError):
            found.counts["failed"] += 1
        else:
            found.counts["answered"] += 1
            found.seconds.append(time.monotonic() - started)
            if not question.right(answer):
                found.wrong.append(question)


async def watch(http: httpx.AsyncClient, found: Findings) -> None:
    """Memory and queue, as the server says them."""
    while True:
        values = await metrics(http)
        found.memory.append(int(values["glm4lite_resident_bytes"]))
        found.waiting.append(int(values["glm4lite_queue_waiting"]))
        await asyncio.sleep(POLL_S)


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def load(url: str, clients: int, seconds: float) -> dict[str, Any]:
    """The figures."""
    found = Findings()
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await ask(http, Question(12, 13))  # warm
        watching = asyncio.create_task(watch(http, found))
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(http, random.Random(seed), until, found) for seed in range(clients)))
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        left = time.monotonic()
        while (values := await metrics(http))["glm4lite_running"] and time.monotonic() - left < 5:
            await asyncio.sleep(0.01)
        alone = [question.right(await ask(http, question)) for question in found.wrong]
    return figures(found, values, alone, clients, seconds)


def figures(
    found: Findings, values: dict[str, float], alone: list[bool], clients: int, seconds: float
) -> dict[str, Any]:
    third = max(1, len(found.memory) // 3)
    early, late = statistics.median(found.memory[third : 2 * third]), statistics.median(found.memory[-third:])
    times = sorted(found.seconds)
    return {
        "clients": clients,
        "seconds": seconds,
        "answered": found.counts["answered"],
        "left": found.counts["left"],
        "refused": found.counts["refused"],
        "failed": found.counts["failed"],
        "wrong": len(found.wrong),
        "wrong_only_among_others": sum(alone),
        "median_s": round(statistics.median(times), 3) if times else None,
        "p95_s": round(times[int(len(times) * 0.95)], 3) if times else None,
        "tokens_per_s": round(values["glm4lite_new_tokens_total"] / seconds, 1),
        "reused_prompt": round(
            values["glm4lite_prompt_tokens_reused_total"] / values["glm4lite_prompt_tokens_total"], 3
        ),
        "longest_queue": max(found.waiting),
        "queue_limit": int(values["glm4lite_queue_limit"]),
        "memory_mib": round(late / 2**20, 1),
        "memory_growth_mib": round((late - early) / 2**20, 2),
    }


def problems(result: dict[str, Any]) -> list[str]:
    """What does not hold."""
    checks = {
        "nothing was answered": not result["answered"],
        "requests failed": bool(result["failed"]),
        "answers were disturbed by others": bool(result["wrong_only_among_others"]),
        "more than one answer in twenty is wrong": result["wrong"] > result["answered"] / 20,
        "the queue grew past its limit": result["longest_queue"] > result["queue_limit"],
        "memory grew": result["memory_growth_mib"] > GROWTH / 2**20,
    }
    return [name for name, found in checks.items() if found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--queue", type=int, default=5, help="requests that may wait: fewer than clients, so that some are refused"
    )
    options = parser.parse_args()
    command = [sys.executable, "-m", "glm4lite", "serve", "--port", "0", "--queue", str(options.queue)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = next((line for line in server.stderr or () if "answers at" in line), "")
            if not said:
                sys.exit("the server did not start")
            url = said.split("answers at ")[1].split()[0].removesuffix("/v1")
            result = asyncio.run(load(url, options.clients, options.seconds))
        finally:
            server.terminate()
    for name, value in result.items():
        print(f"{name:<26}{value}")
    print(json.dumps(result))
    if wrong := problems(result):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
