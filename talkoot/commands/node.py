"""The command `node`: what volunteers run."""

from pathlib import Path
from typing import Annotated

import typer

from peer.errors import SettingsError
from talkoot.options import Config, Deny, Format, Join, MetricsHost, NodeCommand, State, command, given_settings
from talkoot.terminal import LogFormat
from talkoot.lasting import lasting_imports

NOT_FIT_STATUS = 1


def node(
    *,
    new: Annotated[
        Path | None, typer.Option(metavar="SWARM.TOML", help="Found a swarm with this manifest.")
    ] = None,
    join: Join = None,
    experts: int | None = None,
    spare: int | None = None,
    host: Annotated[str | None, typer.Option(metavar="A")] = None,
    dht_port: int | None = None,
    grpc_port: int | None = None,
    metrics_port: int | None = None,
    metrics_host: MetricsHost = None,
    name: str | None = None,
    state: State = None,
    device: Annotated[str | None, typer.Option(metavar="D")] = None,
    precision: str | None = None,
    threads: int | None = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE")] = None,
    upload_mbit: float | None = None,
    download_mbit: float | None = None,
    schedule: Annotated[str | None, typer.Option(metavar="HOURS")] = None,
    only_when_idle: Annotated[bool | None, typer.Option("--only-when-idle/--even-when-busy")] = None,
    not_on_battery: Annotated[bool | None, typer.Option("--not-on-battery/--on-battery")] = None,
    niceness: int | None = None,
    announce_every_s: float | None = None,
    drain_timeout_s: Annotated[float | None, typer.Option("--drain-timeout-s", "--drain-timeout")] = None,
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
    flags = given_settings(locals(), NodeCommand.role())
    with command(LogFormat.JSON if as_json else log_format) as (terminal, _):
        with lasting_imports():
            from talkoot.node.launch import Origin, run_node

        origin = Origin(new, join, tuple(bootstrap or ()))
        if check:
            from talkoot.doctor.examination import run_check

            if not run_check(terminal, origin, config, flags, cached=cached):
                raise typer.Exit(NOT_FIT_STATUS)
            return
        if cached or as_json:
            raise SettingsError("--cached and --json are for --check")
        run_node(terminal, origin, config, flags, invite_file)
