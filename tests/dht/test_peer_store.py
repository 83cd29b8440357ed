"""Remembered peers: the newest are kept, hostile addresses are not, and a broken file or a full disk does no harm."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.membership import PeerStore
from peer.identity import PeerID
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def address(number: int, port: int = 31337) -> Multiaddress:
    return Multiaddress.of(Endpoint.of("192.0.2.1", port), peer(number))


def test_what_was_met_is_there_after_a_restart_newest_first(tmp_path: Path) -> None:
    path = tmp_path / "peers" / "sauna.json"
    first = PeerStore(path)
    for n in range(3):
        first.add([address(n)], now=100.0 + n)
    first.add([address(0), address(0, 4001)], now=200.0)
    first.save()
    again = PeerStore(path)
    assert again.addresses() == first.addresses() == [address(0), address(0, 4001), address(2), address(1)]
    assert (again.met_at(peer(0)), again.met_at(peer(1)), again.met_at(peer(9))) == (200.0, 101.0, -math.inf)
    assert again.absent({peer(0), peer(1)}) == [[address(2)]]
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


@given(st.lists(st.integers(0, 200), max_size=300))
def test_only_the_newest_64_peers_are_kept(numbers: list[int]) -> None:
    peer_store = PeerStore(None)
    for n in numbers:
        peer_store.add([address(n)], now=0.0)
    newest = list(dict.fromkeys(reversed(numbers)))[:64]
    assert peer_store.addresses() == [address(n) for n in newest]


def test_a_peer_has_at_most_four_addresses() -> None:
    peer_store = PeerStore(None)
    peer_store.add([address(1, port) for port in range(1000, 1100)], now=0.0)
    assert len(peer_store.addresses()) == 4


@pytest.mark.parametrize(
    "bad",
    [
        "", "x", "/ip4/1.2.3.4/tcp/1", f"/p2p/{peer(1)}", "/ip4/1.2.3.4/tcp/1/p2p/0", f"{address(1)}" + "/" * 300,
        f"/ip4/1.2.3.4/tcp/x/p2p/{peer(1)}", f"/ip4/1.2.3.4/tcp/1/p2p/{peer(1)}/ip4/1.2.3.4/p2p/{peer(1)}",
        f"/onion/aaimaq4ygg2iegci:80/dns/a/p2p/{peer(1)}", 7, None,
    ],
)  # fmt: skip
def test_a_bad_address_that_was_stored_earlier_is_dropped_at_the_start(
    tmp_path: Path, bad: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.json"
    peers = [{"addresses": [bad, address(2)], "met_at": 1.0}, {"addresses": [bad], "met_at": 0.5}]
    path.write_text(json.dumps({"peers": peers}))
    peer_store = PeerStore(path)
    assert peer_store.addresses() == [address(2)]
    assert caplog.text.count("dropped") == 2
    peer_store.save()
    assert json.loads(path.read_text()) == {"peers": [{"addresses": [address(2)], "met_at": 1.0}]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"peers": 3}',
        '{"peers": [{"addresses": 1, "met_at": 2}]}',
        '{"peers": [[]]}',
        "\x00",
    ],
)
def test_a_broken_file_is_as_good_as_none_and_is_written_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "peers.json"
    path.write_text(text)
    peer_store = PeerStore(path)
    assert peer_store.addresses() == []
    peer_store.add([address(1)], now=0.0)
    peer_store.save()
    assert PeerStore(path).addresses() == [address(1)]


def test_a_file_with_too_many_peers_is_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"peers": [{"addresses": [address(n)], "met_at": -n} for n in range(100)]}))
    assert PeerStore(path).addresses() == [address(n) for n in range(64)]


def test_a_folder_that_can_not_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "peers").write_text("a file where the folder should be")
    peer_store = PeerStore(tmp_path / "peers" / "sauna.json")
    peer_store.add([address(1)], now=0.0)
    peer_store.save()
    told = caplog.messages[-1]
    assert told.startswith("could not write")
    assert told.endswith("; after a restart, peers met lately are forgotten")
    assert "Errno" not in told


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 300))
def test_new_keys_of_one_line_displace_no_peers_elsewhere(honest: int, keys: int) -> None:
    peer_store = PeerStore(None)
    for n in range(honest):
        peer_store.add([Multiaddress.of(Endpoint.of(f"198.51.100.{n + 1}", 1), peer(n))], now=0.0)
    for n in range(keys):
        peer_store.add([address(1000 + n)], now=1.0)
    assert all(peer_store.met_at(peer(n)) == 0.0 for n in range(honest))
    assert len(peer_store.addresses()) == min(64, honest + keys)
