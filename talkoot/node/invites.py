"""A founder's invites: `talkoot invite` makes, lists and revokes them, and a founder's node says who can use the invite
that it prints.

The command needs the founder's key, but no running node.
"""

import asyncio
import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from dht.admission import Mode, Role, make_token, new_serial
from dht.invites import Invite, InviteLedger, IssuedInvite
from dht.swarm import OTHERS_IN_INVITE, known_peers
from peer.errors import SettingsError, StartError, UserError
from peer.files import write_atomically
from peer.host import DIAL_DEADLINE_S
from peer.identity import Identity
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import accepts
from talkoot.node.control import node_folder, state_option
from talkoot.node.remote import parse_duration_s
from talkoot.terminal import Terminal

FILE = "swarm.json"
_ONLY_OWN = (
    "It names only your own node, because no other node that yours has met answers now. So it works only while your "
    "node runs"
)
_LONGEST_NAME = 64
_LONGEST_S = 10 * 365 * 86400.0


class FoundedSwarm(BaseModel):
    """The file that a founder's node leaves in its state folder for `talkoot invite`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    invite: str
    """The invite that the node prints, without a token."""
    admission: Mode

    def save(self, folder: Path) -> None:
        """Raises StartError."""
        try:
            write_atomically(folder / FILE, self.model_dump_json().encode(), mode=0o600)
        except OSError as error:
            raise StartError(f"can't write {folder / FILE}: {error.strerror}") from error

    @classmethod
    def load(cls, folder: Path) -> "FoundedSwarm":
        """Raises SettingsError."""
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except FileNotFoundError:
            raise SettingsError(
                f"no swarm was founded with the state folder {folder}: pass the --state of the node that you started "
                "with --new. If it is still starting, wait until it prints its invite"
            ) from None
        except NotADirectoryError:
            raise SettingsError(
                f"--state {folder} is not a folder: pass the --state of the node that you started with --new"
            ) from None
        except OSError as error:
            raise SettingsError(
                f"can't read {folder / FILE}: {error.strerror}; run this as the user who runs the node"
            ) from error
        except ValidationError as error:
            raise SettingsError(f"{folder / FILE} is broken: restart your node, which writes it") from error


def require_no_other_swarm(folder: Path, name: str) -> None:
    """Raises SettingsError if a swarm of another name was founded with the folder. `talkoot invite` knows only one."""
    try:
        founded = Invite.parse(FoundedSwarm.load(folder).invite).keys.name
    except UserError:  # there is none, or the node writes the file again
        return
    if founded != name:
        raise SettingsError(
            f"you founded the swarm {founded!r} with the state folder {folder}: pass another --state to found {name!r}"
        )


@dataclass(frozen=True)
class InviteRequest:
    """What kind of invite to make."""

    role: Role
    lasts_s: float
    name: str

    @classmethod
    def parse(cls, role: str | None, expires: str | None, name: str | None) -> "InviteRequest":
        """Raises SettingsError."""
        roles = {each.word: each for each in Role}
        word = role or Role.TRAINER.word
        if word not in roles:
            raise SettingsError(f"--role {word}: pass one of {', '.join(roles)}")
        if name is not None and (len(name) > _LONGEST_NAME or not name.isprintable()):
            raise SettingsError(f"--name: at most {_LONGEST_NAME} printable characters")
        return cls(roles[word], parse_duration_s(expires or "30d", "--expires", _LONGEST_S), name or "")


def run_invite(terminal: Terminal, state: Path | None, request: InviteRequest) -> None:
    """Prints a new invite, or that of an open swarm. Raises UserError if the folder is not the founder's."""
    folder = node_folder(state)
    founded = FoundedSwarm.load(folder)
    plain = Invite.parse(founded.invite)
    if founded.admission == "open":
        _print_open_invite(terminal, folder, plain, request)
        return
    founder = Identity.load_or_create(folder / "identity.key")
    if founder.peer_id != plain.keys.author:
        raise SettingsError(
            f"{folder} does not have the key of the swarm's founder, so it can't make invites"
        )
    now = time.time()
    issued = IssuedInvite(
        serial=new_serial(),
        role=request.role,
        name=request.name,
        made_at=now,
        expires_at=now + request.lasts_s,
    )
    token = make_token(founder, plain.keys.swarm_id, request.role, issued.expires_at, issued.serial)
    InviteLedger(folder).add(issued)
    current, others = _with_live_peers(plain, folder)
    invite = str(replace(current, token=token.SerializeToString()))
    if terminal.json:
        terminal.event("invite", {"invite": invite, **_values(issued)})
        return
    terminal.line(f"invite: {invite}")
    terminal.err.print(
        f"serial {issued.number}: for a {request.role.word}, until {_day(issued.expires_at)}. Anybody who has this "
        f"line can use it: send it to one person, not to a list. `talkoot invite --revoke "
        f"{issued.number}{state_option(folder)}` revokes it"
    )
    if not others:
        terminal.err.print(_ONLY_OWN)


