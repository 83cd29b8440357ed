// The tables of nodes, trainers, memories and volunteers. The server sorts, filters and cuts them into pages.

import { get } from "./api.js";
import { byId, el, icon, setText, shown } from "./dom.js";
import * as format from "./format.js";
import { serverNow } from "./head.js";
import { Section } from "./section.js";
import { PagedTable } from "./table.js";

const PER_PAGE = 25;
const FILTER_WAIT_MS = 250;

const STATES = {
  serving: ["ok", "serving"],
  training: ["ok", "training"],
  "own loop": ["ok", "own loop"],
  finished: ["ok", "finished"],
  stopped: ["unknown", "stopped", "pause"],
  paused: ["warn", "paused", "pause"],
  claimed: ["warn", "starting", "pause"],
  leaving: ["warn", "leaving", "leave"],
  left: ["unknown", "left", "leave"],
  gone: ["bad", "gone"],
};

/** A state as icon, colour and word. */
export function stateBadge(state) {
  const [level, words, picture] = STATES[state] ?? ["unknown", state];
  return el("span", { class: "badge", "data-level": level }, icon(picture ?? level), words);
}

/** A node's state, with a warning when it says that its tasks fail again and again. */
export function nodeBadges({ state, unsteady }) {
  if (!unsteady) return [stateBadge(state)];
  const title = "some of its tasks fail again and again, as it reports";
  return [
    stateBadge(state),
    " ",
    el("span", { class: "badge", "data-level": "warn", title }, icon("warn"), "unsteady"),
  ];
}

/** What the peer calls itself, and the start of its key, which is its own. */
export function peerName({ name, short }) {
  const parts = name ? [el("bdi", { class: "name" }, name), " "] : [];
  return [...parts, el("code", { class: "short" }, short)];
}

function peerLink(row) {
  return el("a", { class: "peer", href: `#/node/${encodeURIComponent(row.peer_id)}` }, ...peerName(row));
}

function when(t) {
  return el("span", { title: format.moment(t) }, `${format.duration(serverNow() - t)} ago`);
}

const figure = (id, name, write, drop) => ({
  id,
  name,
  numeric: true,
  drop,
  cell: (row) => shown(row[id], write),
});

const NODE_COLUMNS = [
  { id: "name", name: "Node", cell: peerLink },
  { id: "state", name: "State", cell: nodeBadges },
  {
    id: "experts",
    name: "Experts",
    numeric: true,
    cell: ({ experts, capacity }) =>
      capacity ? [format.count(experts), el("small", {}, ` / ${format.count(capacity)}`)] : format.count(experts),
  },
  figure("rows_per_s", "Rows/s", format.rate, 3),
  figure("latency_ms", "Latency", format.milliseconds, 3),
  { id: "reach", name: "Reach", drop: 2, cell: ({ reach }) => (reach === "unknown" ? shown(null) : reach) },
  {
    id: "software_version",
    name: "Version",
    drop: 1,
    cell: ({ software_version: version }) => el("bdi", {}, version),
  },
  figure("up_s", "Up", format.duration, 2),
  figure("updates", "Updates", format.compact, 3),
  figure("rows", "Rows", format.compact, 1),
  figure("hours", "Hours", format.hours, 1),
  { ...figure("memory_bytes", "Memories", format.bytes, 1), ofMemories: true },
  { id: "seen_at", name: "Seen", numeric: true, drop: 2, cell: ({ seen_at: t }) => shown(t, when) },
];

const TRAINER_COLUMNS = [
  {
    id: "name",
    name: "Trainer",
    fixed: true,
    cell: (row) => el("span", { class: "peer" }, ...peerName(row)),
  },
  { id: "state", name: "State", fixed: true, cell: ({ state }) => stateBadge(state) },
  { id: "step", name: "Step", fixed: true, numeric: true, drop: 4, cell: steps },
  figure("loss", "Loss", format.loss, 3),
  figure("validation_loss", "Validation", format.loss),
  figure("bits_per_byte", "Bits/byte", format.loss, 2),
  figure("tokens_per_s", "Tokens/s", format.compact, 3),
  {
    id: "forward",
    name: "Forward p50 / p99",
    numeric: true,
    drop: 1,
    cell: (row) => pair(row.forward_p50_ms, row.forward_p99_ms),
  },
  {
    id: "backward",
    name: "Backward p50 / p99",
    numeric: true,
    drop: 1,
    cell: (row) => pair(row.backward_p50_ms, row.backward_p99_ms),
  },
  {
    id: "failures",
    name: "Failures",
    numeric: true,
    drop: 2,
    cell: ({ failures }) => shown(failures, failureCount),
  },
  figure("up_s", "Up", format.duration, 2),
].map((column) => ({ ...column, fixed: true }));

const MEMORY_COLUMNS = [
  { id: "name", name: "Memory", cell: memoryName },
  figure("passages", "Passages", format.compact),
  figure("bytes", "Size", format.bytes, 3),
  { id: "shards", name: "Shards", numeric: true, drop: 3, cell: servedShards },
  { id: "replicas", name: "Replicas", numeric: true, cell: replicaCounts },
  figure("hosts", "Hosts", format.count, 2),
  { id: "checks", name: "Checks", numeric: true, drop: 1, cell: hostChecks },
  { id: "licenses", name: "Licences", drop: 2, cell: ({ licenses }) => el("bdi", {}, licenses.join(", ")) },
  figure("revision", "Revision", format.count, 1),
].map((column) => ({ ...column, fixed: true }));

