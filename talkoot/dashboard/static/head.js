// The state of the swarm in words, its figures, and how old they are.

import { get } from "./api.js";
import { byId, copyButton, el, fill, icon, setText, shown, svg } from "./dom.js";
import * as format from "./format.js";

const MARKS = { ok: "✓", warn: "!", bad: "✕", unknown: "?" };
const SPARK_POINTS = 60;
const SPARK_RANGE_S = 3600;
const SLOW_S = 2; // at which deploy/prometheus/rules.yml warns of nodes and trainers too

/** The last reading, and how far this machine's clock is from the server's. */
export const reading = { swarm: null, heardAt: 0 };

/** Seconds since the swarm was read; null when it never was. */
export function ageNow() {
  const age = reading.swarm?.age_s ?? null;
  return age === null ? null : age + (performance.now() - reading.heardAt) / 1000;
}

/** The server's clock, unix seconds: this machine's may be wrong. */
export function serverNow() {
  const { swarm } = reading;
  return swarm?.read_at ? swarm.read_at + ageNow() : Date.now() / 1000;
}

export function showSwarm(swarm) {
  setText(byId("swarm-name"), swarm.name);
  showState(swarm.state, swarm.name);
  showTiles(swarm);
  showMemories(swarm.memories);
  for (const box of document.querySelectorAll("[data-command]")) {
    const command = swarm.join[box.dataset.command];
    showCommand(box, command ?? "");
    box.parentElement.hidden = !command;
  }
  byId("by-invite").hidden = Boolean(swarm.join.node);
  setText(
    byId("versions"),
    `Talkoot ${swarm.software_version}, protocol ${swarm.protocol_version}, swarm ${swarm.swarm_id}`,
  );
  setText(byId("own-state"), ownState(swarm.dashboard));
  showAge();
}

function ownState({ longest_lag_s: lag, unsteady }) {
  const failing = unsteady.length ? ` It fails again and again: ${unsteady.join(", ")}.` : "";
  const slow = lag > SLOW_S ? " Its machine may be overloaded." : "";
  return `In the last two minutes, this dashboard paused for at most ${format.milliseconds(1000 * lag)}.${slow}${failing}`;
}

function showState(state, name) {
  const level = state.level in MARKS ? state.level : "unknown";
  const box = byId("state");
  if (box.dataset.level !== level) {
    box.dataset.level = level;
    box.firstElementChild.replaceWith(icon(level));
  }
  setText(byId("state-words"), state.words);
  document.title = `${MARKS[level]} ${name}: ${state.words} – Talkoot`;
}

export function showAge() {
  const age = ageNow();
  const { swarm } = reading;
  if (!swarm) return;
  const old = age !== null && age > Math.max(30, 4 * swarm.refresh_s);
  const box = byId("age");
  box.classList.toggle("old", old);
  setText(box, age === null ? "not read yet" : `read ${format.duration(age)} ago`);
  box.title =
    swarm.read_at === null
      ? ""
      : `at ${format.moment(swarm.read_at)}, every ${format.duration(swarm.refresh_s)}`;
  document.body.classList.toggle("stale", old || swarm.unreachable_since !== null);
}

/** What is about memories stands on the page only where there are some. */
function showMemories({ count, queries_per_s: rate }) {
  for (const element of document.querySelectorAll("[data-with-memories]")) element.hidden = !count;
  document.body.classList.toggle("with-memories", count > 0);
  setText(byId("memories-note"), `${format.rate(rate)} queries per second`);
}

function showCommand(box, command) {
  if (box.dataset.text === command) return;
  box.dataset.text = command;
  box.replaceChildren(
    el("div", { class: "command-text", tabindex: "0", role: "group", "aria-label": "Command" }, el("code", {}, command)),
    copyButton(() => command),
  );
}

