// The experts of a layer: a heat map, what it shows in words, and the table behind it.

import { get } from "./api.js";
import { byId, choice, el, fill, setText } from "./dom.js";
import * as format from "./format.js";
import { Heatmap, LARGEST_CELL, TALLEST } from "./heatmap.js";
import { openExpert } from "./panel.js";
import { Section } from "./section.js";
import { PagedTable } from "./table.js";

const HEAT = [1, 2, 3, 4, 5, 6].map((step) => `--heat-${step}`);
const NEVER = Infinity; // no update yet
const AGES = [
  [60, "in the last minute"],
  [600, "1 – 10 min ago"],
  [3600, "10 – 60 min ago"],
  [86400, "1 – 24 h ago"],
  [NEVER, "days ago"],
];
const WIDEST = 256; // columns; a longer row of the grid goes on in the next line
const NAMED = 12;
const EDGE = 8;
const REST_MS_PER_EXPERT = 0.1; // 65,536 experts are half a megabyte of JSON
const LISTED = 12; // layers as buttons; more become a list to choose from
const HELP =
  "Nodes that host fewer experts than their --experts add missing replicas within minutes; the rest of their room is for experts whose hosts disappear. If replicas stay missing, the swarm needs more volunteers, or nodes with a larger --experts.";

const MEASURES = {
  replicas: {
    words: "Replicas",
    values: (layer) => layer.replicas,
    write: (value) => format.counted(value, "replica"),
    cell: format.count,
    by: "replicas",
    edge: "Fewest replicas",
    sign: 1,
  },
  load: {
    words: "Load",
    values: (layer) => layer.recent_rows,
    write: shareOfRows,
    cell: share,
    by: "share of rows",
    edge: "Busiest",
    sign: -1,
    label: (from, to) => (from === to ? share(from) : `${share(from)} – ${share(to)}`),
    about: unevenness,
  },
  updates: {
    words: "Updates",
    values: (layer) => layer.updates,
    write: (value) => format.counted(value, "update"),
    cell: format.count,
    by: "updates",
    edge: "Least trained",
    sign: 1,
  },
  freshness: {
    words: "Freshness",
    values: (layer) => layer.updated_ago_s.map((age) => age ?? NEVER),
    write: ago,
    cell: ago,
    by: "last update",
    edge: "Longest without an update",
    sign: -1,
    scale: scaleOfAges,
  },
};

const view = { layer: 0, measure: "replicas", data: null, layers: "" };
let heatmap;
let table;
let section;

export function makeGrid() {
  heatmap = new Heatmap(byId("heatmap"), (i) => openExpert(uid(i)), point);
  byId("measures").append(
    choice(
      "What the colours show",
      Object.entries(MEASURES).map(([id, { words }]) => [id, words]),
      view.measure,
      (id) => {
        view.measure = id;
        draw();
      },
    ),
  );
  table = makeTable();
  byId("grid-as-table").addEventListener("click", toggleTable);
  addEventListener("theme", draw);
  section = new Section(byId("grid"), load, () => (view.data?.replicas.length ?? 0) * REST_MS_PER_EXPERT);
  return section;
}

/** Offers the swarm's layers. */
export function showLayers(layers) {
  const now = JSON.stringify(layers);
  if (now === view.layers) return;
  view.layers = now;
  if (!layers.some(({ layer }) => layer === view.layer)) view.layer = layers[0]?.layer ?? 0;
  byId("layers").hidden = layers.length < 2;
  byId("layers").replaceChildren(layers.length > LISTED ? layerList(layers) : layerButtons(layers));
}

function layerButtons(layers) {
  const options = layers.map(({ layer }) => [layer, layers.length > 4 ? String(layer) : `Layer ${layer}`]);
  return choice("Layer", options, view.layer, chooseLayer);
}

function layerList(layers) {
  const options = layers.map(({ layer }) =>
    el("option", { value: layer, selected: layer === view.layer }, `Layer ${layer}`),
  );
  return el(
    "select",
    { "aria-label": "Layer", onchange: (event) => chooseLayer(Number(event.target.value)) },
    ...options,
  );
}

function chooseLayer(layer) {
  view.layer = layer;
  section.reload();
}

async function load() {
  const layer = view.layer;
  const data = await get("experts", { layer });
  if (layer !== view.layer) return section.invalidate();
  view.data = data;
  draw();
}

function columns() {
  const last = view.data.grid.at(-1);
  const isLine = view.data.grid.length === 1;
  return Math.min(WIDEST, isLine ? Math.ceil(Math.sqrt(last)) : last);
}

/** The expert at a place in the flat arrays: all dimensions but the last are rows. */
function uid(index) {
  const coordinates = [];
  for (const size of view.data.grid.toReversed()) {
    coordinates.unshift(index % size);
    index = Math.floor(index / size);
  }
  return [view.data.layer, ...coordinates].join(".");
}

