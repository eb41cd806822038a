"""Programs that are told to end: a closed terminal, `kill`, a service manager."""

import os
import signal
import subprocess

import pytest

from glm4lite.cli.signals import leaving_on_signals
from tests.commands import forked

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_through_every_finally_once(name: str) -> None:
    number, seen = signal.Signals[name], list[str]()

    def work() -> None:
        with leaving_on_signals():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), signal.SIGHUP)  # a shell and a terminal both say so
                os.kill(os.getpid(), number)
                seen.append("tidied up")

    with pytest.raises(SystemExit) as caught:
        work()
    ignored = [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGHUP)]
    for known in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(known, signal.SIG_DFL)
    assert (caught.value.code, seen) == (128 + number, ["tidied up"])
    assert ignored == [signal.SIG_IGN] * 2  # until the process is gone


def test_signals_that_are_taken_or_ignored_stay_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with leaving_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_server_whose_terminal_closes_ends_as_it_should() -> None:
    command = [*forked(), "serve", "nano", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        try:
            next(line for line in server.stdout if "answers at" in line)
            server.send_signal(signal.SIGHUP)
            assert server.wait(60) == 128 + signal.SIGTERM
            assert "Traceback" not in server.stdout.read()
        finally:
            server.kill()
