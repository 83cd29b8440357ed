// The panel about one node or one expert. The address names it, so that it can be shared and gone back from.

import { get } from "./api.js";
import { byId, copyButton, el, fill, shown } from "./dom.js";
import * as format from "./format.js";
import { serverNow } from "./head.js";
import { Plot } from "./plot.js";
import { Section } from "./section.js";
import { nodeBadges, peerName, stateBadge } from "./tables.js";

const REACHED = { direct: "directly", punched: "through its router", relayed: "through a relay" };

const ROUTE = /^#\/(node|expert)\/(.+)$/;

let section;
let route = null;
let plots = [];
let opener = null;

export function makePanel() {
  const panel = byId("panel");
  section = new Section(panel, load);
  byId("panel-close").addEventListener("click", close);
  addEventListener("keydown", (event) => event.key === "Escape" && !panel.hidden && close());
  addEventListener("hashchange", follow);
  addEventListener("theme", () => plots.forEach((plot) => plot.redraw()));
  follow();
  return section;
}

export function openExpert(uid) {
  location.hash = `#/expert/${uid}`;
}

function close() {
  history.pushState(null, "", location.pathname + location.search);
  follow();
}

function follow() {
  const found = ROUTE.exec(location.hash);
  const panel = byId("panel");
  clear();
  route = found && { kind: found[1], id: decode(found[2]) };
  if (route) {
    if (panel.hidden) opener = document.activeElement;
    byId("panel-kind").textContent = route.kind === "node" ? "Node" : "Expert";
    byId("panel-title").textContent = route.id;
    panel.hidden = false;
    leaveTheRest(getComputedStyle(panel).width === `${document.documentElement.clientWidth}px`);
    panel.scrollTop = 0;
    byId("panel-title").focus({ preventScroll: true });
    section.reload();
  } else if (!panel.hidden) {
    panel.hidden = true;
    leaveTheRest(false);
    returnFocus();
  }
}

/** Nobody should come by the keyboard to what a panel as wide as the window hides. */
function leaveTheRest(inert) {
  for (const part of document.querySelectorAll("body > :is(.skip, header, .banner, main, footer)")) part.inert = inert;
}

/** To what opened the panel: a table may have drawn its link anew since. */
function returnFocus() {
  const href = opener?.getAttribute("href");
  const same = opener?.isConnected || !href ? opener : document.querySelector(`main a[href="${CSS.escape(href)}"]`);
  (same ?? byId("heatmap")).focus({ preventScroll: true });
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody's half-copied address
  }
}

function clear() {
  plots.forEach((plot) => plot.destroy());
  plots = [];
  section.forget();
  byId("panel-body").replaceChildren();
}

async function load() {
  if (!route) return;
  const asked = route;
  const path = asked.kind === "node" ? "nodes" : "experts";
  const answer = await get(`${path}/${encodeURIComponent(asked.id)}`);
  if (asked !== route) return;
  if (asked.kind === "node") showNode(answer);
  else showExpert(answer);
}

function showNode(node) {
  byId("panel-title").replaceChildren(...peerName(node));
  fill(
    byId("panel-body"),
    el("p", {}, ...nodeBadges(node)),
    facts([
      [
        "Key",
        el(
          "span",
          { class: "key" },
          el("code", {}, node.peer_id),
          copyButton(() => node.peer_id),
        ),
      ],
      ["Seen", shown(node.seen_at, (t) => `${format.duration(serverNow() - t)} ago`)],
      ["Up", shown(node.up_s, format.duration)],
      ["Since", shown(node.started_at || null, format.moment)],
      ["Experts", format.count(node.experts) + (node.capacity ? ` of at most ${format.count(node.capacity)}` : "")],
      ["Speed", shown(node.rows_per_s, (rate) => `${format.rate(rate)} rows/s`)],
      ["Latency", shown(node.latency_ms, format.milliseconds, "no trainer has measured it")],
      [
        "Reached",
        REACHED[node.reach] ?? shown(null),
      ],
      ["Version", el("bdi", {}, `${node.software_version}, protocol ${node.protocol_version}`)],
      [
        "Computed",
        `${format.counted(node.updates, "update")}, ${format.counted(node.rows, "row")}, ${format.hours(node.hours)} hours`,
      ],
      ["Signed", shown(node.signed_pairs, () => signed(node))],
      ...(node.memory_shards || node.memory_queries ? [["Memory", memory(node)]] : []),
      [
        "Addresses",
        el(
          "ul",
          { class: "plain" },
          ...node.addresses.map((address) => el("li", {}, el("code", {}, address))),
        ),
      ],
    ]),
    el("h3", {}, "Hosts ", el("span", { class: "note" }, format.counted(node.uids_total, "expert"))),
    el(
      "p",
      { class: "chips" },
      ...node.uids.map((uid) => el("a", { class: "chip", href: `#/expert/${encodeURIComponent(uid)}` }, uid)),
      ...unlisted(node),
    ),
  );
}

