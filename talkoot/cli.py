"""The command `talkoot`. What is slow to import is imported inside the commands, so that --help is instant."""

from pathlib import Path
from typing import Annotated

import typer

from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.errors import SettingsError
from talkoot import invite, steer, use
from talkoot.console import LogFormat
from talkoot.options import (
    Config,
    Deny,
    Format,
    Join,
    MetricsHost,
    Name,
    State,
    TextField,
    Threads,
    WaitForExperts,
    command,
)

NOT_FIT_STATUS = 1

WELCOME = """\
Neighbours train a large neural network together. There are three things you can do:

  talkoot node --join INVITE        run a node, which hosts experts on this machine
  talkoot train --join INVITE       train a model on the experts of a swarm
  talkoot dashboard --join INVITE   watch a swarm on a web page

An invite is one line that somebody gives you. Without one:

  talkoot demo                      see a whole swarm work on this machine
  talkoot doctor                    check whether this machine can take part
  talkoot node --new SWARM.TOML     found a swarm

`talkoot --help` lists all commands."""

app = typer.Typer(
    help="Volunteers host experts; trainers train a language model on them.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console entry."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}")
        raise typer.Exit


@app.callback()
def _talkoot(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print software and protocol version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(WELCOME)


@app.command()
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
        int | None, typer.Option(help="TCP port of the DHT.  [default: any free one]")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="TCP port of the expert service.  [default: any free one]")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="TCP port of /metrics.  [default: any free one]")
    ] = None,
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
    flags = {
        "experts": experts,
        "spare": spare,
        "host": host,
        "dht_port": dht_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
        "name": name,
        "state": state,
        "device": device,
        "precision": precision,
        "threads": threads,
        "memory": memory,
        "upload_mbit": upload_mbit,
        "download_mbit": download_mbit,
        "schedule": schedule,
        "only_when_idle": only_when_idle,
        "not_on_battery": not_on_battery,
        "niceness": niceness,
        "announce_every_s": announce_every_s,
        "drain_timeout_s": drain_timeout_s,
        "deny": deny or None,
    }
    with command(LogFormat.JSON if as_json else log_format) as (terminal, _):
        from talkoot.node_command import Origin, run_node

        origin = Origin(new, join, tuple(bootstrap or ()))
        if check:
            from talkoot.check_command import run_check

            if not run_check(terminal, origin, config, flags, cached=cached):
                raise typer.Exit(NOT_FIT_STATUS)
            return
        if cached or as_json:
            raise SettingsError("--cached and --json are for --check")
        run_node(terminal, origin, config, flags, invite_file)


@app.command()
def train(
    *,
    join: Join = None,
    local: Annotated[
        Path | None,
        typer.Option(
            metavar="SWARM.TOML", help="Train this manifest's model in this process alone, without a swarm."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="A text, .jsonl or .parquet file, a folder of them, or a glob in quotes. May be given several times.  "
            "[default: Python's own help]",
        ),
    ] = None,
    field: TextField = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="bytes; bpe, byte pairs learned from the text; or a tokenizer.json.  [default: bytes]",
        ),
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens that bpe learns.  [default: 4096]")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps, those before a resume too.  [default: 200]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch.  [default: 8]")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches in a step.  [default: 1]")] = None,
    in_flight: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Steps under way at once, or as many as hide the latency of experts.  [default: 1]",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest step size of the dense part.  [default: 0.002]")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of the dense part's matrices.  [default: 0.01]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="P", help="Of the dense part's activations: fp32 or bf16.  [default: fp32]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="From which batches, noise and dropout are drawn.  [default: this trainer's own]"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Router, gate and step size that learned best with this kind of experts: transformer or ffn.",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How tokens find experts: product-key, noisy-top-k, switch, base or glam."
            "  [default: product-key]",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts for each token.  [default: the router's own number]")
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations.  [default: only before and after]")
    ] = None,
    call_deadline_s: Annotated[
        float | None, typer.Option(help="Longest that a call to experts may take.  [default: 10]")
    ] = None,
    grace_s: Annotated[
        float | None, typer.Option(help="Wait for late answers once there are enough.  [default: 0.5]")
    ] = None,
    k_min: Annotated[
        int | None, typer.Option(help="Answers that a token needs before others may be late.  [default: 2]")
    ] = None,
    wait_for_experts_s: WaitForExperts = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of checkpoints.  [default: one for each run, in the state folder]"
        ),
    ] = None,
    average_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between averages with another trainer's dense part; 0: never.  [default: 20]"
        ),
    ] = None,
    average_host: Annotated[
        str | None,
        typer.Option(metavar="A", help="Where other trainers reach this one.  [default: first interface]"),
    ] = None,
    average_port: Annotated[
        int | None, typer.Option(help="TCP port for them.  [default: any free one]")
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            metavar="swarm|fresh",
            help="Begin a new run with the freshest dense part in the swarm, or anew.  [default: swarm]",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0: only at the end.  [default: 100]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint, with its settings and data where no others are given.",
        ),
    ] = False,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a JSON line for each step.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write there what TensorBoard shows.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the loss there at the end, as PNG.")
    ] = None,
    threads: Threads = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="TCP port of /metrics.  [default: any free one]")
    ] = None,
    metrics_host: MetricsHost = None,
    name: Name = None,
    state: State = None,
    deny: Deny = None,
    config: Config = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the summary there, as JSON.")
    ] = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Train a language model on the experts of a swarm."""
    flags = {
        "data": data or None,
        "field": field,
        "tokenizer": tokenizer,
        "vocabulary": vocabulary,
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "in_flight": in_flight,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "precision": precision,
        "seed": seed,
        "preset": preset,
        "router": router,
        "top_k": top_k,
        "validate_every": validate_every,
        "call_deadline_s": call_deadline_s,
        "grace_s": grace_s,
        "k_min": k_min,
        "wait_for_experts_s": wait_for_experts_s,
        "checkpoint": checkpoint,
        "checkpoint_every": checkpoint_every,
        "average_every": average_every,
        "average_host": average_host,
        "average_port": average_port,
        "start_from": start_from,
        "log": log,
        "tensorboard": tensorboard,
        "plot": plot,
        "threads": threads,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
        "name": name,
        "state": state,
        "deny": deny or None,
    }
    with command(log_format) as (terminal, signals):
        from talkoot.train_command import run_train

        run_train(terminal, signals, join, local, config, flags, resume=resume, json_file=json_file)


@app.command()
def status(
    *,
    join: Join = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
) -> None:
    """List the nodes, trainers and experts of a swarm."""
    with command(LogFormat.JSON if as_json else LogFormat.TEXT) as (terminal, _):
        from talkoot.status import run_status

        run_status(terminal, join, watch)


@app.command()
def dashboard(
    *,
    join: Join = None,
    host: Annotated[
        str | None, typer.Option(metavar="A", help="Address to listen on.  [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="TCP port of the page; 0: any free one.  [default: 8080]")
    ] = None,
    state: State = None,
    config: Config = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Show a swarm on a web page, and to Prometheus and other programs."""
    flags = {"host": host, "port": port, "state": state}
    with command(log_format) as (terminal, _):
        from talkoot.dashboard_command import run_dashboard

        run_dashboard(terminal, join, config, flags)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[NODE OPTIONS]",
)
def doctor(context: typer.Context) -> None:
    """Check this machine and say what to mend, as `node --check` does; with --join, against a swarm."""
    node = steer.node_command(context)
    with node.make_context("talkoot doctor", ["--check", *context.args]) as checking:
        node.invoke(checking)


@app.command()
def demo(
    *,
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Nodes to start.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 180,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill a node half-way.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was measured there, as JSON.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="A text file, or a folder of .txt files.  [default: Python's own help]"
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="LINK",
            help="Emulate this link before every node: rate, delay there and back, jitter, lost packets, such as "
            "100mbit,80ms or 20mbit,80ms,5ms,0.1%.  [default: none]",
        ),
    ] = None,
) -> None:
    """Start a swarm on this machine, train on it, kill a node, and watch it go on."""
    with command(LogFormat.TEXT) as (terminal, _):
        from talkoot.demo import DemoPlan, run_demo
        from talkoot.links import Link

        before = None if link is None else Link.parse(link)
        run_demo(terminal, DemoPlan(nodes, steps, kill, data, link=before), json_file)


use.add_to(app)
steer.add_to(app)
invite.add_to(app)


if __name__ == "__main__":
    main()
