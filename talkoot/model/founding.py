"""`talkoot import`: prepares a new swarm whose experts and dense part start from a model folder.

It writes three things: the experts into the state folder of the founder's node, as checkpoints without momentum; the
dense part into the trainer's state folder, as a run without steps; and the manifest, as the file to found the swarm
with.
"""

import json
import os
import secrets
import shlex
import time
import tomllib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dht.founder_records import RecordFile
from dht.manifest import Manifest
from dht.records import SwarmKeys
from dht.uid import UID
from expert_server.blocks import build_block
from expert_server.experts.format import BLOCK, Checkpoint, State, StateForm, moment_name
from expert_server.experts.plausibility import Scale, require_plausible
from expert_server.state.checkpoints import CheckpointStore
from peer.averaging import MAX_UPDATE_COUNT
from peer.errors import ModelError, SettingsError, StartError, StateError
from peer.files import StateFolder
from peer.formatting import counted
from peer.identity import Identity
from peer.settings import describe_validation_error
from talkoot.model.folder import ModelFolder
from talkoot.model.upcycling import UpcycledModel, grown_manifest
from talkoot.node.control import node_folder
from talkoot.node.invites import require_no_other_swarm
from talkoot.terminal import Terminal, check_writable, option_text, write_output
from talkoot.train.session import once
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import CheckpointWriter, Header, checkpoint_folder, manifest_sha256

_KEEP = 1
"""How many checkpoints of each expert, and of the dense part, to keep."""
_AGE = 1
"""The age of the dense part: higher than a new one's, so that joining trainers take it over."""


@dataclass(frozen=True)
class ImportPlan:
    """The arguments of `talkoot import`."""

    folder: Path
    manifest_file: Path
    name: str | None = None
    """The swarm's name; None: the model's."""
    node_state: Path | None = None
    trainer_state: Path | None = None
    grid: tuple[int, ...] | None = None
    """A grid larger than the model's; None: the same."""


def run_import(terminal: Terminal, plan: ImportPlan) -> None:
    """Raises UserError if the folder is incomplete, or the swarm exists."""
    with terminal.stages("reading the model") as stage, closing(ModelFolder.open(plan.folder)) as folder:
        values = import_model(folder, plan, stage)
    if terminal.json:
        terminal.event("import", values)
        return
    state, trainers_state = (option_text("--state", each) for each in (plan.node_state, plan.trainer_state))
    experts = counted(values["experts"], "expert")
    terminal.line(f"{experts} and the dense part are ready for the swarm {values['name']}.")
    terminal.line("Found it, with a node that has room for all of them:")
    terminal.line(f"  talkoot node --new {shlex.quote(str(plan.manifest_file))}{state}")
    if values["admission"] == "token":
        terminal.line(f"Then train on, with an invite that `talkoot invite --role trainer{state}` makes:")
    else:
        terminal.line("Then train on, with the invite that the node shows:")
    terminal.line(f"  talkoot train --join INVITE --resume --data YOUR-TEXT{trainers_state}")


def import_model(folder: ModelFolder, plan: ImportPlan, stage: Callable[[str], None]) -> dict[str, Any]:
    """Writes everything, and returns figures. The manifest's file is written last: once it exists, so does the rest.
    Raises UserError.
    """
    _require_startable(folder)
    grown = folder.manifest if plan.grid is None else grown_manifest(folder.manifest, plan.grid)
    manifest = _manifest(grown, plan.name)
    # the larger part, and its encoding
    folder.require_memory(
        2 * max(folder.dense_nbytes, (1 + manifest.optimizer.moments) * folder.expert_nbytes)
    )
    if os.path.exists(plan.manifest_file):  # raises no OSError: `check_writable` says what is wrong
        raise SettingsError(f"{plan.manifest_file} exists: pass another --out")
    node, trainer = (
        node_folder(plan.node_state),
        TrainerSettings.load(state=plan.trainer_state).state_folder,
    )
    if node.resolve() == trainer.resolve():
        raise SettingsError(
            f"{node} can't be both: pass two folders, one as --state and one as --trainer-state"
        )
    # before the lock, since stopping a node that runs there would not help
    require_no_other_swarm(node, manifest.name)
    with closing(StateFolder(node)), closing(StateFolder(trainer, "--trainer-state")):
        check_writable(plan.manifest_file, "--out", makes_folder=True)
        keys = SwarmKeys(manifest.name, Identity.load_or_create(node / "identity.key").peer_id)
        if RecordFile(node / "manifests" / keys.swarm_id).read() is not None:
            raise SettingsError(
                f"this node has already founded a swarm {manifest.name}: pass another --name, or another --state"
            )
        model = folder if plan.grid is None else UpcycledModel(folder, manifest, stage)
        store = CheckpointStore(node / "checkpoints", keys.swarm_id, manifest, _KEEP)
        try:
            _write_experts(model, manifest, store, stage)
            stage("writing the dense part")
            run = _write_dense(model, manifest, keys.swarm_id, trainer)
        except OSError as error:
            raise StartError(
                f"can't write {error.filename or node}: {error.strerror or error}; fix this, and run the same command "
                "again"
            ) from error
        write_output(plan.manifest_file, to_toml(manifest).encode(), "--out")
    return {
        "name": manifest.name,
        "admission": manifest.admission.mode,
        "experts": manifest.experts_total,
        "manifest": str(plan.manifest_file),
        "node_state": str(node),
        "checkpoint": str(run),
    }


