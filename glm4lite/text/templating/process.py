"""Talks to the process that renders chat templates (sandbox.py), and ends it when it takes too long."""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4lite.base.errors import TemplateError, one_line
from glm4lite.base.processes import apart, bounded

_SCRIPT = Path(__file__).with_name("sandbox.py")
_MOST = 16_000_000  # characters of a prompt; the longest context, a million tokens, is about 4 million
_OWN_TEXT = 1_000_000  # characters that a template may write of its own; real ones have a few thousand
_ESCAPED = 12  # characters of JSON for one
_MEMORY = 1 << 30  # bytes; Python and jinja2 take about 60 MB of it
_START_LIMIT_S = 30.0  # starting Python and importing jinja2 takes 0.1 s, on a busy machine much longer


class TemplateProcess:
    """Renders the templates `sources` (name -> Jinja source), each within `time_limit_s` seconds.

    openers: of each template, the first characters of the strings that it looks for in what it is given.

    The process is started at once, restarted when a template had to be killed, and ends with this object. Methods may
    be called from several threads. Raises TemplateError, in one line that starts with `origin`.
    """

    def __init__(self, sources: Mapping[str, str], origin: str, time_limit_s: float) -> None:
        self._sources = dict(sources)
        self.openers = dict.fromkeys(sources, "")
        self._origin = origin
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        try:
            self._start()
        except TemplateError:
            self._drop()
            raise

    def render(self, name: str, variables: Mapping[str, Any]) -> str:
        """The template `name` with `variables`, which must be JSON data.

        A prompt is not much longer than what it is made of: one that is, is given up while it is written.
        """
        given = json.dumps(variables, ensure_ascii=False)
        limit = min(_MOST, _OWN_TEXT + 8 * len(given))  # tojson indents, and some templates write a thing twice
        request = f'{{"name": {json.dumps(name)}, "limit": {limit}, "variables": {given}}}'
        with self._lock:
            if self._process is None:
                self._start()
            text: str = self._exchange(request, self._time_limit_s, limit)["text"]
            return text

    def _start(self) -> None:
        # -P: the package's folder must not become an import path, its file names would shadow other modules.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(_MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                errors="surrogatepass",
                **apart(),
            )
        except OSError as error:
            raise TemplateError(f"{self._origin}: the process for templates cannot start ({error})") from error
        weakref.finalize(self, _end, self._process)
        self._exchange(None, _START_LIMIT_S)
        for name, source in self._sources.items():
            answer = self._exchange(json.dumps({"name": name, "source": source}), self._time_limit_s)
            self.openers[name] = answer["openers"]

    def _exchange(self, request: str | None, limit_s: float, most: int = _OWN_TEXT) -> dict[str, Any]:
        """Send one request (None: only wait for the greeting) and read its answer."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise TemplateError(f"{self._origin}: the process for templates is not running")
        try:
            with bounded(process, limit_s, _MEMORY) as expired:
                if request is not None:
                    process.stdin.write(request)
                    process.stdin.write("\n")
                    process.stdin.flush()
                answer: dict[str, Any] = json.loads(process.stdout.readline(_ESCAPED * most + 1000))
        except (OSError, ValueError) as error:
            self._drop()
            reason = f"did not finish within {limit_s:g} s" if expired.is_set() else "ended its process"
            raise TemplateError(f"{self._origin}: the template {reason}") from error
        except BaseException:  # Ctrl-C between question and answer: the next answer would be this one's
            self._drop()
            raise
        if expired.is_set():
            self._drop()
        if "error" in answer:
            where = f" line {answer['line']}" if answer.get("line") else ""
            raise TemplateError(f"{self._origin}{where}: the template {one_line(answer['error'])[:300]}")
        return answer

    def _drop(self) -> None:
        if self._process is not None:
            _end(self._process)
        self._process = None


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill and reap. The pipes are closed too, so that nothing is left open when a template is replaced."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:  # the rest of a request that a dead process did not read
            continue
    process.wait()
