"""What every call between two peers must get right: the protocol version and the swarm. How a call is refused."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import StatusCode

from peer import PROTOCOL_VERSION
from peer.errors import ExpertError, StateError, WireError

_RETRY_KEY = "talkoot-retry-after-s"
_LONGEST_RETRY_S = 3600.0


def retry_metadata(retry_after_s: float) -> tuple[tuple[str, str], ...]:
    """What a refused call's trailing metadata says of when it is worth coming back; nothing when that is not known."""
    return ((_RETRY_KEY, f"{retry_after_s:.3f}"),) if retry_after_s else ()


def retry_after_s(metadata: Iterable[tuple[str, str | bytes]] | None, otherwise: float) -> float:
    """As the other side said, within reason; `otherwise` when it said nothing sensible."""
    for key, value in metadata or ():
        if key == _RETRY_KEY:
            try:
                seconds = float(value)
            except ValueError:
                break
            return min(seconds, _LONGEST_RETRY_S) if math.isfinite(seconds) and seconds > 0 else otherwise
    return otherwise


def require_same_swarm(own_swarm_id: str, protocol_version: int, swarm_id: str) -> None:
    """Raises ExpertError (FAILED_PRECONDITION) when the caller speaks another version or means another swarm."""
    if protocol_version != PROTOCOL_VERSION:
        raise ExpertError(
            StatusCode.FAILED_PRECONDITION,
            f"this node speaks protocol version {PROTOCOL_VERSION}, the caller {protocol_version}",
        )
    if swarm_id != own_swarm_id:
        raise ExpertError(
            StatusCode.FAILED_PRECONDITION,
            f"this node belongs to swarm {own_swarm_id}, the call is for {swarm_id[:64]!r}",
        )


@asynccontextmanager
async def refusing(
    context: grpc.aio.ServicerContext[Any, Any], longest_s: float | None = None, late: str = ""
) -> AsyncIterator[None]:
    """Around what answers a call: an error there ends the call with its status.

    `late`: what is said when it takes longer than `longest_s`.
    """
    try:
        async with asyncio.timeout(longest_s):
            yield
    except WireError as error:
        await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
    except ExpertError as error:
        await context.abort(error.status, str(error), retry_metadata(error.retry_after_s))
    except StateError as error:
        await context.abort(StatusCode.FAILED_PRECONDITION, str(error))
    except TimeoutError:
        await context.abort(StatusCode.DEADLINE_EXCEEDED, late)
