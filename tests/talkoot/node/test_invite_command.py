"""`talkoot invite` makes, lists and revokes invites, with only the founder's folder."""

import json
import re
import shlex
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import assert_one_clear_line, run_here

from dht.admission import Mode, Role, SwarmAdmission, make_token, read_grant
from dht.invites import Invite
from dht.membership import PeerStore
from dht.records import SwarmKeys
from peer.identity import Identity
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from peer.wire import admission_pb2
from talkoot.node.invites import FoundedSwarm


def founded(
    folder: Path, mode: Mode = "token", author: Identity | None = None, host: str = "192.0.2.7"
) -> Invite:
    """Makes a folder as a founder's node leaves it."""
    identity = Identity.load_or_create(folder / "identity.key")
    keys = SwarmKeys("sauna", (author or identity).peer_id)
    invite = Invite(keys, (Multiaddress.of(Endpoint.of(host, 31337), identity.peer_id),))
    FoundedSwarm(invite=str(invite), admission=mode).save(folder)
    return invite


def test_an_invite_is_made_listed_and_revoked(tmp_path: Path) -> None:
    plain = founded(tmp_path)
    state = ("--state", str(tmp_path))
    made = run_here("invite", "--role", "node", "--expires", "90d", "--name", "Ada", "--json", *state)
    values = json.loads(made.stdout)
    invite = Invite.parse(values["invite"])
    assert (invite.keys, invite.bootstrap) == (plain.keys, plain.bootstrap)
    token = admission_pb2.Token.FromString(invite.token)
    grant = read_grant(token.grant)
    assert (grant.role, f"{grant.serial:08x}") == (Role.NODE, values["serial"])
    assert 89 * 86400 < grant.expires_at - time.time() <= 90 * 86400
    founder = Identity.load_or_create(tmp_path / "identity.key")
    admission = SwarmAdmission(plain.keys)
    admission.learn(founder.public_key, "token")
    admission.present(token, founder.peer_id)
    assert admission.badge is not None

    assert "Ada" in run_here("invite", "--list", *state).stdout
    assert "is revoked" in run_here("invite", "--revoke", values["serial"].upper(), *state).stdout
    (listed,) = json.loads(run_here("invite", "--list", "--json", *state).stdout)["invites"]
    assert listed["revoked"] is True
    assert invite.token.hex() not in (tmp_path / "invites.json").read_bytes().hex()


@pytest.mark.parametrize(
    ("role", "said"), [("reader", "a reader, who can't train, so ask a trainer"), ("trainer", "train first")]
)
def test_without_a_checkpoint_the_remedy_is_one_that_the_invite_allows(
    role: str, said: str, tmp_path: Path
) -> None:
    founded(tmp_path)
    made = run_here("invite", "--role", role, "--json", "--state", str(tmp_path))
    invite = json.loads(made.stdout)["invite"]
    ended = run_here("generate", "--join", invite, "--prompt", "x", "--state", str(tmp_path / "reader"))
    assert_one_clear_line(ended, "no checkpoint of this swarm", said, "--checkpoint DIR", "[T113]")


