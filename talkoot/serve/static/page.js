// The page to try the model: a prompt, an answer that is written while one looks, and what it took.

import { byId, copyButton, el, setText } from "./shared/dom.js";
import { count, counted } from "./shared/format.js";
import { complete } from "./stream.js";

const LOOK_EVERY_MS = 5000;

let status = null;
/** While an answer is written. */
let writing = null;

async function look() {
  try {
    status = await (await fetch("status")).json();
    showStatus();
  } catch {
    setText(byId("state"), "The server does not answer.");
  }
  setTimeout(look, LOOK_EVERY_MS);
}

function showStatus() {
  const { model, context, experts, from } = status;
  document.title = `${model} – Talkoot`;
  setText(byId("model"), model);
  const where = from === "swarm" ? "live in the swarm" : "on this machine";
  const live = `${count(experts.live)} of ${counted(experts.total, "expert")}`;
  setText(byId("state"), `${live} ${where}, context of ${counted(context, "token")}`);
  byId("tokens").max = status.max_tokens;
  byId("key-field").hidden = !status.needs_key;
  setText(byId("prompt-label"), status.answers_questions ? "Question" : "Text to continue");
  setText(byId("go"), status.answers_questions ? "Ask" : "Continue");
  byId("ask").classList.toggle("asks", status.answers_questions);
  if (!writing) byId("go").disabled = false;
}

function asked() {
  const request = {
    model: status.model,
    prompt: byId("prompt").value,
    temperature: byId("temperature").valueAsNumber,
    top_p: byId("top-p").valueAsNumber,
    max_tokens: byId("tokens").valueAsNumber,
  };
  if (byId("seed").value) request.seed = byId("seed").valueAsNumber;
  if (byId("stop-text").value) request.stop = byId("stop-text").value;
  return request;
}

async function write() {
  if (writing || !status || !byId("ask").reportValidity()) return;
  const request = asked();
  writing = new AbortController();
  begin(request.prompt);
  const began = performance.now();
  const seen = { first: null, tokens: 0, nodes: null, sources: null, end: "" };
  try {
    for await (const chunk of complete(request, byId("key").value, writing.signal)) take(chunk, seen, began);
  } catch (error) {
    if (error.name === "AbortError") seen.end = "stopped";
    else tell(error.message);
  }
  writing = null;
  finish(seen, (performance.now() - began) / 1000);
}

function begin(prompt) {
  byId("problem").hidden = true;
  byId("nodes").hidden = byId("sources").hidden = true;
  setText(byId("given"), status.answers_questions ? `${prompt}\n` : prompt);
  byId("written").replaceChildren();
  byId("answer").setAttribute("aria-busy", "true");
  setText(byId("speed"), "writing…");
  byId("go").disabled = byId("more").disabled = true;
  byId("stop").disabled = false;
}

function take(chunk, seen, began) {
  const [choice] = chunk.choices;
  if (chunk.usage) seen.tokens = chunk.usage.completion_tokens;
  if (chunk.talkoot) ({ nodes: seen.nodes, sources: seen.sources } = chunk.talkoot);
  if (!choice) return;
  if (choice.finish_reason === "stop" && !status.answers_questions) seen.end = "ended before the stop text";
  if (!choice.text) return;
  seen.first ??= performance.now() - began;
  const box = byId("answer");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
  byId("written").append(choice.text);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function finish({ first, tokens, nodes, sources, end }, seconds) {
  byId("written").normalize();
  byId("answer").setAttribute("aria-busy", "false");
  byId("go").disabled = false;
  byId("more").disabled = !byId("written").textContent;
  byId("stop").disabled = true;
  const said = [];
  if (tokens) said.push(`${counted(tokens, "token")} in ${seconds.toFixed(1)} s, ${(tokens / seconds).toFixed(1)} tokens/s`);
  if (first !== null) said.push(`first text after ${Math.round(first)} ms`);
  if (end) said.push(end);
  setText(byId("speed"), said.join("; "));
  byId("sources").hidden = !sources;
  if (sources) setText(byId("sources"), `Read: ${sources.map(named).join("; ")}`);
  byId("nodes").hidden = !nodes;
  if (nodes) setText(byId("nodes"), `Nodes that answered meanwhile: ${nodes.join(", ")}`);
}

function named({ title, source, license }) {
  return `${title || "(no title)"} (${source}, ${license || "licence not given"})`;
}

function tell(message) {
  setText(byId("problem"), message);
  byId("problem").hidden = false;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
byId("stop").addEventListener("click", () => writing?.abort());
byId("more").addEventListener("click", () => {
  byId("prompt").value = byId("given").textContent + byId("written").textContent;
  byId("prompt").focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") writing?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write();
});
const base = new URL("v1", location.href).href;
byId("base-url").append(
  el("code", { tabindex: "0", "aria-label": "base URL" }, base),
  copyButton(() => base),
);
look();
