"""A restarted node uses the port that it had before."""

import socket
from pathlib import Path

import pytest

from peer.errors import PortError
from peer.transport.addresses import require_free_port
from talkoot.demo.links import free_ports
from talkoot.node.launch import last_port, remember_port

HOST = "127.0.0.1"


def test_a_first_start_has_no_last_port(tmp_path: Path) -> None:
    assert last_port(tmp_path, HOST) == 0


def test_the_last_port_is_remembered(tmp_path: Path) -> None:
    (port,) = free_ports(HOST, 1)
    remember_port(tmp_path, port)
    assert last_port(tmp_path, HOST) == port


def test_a_port_that_somebody_else_has_taken_is_left_to_them(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as other:
        remember_port(tmp_path, other.getsockname()[1])
        assert last_port(tmp_path, HOST) == 0


@pytest.mark.parametrize("text", ["", "many", "-1", "65536", "9" * 30, "\x00"])
def test_a_spoilt_file_counts_as_none(tmp_path: Path, text: str) -> None:
    remember_port(tmp_path, 1)
    (tmp_path / "port").write_text(text)
    assert last_port(tmp_path, HOST) == 0


def test_whoever_listens_on_the_routers_address_is_told_how_to_announce_it() -> None:
    with pytest.raises(
        PortError, match=r"not an address of this machine: .* set announce_host to it instead"
    ):
        require_free_port("203.0.113.7", 31337)
