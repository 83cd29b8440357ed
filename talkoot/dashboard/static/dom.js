// Builds elements. Strings become text nodes, never markup: what peers call themselves is hostile.

import { UNKNOWN } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with attributes ("on…" are listeners, null and false are left out) and children. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));
}

/** Sets a text only when it differs, so that a screen reader is not told the same again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const FOCUSABLE = "a[href], button:not([disabled])";

/** Replaces what is inside an element. The focus stays on the same link, or on the one that takes its place. */
export function fill(host, ...children) {
  const before = document.activeElement;
  const place = [...host.querySelectorAll(FOCUSABLE)].indexOf(before);
  host.replaceChildren(...children);
  if (place < 0) return;
  const now = [...host.querySelectorAll(FOCUSABLE)];
  const href = before.getAttribute("href");
  const same = href === null ? undefined : now.find((one) => one.getAttribute("href") === href);
  (same ?? now[Math.min(place, now.length - 1)])?.focus({ preventScroll: true });
}

/** A formatted value; one that cannot be seen says so to those who point at it. */
export function shown(value, format, why = "not measured, or not visible from here") {
  return value === null || value === undefined
    ? el("span", { class: "unseen", title: why }, UNKNOWN)
    : format(value);
}

/** A row of buttons of which one is chosen. */
export function choice(label, options, chosen, choose) {
  const buttons = options.map(([value, text]) =>
    el(
      "button",
      { type: "button", "aria-pressed": String(value === chosen), onclick: () => pick(value) },
      text,
    ),
  );
  function pick(value) {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(options[i][0] === value)));
    choose(value);
  }
  return el("div", { class: "choice", role: "group", "aria-label": label }, ...buttons);
}

export function copyButton(getText) {
  const said = el("span", {}, "Copy");
  const button = el("button", { class: "button", type: "button" }, icon("copy"), said);
  let timer = 0;
  button.addEventListener("click", async () => {
    said.textContent = (await copy(getText())) ? "Copied" : "Select and copy it";
    clearTimeout(timer);
    timer = setTimeout(() => (said.textContent = "Copy"), 2000);
  });
  said.setAttribute("aria-live", "polite");
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyThroughSelection(text); // pages that came over plain http have no clipboard
  }
}

function copyThroughSelection(text) {
  const field = el("textarea", { class: "visually-hidden", readonly: true });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

const probe = document.createElement("span");

/** The colour that a custom property has now, as canvas takes it. */
export function colour(name) {
  if (!probe.isConnected) {
    probe.hidden = true;
    probe.style.forcedColorAdjust = "none"; // else all colours are one where the system forces its own
    document.body.append(probe);
  }
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
