"""The dense part of a model that is exported: from a run on this machine, or from live trainers."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import Tensor

from dht.admission import EXPORT
from dht.announcements import TrainerInfo
from dht.manifest import Manifest
from dht.swarm import Swarm
from peer.errors import SettingsError, UnavailableError
from peer.formatting import counted
from peer.medoid import COMPARED
from talkoot.model.folder import FolderRouting, dense_forms
from talkoot.model.reading import QUESTIONS, FolderMemory
from trainer_client.averaging.averager import Averaging, AveragingSchedule
from trainer_client.averaging.dense_part import DenseForm, SharedParameters, fingerprint_of
from trainer_client.averaging.exchange import DenseExchange
from trainer_client.client import SwarmClient
from trainer_client.data.tokenizer import Tokenizer, load_tokenizer
from trainer_client.model import LanguageModel, require_memory
from trainer_client.moe import Experts, RemoteMixtureOfExperts
from trainer_client.routers import ROUTERS, Routing
from trainer_client.settings import TrainerSettings
from trainer_client.training.checkpoints import Checkpoint

_ELSE = "pass --resume on a machine that has trained in this swarm, or --checkpoint with the folder of a run"


@dataclass(frozen=True, eq=False)
class ExportedDense:
    """A dense part, and what belongs to it."""

    model: LanguageModel
    tokenizer: Tokenizer
    routing: Routing
    origin: str
    """Where it comes from, in words, for the model card."""
    steps: int
    """Steps that have gone into it."""
    validation_loss: float | None
    """The loss in nats per token; None: not known."""
    validated_after: float | None = None
    """The step of its run after which the loss was measured; None: not known."""
    memory: FolderMemory | None = None
    """How it reads a memory; None: it reads none."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """For a model that answers questions: its tensors in addition to those of its generator."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **self.beside}


def dense_of_run(client: SwarmClient, checkpoint: Checkpoint, experts: Experts) -> ExportedDense:
    """`checkpoint`: of a run in this swarm, with the client's settings. Raises UserError if it does not fit."""
    checkpoint.check_manifest(client.manifest)
    header = checkpoint.header
    tokenizer = load_tokenizer(header.tokenizer)
    routing = _anywhere(Routing.of(client.settings, client.manifest, 0))
    memory = FolderMemory.of(client.settings, client.manifest, header.encoder, checkpoint.tensors)
    model = _model(client, routing, tokenizer, experts, memory)
    answering = None if memory is None else memory.answering(model, client.manifest, tokenizer)
    checkpoint.load_into(answering or model)
    loss, validated = (
        _last(checkpoint.tensors.get(f"history.{name}")) for name in ("validation_losses", "validated")
    )
    steps = header.step if header.age is None else header.age
    origin = f"a trainer's run of {counted(header.step, 'step')}"
    beside = {} if answering is None else answering.questions.state_dict(prefix=QUESTIONS)
    return ExportedDense(model, tokenizer, routing, origin, steps, loss, validated, memory, beside)


def _last(values: Tensor | None) -> float | None:
    return None if values is None or not values.numel() else float(values[-1])