const LEADER_COLUMNS = [
  {
    id: "rank",
    name: "#",
    fixed: true,
    cell: ({ rank: place }) =>
      shown(place, (rank) => el("span", { class: "rank", "data-rank": rank }, format.count(rank)), "there is no ranking"),
  },
  { id: "name", name: "Volunteer", fixed: true, cell: peerLink },
  { ...figure("rows", "Computed", format.compact, 3), fixed: true },
  { id: "signed", name: "Signed", fixed: true, numeric: true, cell: signed },
  { ...figure("hours", "Hours", format.hours), fixed: true },
];

function memoryName({ name, short, about }) {
  return el(
    "span",
    { class: "peer", title: about || null },
    el("bdi", { class: "name" }, name),
    " ",
    el("code", { class: "short" }, short),
  );
}

function servedShards({ served, shards }) {
  return [format.count(served), el("small", {}, ` / ${format.count(shards)}`)];
}

/** The fewest that any shard has, and the mean; a warning where one has fewer than are wanted. */
function replicaCounts({ replicas_min: fewest, replicas_mean: mean, replicas_wanted: wanted, below_two: few }) {
  const numbers = [format.count(fewest), el("small", {}, " / "), format.compact(mean)];
  if (fewest >= wanted) return numbers;
  const title = `${format.counted(few, "shard")} with fewer than ${wanted} replicas`;
  const level = fewest ? "warn" : "bad";
  return [el("span", { class: "badge", "data-level": level, title }, icon(level), ...numbers)];
}

/** How often two hosts were asked for the same passages; a warning where one left some out, or lied. */
function hostChecks({ checks, omissions, lies, caught }) {
  if (!omissions && !lies) return [shown(checks, format.count)];
  const found = [...(omissions ? [format.counted(omissions, "omission")] : []), ...(lies ? [format.counted(lies, "lie")] : [])];
  const title = `left out passages or lied: ${caught.map((peer) => peer.slice(-8)).join(", ")}`;
  const numbers = [format.count(checks), el("small", {}, ` / ${found.join(", ")}`)];
  return [el("span", { class: "badge", "data-level": "bad", title }, icon("bad"), ...numbers)];
}

function steps({ step, steps: all }) {
  if (all === null || all === undefined) return shown(step, format.count);
  const meter = el("progress", { max: all || 1, value: step ?? 0, "aria-label": "steps done" });
  return el(
    "span",
    { class: "steps" },
    shown(step, format.count),
    el("small", {}, `/ ${format.count(all)}`),
    meter,
  );
}

function pair(middle, worst) {
  return el(
    "span",
    {},
    shown(middle, format.milliseconds),
    el("small", {}, " / "),
    shown(worst, format.milliseconds),
  );
}

function failureCount(failures) {
  const causes = Object.entries(failures);
  const total = causes.reduce((sum, [, number]) => sum + number, 0);
  const words = causes.map(([cause, number]) => `${format.count(number)} ${cause}`).join(", ") || "none";
  return el("span", { title: words }, format.compact(total));
}

/** Rows that trainers have signed for, and how many have. */
function signed({ signed_pairs: pairs, signed_trainers: trainers, signed_share: share }) {
  if (pairs === null) return shown(null);
  const title = share === null ? null : `${(100 * share).toFixed(1)}% of all votes`;
  return el("span", { title }, format.compact(pairs), el("small", {}, ` by ${format.count(trainers)}`));
}

/** One section with one table that pages at the server. */
function paged(id, path, list, noun, columns, options = {}) {
  let section = null;
  const load = async ({ sort, order, filter, page, perPage }) => {
    const query = {
      page,
      per_page: perPage,
      ...(options.sort ? { sort, order } : {}),
      ...(filter ? { filter } : {}),
    };
    const answer = await get(path, query);
    if (options.why) setText(byId(options.why), answer.note);
    return { total: answer.total, rows: answer[list] };
  };
  const caption = byId(`${id}-title`).textContent;
  const settings = {
    caption,
    noun,
    columns,
    load,
    perPage: PER_PAGE,
    rowClass: (row) => (row.state === "gone" ? "lost" : ""),
    ...options,
  };
  const table = new PagedTable(byId(options.host ?? `${id}-table`), settings, () => section.reload());
  section = new Section(byId(id), () => table.refresh());
  return { section, table };
}

export function makeTables() {
  const nodes = paged("nodes", "nodes", "nodes", "node", NODE_COLUMNS, { sort: "updates", order: "desc" });
  let timer = 0;
  byId("nodes-filter").addEventListener("input", ({ target }) => {
    clearTimeout(timer);
    timer = setTimeout(() => nodes.table.filter(target.value.trim()), FILTER_WAIT_MS);
  });
  byId("tiles").addEventListener("click", ({ target }) => {
    if (target.closest(".gone-link")) nodes.table.sortBy("state", "asc");
    if (target.closest(".unsteady-link")) nodes.table.sortBy("unsteady", "desc");
  });
  const trainers = paged("trainers", "trainers", "trainers", "trainer", TRAINER_COLUMNS);
  const memories = paged("memories", "memories", "memories", "memory", MEMORY_COLUMNS, {
    plural: "memories",
    rowClass: (row) => (row.replicas_min === 0 ? "lost" : ""),
  });
  const leaders = paged("volunteers", "leaderboard", "nodes", "volunteer", LEADER_COLUMNS, {
    host: "leaders-table",
    why: "leaders-why",
    perPage: 10,
    rowClass: null,
  });
  return [nodes.section, trainers.section, memories.section, leaders.section];
}
