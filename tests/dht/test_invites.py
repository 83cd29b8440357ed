"""Invites: one line of text, in which any typing error is detected."""

import string
from pathlib import Path
from typing import Any

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.invites import Invite, read_bootstrap
from dht.records import SwarmKeys
from peer.errors import InviteError, SettingsError
from peer.identity import Identity, PeerID
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from peer.wire import records_pb2

AUTHOR = PeerID(b"\x12\x20" + bytes(range(32)))
ADDRESS = Multiaddress.of(Endpoint("203.0.113.7:31337"), AUTHOR)
INVITE = Invite(
    SwarmKeys("sauna-42", AUTHOR), (ADDRESS, Multiaddress.of(Endpoint("[2001:db8::7]:31337"), AUTHOR))
)
LINE = str(INVITE)
PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " "


def line_of(message: records_pb2.InviteMessage) -> str:
    return "talkoot2" + str(base58.b58encode_check(message.SerializeToString()).decode())


def message_of(**changes: object) -> records_pb2.InviteMessage:
    fields: dict[str, Any] = {"author": AUTHOR.to_bytes(), "bootstrap_addresses": [ADDRESS]}
    return records_pb2.InviteMessage(**{"name": "sauna-42", **fields, **changes})


peer_ids = st.binary(min_size=32, max_size=32).map(lambda digest: PeerID(b"\x12\x20" + digest))
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,30}[a-z0-9]", fullmatch=True)
addresses = st.builds(
    lambda host, port, peer_id: Multiaddress.of(Endpoint.of(str(host), port), peer_id),
    st.ip_addresses(v=4),
    st.integers(1, 65535),
    peer_ids,
)


@given(names, peer_ids, st.lists(addresses, min_size=1, max_size=16, unique=True).map(tuple))
def test_parsing_gives_back_the_invite(
    name: str, author: PeerID, bootstrap: tuple[Multiaddress, ...]
) -> None:
    invite = Invite(SwarmKeys(name, author), bootstrap)
    assert Invite.parse(str(invite)) == invite


def test_a_real_peers_invite_is_one_word(tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "peer.key")
    line = str(Invite(SwarmKeys("sauna", identity.peer_id), (ADDRESS,)))
    assert line.isalnum()
    assert Invite.parse(line).keys.author == identity.peer_id


@pytest.mark.parametrize("around", ["{}\n", "  {}  ", "\t{}\r\n"])
def test_white_space_around_it_is_no_matter(around: str) -> None:
    assert Invite.parse(around.format(LINE)) == INVITE


@pytest.mark.parametrize(
    "text",
    [
        f"invite: {LINE}",
        f"Invite:\n{LINE}\n\nSee you there, Aino",
        "\n".join(LINE[n : n + 20] for n in range(0, len(LINE), 20)),
        f"invite: {LINE[:30]} \r\n  {LINE[30:]}\r\n-- \r\nAino",
        f"**invite:** `{LINE}`.",
        f"> invite:\n> {LINE[:30]}\n> {LINE[30:]}\n",
        f"\u201c{LINE[:30]}\u200b{LINE[30:]}\u201d",
        f"{LINE[:30]}=\r\n{LINE[30:]}",
    ],
)
def test_it_may_be_wrapped_and_have_words_around_it(text: str) -> None:
    assert Invite.parse(text) == INVITE


@given(st.integers(0, len(LINE) - 1), st.sampled_from(PRINTABLE))
def test_any_changed_character_is_found(position: int, character: str) -> None:
    changed = LINE[:position] + character + LINE[position + 1 :]
    if changed != LINE:
        with pytest.raises(InviteError):
            Invite.parse(changed)


@given(st.integers(0, len(LINE) - 1))
def test_any_truncation_is_found_at_either_end(length: int) -> None:
    for cut in (LINE[:length], LINE[len(LINE) - length :]):
        with pytest.raises(InviteError):
            Invite.parse(cut)


@given(st.integers(0, len(LINE)), st.sampled_from(string.ascii_letters + string.digits))
def test_any_added_character_is_found(position: int, character: str) -> None:
    with pytest.raises(InviteError):
        Invite.parse(LINE[:position] + character + LINE[position:])


@given(st.integers(0, len(LINE) - 2))
def test_any_two_exchanged_neighbours_are_found(position: int) -> None:
    first, second = LINE[position], LINE[position + 1]
    if first != second:
        with pytest.raises(InviteError):
            Invite.parse(LINE[:position] + second + first + LINE[position + 2 :])


@given(st.text(max_size=200))
def test_garbage_raises_only_invite_error(text: str) -> None:
    for garbage in (text, "talkoot2" + text):
        with pytest.raises(InviteError):
            Invite.parse(garbage)