/** What callers have signed for, and which ones. */
function signed({ signed_pairs, signed_trainers, signed_queries, checks_passed, checks_failed, signers }) {
  const parts = [`${format.count(signed_pairs)} rows by ${format.counted(signed_trainers, "caller")}`];
  if (signed_queries) parts.push(format.counted(signed_queries, "query", "queries"));
  if (checks_passed || checks_failed) {
    parts.push(`${format.counted(checks_passed, "check")} passed, ${format.count(checks_failed)} failed`);
  }
  const names = signers.map((signer) => el("li", {}, ...peerName(signer), ` ${format.count(signer.pairs)}`));
  return el("div", {}, parts.join(", "), el("ul", { class: "plain" }, ...names));
}

function memory({ memory_shards: shards, memory_bytes: bytes, memory_queries: queries, memory_queries_per_s: rate }) {
  const speed = shown(rate, (value) => `${format.rate(value)} a second`);
  return el(
    "span",
    {},
    `${format.counted(shards, "shard")}, ${format.bytes(bytes)}, ${format.counted(queries, "query", "queries")}, `,
    speed,
  );
}

function unlisted({ uids, uids_total: total }) {
  return total > uids.length
    ? [el("span", { class: "note" }, `and ${format.count(total - uids.length)} more`)]
    : [];
}

function facts(pairs) {
  return el(
    "dl",
    { class: "facts" },
    ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
  );
}

function showExpert(expert) {
  byId("panel-title").textContent = expert.uid;
  if (!plots.length) makeExpertBody(expert);
  fill(byId("panel-body").firstElementChild, ...replicas(expert));
  const until = serverNow();
  const firsts = expert.series.map(({ points }) => points[0]?.[0] ?? until);
  const start = Math.min(...firsts, until - 60);
  plots.forEach((plot, i) =>
    plot.show(
      expert.series.filter(({ name }) => name === HISTORIES[i].series),
      "",
      start,
      until,
    ),
  );
}

const HISTORIES = [
  { series: "updates", title: "Updates", write: format.count, whole: true },
  { series: "replicas", title: "Replicas", write: format.count, fromZero: true, whole: true },
];

function makeExpertBody() {
  plots = HISTORIES.map((history) => new Plot({ ...history, sync: "expert" }));
  byId("panel-body").replaceChildren(el("div"), ...plots.map((plot) => plot.element));
}

function replicas({ replicas: all }) {
  if (!all.length)
    return [
      el(
        "p",
        { class: "lonely" },
        stateBadge("gone"),
        " No node hosts this expert. A node with room takes it over.",
      ),
    ];
  return [
    el("h3", {}, format.counted(all.length, "replica")),
    el("ul", { class: "replicas" }, ...all.map(replica)),
  ];
}

function replica(one) {
  return el(
    "li",
    {},
    el("a", { class: "peer", href: `#/node/${encodeURIComponent(one.peer_id)}` }, ...peerName(one)),
    stateBadge(one.state),
    el(
      "p",
      { class: "note" },
      [
        format.counted(one.updates, "update"),
        `${format.counted(one.recent_rows, "row")} lately`,
        one.updated_ago_s === null ? "no update yet" : `updated ${format.duration(one.updated_ago_s)} ago`,
        `announcement valid for ${format.duration(one.expires_in_s)}`,
      ].join(", "),
    ),
  );
}
