"""Where the state of an expert comes from that a node takes: its own disk, or a live replica elsewhere."""

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

from hivemind.p2p import PeerID

from dht.registry import Replica
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.hosting.placement import sources
from expert_server.state.checkpoints import Checkpoints
from expert_server.experts.expert import Expert
from expert_server.serving.runtime import Runtime
from expert_server.state.transfer import StateClient
from peer.errors import StateError, TransferError
from peer.averaging import Meetings, most_believed

logger = logging.getLogger(__name__)


class Restorer:
    """Brings experts that do not serve yet to the freshest state there is."""

    def __init__(
        self,
        swarm: Swarm,
        runtime: Runtime,
        checkpoints: Checkpoints,
        client: StateClient,
        meetings: Meetings[UID],
        plausible: Callable[[], int],
    ) -> None:
        """`plausible`: gives the most updates that a state of others is believed to have taken."""
        self._swarm = swarm
        self._runtime = runtime
        self._checkpoints = checkpoints
        self._client = client
        self._meetings = meetings
        self._plausible = plausible
        self._rng = random.SystemRandom()

    async def restore(
        self, expert: Expert, hosts: Sequence[Replica], saved: int | None, unreachable: set[PeerID]
    ) -> bool:
        """From the freshest of others' replicas and this node's checkpoint of `saved` updates; else from the next.

        An expert that nobody has keeps its first parameters. False when others have it and none of them gave it.
        Peers that are `unreachable` are left out, and those that do not answer become so.
        """
        others = sources(hosts, self._swarm.host.peer_id, self._rng)
        most = most_believed([replica.update_count for replica in others])
        most = min(most, max(self._plausible(), saved or 0))
        fresher = [replica for replica in others if saved is None or replica.update_count > saved]
        if await self._fetch_first(expert, fresher, most, unreachable):
            return True
        restored = saved is not None and await self._checkpoints.restore(expert)
        if restored and expert.update_count == saved:
            return True
        staler = [
            r for r in others if r not in fresher and (not restored or r.update_count > expert.update_count)
        ]
        return await self._fetch_first(expert, staler, most, unreachable) or restored or not others

    async def _fetch_first(
        self, expert: Expert, replicas: Sequence[Replica], most: int, unreachable: set[PeerID]
    ) -> bool:
        """Fetches from the first that gives a good state, which counts `most` updates at most."""
        peers = {replica.peer_id for replica in replicas} - unreachable
        nodes = await self._swarm.registry.nodes(peers) if peers else {}
        for replica in replicas:
            if replica.peer_id not in nodes:
                continue
            try:
                fetched = await self._client.fetch(nodes[replica.peer_id], expert.uid)
                checkpoint = fetched.checkpoint
                update_count = min(checkpoint.update_count, most)
                await self._runtime.run(partial(expert.import_state, checkpoint.state, update_count))
            except TransferError as error:
                logger.warning("%s", error)
                if not error.answered:
                    unreachable.add(replica.peer_id)
                continue
            except StateError as error:
                logger.warning("refused the state of %s by %s: %s", expert.uid, replica.peer_id, error)
                continue
            self._meetings.note(expert.uid, replica.peer_id, update_count)
            return True
        return False