function draw() {
  if (!view.data) return; // its answer is still to come
  const { replicas } = view.data;
  const values = MEASURES[view.measure].values(view.data);
  const scale = (MEASURES[view.measure].scale ?? scaleOf)(values, replicas);
  const levels = Uint8Array.from(values, (value, i) => (replicas[i] ? 1 + scale.step(value) : 0));
  layOut(columns(), levels.length);
  heatmap.show(levels, columns(), scale.palette, "--missing");
  byId("heatmap").setAttribute(
    "aria-label",
    `Experts of layer ${view.data.layer}: ${MEASURES[view.measure].words}`,
  );
  fill(byId("grid-side"), ...sideOf(levels, scale, replicas));
  if (!byId("grid-table").hidden) table.refresh();
}

/** A map that is wider than it is tall gets the room; one of few cells takes no more than they need. */
function layOut(across, cells) {
  const map = byId("grid-map");
  map.classList.toggle("wide", across ** 2 > 1.4 * cells);
  map.style.setProperty("--map-width", `${Math.min(TALLEST, across * LARGEST_CELL)}px`);
}

/** Six steps. Few different values get a step each; else the steps are equally wide. */
function scaleOf(values, replicas) {
  let [low, high] = [Infinity, -Infinity];
  values.forEach((value, i) => {
    if (!replicas[i]) return;
    low = Math.min(low, value);
    high = Math.max(high, value);
  });
  if (low > high) [low, high] = [0, 0];
  if (view.measure !== "updates") low = view.measure === "load" ? 0 : 1;
  high = Math.max(high, low);
  const width = high - low < HEAT.length ? 1 : (high - low) / (HEAT.length - 1);
  const steps = Math.min(HEAT.length, high - low + 1);
  const step = (value) => Math.min(steps - 1, Math.max(0, Math.round((value - low) / width)));
  const palette = Array.from({ length: steps }, (_, i) => HEAT[spread(i, steps)]);
  const { label = labelOf } = MEASURES[view.measure];
  return { step, palette, labels: palette.map((_, i) => label(...edges(low, width, i))) };
}

/** The fresher the darker; what has not learned where it is now is lightest. */
function scaleOfAges() {
  const labels = [...AGES.map(([, words]) => words), "no update yet"];
  const step = (age) => (age === NEVER ? AGES.length : AGES.findIndex(([below]) => age < below));
  return { step, palette: HEAT.toReversed(), labels };
}

function ago(age) {
  return age === NEVER ? "no update yet" : `updated ${format.duration(age)} ago`;
}

/** Few steps use the whole range of colours too, but one alone is in the middle. */
function spread(i, steps) {
  return steps === 1 ? 2 : Math.round((i * (HEAT.length - 1)) / (steps - 1));
}

/** The values of a step, from the first to the last, both included. */
function edges(low, width, step) {
  if (width === 1) return [low + step, low + step];
  const from = Math.max(low, low + (step - 0.5) * width);
  return [Math.ceil(from), Math.ceil(low + (step + 0.5) * width) - 1];
}

function labelOf(from, to) {
  return from === to ? format.compact(from) : `${format.compact(from)} – ${format.compact(to)}`;
}

/** Of all the layer's rows lately. */
function share(rows) {
  const all = view.data.recent_rows.reduce((sum, one) => sum + one, 0);
  return all ? format.percent(rows / all) : format.UNKNOWN;
}

function shareOfRows(rows) {
  return `${share(rows)} of rows`;
}

function unevenness({ busiest_over_mean: most, starving }) {
  if (most === null) return "No rows lately: nobody trains.";
  const few = starving ? `${format.counted(starving, "expert")} starve` : "no expert starves";
  const words = starving === 1 ? "1 expert starves" : few;
  return `The busiest expert has ${format.rate(most)} times the mean; ${words} (less than a tenth of it).`;
}

function sideOf(levels, scale, replicas) {
  const counts = new Array(scale.palette.length + 1).fill(0);
  for (const level of levels) counts[level] += 1;
  const bars = scale.labels.map((text, i) => bar(text, counts[i + 1], levels.length, scale.palette[i]));
  return [
    el("h3", {}, `Experts by ${MEASURES[view.measure].by}`),
    ...(MEASURES[view.measure].about ? [el("p", { class: "note" }, MEASURES[view.measure].about(view.data))] : []),
    el("ul", { class: "bars" }, ...bars, bar("no host", counts[0], levels.length, "--missing")),
    ...hostless(replicas, counts[0]),
    ...(view.measure === "load" ? starving(view.data) : []),
    ...edgeOf(replicas),
  ];
}

function bar(text, number, of, property) {
  const swatch = el("span", { class: property === "--missing" ? "swatch crossed" : "swatch" });
  swatch.style.background = `var(${property})`;
  const fill = el("span", { class: "bar-fill" });
  fill.style.width = `${of ? (100 * number) / of : 0}%`;
  fill.style.background = `var(${property})`;
  return el(
    "li",
    {},
    swatch,
    el("span", { class: "bar-label" }, text),
    el("span", { class: "bar" }, fill),
    el("span", { class: "bar-count" }, format.count(number)),
  );
}