const TILES = [
  { id: "nodes", value: (s) => shown(s.nodes.live, format.count), sub: nodesInTrouble, spark: "live_nodes" },
  { id: "experts", value: (s) => shown(s.experts.live, format.count), sub: share, spark: "live_experts" },
  { id: "replicas", value: (s) => shown(s.replicas, format.compact), sub: perExpert },
  { id: "trainers", value: (s) => shown(s.trainers, format.count), sub: requests },
  { id: "speed", value: (s) => shown(s.tokens_per_s, format.compact), sub: traffic, spark: "tokens_per_s" },
  { id: "loss", value: (s) => shown(s.validation_loss, format.loss), sub: bits, spark: "validation_loss" },
];

function nodesInTrouble({ nodes, unreachable_since: since }) {
  if (nodes.gone === null) return [shown(null)];
  if (since !== null) return ["when last seen"];
  const link = (kind, words) => el("a", { href: "#nodes", class: kind }, words);
  return [
    nodes.gone ? link("gone-link", `${format.count(nodes.gone)} gone`) : "none missing",
    ...(nodes.unsteady ? [", ", link("unsteady-link", `${format.count(nodes.unsteady)} unsteady`)] : []),
  ];
}

function share({ experts }) {
  if (experts.total === null) return [shown(null)];
  const percent = experts.total ? Math.floor((1000 * experts.live) / experts.total) / 10 : 0; // 99.99 % is not all
  return [`of ${format.count(experts.total)}, ${percent} %`];
}

function perExpert({ replicas, experts }) {
  if (replicas === null) return [shown(null)];
  return [experts.live ? `${(replicas / experts.live).toFixed(1)} per live expert` : "no live expert"];
}

function requests({ requests_per_s: rate }) {
  return [shown(rate, format.rate), " calls/s"];
}

function traffic({ bytes_per_s: rate }) {
  return [shown(rate, (value) => `${format.bytes(value)}/s`), " on the wire"];
}

function bits({ bits_per_byte: value }) {
  return ["nats; ", shown(value, format.loss), " bits/byte"];
}

function showTiles(swarm) {
  for (const { id, value, sub } of TILES) {
    const tile = byId(`tile-${id}`);
    tile.querySelector(".figure").replaceChildren(...[value(swarm)].flat());
    fill(tile.querySelector(".sub"), ...sub(swarm));
  }
}

/** Reads and draws the small lines in the tiles. */
export async function showSparks() {
  const since = serverNow() - SPARK_RANGE_S;
  await Promise.all(
    TILES.filter((tile) => tile.spark).map(async ({ id, spark }) => {
      const { series } = await get("history", { metric: spark, since, points: SPARK_POINTS });
      drawSpark(byId(`tile-${id}`).querySelector(".spark"), series[0]?.points ?? [], id !== "loss");
    }),
  );
}

function drawSpark(box, points, startsAtZero) {
  const known = points.filter(([, value]) => value !== null);
  if (!known.length) return box.replaceChildren();
  if (known.length === 1) known.push([known[0][0] + 1, known[0][1]]); // a level line
  const [width, height] = [120, 32];
  const values = known.map(([, value]) => value);
  const low = startsAtZero ? 0 : Math.min(...values);
  const high = Math.max(...values);
  const [first, last] = [known[0][0], known.at(-1)[0]];
  const x = (t) => ((t - first) / (last - first || 1)) * width;
  const y = (value) => (high === low ? height / 2 : 2 + (1 - (value - low) / (high - low)) * (height - 4));
  const line = known
    .map(([t, value], i) => `${i ? "L" : "M"}${x(t).toFixed(1)} ${y(value).toFixed(1)}`)
    .join("");
  const area = `${line}L${width} ${height}L0 ${height}Z`;
  box.replaceChildren(
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" },
      svg("path", { class: "spark-area", d: area }),
      svg("path", { class: "spark-line", d: line, "vector-effect": "non-scaling-stroke" }),
    ),
  );
}

/** Says what is wrong, and beside it what changes each second, which is not read aloud; no words, no banner. */
export function showBanner({ words, ages }, canRetry) {
  byId("banner").hidden = !words;
  setText(byId("banner-words"), words);
  setText(byId("banner-ages"), ages);
  byId("banner-retry").hidden = !canRetry;
}
