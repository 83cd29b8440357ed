"""An internet of network namespaces: public hosts, and hosts each behind its own router that drops incoming
connections.

Public hosts have addresses that look public, since libp2p never relays through private ones. Nothing leaves the
namespaces. They are removed when the block ends. What a killed process left behind is removed at the next start: the
names contain the process id of their maker.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.scratch import scratch_folder

_MARK = "talkoot"
_NAME = re.compile(rf"{_MARK}(\d+)-")
_FIREWALL = """
table ip nat {
    chain postrouting {
        type nat hook postrouting priority 100
        oifname "wan" masquerade
    }
}
table ip filter {
    chain input {
        type filter hook input priority 0; policy drop
        ct state established,related accept
        iifname { "lan", "lo" } accept
    }
    chain forward {
        type filter hook forward priority 0; policy drop
        ct state established,related accept
        ct status dnat accept
        iifname "lan" accept
    }
}
"""
_UPNP_CHAINS = """
table inet upnp {
    chain forward { }
    chain prerouting {
        type nat hook prerouting priority -100
        jump forwarded
    }
    chain forwarded { }
    chain postrouting { }
}
"""
_UPNP_SETTINGS = """
ext_ifname=wan
listening_ip=lan
enable_upnp=yes
enable_natpmp=no
secure_mode=yes
upnp_table_name=upnp
upnp_nat_table_name=upnp
upnp_forward_chain=forward
upnp_nat_chain=forwarded
upnp_nat_postrouting_chain=postrouting
uuid=f1c5129f-ce8a-4f6b-81d6-8a59a23d3cfd
allow 1024-65535 192.168.0.0/16 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
"""Settings for miniupnpd, which many home routers run."""


@dataclass(frozen=True)
class Machine:
    """A host in a namespace of its own."""

    namespace: str
    address: str
    router: str = ""
    """The namespace of the router that the host is behind; empty: it is behind none."""

    @property
    def is_behind_router(self) -> bool:
        return bool(self.router)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs these arguments on this machine."""
        return [shutil.which("ip") or "ip", "netns", "exec", self.namespace, *arguments]


class Internet:
    """Machines that reach each other as far as their routers allow. Created by `internet`."""

    def __init__(self, rate_mbit: float | None = None) -> None:
        """`rate_mbit`: the rate of each machine's link to all others, in each direction; None: unlimited."""
        self._rate_mbit = rate_mbit
        self._prefix = f"{_MARK}{os.getpid()}-"
        self._count = 0
        self._backbone = self._add("net")
        _ip("-n", self._backbone, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._backbone, "link", "set", "bridge", "up")

    def public(self) -> Machine:
        """Adds a machine that all others reach."""
        self._count += 1
        return Machine(
            self._attached(f"public{self._count}", f"44.1.1.{self._count}"), f"44.1.1.{self._count}"
        )

    def home(self) -> Machine:
        """Adds a machine behind a router that translates its address, and admits nobody whom the machine has not called
        first.
        """
        self._count += 1
        number = self._count
        router = self._attached(f"router{number}", f"44.1.2.{number}")
        home = self._add(f"home{number}")
        _ip("-n", router, "link", "add", "lan", "type", "veth", "peer", "name", "lan", "netns", home)
        for namespace, host in ((router, 1), (home, 2)):
            _ip("-n", namespace, "address", "add", f"192.168.{number}.{host}/24", "dev", "lan")
            _ip("-n", namespace, "link", "set", "lan", "up")
        _ip("-n", home, "route", "add", "default", "via", f"192.168.{number}.1")
        _run("ip", "netns", "exec", router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        _run("ip", "netns", "exec", router, "nft", "-f", "-", stdin=_FIREWALL)
        return Machine(home, f"192.168.{number}.2", router)

    @contextlib.contextmanager
    def upnp(self, home: Machine) -> Iterator[None]:
        """Until the block ends, this home's router forwards ports on request, by UPnP."""
        run_there = ("ip", "netns", "exec", home.router)
        _run(*run_there, "nft", "-f", "-", stdin=_UPNP_CHAINS)
        with scratch_folder() as folder:
            settings = folder / "miniupnpd.conf"
            settings.write_text(_UPNP_SETTINGS)
            options = ("-d", "-f", str(settings), "-P", f"{folder}/pid")
            daemon = subprocess.Popen(
                [*run_there, "miniupnpd", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                yield
            finally:
                daemon.kill()
                daemon.wait()
                _run(*run_there, "nft", "delete", "table", "inet", "upnp")

    def redirect(self, machine: Machine, ports: Mapping[int, int]) -> None:
        """Redirects connections to some ports of a public machine to other ports there. `ports`: the target for each
        port.
        """
        rules = "".join(f'iifname "wan" tcp dport {port} redirect to :{to}\n' for port, to in ports.items())
        chain = f"chain prerouting {{\ntype nat hook prerouting priority -100\n{rules}}}\n"
        _run(
            "ip", "netns", "exec", machine.namespace, "nft", "-f", "-", stdin=f"table ip nat {{\n{chain}}}\n"
        )

    def forwarded(self, home: Machine) -> str:
        """The ports that the router forwards by UPnP, as listed by nft."""
        return _run("ip", "netns", "exec", home.router, "nft", "list", "chain", "inet", "upnp", "forwarded")

    def close(self) -> None:
        _remove(self._prefix)

    def _attached(self, name: str, address: str) -> str:
        namespace = self._add(name)
        port = f"port{self._count}"
        _ip(
            "-n",
            self._backbone,
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            "wan",
            "netns",
            namespace,
        )
        _ip("-n", self._backbone, "link", "set", port, "master", "bridge", "up")
        _ip("-n", namespace, "address", "add", f"{address}/16", "dev", "wan")
        _ip("-n", namespace, "link", "set", "wan", "up")
        if self._rate_mbit is not None:
            for end, device in ((namespace, "wan"), (self._backbone, port)):
                _slow(end, device, self._rate_mbit)
        return namespace

    def _add(self, name: str) -> str:
        namespace = self._prefix + name
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        return namespace


@contextlib.contextmanager
def internet(rate_mbit: float | None = None) -> Iterator[Internet]:
    """Creates an internet that lasts until the block ends. `rate_mbit`: see `Internet`."""
    sweep()
    made = Internet(rate_mbit)
    try:
        yield made
    finally:
        made.close()


def why_not() -> str:
    """Why this machine cannot create such an internet. Empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "nft", "sysctl") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} missing: install iproute2, nftables and procps"
    try:
        with internet() as made:
            made.home()
    except subprocess.CalledProcessError as error:
        return f"no network namespaces or NAT here: {error.stderr.strip()}"
    return ""


def sweep() -> None:
    """Removes what processes that no longer exist have left behind."""
    for name in _namespaces():
        if (maker := _NAME.match(name)) and not os.path.exists(f"/proc/{maker[1]}"):
            _remove(maker[0])


def _slow(namespace: str, device: str, rate_mbit: float) -> None:
    """Limits what leaves through this device to the rate. At most a twentieth of a second of it may wait."""
    _run(
        "tc", "-n", namespace, "qdisc", "add", "dev", device, "root",
        "tbf", "rate", f"{rate_mbit:g}mbit", "burst", "128kb", "latency", "50ms",
    )  # fmt: skip


def _remove(prefix: str) -> None:
    for namespace in _namespaces():
        if namespace.startswith(prefix):
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in _run("ip", "netns", "pids", namespace).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                _ip("netns", "delete", namespace)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout
