"""The command `talkoot`: all commands, in the order in which `talkoot --help` lists them. `talkoot memory` has its own
in `talkoot.memory.commands`.

A command imports what it runs only when it runs, so that help and small commands start at once.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer
from typer.core import TyperGroup

from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.errors import SettingsError
from talkoot.memory.commands import memory_commands
from talkoot.options import (
    AsJson,
    AskCommand,
    Bootstrap,
    Config,
    DashboardCommand,
    DoctorCommand,
    EvaluateCommand,
    ExportCommand,
    Format,
    GenerateCommand,
    GroupedCommands,
    Join,
    NodeCommand,
    NodeState,
    PlainCommand,
    ServeCommand,
    TrainCommand,
    command,
    given_settings,
    join_options,
    load_settings,
    printing,
)
from talkoot.signals import exit_at_once_on_signals
from talkoot.terminal import LogFormat

WELCOME = """\
Neighbours train a large neural network together. There are three things you can do:

  talkoot node --join INVITE        run a node, which hosts experts on this machine
  talkoot train --join INVITE       train a model on the experts of a swarm
  talkoot dashboard --join INVITE   watch a swarm on a web page

Use what a swarm has learned:

  talkoot generate --join INVITE    continue a text with your trained model
  talkoot serve --join INVITE       serve the model to programs and to a page
  talkoot export --join INVITE      keep the model in a folder
  talkoot search --join INVITE "…"  find passages of text that nodes host
  talkoot ask --join INVITE "…"     let your model answer from these passages

An invite is one line that somebody gives you. Without one:

  talkoot demo                      see a whole swarm work on this machine
  talkoot doctor                    check whether this machine can take part
  talkoot node --new SWARM.TOML     start a new swarm

`talkoot --help` lists all commands."""

_FAILED = 1
_KEEPS_TO_THIS_MACHINE = (
    "Only programs on this machine can reach the server, unless you set --host. See docs/serve.md."
)
_ALL_SETTINGS = "Every other setting is an option too, such as {example}: docs/settings.md lists them."


class _Talkoot(GroupedCommands):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Take part": ("node", "train", "dashboard", "status"),
        "Try and check": ("demo", "doctor"),
        "Use what a swarm learned": (
            *("generate", "serve", "evaluate", "export", "import"),
            *("ask", "search", "memory"),
        ),
        "Your node and your swarm": ("pause", "resume", "stop", "logs", "service", "invite"),
        "This program": ("update", "uninstall"),
    }


app: typer.Typer = typer.Typer(
    cls=_Talkoot,
    help="Train one model on many home computers: volunteers host experts, and trainers train on them.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)
service: typer.Typer = typer.Typer(
    cls=GroupedCommands,
    help="Run a node as a service of this user, which the system starts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def main() -> None:
    """The console entry. Ends the process as soon as the command has ended.

    By then, the command has closed everything that it opened. Python's own shutdown takes more than a second once torch
    is imported, and gRPC's threads keep running during it.
    """
    exit_at_once_on_signals()  # until a command handles signals itself: options import the settings
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # its encoding may lack characters
    try:
        app()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a pipe without a reader
                stream.flush()
        os._exit(end.code or 0)


def _open_standard_streams() -> None:
    """Opens the null device in place of closed ones, which get its file descriptor: the lowest that is free. Otherwise,
    a socket would get it, and libuv ends the process when it is to close such a socket.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # open for as long as the process lives


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"talkoot {SOFTWARE_VERSION}, protocol version {PROTOCOL_VERSION}")
        raise typer.Exit


def _check_invite(join: str | None) -> None:
    """Refuses a wrong invite before torch is imported, which takes seconds. Raises InviteError."""
    if join is not None and not join.startswith("@"):
        from dht.invites import Invite

        Invite.read(join)


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
        with printing():
            typer.echo(WELCOME)


