"""What hivemind's connection to p2pd notes of calls, so that one that is broken off harms no other."""

import asyncio
from typing import Any
from uuid import UUID


class PendingCalls(dict[UUID, "asyncio.Future[Any]"]):
    """Calls of this peer, by id.

    Says that it has none that has ended: when the answer comes in the turn of the loop in which the call is broken off,
    hivemind's reader would set its result, and end by the error. No later call would get an answer.
    """

    def __contains__(self, call_id: object) -> bool:
        return super().__contains__(call_id) and not self[call_id].done()  # type: ignore[index]  # a UUID


class HandlerTasks(dict[UUID, "asyncio.Task[None]"]):
    """Calls of others, by id, while they are answered: hivemind forgets none that is broken off."""

    def __setitem__(self, call_id: UUID, task: "asyncio.Task[None]") -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


def mend(control: Any) -> None:
    """Gives a hivemind ControlClient, on which no calls are under way, these tables in place of its own."""
    control._pending_calls, control._handler_tasks = PendingCalls(), HandlerTasks()
