"""Bodies made to be expensive, sent to `glm4lite serve` while /health is asked: what do they cost, and who waits?

    python -m bench.bodies                # each kind alone; then several of each kind at once with --clients 4

Prints per kind: the status, seconds until the answer, the server's processor time, how much its memory peaked above
what it held, and the longest that /health took meanwhile; one JSON line last. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HEALTH_S = 0.2  # what /health may take
MIB = 1 << 20


def bodies() -> dict[str, bytes]:
    """All within the limit of 8 MiB."""
    return {name: body.encode() for name, body in (_of_structure() | _of_text()).items()}


def _of_structure() -> dict[str, str]:
    numbers = range(70_000)
    calls = ",".join(f'{{"id":"{n}","function":{{"name":"a"}}}}' for n in numbers)
    results = ",".join(f'{{"role":"tool","content":"","tool_call_id":"{n}"}}' for n in reversed(numbers))
    return {
        "lists": _chat("[]," * (2 << 20) + "[]"),
        "objects": _chat("{}," * (2 << 20) + "{}"),
        "messages": _chat(",".join(['{"role":"user","content":""}'] * 250_000)),
        "parts": _chat('{"role":"user","content":[' + "{}," * 2_000_000 + "{}]}"),
        "calls": _chat(f'{{"role":"assistant","tool_calls":[{calls}]}},{results}'),
        "deep": _chat("[" * 4_000_000 + "]" * 4_000_000),
        "keys": _hello(",".join(f'"{n}":1' for n in range(700_000))),
        "wide schema": _schema('"properties":{' + ",".join(f'"{n}":{{}}' for n in range(400_000)) + "}"),
        "floats": _hello('"x":[' + "1.5," * 1_900_000 + "1]"),
        "strings": _hello('"stop":[' + '"ab",' * 1_600_000 + '"a"]'),
        "numbers": '{"model":"nano","prompt":[' + "1000," * 1_500_000 + "1]}",
    }


def _of_text() -> dict[str, str]:
    arguments = "[" + "[]," * 2_000_000 + "[]]"
    return {
        "schema": _schema('"description":"' + "x " * (3 << 20) + '"'),
        "long float": _hello('"x":0.' + "1" * 8_000_000),
        "long number": _hello('"x":' + "1" * 8_000_000),
        "escapes": _chat(_user("\\u0041" * 1_300_000)),
        "words": _chat(_user("one two " * 1_000_000)),
        "brackets": _chat(_user("<|" * 4_000_000)),
        "one emoji": _chat(_user("\U0001f600" + "a" * 8_000_000)),
        "arguments": _chat(
            '{"role":"assistant","tool_calls":[{"id":"c","function":{"name":"a","arguments":"' + arguments + '"}}]}'
        ),
    }


def _chat(messages: str, more: str = "") -> str:
    return f'{{"model":"nano","max_tokens":2,"messages":[{messages}]{more}}}'


def _user(text: str) -> str:
    return f'{{"role":"user","content":"{text}"}}'


def _hello(more: str) -> str:
    return _chat(_user("Hi"), f",{more}")


def _schema(members: str) -> str:
    return _hello(
        f'"tools":[{{"type":"function","function":{{"name":"a","parameters":{{"type":"object",{members}}}}}}}]'
    )


class Watched:
    """The server's process, as /proc tells of it."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self._proc = port, Path(f"/proc/{pid}")

    def ask(self, method: str, path: str, body: bytes | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def cpu(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, name: str) -> int:
        lines = dict(line.split(":", 1) for line in (self._proc / "status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024

    def forget_peak(self) -> None:
        (self._proc / "clear_refs").write_text("5")


def measure(server: Watched, body: bytes, clients: int) -> dict[str, Any]:
    """One kind, sent by `clients` at once."""
    server.forget_peak()
    held, spent, started = server.memory("VmRSS"), server.cpu(), time.monotonic()
    answers, waits, over = list[int](), list[float](), threading.Event()

    def send() -> None:
        path = "/v1/completions" if b'"prompt"' in body[:40] else "/v1/chat/completions"
        answers.append(server.ask("POST", path, body))

    def watch() -> None:
        while not over.is_set():
            asked = time.monotonic()
            server.ask("GET", "/health")
            waits.append(time.monotonic() - asked)
            time.sleep(0.01)

    senders = [threading.Thread(target=send) for _ in range(clients)]
    watching = threading.Thread(target=watch)
    for thread in (watching, *senders):
        thread.start()
    for thread in senders:
        thread.join()
    seconds = time.monotonic() - started
    over.set()
    watching.join()
    return {
        "mib": round(len(body) / MIB, 1),
        "status": sorted(set(answers)),
        "seconds": round(seconds, 2),
        "cpu_s": round(server.cpu() - spent, 2),
        "peak_mib": round((server.memory("VmHWM") - held) / MIB),
        "health_s": round(max(waits), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1, help="who send the same body at the same time")
    parser.add_argument("--only", nargs="*", help="these kinds")
    options = parser.parse_args()
    command = [sys.executable, "-m", "glm4lite", "serve", "nano", "--port", "0"]
    results = dict[str, Any]()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = next((line for line in process.stderr or () if "answers at" in line), "")
            if not said:
                sys.exit("the server did not start")
            server = Watched(int(said.split("127.0.0.1:")[1].split("/")[0]), process.pid)
            for name, body in bodies().items():
                if options.only and name not in options.only:
                    continue
                results[name] = measure(server, body, options.clients)
                print(f"{name:<12}", *(f"{key} {value}" for key, value in results[name].items()), sep="  ", flush=True)
        finally:
            process.terminate()
    print(json.dumps(results))
    if late := [name for name, result in results.items() if result["health_s"] > HEALTH_S]:
        sys.exit(f"/health waited longer than {HEALTH_S} s: {', '.join(late)}")


if __name__ == "__main__":
    main()