@app.command(cls=NodeCommand, epilog=_ALL_SETTINGS.format(example="--checkpoint-every-s 300"))
def node(
    context: typer.Context,
    *,
    new: Annotated[
        Path | None,
        typer.Option(metavar="SWARM.TOML", help="The manifest of a new swarm, instead of an invite."),
    ] = None,
    join: Join = None,
    bootstrap: Bootstrap = None,
    config: Config = None,
    invite_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write this node's invite to a file.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check this machine, as `talkoot doctor` does.")
    ] = False,
    cached: Annotated[bool, typer.Option("--cached", help="Print what the last check found.")] = False,
    as_json: AsJson = False,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Host experts, in a new swarm or one that you were invited to."""
    with command(log_format, as_json=as_json, is_service=not check) as (terminal, signals):
        with signals.importing():
            from expert_server.settings import NodeSettings

        settings = load_settings(context, NodeSettings)
        if new is None:
            _check_invite(join)
        with signals.importing():
            from talkoot.node.launch import Origin, run_node

        origin = Origin(new, join, tuple(bootstrap or ()))
        if check:
            with signals.importing():
                from talkoot.doctor.examination import run_check

            if not run_check(terminal, origin, settings, cached=cached):
                raise typer.Exit(_FAILED)
        elif cached or as_json:
            raise SettingsError("--cached and --json are for --check")
        else:
            run_node(terminal, origin, settings, invite_file)


@app.command(cls=TrainCommand, epilog=_ALL_SETTINGS.format(example="--grace-s 2"))
def train(
    context: typer.Context,
    *,
    join: Join = None,
    local: Annotated[
        Path | None,
        typer.Option(
            metavar="SWARM.TOML", help="Train the model of this manifest in this process, without a swarm."
        ),
    ] = None,
    config: Config = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the newest checkpoint, with its data and training settings.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the summary to a file, as JSON.")
    ] = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Train a language model on the experts of a swarm."""
    with command(log_format) as (terminal, signals):
        with signals.importing():
            from trainer_client.settings import TrainerSettings

        settings = load_settings(context, TrainerSettings)
        if local is None:
            _check_invite(join)
        with signals.importing():
            from talkoot.train.session import run_train

        joined = join_options(context)
        run_train(terminal, signals, join, local, settings, resume=resume, json_file=json_file, joined=joined)


@app.command(cls=PlainCommand)
def status(
    *,
    join: Join = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until Ctrl-C.")] = False,
    state: NodeState = None,
) -> None:
    """List the nodes, trainers and experts of a swarm; without --join, that of the node that runs here."""
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from talkoot.status import run_status

        run_status(terminal, join, watch, state)


@app.command(cls=DashboardCommand)
def dashboard(
    context: typer.Context, *, join: Join = None, config: Config = None, log_format: Format = LogFormat.TEXT
) -> None:
    """Show a swarm on a web page, and to other programs."""
    with command(log_format, is_service=True) as (terminal, signals):
        with signals.importing():
            from talkoot.dashboard.settings import DashboardSettings

        settings = load_settings(context, DashboardSettings)
        with signals.importing():
            from talkoot.dashboard.server import run_dashboard

        run_dashboard(terminal, join, settings)


app.command(
    "doctor",
    cls=DoctorCommand,
    help="Check this machine; with --join, also whether it can serve that swarm.",
    epilog="All options of `talkoot node` are accepted.",
)(node)


@app.command(cls=PlainCommand)
def demo(
    *,
    nodes: Annotated[int, typer.Option(min=1, max=16, metavar="N", help="Nodes to start.")] = 3,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Training steps.")] = 180,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill a node half-way.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results to a file, as JSON.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A file or folder of text, as for `talkoot train`.  [default: Python's own help]",
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="LINK",
            help="Emulate a network link to every node: rate, round-trip delay, jitter and packet loss, such as "
            "100mbit,80ms or 20mbit,80ms,5ms,0.1%.  [default: none]",
        ),
    ] = None,
    p2pd: Annotated[
        bool, typer.Option("--p2pd/--no-p2pd", help="Start a libp2p daemon with each peer.")
    ] = True,
) -> None:
    """Train on a swarm on this machine, and kill a node half-way."""
    with command() as (terminal, signals):
        with signals.importing():
            from talkoot.demo.links import Link
            from talkoot.demo.scenario import DemoPlan, run_demo

        before = None if link is None else Link.parse(link)
        run_demo(terminal, DemoPlan(nodes, steps, kill, data, link=before, p2pd=p2pd), json_file)


