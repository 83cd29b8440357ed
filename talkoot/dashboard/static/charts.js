// The charts over time, all over the same range.

import { get } from "./api.js";
import { byId, choice } from "./dom.js";
import * as format from "./format.js";
import { reading, serverNow } from "./head.js";
import { Plot, baseNames } from "./plot.js";
import { Section } from "./section.js";

const POINTS = 300;
const LONGEST_REST_MS = 30000;
const SHORTEST_S = 60;
const RANGES = [
  [900, "15 min"],
  [3600, "1 h"],
  [86400, "1 day"],
  [0, "All"],
];
const perSecond = (value) => (Number.isFinite(value) ? `${format.bytes(value)}/s` : format.UNKNOWN);

const CHARTS = [
  { metric: "loss", title: "Loss", unit: true, write: format.loss, ofTrainers: true },
  { metric: "bits_per_byte", title: "Bits per byte", write: format.loss, ofTrainers: true },
  { metric: "tokens_per_s", title: "Tokens per second", write: format.compact, fromZero: true, present: true },
  { metric: "live_experts", title: "Live experts", write: format.count, fromZero: true, present: true, whole: true, now: ({ experts }) => experts.live },
  { metric: "live_nodes", title: "Live nodes", write: format.count, fromZero: true, present: true, whole: true, now: ({ nodes }) => nodes.live },
  { metric: "latency_ms", title: "Latency", write: format.milliseconds, fromZero: true, present: true },
  { metric: "failures", title: "Failures by cause", unit: true, write: format.compact, fromZero: true, present: true },
  { metric: "bytes_per_s", title: "Bandwidth", write: perSecond, fromZero: true, present: true },
  { metric: "memory_replicas", title: "Replicas of shards", write: format.compact, fromZero: true, present: true, ofMemories: true },
  { metric: "memory_queries_per_s", title: "Memory queries per second", write: format.rate, fromZero: true, present: true, ofMemories: true },
];

let range = 3600;

export function makeCharts() {
  const plots = CHARTS.map((chart) => ({ ...chart, plot: new Plot({ ...chart, sync: "time" }) }));
  byId("chart-cards").append(...plots.map(({ plot }) => plot.element));
  for (const { plot, ofMemories } of plots) {
    if (ofMemories) Object.assign(plot.element, { hidden: true }).dataset.withMemories = "";
  }
  const section = new Section(byId("charts"), () => load(plots), rest);
  let shown = "";
  addEventListener("reading", () => {
    const counts = String(plots.map(({ now }) => now?.(reading.swarm)));
    if (counts !== shown) section.reload(); // tiles show it at once
    shown = counts;
  });
  byId("ranges").append(
    choice("Time shown", RANGES, range, (chosen) => {
      range = chosen;
      section.reload();
    }),
  );
  addEventListener("theme", () => plots.forEach(({ plot }) => plot.redraw()));
  return section;
}

/** A new point comes every range / POINTS at most: more often there is nothing new to draw. */
function rest() {
  return range ? Math.min((1000 * range) / POINTS, LONGEST_REST_MS) : LONGEST_REST_MS;
}

/** All charts begin together: with the range, or with the first point of any where the history is younger. */
async function load(plots) {
  const until = serverNow();
  const since = range ? until - range : 0;
  const answers = await Promise.all(
    plots.map(({ metric }) => get("history", { metric, since, points: POINTS })),
  );
  plots.forEach(({ now }, i) => {
    const { swarm } = reading; // points are means, also of what is counted: the last one is what tiles say
    if (now && swarm.read_at) answers[i].series[0]?.points.push([swarm.read_at, now(swarm)]);
  });
  const firsts = answers.flatMap(({ series }) => series.map(({ points }) => points[0]?.[0] ?? until));
  const start = Math.min(Math.max(since, Math.min(...firsts)), until - SHORTEST_S);
  const trainers = baseNames(answers.flatMap(({ series }, i) => (plots[i].ofTrainers ? series : [])));
  plots.forEach(({ plot, unit, ofTrainers }, i) =>
    plot.show(answers[i].series, unit ? answers[i].unit : "", start, until, ofTrainers ? trainers : undefined),
  );
}
