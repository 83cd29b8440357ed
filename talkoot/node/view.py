"""How `talkoot node` shows its state: a live panel on a terminal, otherwise a log line now and then."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expert_server.status import NodeState, NodeStatus
from peer.formatting import bytes_in_words, counted

_BAR = 20
_STYLES = {
    NodeState.SERVING: "green",
    NodeState.PAUSED: "yellow",
    NodeState.DRAINING: "yellow",
    NodeState.UNREACHABLE: "red",
}


@dataclass(frozen=True)
class NodeRates:
    """A node's rates per second between two looks; `busy` is a share of the time."""

    calls: float = 0.0
    rows: float = 0.0
    up_mbit: float = 0.0
    down_mbit: float = 0.0
    busy: float = 0.0
    queries: float = 0.0


class RateMeter:
    """Measures rates between two looks at a node. Pure: `now` is an argument."""

    def __init__(self) -> None:
        self._last: tuple[float, NodeStatus] | None = None

    def note(self, status: NodeStatus, now: float) -> NodeRates:
        last, self._last = self._last, (now, status)
        if last is None or now <= last[0]:
            return NodeRates()
        seconds, before = now - last[0], last[1]
        return NodeRates(
            calls=(status.calls - before.calls) / seconds,
            rows=(status.rows - before.rows) / seconds,
            up_mbit=(status.uploaded_bytes - before.uploaded_bytes) * 8e-6 / seconds,
            down_mbit=(status.downloaded_bytes - before.downloaded_bytes) * 8e-6 / seconds,
            busy=min(1.0, (status.busy_s - before.busy_s) / seconds),
            queries=(status.memory_queries - before.memory_queries) / seconds,
        )


def state_in_words(status: NodeStatus) -> str:
    """The state in words, such as `serving`, `paused: on battery` or `serving (resumed by hand, else paused until
    22:00)`.
    """
    if not status.pause_reason:
        return status.state.value
    return (
        status.pause_reason
        if status.state is NodeState.PAUSED
        else f"{status.state.value} ({status.pause_reason})"
    )


def live_panel(swarm: str, status: NodeStatus, rates: NodeRates) -> Group:
    """The panel, and an empty line for the `^C` that a terminal shows. After the panel's last column, it would move the
    cursor down a line, and a part of the panel would stay on the screen.
    """
    return Group(panel(swarm, status, rates), "")


def panel(swarm: str, status: NodeStatus, rates: NodeRates) -> Panel:
    """The panel, as wide as the terminal. It never breaks words, and is red only if something is wrong."""
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    grid.add_row("state", Text(_state_and_use(status, rates), style=_STYLES.get(status.state, "")))
    if _may_host_experts(status):
        grid.add_row("trained", _trained(status, verb=""))
        grid.add_row("computed", _computed(status, rates))
        grid.add_row("model", _model(status))
    grid.add_row("experts", _share(status))
    if status.memory_disk_bytes:
        grid.add_row("memories", _memories(status, rates))
    grid.add_row("network", _network(status, rates))
    grid.add_row("reached", _reached(status))
    grid.add_row(
        "compute", _bar(rates.busy, 1.0, f"{rates.busy:.0%} busy, {counted(status.threads, 'thread')}")
    )
    grid.add_row("memory", _bar(status.memory_bytes, status.memory_limit_bytes, _memory(status)))
    grid.add_row("all runs", so_far(status))
    grid.add_row("", signed_in_words(status))
    if trouble := _trouble(status):
        grid.add_row("trouble", Text(trouble, style="red"))
    return Panel(grid, title=Text(f"talkoot node in {swarm}"), title_align="left")


def summary(status: NodeStatus) -> str:
    """What the node achieved in the run that is ending, with thanks."""
    done = [_trained(status), _rows_for(status)] if _may_host_experts(status) else []
    if status.memory_disk_bytes or not done:
        done.append(f"{_queries(status)} of memories answered")
    return (
        f"in this run: {', '.join(done)}; in all runs {so_far(status)}; "
        f"{signed_in_words(status)}. Thank you for taking part!"
    )


def line(status: NodeStatus, rates: NodeRates) -> str:
    """The same figures in one line, for a log."""
    return ", ".join(_parts(status, rates))


def _parts(status: NodeStatus, rates: NodeRates) -> Iterator[str]:
    yield f"{state_in_words(status)}: {status.experts} of at most {counted(status.capacity, 'expert')}"
    yield _moved(status)
    yield _trained(status)
    yield _rows_for(status)
    yield f"{rates.calls:.1f} calls/s"
    yield f"{rates.rows:.0f} rows/s"
    yield f"{counted(status.queued_rows, 'row')} queued"
    if status.memory_disk_bytes:
        yield f"memories: {_memories(status, rates)}"
    yield f"up {rates.up_mbit:.1f} and down {rates.down_mbit:.1f} Mbit/s"
    yield f"{rates.busy:.0%} busy"
    yield f"memory {_memory(status)}"
    yield counted(status.peers, "DHT peer")
    yield f"reached: {_reached(status)}"
    yield f"in all runs {so_far(status)}"
    yield signed_in_words(status)
    if trouble := _trouble(status):
        yield trouble


