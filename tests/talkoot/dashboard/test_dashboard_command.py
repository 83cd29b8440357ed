"""The command as users run it: where it listens, what it says if it can't, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from commands import run, wait_until
from other_processes import gone
from preloaded import Preloaded
from simulated_readings import peer

from dht.invites import Invite
from dht.records import SwarmKeys
from peer.errors import StartError
from peer.transport.addresses import Multiaddress
from talkoot.web import address_of, listen

LIMIT_S = 90.0


@pytest.fixture
def dead_invite(closed_port: int) -> str:
    """The invite of a swarm whose only known peer has gone."""
    author = peer(1)
    address = f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{author.to_base58()}"
    return str(Invite(SwarmKeys("sauna", author), (Multiaddress(address),)))


def test_a_free_port_is_found_and_named() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert address_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(StartError, match=r"can't listen on 192\.0\.2\.7 port 0.*--host"):
        listen("192.0.2.7", 0)


@pytest.mark.parametrize("host", ["127.0..1", "a" * 64])
def test_what_is_no_host_name_is_refused(host: str) -> None:
    with pytest.raises(StartError, match=f"can't listen on {host}, .*--host"):
        listen(host, 0)


def test_a_port_in_use_is_one_line_and_status_2(dead_invite: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("dashboard", "--join", dead_invite, "--port", str(port), "--state", str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: can't listen on 127.0.0.1 port {port}: Address already in use; pass another --port or --host [T104]\n"
    )


def test_a_swarm_that_cannot_be_reached_is_shown_so_until_ctrl_c(dead_invite: str, tmp_path: Path) -> None:
    process = Preloaded(
        *("-m", "talkoot", "dashboard", "--join", dead_invite, "--port", "0", "--state", str(tmp_path / "state")),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+/)\n", process.stdout.readline())
        assert found is not None
        deadline = time.monotonic() + LIMIT_S
        while not (shown := get(found[1] + "api/v1/swarm"))["unreachable_since"]:
            assert time.monotonic() < deadline, shown
            threading.Event().wait(0.1)
        assert shown["state"] == {"level": "unknown", "words": "cannot reach the swarm"}
        assert (shown["name"], shown["nodes"]) == ("sauna", {"live": None, "gone": None, "unsteady": None})
        assert get(found[1] + "healthz") == {"status": "ok"}
        kin = psutil.Process(process.pid).children(recursive=True)
        with urllib.request.urlopen(found[1] + "events", timeout=60) as events:
            events.readline()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    assert "cannot reach the swarm: none of the bootstrap addresses answers" in said
    assert "Traceback" not in said
    wait_until(lambda: gone(kin), "the end of its children")


def get(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=60) as answer:
        shown: dict[str, object] = json.loads(answer.read())
        return shown
