"""The mixture layers of one trainer, as its settings and the manifest want them."""

from collections.abc import Callable
from typing import Any, Literal

from dht.manifest import Manifest
from peer.errors import SettingsError
from trainer_client.moe import Experts, RemoteMixtureOfExperts, Run
from trainer_client.routers import Routing, experts_for_each_row
from trainer_client.settings import TrainerSettings


class Mixtures:
    """Makes them, all with the same experts behind them."""

    def __init__(
        self, manifest: Manifest, settings: TrainerSettings, own_seed: int, experts: Experts, run: "Run[Any]"
    ) -> None:
        """`own_seed` is taken where the settings have none. Raises SettingsError when the router doesn't fit."""
        self._manifest = manifest
        self._k = experts_for_each_row(settings.router, settings.top_k, manifest)
        self._routing = Routing(
            settings.router,
            settings.balance_weight,
            settings.expert_dropout,
            settings.gate_scale,
            own_seed if settings.seed is None else settings.seed,
        )
        self._experts = experts
        self._run = run

    def make(
        self,
        layer: int,
        choose_by: Literal["token", "sequence"] | None = None,
        gradient_scale: Callable[[], float] | None = None,
        routing_prefix: int = 0,
    ) -> RemoteMixtureOfExperts:
        """The mixture of one layer of the model, from 0, which routes as the manifest says unless `choose_by` is given.

        Raises SettingsError.
        """
        model = self._manifest.model
        if choose_by is None:
            routing_prefix = self._manifest.routing.prefix
            choose_by = "sequence" if routing_prefix else "token"
        if not 0 <= layer < model.layers:
            raise SettingsError(f"layer {layer}: this swarm has layers 0 to {model.layers - 1}")
        return RemoteMixtureOfExperts(
            layer,
            model.hidden,
            self._manifest.experts.grid,
            self._k,
            self._experts,
            self._run,
            choose_by,
            self._routing,
            gradient_scale,
            routing_prefix,
        )