@app.command(cls=GenerateCommand)
def generate(
    context: typer.Context,
    *,
    join: Join = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="The text to continue; - reads it from standard input.")
    ] = "",
) -> None:
    """Continue a prompt with a trained model, or answer it if the model learned to answer questions."""
    with command() as (terminal, signals):
        with signals.importing():
            from trainer_client.settings import Sampling, TrainerSettings

        settings, sampling = load_settings(context, TrainerSettings), load_settings(context, Sampling)
        _check_invite(join)
        with signals.importing():
            from talkoot.train.generate import run_generate

        run_generate(terminal, signals, join, prompt, settings, sampling)


@app.command(cls=ServeCommand, epilog=_KEEPS_TO_THIS_MACHINE)
def serve(
    context: typer.Context,
    *,
    join: Join = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Serve a folder of `talkoot export` instead, without a swarm."),
    ] = None,
    config: Config = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Serve a trained model to OpenAI's clients, and on a web page."""
    with command(log_format, is_service=True) as (terminal, signals):
        with signals.importing():
            from talkoot.serve.settings import ServeSettings
            from trainer_client.settings import TrainerSettings

        settings = load_settings(context, ServeSettings)
        trainer = TrainerSettings.load(**given_settings(context, TrainerSettings))
        if model is None:
            _check_invite(join)
        with signals.importing():
            from talkoot.serve.server import run_serve

        run_serve(terminal, signals, join, model, trainer, settings)


@app.command(cls=EvaluateCommand)
def evaluate(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT", help="Files, folders or globs; each one is scored as a separate text."
        ),
    ],
    *,
    join: Join = None,
    as_json: AsJson = False,
) -> None:
    """Measure a trained model's loss and perplexity on texts, and compare them."""
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from trainer_client.settings import TrainerSettings

        settings = load_settings(context, TrainerSettings)
        _check_invite(join)
        with signals.importing():
            from talkoot.train.trained import run_evaluate

        run_evaluate(terminal, signals, join, paths, settings)


