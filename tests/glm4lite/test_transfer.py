"""Files by ranges from a real server that cuts, stalls, refuses, lies and changes them in the middle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm4lite.base.errors import HubError
from glm4lite.base.events import Progress
from glm4lite.hub.arriving import Arriving, journal, unfinished
from glm4lite.hub.client import RefusedError, httpx
from glm4lite.hub.connections import Counter
from glm4lite.hub.patience import Patience
from glm4lite.hub.transfer import CONNECTIONS, Transfer, Wanted
from tests.glm4lite.file_server import Answer, FileServer

PART = 10_000
DATA = bytes(range(256)) * 1000  # 26 parts
SHA = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
QUICK = Patience(attempts=3, first=0.01, longest=0.02, silence=0.5)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer({"/model": DATA}) as files:
        yield files


def wanted(server: FileServer, target: Path, digests: tuple[str, ...] = (SHA,), size: int = len(DATA)) -> Wanted:
    lock = target.with_name(f"{target.name}.lock")
    return Wanted("model", "org/tiny", f"{server.url}/model", {}, target, size, frozenset(digests), lock=lock)


def publish(asked: Wanted, arriving: Arriving) -> None:
    if arriving.path.exists():
        arriving.publish(asked.target)


def bring(
    *asked: Wanted,
    progress: list[Progress] | None = None,
    client: httpx.Client | None = None,
    patience: Patience = QUICK,
) -> Exception | None:
    """What went wrong with fetching these, None where nothing did."""
    counter = Counter(None if progress is None else progress.append)
    with client or httpx.Client(trust_env=False) as own:
        return Transfer(own, asked, counter, publish, patience, PART).run()


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock"))


def test_a_file_comes_in_parts_each_of_which_is_asked_for_once(server: FileServer, tmp_path: Path) -> None:
    seen: list[Progress] = []
    assert bring(wanted(server, tmp_path / "model"), progress=seen) is None
    assert (tmp_path / "model").read_bytes() == DATA
    assert left(tmp_path / "model") == ["model"]
    starts = sorted(first for _, first, _ in server.sent)
    assert starts == list(range(0, len(DATA), PART))
    assert server.bytes_sent == len(DATA)
    assert (seen[-1].done, seen[-1].total) == (len(DATA), len(DATA))


def test_what_is_fetched_beside_other_work_stays_in_its_room_until_it_is_waited_for(
    server: FileServer, tmp_path: Path
) -> None:
    with httpx.Client(trust_env=False) as client:
        seen: list[Progress] = []
        transfer = Transfer(client, [wanted(server, tmp_path / "model")], Counter(seen.append), publish, QUICK, PART)
        transfer.start(room=5 * PART + 1)
        deadline = time.monotonic() + 20
        while server.bytes_sent < 5 * PART and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert server.bytes_sent == 5 * PART
        assert not seen  # the caller is not told before it asks
        assert transfer.wait() is None
    assert (tmp_path / "model").read_bytes() == DATA
    assert seen[-1].done == len(DATA)
    assert server.bytes_sent == len(DATA)


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART])
@pytest.mark.parametrize("listed", [True, False])
def test_files_of_every_length_arrive(size: int, listed: bool, tmp_path: Path) -> None:
    data = DATA[:size]
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with FileServer({"/model": data}) as server:
        assert bring(wanted(server, tmp_path / "model", (digest,), size if listed else 0)) is None
    assert (tmp_path / "model").read_bytes() == data


def test_a_connection_that_breaks_goes_on_at_its_byte(server: FileServer, tmp_path: Path) -> None:
    def cut(answer: Answer) -> None:
        answer.breaks = len(answer.body) // 3 if answer.number % 2 else None

    server.fault = cut
    assert bring(wanted(server, tmp_path / "model")) is None
    assert (tmp_path / "model").read_bytes() == DATA
    assert server.bytes_sent == len(DATA)


def test_a_connection_that_stalls_is_given_up_and_goes_on(server: FileServer, tmp_path: Path) -> None:
    def stall(answer: Answer) -> None:
        answer.stalls = 5.0 if answer.number == 2 else 0.0

    server.fault = stall
    began = time.monotonic()
    assert bring(wanted(server, tmp_path / "model")) is None
    assert time.monotonic() - began < 4
    assert (tmp_path / "model").read_bytes() == DATA


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_has_too_much_to_do_is_asked_again(status: int, server: FileServer, tmp_path: Path) -> None:
    def busy(answer: Answer) -> None:
        if answer.number % 2:
            answer.status, answer.headers = status, {"Retry-After": "0"}

    server.fault = busy
    patience = Patience(attempts=20, first=0.001, longest=0.002)
    assert bring(wanted(server, tmp_path / "model"), patience=patience) is None
    assert (tmp_path / "model").read_bytes() == DATA


@pytest.mark.parametrize(("status", "most"), [(500, (QUICK.attempts + 1) * CONNECTIONS), (404, CONNECTIONS)])
def test_a_refusal_that_stays_ends_the_transfer(status: int, most: int, server: FileServer, tmp_path: Path) -> None:
    def refuse(answer: Answer) -> None:
        answer.status = status

    server.fault = refuse
    failed = bring(wanted(server, tmp_path / "model"))
    assert isinstance(failed, RefusedError)
    assert server.count <= most
    assert not (tmp_path / "model").exists()


def test_a_pause_grows_and_the_servers_word_about_it_counts() -> None:
    cut = httpx.ReadError("cut")
    patience = Patience(attempts=4, first=1.0, longest=3.0)
    pauses = [patience.pause(failures, cut) for failures in range(1, 6)]
    assert [pause is None for pause in pauses] == [False] * 4 + [True]
    for pause, most in zip(pauses, (1, 2, 3, 3), strict=False):
        assert pause is not None
        assert most / 2 <= pause <= most
    response = httpx.Response(429, headers={"Retry-After": "7"}, request=httpx.Request("GET", "http://host/x"))
    assert patience.pause(1, RefusedError("busy", response=response)) == 7
    assert patience.pause(1, httpx.ConnectError("CERTIFICATE_VERIFY_FAILED")) is None


@pytest.mark.parametrize(
    "lie",
    [
        lambda answer: setattr(answer, "body", answer.body[:-1]),
        lambda answer: setattr(answer, "body", answer.body + b"x"),
        lambda answer: answer.headers.update({"Content-Range": f"bytes 0-{PART - 1}/{len(DATA)}"}),
        lambda answer: answer.headers.pop("Content-Range"),
        lambda answer: answer.headers.update({"Content-Encoding": "gzip"}),
        lambda answer: answer.__dict__.update(status=200, body=DATA),
    ],
    ids=["shorter", "longer", "another part", "no part", "packed", "whole"],
)
def test_an_answer_of_a_wrong_length_or_place_is_asked_for_again(
    lie: object, server: FileServer, tmp_path: Path
) -> None:
    def once(answer: Answer) -> None:
        if answer.number == 5:
            lie(answer)  # type: ignore[operator]

    server.fault = once
    assert bring(wanted(server, tmp_path / "model")) is None
    assert (tmp_path / "model").read_bytes() == DATA


def test_a_file_of_another_size_than_listed_is_refused(server: FileServer, tmp_path: Path) -> None:
    failed = bring(wanted(server, tmp_path / "model", size=len(DATA) - 1))
    assert str(failed) == (
        f"org/tiny: model has {len(DATA)} bytes at {server.url}, but {len(DATA) - 1} in its listing; "
        "run it again later, or set HF_ENDPOINT to another mirror"
    )


def test_a_web_page_in_place_of_a_file_is_said(server: FileServer, tmp_path: Path) -> None:
    def login(answer: Answer) -> None:
        answer.status, answer.body, answer.headers = 200, b"<html>log in</html>", {"Content-Type": "text/html"}

    server.fault = login
    for size in (len(DATA), 0):
        failed = bring(wanted(server, tmp_path / f"m{size}", size=size))
        assert str(failed).startswith(f"org/tiny: {server.url} answers with a web page where model should be; ")


def test_flipped_bytes_are_fetched_again_and_never_get_the_files_name(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def flip(answer: Answer) -> None:
        if answer.number == 3:
            answer.body = bytes(byte ^ 255 for byte in answer.body)

    server.fault = flip
    with caplog.at_level(logging.WARNING, "glm4lite"):
        assert bring(wanted(server, tmp_path / "model")) is None
    assert (tmp_path / "model").read_bytes() == DATA
    assert [record.getMessage().endswith("; it is downloaded again") for record in caplog.records] == [True]
    server.fault = lambda answer: setattr(answer, "body", bytes(len(answer.body)))
    failed = bring(wanted(server, tmp_path / "zeros"))
    assert "model arrives damaged from http://127.0.0.1:" in str(failed)
    assert left(tmp_path / "zeros") == ["model"]


def test_a_file_that_changes_in_the_middle_is_refused(server: FileServer, tmp_path: Path) -> None:
    def change(answer: Answer) -> None:
        answer.headers["ETag"] = '"old"' if answer.number < 5 else '"new"'

    server.fault = change
    failed = bring(wanted(server, tmp_path / "model", ()))
    assert str(failed) == "org/tiny: model was changed while it was downloaded; run it again"
    assert left(tmp_path / "model") == []


def test_another_revision_in_the_middle_is_refused(server: FileServer, tmp_path: Path) -> None:
    def change(answer: Answer) -> None:
        answer.headers["X-Repo-Commit"] = "a" * 40 if answer.number < 5 else "b" * 40

    server.fault = change
    one = wanted(server, tmp_path / "model")
    failed = bring(Wanted(**(one.__dict__ | {"commit": "a" * 40})))
    assert "comes from another revision (bbb" in str(failed)


def test_a_tag_that_is_the_hash_of_another_file_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.etags["/model"] = "0" * 64
    assert "is another file (000" in str(bring(wanted(server, tmp_path / "model")))
    server.etags["/model"] = "d41d8cd98f00b204e9800998ecf8427e"  # a storage's own tag
    assert bring(wanted(server, tmp_path / "model")) is None


def stopped_halfway(server: FileServer, target: Path) -> int:
    """Bytes that a transfer had when its caller stopped it."""
    server.pace = 0.02

    def stop(event: Progress) -> None:
        if event.done >= len(DATA) // 3:
            raise KeyboardInterrupt

    with httpx.Client(trust_env=False) as client, pytest.raises(KeyboardInterrupt):
        Transfer(client, [wanted(server, target, ())], Counter(stop), publish, QUICK, PART).run()
    server.pace = 0.0
    return sum(count for _, _, count in server.sent)


def test_a_stopped_transfer_goes_on_at_its_byte(server: FileServer, tmp_path: Path) -> None:
    server.etags["/model"] = "v1"
    stopped_halfway(server, tmp_path / "model")
    assert left(tmp_path / "model") == [journal(tmp_path / "model").name, unfinished(tmp_path / "model").name][::-1]
    seen: list[Progress] = []
    assert bring(wanted(server, tmp_path / "model"), progress=seen) is None
    assert (tmp_path / "model").read_bytes() == DATA
    assert server.bytes_sent <= len(DATA) + CONNECTIONS * PART


def test_a_file_that_changed_between_two_runs_begins_anew(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.etags["/model"] = "v1"
    stopped_halfway(server, tmp_path / "model")
    new = bytes(reversed(DATA)) + b"more"
    server.files["/model"], server.etags["/model"] = new, "v2"
    with caplog.at_level(logging.WARNING, "glm4lite"):
        assert bring(wanted(server, tmp_path / "model", (), 0)) is None
    assert (tmp_path / "model").read_bytes() == new
    assert "was changed since its download began" in caplog.text


def test_a_server_without_ranges_sends_all_of_it(server: FileServer, tmp_path: Path) -> None:
    stopped_halfway(server, tmp_path / "model")
    server.ranges = False
    server.fault = lambda answer: setattr(answer, "breaks", 50_000 if answer.number % 2 else None)
    assert bring(wanted(server, tmp_path / "model")) is None
    assert (tmp_path / "model").read_bytes() == DATA


@pytest.mark.parametrize("damage", ["", "{}\n0 5\n", "cut", "beyond", "binary"])
def test_a_journal_that_is_none_costs_the_bytes_and_nothing_else(
    damage: str, server: FileServer, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    stopped_halfway(server, target)
    notes = journal(target)
    text = notes.read_text()
    if damage == "cut":
        notes.write_text(text[:-3])
    elif damage == "beyond":
        notes.write_text(f"{text}0 999999999\n")
    elif damage == "binary":
        notes.write_bytes(bytes(range(256)))
    else:
        notes.write_text(damage)
    assert bring(wanted(server, target)) is None
    assert target.read_bytes() == DATA


KILLED = """
import sys
from pathlib import Path
from glm4lite.hub.client import httpx
from glm4lite.hub.connections import Counter
from glm4lite.hub.patience import Patience
from glm4lite.hub.transfer import Transfer, Wanted
url, target, part = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
wanted = Wanted("model", "org/tiny", url, {}, target, int(sys.argv[4]), lock=target.with_name("model.lock"))
Transfer(httpx.Client(trust_env=False), [wanted], Counter(None), lambda *_: None, Patience(), part).run()
"""


@pytest.mark.skipif(os.name != "posix", reason="no signal that ends a process at once")
def test_a_killed_process_costs_one_part_a_connection(server: FileServer, tmp_path: Path) -> None:
    target = tmp_path / "model"
    server.pace = 0.1
    command = [sys.executable, "-c", KILLED, f"{server.url}/model", str(target), str(PART), str(len(DATA))]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while len(server.sent) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    server.pace = 0.0
    assert bring(wanted(server, target)) is None
    assert target.read_bytes() == DATA
    assert server.bytes_sent <= len(DATA) + CONNECTIONS * PART


def test_of_two_transfers_of_one_file_the_second_waits(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.pace = 0.02
    asked, failures = wanted(server, tmp_path / "model"), list[Exception | None]()
    with caplog.at_level(logging.WARNING, "glm4lite"):
        threads = [threading.Thread(target=lambda: failures.append(bring(asked))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == [None, None]
    assert (tmp_path / "model").read_bytes() == DATA
    assert server.bytes_sent == len(DATA)
    assert "is being downloaded by another process: waiting for it" in caplog.text


def test_a_token_stays_with_its_host_and_a_link_that_grew_old_is_asked_for_anew(
    server: FileServer, tmp_path: Path
) -> None:
    def signed(answer: Answer) -> None:
        answer.status = 403 if answer.number == 3 else answer.status

    def send_on(answer: Answer) -> None:
        elsewhere = server.url.replace("127.0.0.1", "localhost")
        answer.status, answer.headers = 302, {"Location": f"{elsewhere}/model?signature=secret", "ETag": '"v"'}

    server.files["/model?signature=secret"] = DATA
    server.fault = signed
    with FileServer({"/model": DATA}, fault=send_on) as hub:
        one = wanted(hub, tmp_path / "model")
        assert bring(Wanted(**(one.__dict__ | {"headers": {"Authorization": "Bearer hf_secret"}}))) is None
        assert set(hub.tokens) == {"Bearer hf_secret"}
    assert set(server.tokens) == {None}
    server.fault = lambda answer: setattr(answer, "status", 500)
    with FileServer({"/model": DATA}, fault=send_on) as hub:
        failed = bring(wanted(hub, tmp_path / "other"))
    assert "hf_secret" not in str(failed)


def test_a_full_disk_is_an_error_and_what_arrived_is_kept(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glm4lite.hub import transfer

    write, written = transfer._write, list[int]()

    def full(out: object, piece: bytes, path: Path) -> None:
        written.append(len(piece))
        if sum(written) > len(DATA) // 2:
            raise OSError(28, "No space left on device", str(path))
        write(out, piece, path)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "_write", full)
    failed = bring(wanted(server, tmp_path / "model"))
    assert isinstance(failed, OSError)
    assert failed.errno == 28
    monkeypatch.undo()
    assert bring(wanted(server, tmp_path / "model")) is None
    assert (tmp_path / "model").read_bytes() == DATA
    assert server.bytes_sent < 2 * len(DATA) - len(DATA) // 4


def test_several_files_share_the_connections(tmp_path: Path) -> None:
    files = {f"/{number}": DATA[: 30_000 * number] for number in range(1, 6)}
    with FileServer(files) as server:
        asked = []
        for path, data in files.items():
            digests = frozenset({f"sha256:{hashlib.sha256(data).hexdigest()}"})
            asked.append(Wanted(path, "org/x", server.url + path, {}, tmp_path / path[1:], len(data), digests))
        assert bring(*asked) is None
    assert all((tmp_path / path[1:]).read_bytes() == data for path, data in files.items())


def test_what_hub_errors_are_made_of_is_one_line(server: FileServer, tmp_path: Path) -> None:
    failed = bring(wanted(server, tmp_path / "model", ("sha256:" + "0" * 64,)))
    assert isinstance(failed, HubError)
    assert "\n" not in str(failed)
    assert json.dumps(str(failed))
