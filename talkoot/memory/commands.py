"""The commands of `talkoot memory`.

A command imports what it runs only when it runs, as in `talkoot.cli`.
"""

from pathlib import Path
from typing import Annotated

import typer

from talkoot.options import (
    AsJson,
    Format,
    GroupedCommands,
    Join,
    PlainCommand,
    PublishCommand,
    RevokeCommand,
    command,
    load_settings,
)
from talkoot.terminal import LogFormat

memory_commands: typer.Typer = typer.Typer(
    cls=GroupedCommands,
    help="Build and publish memories. A memory is a set of text passages that nodes host, people search and models "
    "read.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MemoryFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder that `talkoot memory build` wrote.")
]
PublisherJoin = Annotated[
    str | None,
    typer.Option(
        metavar="INVITE",
        help="The swarm's invite, or @FILE that contains it.  [default: the swarm that the node of --state founded]",
    ),
]
PublisherState = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="For the founder, the state folder of its node, which may be running. For a librarian, a folder for its "
        "key.  [default: the node's if it founded the swarm, else ~/.local/state/talkoot/publisher]",
    ),
]


@memory_commands.command(cls=PlainCommand)
def build(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="FILES", help="Files, folders or globs of text, as `talkoot train` reads."),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="The folder to write, which must be new or empty."),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The memory's name: small letters, digits, hyphens.  [default: the folder's]"
        ),
    ] = None,
    about: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A one-line description of the memory.")
    ] = None,
    license: Annotated[
        str,
        typer.Option(
            metavar="SPDX",
            help="The text's licence, such as CC-BY-SA-4.0. A field `license` of a line or row overrides it.  "
            "[default: unknown]",
        ),
    ] = "",
    field: Annotated[
        str, typer.Option(metavar="NAME", help="The field of .jsonl and .parquet that has the text.")
    ] = "text",
    title_field: Annotated[
        str, typer.Option("--title-from", metavar="NAME", help="The field that has the title.")
    ] = "title",
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Add to this memory: make its next revision, which keeps all of its shards.",
        ),
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An encoder of `talkoot memory train-encoder`.  [default: word vectors, learned from the text]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of all random choices.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a memory from text files.

    Cuts the text into passages, learns word vectors from them, and writes shards.
    """
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from talkoot.memory.build import BuildPlan, run_build

        run_build(
            terminal,
            BuildPlan(tuple(paths), out, name, about, license, field, title_field, base, encoder, seed),
        )


@memory_commands.command("train-encoder", cls=PlainCommand)
def train_encoder(
    pairs: Annotated[
        Path,
        typer.Argument(
            metavar="PAIRS",
            help="JSON lines with the fields `question`, `title` and `text`: a question, and the passage that answers "
            "it. `answers` is an optional list of phrases; other passages that contain one may answer the question "
            "too.",
        ),
    ],
    *,
    text: Annotated[
        list[str],
        typer.Option(
            metavar="FILES",
            help="The text of the memory, as `talkoot memory build` reads it. May be given several times.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The new file to write.")],
    field: Annotated[
        str, typer.Option(metavar="NAME", help="The field of .jsonl and .parquet that has the text.")
    ] = "text",
    title_field: Annotated[
        str, typer.Option("--title-from", metavar="NAME", help="The field that has the title.")
    ] = "title",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of all random choices.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train an encoder on questions and their answers.

    Learns word vectors from the text, and then two encoders, one for questions and one for passages, which place a
    question near the passage that answers it. To use them, run `talkoot memory build --encoder FILE`.
    """
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from talkoot.memory.train_encoder import TrainEncoderPlan, run_train_encoder

        run_train_encoder(terminal, TrainEncoderPlan(pairs, tuple(text), out, field, title_field, seed))


@memory_commands.command(cls=PublishCommand)
def publish(
    context: typer.Context,
    folder: MemoryFolder,
    *,
    join: PublisherJoin = None,
    state: PublisherState = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Publish a memory in a swarm.

    Announces the memory, and serves it until nodes host two replicas of each shard. Nodes take as much as --memory-disk
    allows. If you stop the command early, run it again to continue. In an open swarm, only the founder can publish; in
    a swarm that admits by token, librarians can too.
    """
    with command(log_format) as (terminal, signals):
        with signals.importing():
            from expert_server.settings import NodeSettings
            from talkoot.memory.publish import run_publish

        run_publish(terminal, folder, join, state, load_settings(context, NodeSettings))


@memory_commands.command(cls=PublishCommand)
def unlist(
    context: typer.Context,
    which: Annotated[str, typer.Argument(metavar="NAME", help="The memory's name or id.")],
    *,
    join: PublisherJoin = None,
    state: PublisherState = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Take a memory off your list, so that nodes remove it."""
    with command(log_format) as (terminal, signals):
        with signals.importing():
            from expert_server.settings import NodeSettings
            from talkoot.memory.unlist import run_unlist

        run_unlist(terminal, which, join, state, load_settings(context, NodeSettings))


@memory_commands.command("list", cls=PlainCommand)
def list_memories(
    *,
    join: Join = None,
    as_json: AsJson = False,
) -> None:
    """List the memories of a swarm."""
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from talkoot.memory.listing import run_list

        run_list(terminal, join)


@memory_commands.command("inspect", cls=PlainCommand)
def inspect_memory(
    name: Annotated[
        str,
        typer.Argument(
            metavar="DIR|NAME",
            help="A folder that `talkoot memory build` wrote; with --join, a memory's name or id.",
        ),
    ],
    *,
    join: Join = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a memory, or who hosts it.

    Verifies a memory in a folder and shows what is in it. With --join, shows the cells and shards of a swarm's memory,
    and who hosts them.
    """
    with command(as_json=as_json) as (terminal, signals):
        with signals.importing():
            from talkoot.memory import inspection, listing

        if join is None:
            inspection.run_inspect(terminal, Path(name))
        else:
            listing.run_inspect(terminal, join, name)


@memory_commands.command("revoke", cls=RevokeCommand)
def revoke_passages(
    context: typer.Context,
    folder: MemoryFolder,
    *,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Revoke all passages that contain this exact phrase in their text or title. Upper and lower case are "
            "the same; a line break is a space.",
        ),
    ] = None,
    passage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HASH",
            help="Revoke this passage: `talkoot search --json` prints the hash. May be given several times.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the passages that would be revoked.")
    ] = False,
    join: PublisherJoin = None,
    state: PublisherState = None,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Take passages back from a memory.

    Publishes a new revision without them, and waits until all hosts have deleted them. A memory that was never
    published from this folder is only changed in the folder, unless you pass --join.
    """
    with command(log_format) as (terminal, signals):
        with signals.importing():
            from expert_server.settings import NodeSettings
            from talkoot.memory.revoke import run_revoke
            from talkoot.memory.selection import Selection

        selection = Selection.parse(passage or [], match)
        settings = load_settings(context, NodeSettings)
        run_revoke(terminal, folder, selection, join, state, settings, only_show=dry_run)