/** Infinity equals itself, so no difference will do. */
function compare(a, b) {
  return a === b ? 0 : a < b ? -1 : 1;
}

function hostless(replicas, number) {
  if (number) return [...named("Without a host", number, (i) => !replicas[i]), el("p", { class: "note" }, HELP)];
  if (view.measure !== "replicas") return [el("p", { class: "note" }, "Every expert of this layer has a host.")];
  const alone = replicas.filter((hosts) => hosts === 1).length;
  const words = alone ? `${format.counted(alone, "expert")} ${alone === 1 ? "has" : "have"} only one. ${HELP}` : "";
  return [el("p", { class: "note" }, `Every expert of this layer has a host. ${words}`.trim())];
}

/** Those that have a host and less than a tenth of the mean rows, as the server counts them too. */
function starving({ starving: number, recent_rows: rows, replicas }) {
  if (!number) return [];
  const hosted = replicas.filter(Boolean).length;
  const few = (0.1 * rows.reduce((sum, one) => sum + one, 0)) / hosted;
  return named("Starving", number, (i) => replicas[i] && rows[i] < few);
}

/** The first experts of a kind, and how many more there are. */
function named(title, number, isOne) {
  const links = [];
  for (let i = 0; i < view.data.replicas.length && links.length < NAMED; i += 1) {
    if (isOne(i)) links.push(el("a", { class: "chip", href: `#/expert/${uid(i)}` }, uid(i)));
  }
  const more =
    number > NAMED ? [el("span", { class: "note" }, `and ${format.count(number - NAMED)} more`)] : [];
  return [el("h3", {}, title), el("p", { class: "chips" }, ...links, ...more)];
}

/** The experts that want to be looked at: of what the colours show, the busiest or the furthest behind. */
function edgeOf(replicas) {
  const { values, write, edge, sign } = MEASURES[view.measure];
  const all = values(view.data);
  const hosted = [];
  for (let i = 0; i < all.length; i += 1) if (replicas[i]) hosted.push(i);
  hosted.sort((a, b) => sign * compare(all[a], all[b]) || a - b);
  if (!hosted.length || all[hosted[0]] === all[hosted.at(-1)]) return []; // all alike
  const items = hosted.slice(0, EDGE).map((i) => {
    return el(
      "li",
      {},
      el("a", { href: `#/expert/${uid(i)}` }, uid(i)),
      el("span", { class: "note" }, write(all[i])),
    );
  });
  return [el("h3", {}, edge), el("ol", { class: "edge" }, ...items)];
}

function wordsOf(index) {
  if (!view.data.replicas[index]) return "no host";
  return Object.values(MEASURES)
    .map(({ values, write }) => write(values(view.data)[index]))
    .join(", ");
}

function point(index, place) {
  const tip = byId("tip");
  tip.hidden = index < 0;
  if (index < 0) return;
  tip.replaceChildren(el("strong", {}, uid(index)), el("span", {}, wordsOf(index)));
  setText(byId("heatmap-cell"), `Expert ${uid(index)}: ${wordsOf(index)}`);
  const half = tip.offsetWidth / 2;
  const x = Math.min(Math.max(place.x, half + 8), document.documentElement.clientWidth - half - 8);
  const above = place.y > tip.offsetHeight + 16;
  const y = above ? place.y - tip.offsetHeight - 8 : place.y + place.height + 8;
  tip.style.transform = `translate(${Math.round(x - half)}px, ${Math.round(y)}px)`;
}

function toggleTable() {
  const host = byId("grid-table");
  host.hidden = !host.hidden;
  byId("grid-map").hidden = !host.hidden;
  byId("grid-as-table").setAttribute("aria-pressed", String(!host.hidden));
  if (!host.hidden) table.refresh();
  else heatmap.draw();
}

function makeTable() {
  const measured = Object.entries(MEASURES).map(([id, { words, values, cell }]) => ({
    id,
    name: words,
    numeric: true,
    cell: ({ index }) => cell(values(view.data)[index]),
  }));
  return new PagedTable(byId("grid-table"), {
    caption: "Experts of the layer",
    noun: "expert",
    sort: "index",
    order: "asc",
    perPage: 50,
    columns: [
      { id: "index", name: "Expert", cell: ({ uid: id }) => el("a", { href: `#/expert/${id}` }, id) },
      ...measured,
    ],
    rowClass: ({ index }) => (view.data.replicas[index] ? "" : "lost"),
    load: pageOfExperts,
  });
}

async function pageOfExperts({ sort, order, page, perPage }) {
  const length = view.data?.replicas.length ?? 0;
  const indices = Array.from({ length }, (_, i) => i);
  const values = length ? MEASURES[sort]?.values(view.data) : null;
  if (values) indices.sort((a, b) => compare(values[a], values[b]));
  if (order === "desc") indices.reverse();
  const rows = indices.slice((page - 1) * perPage, page * perPage);
  return { total: length, rows: rows.map((index) => ({ index, uid: uid(index) })) };
}