def dense_of_trainers(
    client: SwarmClient, given: TrainerSettings, tokenizer: Tokenizer, experts: Experts
) -> ExportedDense:
    """Takes the dense part of a live trainer with this tokenizer, as a joining trainer does: the medoid of up to three.

    `given`: the settings before the swarm's preset completed them. Raises UnavailableError, which says what else
    can be done.
    """
    swarm = client.swarm
    trainers = client.run(_trainers(swarm))
    if not trainers:
        raise UnavailableError(f"no running trainer could give the dense part: {_ELSE}")
    routing = _trained_routing(given, client, tokenizer, trainers)
    if routing is None:
        raise UnavailableError(
            f"{counted(len(trainers), 'trainer')} could give a dense part, but not of this model: pass --tokenizer "
            "FILE with the tokenizer that they use (`bytes` is the default), and --router if it is not detected; or "
            f"{_ELSE}"
        )
    model = _model(client, routing, tokenizer, experts)
    form = DenseForm.of(model, swarm.keys.swarm_id, tokenizer.to_json(), routing.name)
    age = client.run(_take(swarm, model, form))
    if age is None:
        raise UnavailableError(
            f"none of the swarm's trainers sent its dense part: try again in a minute, or {_ELSE}"
        )
    same = [trainer for trainer in trainers if trainer.dense_fingerprint == form.fingerprint]
    losses = [trainer.validation_loss for trainer in same if trainer.validation_loss is not None]
    loss = sorted(losses)[(len(losses) - 1) // 2] if losses else None
    return ExportedDense(model, tokenizer, routing, "a trainer that was running", age, loss)


async def _trainers(swarm: Swarm) -> list[TrainerInfo]:
    """The trainers that have trained their dense part."""
    found = await swarm.registry.trainers(await swarm.registry.trainer_ids())
    return [trainer for trainer in found.values() if trainer.dense_fingerprint and trainer.dense_age]


def _trained_routing(
    given: TrainerSettings, client: SwarmClient, tokenizer: Tokenizer, trainers: Collection[TrainerInfo]
) -> Routing | None:
    """The routing of most trainers with this tokenizer, identified by their fingerprints."""
    manifest, swarm_id = client.manifest, client.swarm.keys.swarm_id
    found: list[tuple[int, Routing]] = []
    for routing in _routings(given, client.settings, manifest):
        forms = dense_forms(manifest, FolderRouting.of(routing), len(tokenizer.token_bytes))
        fingerprint = fingerprint_of(swarm_id, forms, tokenizer.to_json(), routing.name)
        if count := sum(trainer.dense_fingerprint == fingerprint for trainer in trainers):
            found.append((count, routing))
    return max(found, key=lambda each: each[0])[1] if found else None


def _routings(given: TrainerSettings, settings: TrainerSettings, manifest: Manifest) -> Iterator[Routing]:
    """The routings that are possible with these settings, the swarm's own first."""
    names = [settings.router, *(name for name in ROUTERS if name != settings.router)]
    balances = [settings.balance, None, "bias", "none"]
    if "router" in given.model_fields_set:
        names = names[:1]
    if "balance" in given.model_fields_set:
        balances = balances[:1]
    seen = set[tuple[str, bool]]()
    for name in names:
        for balance in balances:
            with suppress(SettingsError):  # the router does not fit this swarm
                changed = settings.model_copy(update={"router": name, "balance": balance})
                routing = _anywhere(Routing.of(changed, manifest, 0))
                if (key := (name, routing.has_bias)) not in seen:
                    seen.add(key)
                    yield routing


def _anywhere(routing: Routing) -> Routing:
    """The routing without a limit of nodes, because in a folder all experts are in one place."""
    return replace(routing, nodes_per_token=None)


async def _take(swarm: Swarm, model: LanguageModel, form: DenseForm) -> int | None:
    """Takes a dense part, and returns its age in steps; None if nobody gave one."""
    exchange = DenseExchange(form, SharedParameters(model), guard=swarm.guard)
    averaging = Averaging(
        exchange,
        swarm.host.identity,
        swarm.registry,
        AveragingSchedule(every=1, search_every_s=1.0),
        admission=swarm.admission,
        channels=swarm.host.channels(COMPARED),
        rights=(EXPORT,),
    )
    try:
        return await averaging.take_whole()
    finally:
        await averaging.close()


def _model(
    client: SwarmClient,
    routing: Routing,
    tokenizer: Tokenizer,
    experts: Experts,
    memory: FolderMemory | None = None,
) -> LanguageModel:
    manifest, vocabulary = client.manifest, len(tokenizer.token_bytes)
    spec = None if memory is None else memory.retrieval(manifest)

    def mixture(layer: int) -> RemoteMixtureOfExperts:
        return RemoteMixtureOfExperts(layer, manifest, experts, client.run, routing)

    require_memory(manifest, mixture, vocabulary, 1, spec)
    return LanguageModel(manifest, mixture, vocabulary, spec)