@given(st.binary(max_size=200))
def test_garbage_with_a_right_checksum_raises_only_invite_error(data: bytes) -> None:
    with pytest.raises(InviteError):
        Invite.parse("talkoot2" + base58.b58encode_check(data).decode())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "an invite starts with 'talkoot2'"),
        ("hello", "an invite starts with 'talkoot2'"),
        (LINE.removeprefix("talkoot"), "copy the whole line that you were given, or pass @FILE"),
        (LINE.replace("talkoot2", "talkoot1", 1), "another version of Talkoot: update it, or ask for a new"),
        (LINE[:-1], "incomplete or mistyped"),
        ("talkoot2", "incomplete or mistyped"),
        (LINE + "1" * 5000, "at most 4096 characters"),
        (LINE + "\N{LATIN SMALL LETTER A WITH DIAERESIS}", "incomplete or mistyped"),
    ],
)
def test_the_refusal_says_what_to_do(line: str, said: str) -> None:
    with pytest.raises(InviteError) as caught:
        Invite.parse(line)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bootstrap",
    [
        [],
        [""],
        ["localhost:31337"],
        ["/ip4/203.0.113.7/tcp/31337"],
        ["/ip4/203.0.113.7/tcp/99999/p2p/" + AUTHOR.to_base58()],
    ],
)
def test_an_invite_without_a_usable_address_is_refused(bootstrap: list[str]) -> None:
    with pytest.raises(InviteError, match="no usable bootstrap address"):
        Invite.parse(line_of(message_of(bootstrap_addresses=bootstrap)))


@pytest.mark.parametrize(
    "name", ["", "x", "Sauna", "sau.na", "sauna-", "-sauna", "s" * 33, "sauna\n", "sau na"]
)
def test_an_invite_to_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(InviteError, match="names no valid swarm"):
        Invite.parse(line_of(message_of(name=name)))


@pytest.mark.parametrize("author", [b"", b"x", bytes(34), AUTHOR.to_bytes() + b"\0"])
def test_an_invite_without_the_authors_fingerprint_is_refused(author: bytes) -> None:
    with pytest.raises(InviteError):
        Invite.parse(line_of(message_of(author=author)))


def test_the_right_message_passes() -> None:
    """Otherwise the refusals above would prove nothing."""
    assert Invite.parse(line_of(message_of())) == Invite(SwarmKeys("sauna-42", AUTHOR), (ADDRESS,))


# Where an invite may be read from


def test_it_is_read_from_what_was_passed_or_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talkoot-invite"
    path.write_text(f"\ninvite: {LINE}\nfrom Aino, until June\n")  # as `talkoot invite` prints it
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for passed in (
        LINE,
        f" {LINE}\n",
        str(path),
        f"@{path}",
        "@~/talkoot-invite",
        "@talkoot-invite",
        "talkoot-invite",
    ):
        assert Invite.read(passed) == INVITE


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"talkoot2nonsense", b"x" * 10_000])
def test_a_file_without_an_invite_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "invite"
    if content is not None:
        path.write_bytes(content)
    for passed in (f"@{path}", str(path)):
        with pytest.raises(InviteError, match=str(path)):
            Invite.read(passed)


@given(st.text(max_size=200))
def test_whatever_is_passed_raises_only_invite_error(text: str) -> None:
    for garbage in (text, "@" + text, text * 200):
        with pytest.raises(InviteError):
            Invite.read(garbage)


def test_addresses_of_kinds_that_are_not_known_yet_are_left_out() -> None:
    later = f"/ip4/203.0.113.7/udp/31337/quic-v1/p2p/{AUTHOR.to_base58()}"
    assert Invite.parse(line_of(message_of(bootstrap_addresses=[later, ADDRESS]))).bootstrap == (ADDRESS,)


# Other nodes to join through


def test_others_to_join_through_come_before_the_invites_own(tmp_path: Path) -> None:
    other = Multiaddress.of(Endpoint("198.51.100.9:31337"), PeerID(b"\x12\x20" + bytes(32)))
    (tmp_path / "theirs").write_text(LINE)
    mine = Invite(INVITE.keys, (ADDRESS,), token=b"secret")
    assert read_bootstrap([str(other), LINE]) == (other, *INVITE.bootstrap)
    assert read_bootstrap([f"@{tmp_path / 'theirs'}"]) == INVITE.bootstrap
    through = mine.through([other, ADDRESS])
    assert (through.keys, through.token) == (mine.keys, mine.token)
    assert through.bootstrap == (other, ADDRESS)
    assert mine.through(after=[other, ADDRESS]).bootstrap == (ADDRESS, other)


def test_an_invite_keeps_as_many_addresses_as_others_read() -> None:
    many = [Multiaddress.of(Endpoint.of("198.51.100.9", 1000 + port), AUTHOR) for port in range(20)]
    through = INVITE.through(many)
    assert Invite.parse(str(through)).bootstrap == through.bootstrap == tuple(many[:16])
    through = INVITE.through(after=many)
    assert Invite.parse(str(through)).bootstrap == through.bootstrap
    assert through.bootstrap == (*INVITE.bootstrap, *many)[:16]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("there", SettingsError), ("203.0.113.7:31337", SettingsError), (LINE[:-4], InviteError)],
)
def test_what_is_neither_an_address_nor_an_invite_is_told(text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        read_bootstrap([text])
