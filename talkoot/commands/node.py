"""The command `node`: what volunteers run."""

from pathlib import Path
from typing import Annotated

import typer

from peer.errors import SettingsError
from talkoot.commands.options import (
    Config,
    Deny,
    Format,
    Join,
    MetricsHost,
    MetricsPort,
    Name,
    State,
    command,
    given_settings,
)
from talkoot.console import LogFormat

NOT_FIT_STATUS = 1
NOT_SETTINGS = (
    *("new", "join", "bootstrap", "config", "invite_file"),
    *("check", "cached", "as_json", "log_format"),
)
"""Options of the command itself; all others are fields of the role's settings."""


def node(
    *,
    new: Annotated[
        Path | None, typer.Option(metavar="SWARM.TOML", help="Found a swarm with this manifest.")
    ] = None,
    join: Join = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts to host.  [default: a quarter of the free memory]")
    ] = None,
    spare: Annotated[
        int | None,
        typer.Option(help="Experts to adopt beyond those when their host has gone.  [default: half as many]"),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="A", help="IP address to listen on and announce.  [default: this machine's first]"
        ),
    ] = None,
    dht_port: Annotated[
        int | None,
        typer.Option(help="TCP port of the DHT.  [default: that of the last start, or any free one]"),
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="TCP port of the expert service.  [default: any free one]")
    ] = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = None,
    name: Name = None,
    state: State = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="auto, cpu, cuda, cuda:1, mps, or several with commas.  [default: auto, all CUDA GPUs, else MPS, "
            "else the CPU]",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="fp32, tf32, bf16 or auto.  [default: auto, bf16 on CUDA GPUs that have it, else fp32]",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Torch threads, at most one for each core.  [default: one for each core]"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most that experts, kept forward passes and waiting rows take, such as 2GB or 512MiB.  "
            "[default: no bound]",
        ),
    ] = None,
    upload_mbit: Annotated[
        float | None, typer.Option(help="Most that answers take, in Mbit/s.  [default: no bound]")
    ] = None,
    download_mbit: Annotated[
        float | None, typer.Option(help="Most that calls take, in Mbit/s.  [default: no bound]")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="HOURS",
            help="When to work, in local time, such as 22:00-07:00 or "
            "'mon-fri 22:00-07:00,sat-sun 00:00-24:00'.  [default: always]",
        ),
    ] = None,
    only_when_idle: Annotated[
        bool | None,
        typer.Option(
            "--only-when-idle/--even-when-busy",
            help="Pause while other programs need the processor.  [default: no]",
        ),
    ] = None,
    not_on_battery: Annotated[
        bool | None,
        typer.Option(
            "--not-on-battery/--on-battery", help="Pause while the machine is on battery.  [default: no]"
        ),
    ] = None,
    niceness: Annotated[
        int | None,
        typer.Option(help="Priority: 0 as other programs, 19 after all of them.  [default: 10]"),
    ] = None,
    announce_every_s: Annotated[
        float | None, typer.Option(help="Seconds between announcements.  [default: 10]")
    ] = None,
    drain_timeout_s: Annotated[
        float | None,
        typer.Option(
            "--drain-timeout-s",
            "--drain-timeout",
            help="Longest that it waits, when it leaves, for others to take its experts over, in seconds.  "
            "[default: 30]",
        ),
    ] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MULTIADDR", help="Another peer to join the DHT by. May be given several times."
        ),
    ] = None,
    deny: Deny = None,
    config: Config = None,
    invite_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write this node's invite there.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check whether this machine can serve: exit status 0 or 1.")
    ] = False,
    cached: Annotated[
        bool, typer.Option("--cached", help="With --check: print what the last check found.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print one JSON object.")] = False,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Host experts, in a new swarm or in one that you were invited to."""
    flags = given_settings(locals(), NOT_SETTINGS)
    with command(LogFormat.JSON if as_json else log_format) as (terminal, _):
        from talkoot.node.run import Origin, run_node

        origin = Origin(new, join, tuple(bootstrap or ()))
        if check:
            from talkoot.check.run import run_check

            if not run_check(terminal, origin, config, flags, cached=cached):
                raise typer.Exit(NOT_FIT_STATUS)
            return
        if cached or as_json:
            raise SettingsError("--cached and --json are for --check")
        run_node(terminal, origin, config, flags, invite_file)