@app.command(cls=ExportCommand)
def export(
    context: typer.Context,
    *,
    join: Join = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="The folder to write, which must be new or empty."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Take the dense part from the newest run on this machine.  [default: from live trainers]",
        ),
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Mask experts that no live node hosts.")
    ] = False,
    keep: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="Keep this share of each layer's experts, but at least as many as a token is sent to.  [default: all]",
        ),
    ] = None,
    keep_by: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A file or folder of text; the experts that it uses most are kept."
        ),
    ] = None,
    data_note: Annotated[
        str, typer.Option(metavar="TEXT", help="What the model was trained on, for its model card.")
    ] = "",
    download_mbit: Annotated[
        float | None,
        typer.Option(
            min=0.01, metavar="MBIT/S", help="Limit for the experts' download.  [default: no limit]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the model that a swarm trains into a folder, for transformers and for Talkoot.

    If it is stopped, run the same command again to resume.
    """
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from trainer_client.settings import TrainerSettings

        settings = load_settings(context, TrainerSettings)
        if out is None:
            raise SettingsError("pass -o DIR, the folder to write")
        _check_invite(join)
        with signals.importing():
            from talkoot.model.export import ExportPlan, run_export

        plan = ExportPlan(out, resume, allow_missing, keep, keep_by, data_note, download_mbit)
        run_export(terminal, signals, join, settings, plan, join_options(context))


@app.command("import", cls=PlainCommand)
def import_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `talkoot export` wrote.")],
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="SWARM.TOML", help="The file to write, with the new swarm's manifest."
        ),
    ] = Path("swarm.toml"),
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the new swarm.  [default: the old one's]")
    ] = None,
    grid: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="N M",
            help="A larger grid, whose new experts are copies of the old ones.  [default: the model's]",
        ),
    ] = None,
    state: NodeState = None,
    trainer_state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The trainer's state folder, where the dense part goes.  "
            "[default: ~/.local/state/talkoot/trainer]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prepare a new swarm that starts from an exported model."""
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from talkoot.model.founding import ImportPlan, run_import

        run_import(terminal, ImportPlan(folder, out, name, state, trainer_state, grid))


@app.command(cls=PlainCommand)
def search(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for, in your own words.")],
    *,
    join: Join = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The memory to search.  [default: the only one of the swarm]"),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=64, metavar="N", help="Passages to show.")] = 5,
    cells: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Number of cells to search, those nearest to the question."),
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Find passages in a memory of a swarm."""
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from talkoot.memory.search import SearchRequest, run_search

        run_search(terminal, join, SearchRequest(question, memory, k, cells))


@app.command(cls=AskCommand)
def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
    *,
    join: Join = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Ask the model in a folder that `talkoot export` wrote, with the swarm's memory.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question from a memory, and name the passages behind the answer.

    Needs a model that learned to answer: talkoot train --objective rag-sequence --memory NAME --data QUESTIONS.jsonl
    """
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from trainer_client.settings import TrainerSettings

        settings = load_settings(context, TrainerSettings)
        _check_invite(join)
        with signals.importing():
            from talkoot.train.ask import run_ask

        run_ask(terminal, signals, join, question, settings, model)


@app.command(cls=PlainCommand)
def pause(
    *,
    duration: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="TIME", help="Resume automatically after this time, such as 30m, 2h or 1d."
        ),
    ] = None,
    state: NodeState = None,
) -> None:
    """Pause a running node until it is resumed or restarted."""
    with command() as (terminal, _):
        from talkoot.node.remote import run_pause

        run_pause(terminal, state, duration)


@app.command(cls=PlainCommand)
def resume(*, state: NodeState = None) -> None:
    """End a pause, so that the node hosts again."""
    with command() as (terminal, _):
        from talkoot.node.remote import run_resume

        run_resume(terminal, state)


@app.command(cls=PlainCommand)
def stop(
    *,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the node has left and its process has ended.")
    ] = True,
    state: NodeState = None,
) -> None:
    """Stop a running node after it has handed its experts over."""
    with command() as (terminal, _):
        from talkoot.node.remote import run_stop

        run_stop(terminal, state, wait=wait)


@app.command(cls=PlainCommand)
def logs(
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines as they are written, until Ctrl-C.")
    ] = False,
    lines: Annotated[
        int,
        typer.Option(
            "--lines", "-n", min=0, metavar="N", help="Number of lines to print, from the end of the log."
        ),
    ] = 100,
    state: NodeState = None,
) -> None:
    """Print a node's log, whether the node is running or not."""
    with command() as (terminal, _):
        from talkoot.node.remote import run_logs

        run_logs(terminal, state, lines, follow=follow)