@pytest.mark.parametrize(
    "command", [("generate", "--prompt", "x"), ("train", "--resume"), ("export", "--resume")]
)
def test_without_a_checkpoint_an_expired_invite_is_said_to_be_expired(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    plain = founded(tmp_path)
    founder = Identity.load_or_create(tmp_path / "identity.key")
    token = make_token(founder, plain.keys.swarm_id, Role.READER, time.time() - 1, 7)
    invite = str(replace(plain, token=token.SerializeToString()))
    out = ("--out", str(tmp_path / "out")) if command[0] == "export" else ()
    ended = run_here(*command, *out, "--join", invite, "--state", str(tmp_path / "reader"))
    assert ended.returncode == 3
    assert "error: this invite no longer admits you: the token has expired; ask the founder" in ended.stderr
    assert "[T117]" in ended.stderr


@pytest.mark.parametrize("place", [".", "none/invite"])
def test_an_invite_file_that_cant_be_written_founds_no_swarm(tmp_path: Path, place: str) -> None:
    manifest, state = tmp_path / "swarm.toml", tmp_path / "state"
    manifest.write_text('name = "none"\n[model]\nlayers = 1\nhidden = 16\n[experts]\ngrid = [2, 2]\n')
    options = ("--new", str(manifest), "--state", str(state), "--host", "127.0.0.1")
    ended = run_here("node", *options, "--invite-file", str(tmp_path / place))
    assert ended.returncode == 2
    assert "can't write" in ended.stderr
    assert "pass another --invite-file" in ended.stderr
    assert not state.exists()


def test_a_list_of_no_invites_says_so(tmp_path: Path) -> None:
    listed = run_here("invite", "--list", "--state", str(tmp_path))
    assert " ".join(listed.stdout.split()) == f"no invites were made with the state folder {tmp_path}"


def test_a_folder_that_founded_a_swarm_founds_no_other(tmp_path: Path) -> None:
    founded(tmp_path / "state")
    before = sorted((tmp_path / "state").iterdir())
    manifest = tmp_path / "swarm.toml"
    manifest.write_text('name = "kiuas"\n[model]\nlayers = 1\nhidden = 16\n[experts]\ngrid = [2, 2]\n')
    options = ("--new", str(manifest), "--state", str(tmp_path / "state"), "--host", "127.0.0.1")
    # before the folder is used
    assert_one_clear_line(
        run_here("node", *options), "you founded the swarm 'sauna' with", "to found 'kiuas'"
    )
    assert sorted((tmp_path / "state").iterdir()) == before


def test_an_invite_for_people_says_what_it_is_worth(tmp_path: Path) -> None:
    folder = tmp_path / "my club"
    founded(folder)
    made = run_here("invite", "--state", str(folder))
    assert made.returncode == 0
    assert made.stdout.startswith("invite: talkoot2")
    assert "for a trainer" in made.stderr
    (shown,) = re.findall("`talkoot (.*?)` revokes it", " ".join(made.stderr.split()))
    assert "is revoked" in run_here(*shlex.split(shown)).stdout


def test_a_folder_that_is_used_by_default_is_left_out_of_commands(tmp_path: Path) -> None:
    founded(tmp_path)
    made = run_here("invite", TALKOOT_NODE_STATE=str(tmp_path))
    assert "--revoke" in made.stderr
    assert "--state" not in made.stderr


def test_an_invite_names_other_nodes_that_answer(tmp_path: Path) -> None:
    plain = founded(tmp_path, host="127.0.0.1")
    assert "It names only your own node" in run_here("invite", "--state", str(tmp_path)).stderr
    others = [Identity.load_or_create(tmp_path / f"{number}.key").peer_id for number in range(2)]
    store = PeerStore(tmp_path / "peers" / f"{plain.keys.swarm_id}.json")
    with socket.create_server(("127.0.0.1", 0)) as server:
        live, gone = (Endpoint.of("127.0.0.1", port) for port in (server.getsockname()[1], 9))
        store.add([Multiaddress.of(live, others[0]), Multiaddress.of(gone, others[1])], time.time())
        store.save()
        made = run_here("invite", "--state", str(tmp_path))
    assert "names only" not in made.stderr
    assert Invite.parse(made.stdout).bootstrap == (*plain.bootstrap, Multiaddress.of(live, others[0]))


def test_an_invite_names_no_peers_that_only_the_founders_machine_reaches(tmp_path: Path) -> None:
    plain = founded(tmp_path)
    store = PeerStore(tmp_path / "peers" / f"{plain.keys.swarm_id}.json")
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = Endpoint.of("127.0.0.1", server.getsockname()[1])
        other = Identity.load_or_create(tmp_path / "other.key").peer_id
        store.add([Multiaddress.of(here, other)], time.time())
        store.save()
        made = run_here("invite", "--state", str(tmp_path))
    assert Invite.parse(made.stdout).bootstrap == plain.bootstrap


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--role", "king"), "pass one of node, trainer, reader"),
        (("--expires", "soon"), "--expires soon"),
        (("--expires", "99999d"), "at most 3650d"),
        (("--name", "a" * 65), "at most 64"),
        (("--revoke", "00000000"), "no invite 00000000"),
    ],
)
def test_what_can_not_be_is_told(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    founded(tmp_path)
    ended = run_here("invite", *arguments, "--state", str(tmp_path))
    assert ended.returncode == 2
    assert said in ended.stderr
    if "--revoke" in arguments:
        assert f"`talkoot invite --list --state {tmp_path}` shows" in ended.stderr


@pytest.mark.parametrize(
    "others", [("--list",), ("--role", "reader"), ("--expires", "1h"), ("--name", "Bob")]
)
def test_no_option_is_ignored_beside_one_that_revokes(tmp_path: Path, others: tuple[str, ...]) -> None:
    founded(tmp_path)
    state = ("--state", str(tmp_path))
    serial = json.loads(run_here("invite", "--name", "Ada", "--json", *state).stdout)["serial"]
    ended = run_here("invite", "--revoke", serial, *others, *state)
    assert ended.returncode == 2
    assert "can't be given together" in ended.stderr


def test_only_the_founder_of_a_swarm_that_admits_by_token_invites(tmp_path: Path) -> None:
    nobodys, open_one, anothers = (tmp_path / name for name in ("nobodys", "open", "anothers"))
    for folder in (nobodys, open_one, anothers):
        folder.mkdir()
    founded(open_one, "open")
    founded(anothers, author=Identity.load_or_create(tmp_path / "other.key"))
    for folder, said in (
        (nobodys, "wait until it prints its invite"),
        (open_one, f"'sauna', which you founded with the state folder {open_one}, is open"),
        (anothers, "does not have the key"),
    ):
        ended = run_here("invite", "--role", "node", "--state", str(folder))
        assert ended.returncode == 2
        assert said in ended.stderr


def test_a_state_folder_that_can_not_be_read_is_told_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "identity"
    file.touch()
    ended = run_here("invite", "--state", str(file))
    assert_one_clear_line(ended)
    assert f"--state {file} is not a folder: pass the --state" in ended.stderr
    ended = run_here("invite", "--list", "--state", str(file))
    assert_one_clear_line(ended)
    assert "the list of your invites: Not a directory" in ended.stderr
    (tmp_path / "swarm.json").write_text("{")
    assert "is broken: restart your node" in run_here("invite", "--state", str(tmp_path)).stderr
    (tmp_path / "invites.json").write_text("{")
    assert (
        "is broken: restore it from a copy" in run_here("invite", "--list", "--state", str(tmp_path)).stderr
    )


def test_the_invite_of_an_open_swarm_is_printed_again(tmp_path: Path) -> None:
    plain = founded(tmp_path, "open")
    printed = run_here("invite", "--state", str(tmp_path))
    assert printed.stdout == f"invite: {plain}\n"
    assert "anybody who has this line can take part" in " ".join(printed.stderr.split())
    assert "It names only your own node" in printed.stderr
    assert json.loads(run_here("invite", "--json", "--state", str(tmp_path)).stdout)["invite"] == str(plain)


def test_an_invite_is_revoked_by_the_name_of_its_person(tmp_path: Path) -> None:
    founded(tmp_path)
    state = ("--state", str(tmp_path))
    made = [
        json.loads(run_here("invite", "--name", name, "--json", *state).stdout)["serial"]
        for name in ("Ada", "Bob", "Bob")
    ]
    assert f"{made[0]}, for Ada, is revoked" in run_here("invite", "--revoke", "Ada", *state).stdout
    again = run_here("invite", "--revoke", "Ada", *state).stderr
    assert f"no invite for Ada is valid: {made[0]} is already revoked" in again
    assert "no invite Eve in" in run_here("invite", "--revoke", "Eve", *state).stderr
    both = run_here("invite", "--revoke", "Bob", *state).stderr
    assert f"2 invites for Bob are valid: pass the serial of one, {made[1]}, {made[2]}" in " ".join(
        both.split()
    )
    assert f"{made[2]}, for Bob, is revoked" in run_here("invite", "--revoke", made[2], *state).stdout
    repeated = run_here("invite", "--revoke", made[2], *state)
    assert (repeated.returncode, f"{made[2]}, for Bob, was already revoked" in repeated.stdout) == (0, True)
    assert f"{made[1]}, for Bob, is revoked" in run_here("invite", "--revoke", "Bob", *state).stdout


def test_the_end_of_an_invite_has_a_time_zone(tmp_path: Path) -> None:
    founded(tmp_path)
    made = run_here("invite", "--state", str(tmp_path), TZ="UTC")
    assert re.search(r"until \d{4}-\d\d-\d\d \d\d:\d\d UTC\.", " ".join(made.stderr.split()))


@pytest.mark.parametrize("command", ["node", "train", "status", "dashboard"])
def test_every_command_reads_an_invite_from_a_file(tmp_path: Path, command: str) -> None:
    missing = run_here(command, "--join", f"@{tmp_path / 'missing'}")
    assert missing.returncode == 2
    assert "can't read the invite" in missing.stderr
    (tmp_path / "cut").write_text("talkoot2abc\n")
    cut = run_here(command, "--join", f"@{tmp_path / 'cut'}")
    assert cut.returncode == 2
    assert "incomplete or mistyped" in cut.stderr
