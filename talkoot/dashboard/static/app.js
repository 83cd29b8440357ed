// Puts the page together: each reading of the swarm goes to its head at once, and tells the sections to read theirs.

import { Readings } from "./api.js";
import { makeCharts } from "./charts.js";
import { byId } from "./dom.js";
import * as format from "./format.js";
import { makeGrid, showLayers } from "./grid.js";
import { ageNow, reading, showAge, showBanner, showSparks, showSwarm } from "./head.js";
import { makePanel } from "./panel.js";
import { Section } from "./section.js";
import { makeTables } from "./tables.js";

const SPARKS_REST_MS = 15000;
const LONGEST_BLANK_MS = 3000;
const HELP =
  "Check the network of the dashboard's machine. If it works, all peers that the dashboard knows have gone. It goes on when one of them comes back; if none does, restart it with a new invite.";
const sparks = new Section(byId("overview"), showSparks, () => SPARKS_REST_MS);
const sections = [sparks, makeGrid(), makeCharts(), ...makeTables(), makePanel()];
const connection = { lostAt: 0, retryAt: 0 };
const readings = new Readings(hear, lose);

function hear(swarm) {
  const isNew = swarm.read_at !== reading.swarm?.read_at || connection.lostAt > 0;
  reading.swarm = swarm;
  reading.heardAt = performance.now();
  connection.lostAt = 0;
  showSwarm(swarm);
  showLayers(swarm.layers);
  if (isNew) {
    sections.forEach((section) => section.invalidate());
    dispatchEvent(new Event("reading"));
  }
  tick();
}

function lose(waitMs) {
  connection.lostAt ||= Date.now();
  connection.retryAt = Date.now() + waitMs;
  tick();
}

function tick() {
  showAge();
  showBanner(trouble(), connection.lostAt > 0);
}

function trouble() {
  const age = ageNow();
  const old = age === null ? "" : `What you see is ${format.duration(age)} old.`;
  if (connection.lostAt) {
    const wait = (connection.retryAt - Date.now()) / 1000;
    const next = wait > 0 ? `Next try in ${format.duration(wait)}.` : "Trying again.";
    return {
      words: `The dashboard's server has not answered since ${format.clock(connection.lostAt / 1000)}.`,
      ages: `${old} ${next}`,
    };
  }
  const since = reading.swarm?.unreachable_since ?? null;
  if (since === null) return { words: sentence(reading.swarm?.warning), ages: "" };
  return { words: `The swarm has been out of reach since ${format.clock(since)}. ${HELP}`, ages: old };
}

function sentence(words) {
  return words ? `${words[0].toUpperCase()}${words.slice(1)}.` : "";
}

/** Sections whose size depends on their figures appear together, so that none pushes another about. */
function appear() {
  document.body.classList.remove("unread");
}

Promise.all(sections.map((section) => section.settled)).then(() => requestAnimationFrame(appear));
setTimeout(appear, LONGEST_BLANK_MS);
byId("banner-retry").addEventListener("click", () => readings.connect());
setInterval(() => document.hidden || tick(), 1000);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return readings.rest();
  tick();
  readings.connect();
});
if (!document.hidden) readings.connect();