@app.command(cls=PlainCommand)
def invite(
    *,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE",
            help="What the invite allows: node hosts experts, trainer trains, reader only uses the trained model and "
            "searches, librarian publishes memories."
            "  [default: trainer]",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="How long the invite is valid, such as 12h or 30d.  [default: 30d]"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who it is for. Only your own list shows this.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the invites that you made, instead of making one.")
    ] = False,
    revoke: Annotated[
        str | None,
        typer.Option(
            metavar="SERIAL", help="Revoke the invite with this serial or --name, instead of making one."
        ),
    ] = None,
    state: NodeState = None,
    as_json: AsJson = False,
) -> None:
    """Make, list or revoke invites for a swarm that you founded. If it is open, print its only invite.

    With `mode = "token"` in its manifest, only people with such an invite can take part. Keep it secret: until it
    expires, anybody who has it can use it.
    """
    with command(as_json=as_json) as (terminal, _):
        from talkoot.node.invites import InviteRequest, run_invite, run_list, run_revoke

        makes = any(each is not None for each in (role, expires, name))
        if listed + (revoke is not None) + makes > 1:
            raise SettingsError("--list, --revoke, and the options of a new invite can't be given together")
        if listed:
            run_list(terminal, state)
        elif revoke is not None:
            run_revoke(terminal, state, revoke)
        else:
            run_invite(terminal, state, InviteRequest.parse(role, expires, name))


app.add_typer(memory_commands, name="memory")
app.add_typer(service, name="service")


@service.command(
    cls=PlainCommand,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [NODE OPTIONS]",
)
def install(
    context: typer.Context,
    *,
    join: Join = None,
    state: NodeState = None,
    as_root: Annotated[bool, typer.Option("--as-root", help="Let the node run as root.")] = False,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the file that defines the service, and install nothing.")
    ] = False,
) -> None:
    """Run a node as a service of this user, which the system starts. All other options are passed to `talkoot node`."""
    options = _node_options(context)
    with command() as (terminal, _):
        from talkoot.node.service import make_service, run_install

        run_install(terminal, make_service(options, join, state), as_root=as_root, print_only=print_only)


def _node_options(context: typer.Context) -> dict[str, Any]:
    """The options given for `talkoot node`, as it parses them: values by flag; True for a switch."""
    from expert_server.settings import NodeSettings

    node_command = cast(TyperGroup, context.find_root().command).commands["node"]
    parsed = node_command.make_context(context.command_path, list(context.args))
    values = parsed.params | given_settings(parsed, NodeSettings)
    given: dict[str, Any] = {}
    for parameter in node_command.get_params(parsed):
        source = parsed.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            value = values[parameter.name or ""]
            flags = parameter.secondary_opts if value is False else parameter.opts
            given[flags[0]] = value is False or value
    return given


@service.command("remove", cls=PlainCommand)
def remove() -> None:
    """Stop the service and remove it. The node's checkpoints stay."""
    with command() as (terminal, _):
        from talkoot.node.service import run_remove

        run_remove(terminal)


@service.command("status", cls=PlainCommand)
def service_status() -> None:
    """Say whether the service runs. The exit status is 1 if it does not, and 2 if none is installed."""
    with command() as (terminal, _):
        from talkoot.node.service import run_status

        if not run_status(terminal):
            raise typer.Exit(_FAILED)


@app.command(cls=PlainCommand)
def update(
    *,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help="What to install: a folder, a wheel, an archive, or the address of one.  [default: the source of "
            "this installation]",
        ),
    ] = None,
) -> None:
    """Update Talkoot and restart its service. Works if the installer or `uv tool` installed Talkoot."""
    with command() as (terminal, _):
        from talkoot.installation import run_update

        run_update(terminal, source)


@app.command(cls=PlainCommand)
def uninstall(
    *,
    yes: Annotated[
        bool, typer.Option("--yes", help="Don't ask for confirmation, except before deleting identities.")
    ] = False,
    state: Annotated[
        bool,
        typer.Option(
            "--state",
            help="Also delete the state folders, with all checkpoints and logs. Identities stay.",
        ),
    ] = False,
    identity: Annotated[
        bool, typer.Option("--identity", help="With --state: also delete the identities. Asks twice.")
    ] = False,
) -> None:
    """Remove Talkoot and its service. Checkpoints and identity stay."""
    with command() as (terminal, _):
        from talkoot.installation import run_uninstall

        run_uninstall(terminal, yes=yes, state=state, identity=identity)


if __name__ == "__main__":  # services that 0.1.0 installed start this module
    main()