def _print_open_invite(terminal: Terminal, folder: Path, plain: Invite, request: InviteRequest) -> None:
    """Raises SettingsError if another invite is asked for than the one that everybody uses."""
    if request != InviteRequest.parse(None, None, None):
        raise SettingsError(
            f"the swarm {plain.keys.name!r}, which you founded with the state folder {folder}, is open: it has one "
            "invite for everybody, which `talkoot invite` without options prints. Only a swarm whose manifest has "
            'mode = "token" under [admission] has invites for one person'
        )
    current, others = _with_live_peers(plain, folder)
    if terminal.json:
        terminal.event("invite", {"invite": str(current)})
        return
    terminal.line(f"invite: {current}")
    terminal.err.print(
        "The swarm is open: anybody who has this line can take part, for as long as the swarm exists"
    )
    if not others:
        terminal.err.print(_ONLY_OWN)


def _with_live_peers(plain: Invite, folder: Path) -> tuple[Invite, bool]:
    """The founder's invite with other nodes that answer now, and whether there are any."""
    own = tuple(address for address in plain.bootstrap if address.peer_id == plain.keys.author)
    others = tuple(_live(known_peers(plain, folder))[:OTHERS_IN_INVITE])
    return replace(plain, bootstrap=(*own, *others) or plain.bootstrap), bool(others)


def _live(addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
    """Those where something accepts connections now."""

    async def ask() -> list[bool]:
        return await asyncio.gather(*(accepts(each.endpoint, DIAL_DEADLINE_S) for each in addresses))

    return list(compress(addresses, asyncio.run(ask())))


def run_list(terminal: Terminal, state: Path | None) -> None:
    """Raises UserError."""
    issued = InviteLedger(node_folder(state)).read()
    if terminal.json:
        terminal.event("invites", {"invites": [_values(each) for each in issued]})
    elif issued:
        terminal.out.print(_table(issued, time.time()))
    else:
        terminal.line(f"no invites were made with the state folder {node_folder(state)}")


def run_revoke(terminal: Terminal, state: Path | None, which: str) -> None:
    """`which`: the serial of an invite, or the name of its person. Raises UserError."""
    ledger = InviteLedger(node_folder(state))
    before = ledger.read()
    revoked = ledger.revoke(which, time.time())
    if terminal.json:
        terminal.event("revoked", _values(revoked))
        return
    person = f", for {revoked.name}," if revoked.name else ""
    done = "was already revoked" if revoked in before else "is revoked"
    terminal.line(
        f"{revoked.number}{person} {done}. Your node tells the others at once while it runs, or when you start it: "
        "that takes some seconds in a small swarm, and some minutes in a large one"
    )


def _values(issued: IssuedInvite) -> dict[str, object]:
    return issued.model_dump(mode="json", exclude={"serial", "role"}) | {
        "serial": issued.number,
        "role": issued.role.word,
    }


def _table(issued: Sequence[IssuedInvite], now: float) -> Table:
    table = Table(title="invites")
    for column in ("serial", "role", "name", "made", "until", "state"):
        table.add_column(column, overflow="fold")
    for each in issued:
        state = "revoked" if each.revoked else "expired" if each.expires_at <= now else "valid"
        made, until = _day(each.made_at), _day(each.expires_at)
        table.add_row(each.number, each.role.word, each.name or "-", made, until, state)
    return table


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at))


def invite_advice(bootstrap: Sequence[Multiaddress], host: str, port: int, *, chosen: bool = True) -> str:
    """What a founder should do so that people elsewhere can join by these multiaddresses; empty if they already can.

    It is also empty if the founder chose loopback. `host`: the address that the founder listens on; unless `chosen`,
    the machine's first one. The port is 0 if it changes with each run. Pure.
    """
    hosts = [address.endpoint.host for address in bootstrap]
    if not all(map(_is_private, hosts)):
        return ""
    if ipaddress.ip_address(host).is_loopback:
        return (
            ""
            if chosen
            else "nobody else can join by this invite: this machine has no network. Start again when it has one"
        )
    named = (
        f"it has only private addresses ({', '.join(dict.fromkeys(hosts))})" if hosts else "it has no address"
    )
    named_port = f"TCP port {port}" if port else "that TCP port"
    fix = "" if port else "pass --port, "
    return (
        f"nobody outside this network can join by this invite: {named}. Make this machine reachable and start again "
        f"({fix}forward {named_port} on your router to {host}, and set announce_host to the router's public address). "
        "Or start the swarm on a machine with a public address, and join it from here"
    )


def _is_private(host: str) -> bool:
    """A host name counts as public: somebody who passes one has a reason."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False