def _state_and_use(status: NodeStatus, rates: NodeRates) -> str:
    """The state, and whether anybody uses the node if it serves."""
    words = state_in_words(status)
    # a trainer that validates, and a reader, send rows but no gradients
    is_used = bool(status.trainers_now or rates.rows)
    if status.state is not NodeState.SERVING or is_used or not _may_host_experts(status):
        return words
    if not status.swarm_trainers:
        return f"{words}; idle: nobody trains" if status.swarm_trainers == 0 else words
    return f"{words}; idle: no trainer needs this node now"


def _may_host_experts(status: NodeStatus) -> bool:
    """False for a node that only hosts passages, or only leads others into the swarm."""
    return bool(status.capacity or status.rows)


def _trained(status: NodeStatus, verb: str = " trained") -> str:
    return f"{counted(status.trained, 'expert', ',')}{verb} with {counted(status.updates, 'update', ',')}"


def _rows_for(status: NodeStatus) -> str:
    rows = counted(status.rows, "row", ",")
    return f"{rows} for {counted(status.trainers, 'trainer', ',')}" if status.trainers else rows


def _computed(status: NodeStatus, rates: NodeRates) -> str:
    now = f"{rates.rows:,.0f} rows/s now"
    return f"{_rows_for(status)}; {now}, {counted(status.queued_rows, 'row', ',')} waiting"


def _model(status: NodeStatus) -> str:
    if status.loss is None or status.loss_at_first is None:
        return "no validation loss known yet"
    age = f" ({status.loss_age} ago)" if status.loss_age else ""
    return f"validation loss {status.loss:.3f}{age}; {status.loss_at_first:.3f} when this node first looked"


def _share(status: NodeStatus) -> str:
    of_all = status.experts / status.swarm_experts if status.swarm_experts else 0.0
    hosted = f"{status.experts:,} of the swarm's {status.swarm_experts:,} ({of_all:.0%})"
    if status.capacity <= status.experts:
        return hosted if status.capacity else f"{hosted}: it takes none"
    return f"{hosted}, and may adopt {status.capacity - status.experts:,} more"


def _moved(status: NodeStatus) -> str:
    handed_over, shared = f"{status.handed_over} handed over", f"{status.replicated} also on other nodes"
    return f"{status.adopted} adopted, {handed_over if status.handed_over else shared}"


def _memories(status: NodeStatus, rates: NodeRates) -> str:
    shards, size = counted(status.memory_shards, "shard", ","), bytes_in_words(status.memory_disk_bytes)
    return f"{shards} served, {size} on disk, {_queries(status)}, {rates.queries:.1f}/s now"


def _queries(status: NodeStatus) -> str:
    count = status.memory_queries
    return f"{count:,} {'query' if count == 1 else 'queries'}"


def _network(status: NodeStatus, rates: NodeRates) -> str:
    up, down = _mbit(rates.up_mbit, status.upload_mbit), _mbit(rates.down_mbit, status.download_mbit)
    return f"up {up}   down {down}"


def _reached(status: NodeStatus) -> str:
    return (
        f"{status.reachability}; {status.reachability_advice}"
        if status.reachability_advice
        else status.reachability
    )


def _mbit(now: float, limit: float | None) -> str:
    return f"{now:.1f} Mbit/s" if limit is None else f"{now:.1f} of {limit:g} Mbit/s"


def _memory(status: NodeStatus) -> str:
    return f"{bytes_in_words(status.memory_bytes)} of {bytes_in_words(status.memory_limit_bytes)}"


def so_far(status: NodeStatus) -> str:
    """What the node did in all runs."""
    served = f"{hours_in_words(status.contributed_hours)} served"
    if not (_may_host_experts(status) or status.contributed_rows):
        return served
    rows = counted(status.contributed_rows, "row", ",")
    updates = counted(status.contributed_updates, "update", ",")
    return f"computed {rows}, {updates}, {served}"


def signed_in_words(status: NodeStatus) -> str:
    """The part of all runs' work that trainers and other callers have signed for."""
    callers = status.signed.trainers
    if not callers:
        return "so far, no receipt counts for that"
    have = "has" if callers == 1 else "have"
    return f"of that, {counted(callers, 'caller', ',')} {have} signed for {status.signed.in_words} so far"


def hours_in_words(hours: float) -> str:
    """Hours to the minute, such as `12 h 18 min`."""
    whole, minutes = divmod(int(hours * 60 + 1e-6), 60)
    return f"{whole:,} h {minutes:02d} min" if whole else f"{minutes} min"


def _trouble(status: NodeStatus) -> str:
    if status.unsteady:
        return f"fails again and again: {', '.join(status.unsteady)}; its log says why"
    return status.clock_warning


def _bar(value: float, most: float, words: str) -> Table:
    """A bar, followed by words."""
    row = Table.grid(padding=(0, 2))
    row.add_column(width=_BAR)
    row.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(
        total=max(most, 1e-9),
        completed=min(value, most),
        width=_BAR,
        complete_style="cyan",
        finished_style="cyan",
    )
    row.add_row(bar, words)
    return row
