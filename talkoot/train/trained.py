"""A trained model in its swarm: the dense part is from a checkpoint, the experts are called where they are."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.errors import CheckpointError
from talkoot.terminal import Terminal, quiet_hivemind
from talkoot.joining import invite_of
from talkoot.signals import StopSignals
from talkoot.train.session import once, trainer_state
from trainer_client.training.checkpoints import load_checkpoint
from trainer_client.client import SwarmClient
from trainer_client.model import LanguageModel
from trainer_client.run import checkpoint_folder
from trainer_client.settings import TrainerSettings
from trainer_client.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """It serves until the block that made it ends."""

    model: LanguageModel
    tokenizer: Tokenizer
    client: SwarmClient
    settings: TrainerSettings
    step: int
    """How many it was trained for."""
    folder: Path
    """For what is needed until the end."""

    def has_experts(self) -> bool:
        """Whether there are any, so that what was just computed counts. Else waits until there are.

        Raises SwarmError when none comes in time.
        """
        if self.client.dispatcher.live_experts():
            return True
        limit_s = self.settings.wait_for_experts_s
        logger.warning("no expert answers: waiting until one does, at most %.0f s", limit_s)
        self.client.wait_for_experts(limit_s, lambda text: None, share=1 / self.client.manifest.experts_total)
        return False


@contextmanager
def trained_model(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    flags: Mapping[str, Any],
    prepare: Callable[[Tokenizer, TrainerSettings, Path], None],
) -> Iterator[TrainedModel]:
    """Joins with a throw-away identity, so that it works beside a trainer. Raises UserError when it can't.

    `prepare` is called before, with the tokenizer and a folder that is there as long as the model.
    """
    quiet_hivemind()
    settings = TrainerSettings.load(None, **flags)
    invite = invite_of(join)
    swarm_id = invite.keys.swarm_id
    path = checkpoint_folder(settings.checkpoint, trainer_state(settings), swarm_id, newest=True)
    checkpoint = load_checkpoint(path, swarm_id)
    settings = settings.resumed(checkpoint.header.settings)
    tokenizer = load_tokenizer(checkpoint.header.tokenizer)
    with tempfile.TemporaryDirectory(prefix="talkoot-model-") as name:
        folder = Path(name)
        prepare(tokenizer, settings, folder)
        with terminal.stages("making ready") as stage:
            client = SwarmClient(invite, settings, folder / "state", stage=stage, reads_only=True)
        try:
            checkpoint.check_manifest(client.manifest)
            with terminal.stages("looking for experts") as stage:
                share = 1 / client.manifest.experts_total
                client.wait_for_experts(settings.wait_for_experts_s, once(stage), share=share)
            model = LanguageModel(client.manifest, client.mixture, len(tokenizer.token_bytes))
            try:
                model.load_state_dict(checkpoint.model_tensors())
            except RuntimeError as error:
                raise CheckpointError(f"the checkpoint {path} does not fit the swarm: {error}") from error
            yield TrainedModel(model, tokenizer, client, settings, checkpoint.header.step, folder)
        finally:
            signals.ignore()
            client.close()