def _require_startable(folder: ModelFolder) -> None:
    """Raises ModelError if no swarm can start from this model."""
    if missing := sorted(set(folder.manifest.uids()) - folder.live):
        raise ModelError(
            f"{folder.path} lacks {counted(len(missing), 'expert')}, such as {missing[0]}, which a swarm would start "
            "from scratch. Export the model again with all experts"
        )
    if folder.memory is not None:
        raise ModelError(
            f"the model in {folder.path} reads the memory {folder.memory.memory}, and a swarm starts only from a model "
            "that reads none: train one without --memory"
        )


def _manifest(model: Manifest, name: str | None) -> Manifest:
    """The new swarm's manifest. It names no preset if the preset would set keys that this model leaves unset."""
    try:
        manifest = Manifest.model_validate(model.model_dump() | ({} if name is None else {"name": name}))
    except ValidationError as error:
        raise SettingsError(f"--name: {describe_validation_error(error, Manifest)}") from error
    if Manifest.founded(tomllib.loads(to_toml(manifest))) == manifest:
        return manifest
    return manifest.model_copy(update={"preset": "none"})


def _write_experts(
    folder: ModelFolder | UpcycledModel,
    manifest: Manifest,
    store: CheckpointStore,
    stage: Callable[[str], None],
) -> None:
    form = StateForm.of(manifest)
    say = once(stage)
    for number, uid in enumerate(manifest.uids()):
        say(f"writing experts: {number * 10 // manifest.experts_total * 10}%")
        state: State = {BLOCK + name: tensor for name, tensor in folder.expert(uid).items()}
        for name, (shape, dtype) in form.parameters.items():
            for moment in form.moments:
                state[moment_name(name, moment)] = torch.zeros(() if moment == "step" else shape, dtype=dtype)
        try:
            store.save(uid, Checkpoint(state, _update_count(uid, state, manifest)))
        except StateError as error:
            raise ModelError(f"{folder.path}: {error}") from error


def _update_count(uid: UID, state: State, manifest: Manifest) -> int:
    """The fewest updates that can have led from the initial parameters to these. Other nodes check the count. Raises
    StateError.
    """
    first = Scale.of(dict(build_block(manifest, uid).named_parameters()))
    count = 1
    while True:
        try:
            require_plausible(uid, state, count, [first], manifest.optimizer)
        except StateError:
            if count >= MAX_UPDATE_COUNT:
                raise
            count = min(4 * count, MAX_UPDATE_COUNT)
        else:
            return count


def _write_dense(folder: ModelFolder | UpcycledModel, manifest: Manifest, swarm_id: str, state: Path) -> Path:
    """Returns the folder of the run."""
    how, tokenizer = folder.routing, folder.tokenizer.to_json()
    settings = TrainerSettings(
        router=how.router, top_k=how.top_k, balance=how.balance, tokenizer="bpe" if tokenizer else "bytes"
    ).in_swarm(folder.manifest)
    header = Header(
        swarm_id=swarm_id,
        manifest_sha256=manifest_sha256(manifest),
        step=0,
        age=_AGE,
        saved_at=time.time(),
        tokenizer=tokenizer,
        data_sha256="",
        settings=settings.saved(secrets.randbelow(2**63)),
    )
    writer = CheckpointWriter(checkpoint_folder(None, state, swarm_id, newest=False), _KEEP)
    # an earlier attempt may have left one
    writer.open(resumes=True)
    if not writer.save(header, {f"model.{name}": tensor for name, tensor in folder.dense().items()}):
        raise StartError(f"can't write the dense part in {writer.folder}: free some space, and try again")
    return writer.folder


def to_toml(manifest: Manifest) -> str:
    """The file that founds a swarm with this manifest. JSON texts, numbers and lists of these are the same in TOML."""
    values = manifest.model_dump(mode="json", exclude_none=True, exclude={"protocol_version"})
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [_line(name, value) for name, value in values.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(_line(key, value) for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _line(key: str, value: object) -> str:
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"
