// One chart over time: uPlot draws it, the legend names its lines, and a table has the same figures.

import { colour, el, setText } from "./dom.js";
import * as format from "./format.js";

const { uPlot } = globalThis;

const LINES = [1, 2, 3, 4, 5, 6, 7, 8].map((number) => `--line-${number}`);
const MOST_POINTS = 1000;
const HEIGHT = 180;
const LATE_S = 90; // trainers announce their figures every 10 s, and a history has a point every 15 s
const VALIDATION = " validation";
const WHOLE = Array.from({ length: 30 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3)); // between ticks

const baseName = ({ name }) => name.replace(VALIDATION, "");

/** The names of all series, without validations. */
export function baseNames(series) {
  return [...new Set(series.map(baseName))];
}

export class Plot {
  #options;
  #chart = null;
  #drawn = "";
  #series = [];
  #names = [];
  #data = [[]];
  #range = [0, 1];
  #hidden = new Set();
  #legend = el("ul", { class: "legend" });
  #values = [];
  #canvas = el("div", { class: "plot", role: "img" });
  #empty = el("p", { class: "empty-plot", hidden: true }, "nothing measured in this time");
  #table = el("div", { class: "scroll plot-table", tabindex: "0", role: "region", hidden: true });
  #unit = el("span", { class: "note" });

  /**
   * options: title, write(value), and if they hold: fromZero, whole (it counts), present (it is about the present, so an
   * old value says nothing), sync (charts with the same share the cursor).
   */
  constructor(options) {
    this.#options = options;
    const asTable = el(
      "button",
      {
        class: "button small",
        type: "button",
        "aria-pressed": "false",
        onclick: () => this.#toggle(asTable),
        "aria-label": `${options.title} as a table`,
      },
      "Table",
    );
    this.#table.setAttribute("aria-label", `${options.title}, figures`);
    const head = el("div", { class: "plot-head" }, el("h3", {}, options.title, " ", this.#unit), asTable);
    this.element = el(
      "article",
      { class: "card chart" },
      head,
      this.#legend,
      this.#canvas,
      this.#empty,
      this.#table,
    );
    new ResizeObserver(() => this.#resize()).observe(this.#canvas);
  }

  /**
   * series: [{name, label, points: [[t, value or null], …]}], times in unix seconds. names: of these and of the series
   * in other plots where the same name should have the same colour.
   */
  show(series, unit, since, until, names = baseNames(series)) {
    this.#series = series.map((line) => ({ ...line, points: line.points.slice(-MOST_POINTS) }));
    this.#names = names;
    const tables = this.#series.map(({ points }) => [
      points.map(([t]) => t),
      points.map(([, value]) => value),
    ]);
    this.#data = tables.length > 1 ? uPlot.join(tables) : (tables[0] ?? [[]]);
    this.#range = [since, until];
    setText(this.#unit, unit);
    const some = this.#series.some(({ points }) => points.some(([, value]) => value !== null));
    this.#empty.hidden = some || !this.#table.hidden;
    this.#canvas.classList.toggle("blank", !some);
    this.#draw();
    if (!this.#table.hidden) this.#fillTable();
  }

  /** After a change of colours. */
  redraw() {
    this.#drawn = "";
    if (this.#chart) this.#draw();
  }

  destroy() {
    this.#chart?.destroy();
    this.#chart = null;
  }

  #draw() {
    const lines = JSON.stringify(this.#series.map(({ name, label }, i) => [name, label, this.#colourOf(i)]));
    if (lines !== this.#drawn) {
      this.destroy();
      this.#drawn = lines;
      this.#makeLegend();
      if (this.#series.length) this.#chart = new uPlot(this.#uplotOptions(), this.#data, this.#canvas);
    } else {
      this.#chart?.setData(this.#data);
    }
    this.#showValues(null);
    this.#canvas.setAttribute("aria-label", this.#inWords());
  }

  #uplotOptions() {
    const { sync, fromZero, whole, write } = this.#options;
    const ink = colour("--ink-2");
    const grid = { stroke: colour("--grid-line"), width: 1 };
    const axis = { stroke: ink, font: "11px system-ui, sans-serif", grid, ticks: { ...grid, size: 4 } };
    return {
      width: this.#width(),
      height: HEIGHT,
      legend: { show: false },
      cursor: {
        y: false,
        points: { size: 7 },
        drag: { x: false, y: false },
        ...(sync ? { sync: { key: sync } } : {}),
      },
      scales: {
        x: { time: true, range: () => this.#range },
        y: { range: (_, low, high) => limits(low, high, fromZero) },
      },
      axes: [
        {
          ...axis,
          size: 30,
          space: 70,
          values: (_, splits, __, ___, step) => splits.map((t) => format.tick(t, step)),
        },
        {
          ...axis,
          size: 58,
          space: 24, // with the next rounder step, a wider one could leave a single number
          values: (_, splits) => splits.map((value) => write(value)),
          ...(whole ? { incrs: WHOLE } : {}),
        },
      ],
      series: [{}, ...this.#series.map((one, i) => this.#line(one, i))],
      hooks: { setCursor: [({ cursor }) => this.#showValues(cursor.idx)] },
    };
  }

  #line({ name }, i) {
    const stroke = colour(this.#colourOf(i));
    const alone = this.#series.length === 1;
    return {
      stroke,
      width: 1.75,
      show: !this.#hidden.has(name),
      dash: name.endsWith(VALIDATION) ? [6, 4] : undefined,
      fill: alone ? transparent(stroke) : undefined,
      points: { size: 4 },
      spanGaps: false,
    };
  }

  /** A trainer's validation has the colour of that trainer's loss, dashed. */
  #colourOf(i) {
    return LINES[this.#names.indexOf(baseName(this.#series[i])) % LINES.length];
  }

  #makeLegend() {
    this.#values = this.#series.map(() => el("span", { class: "legend-value" }));
    this.#legend.replaceChildren(
      ...this.#series.map(({ name, label }, i) => {
        const swatch = el("span", { class: name.endsWith(VALIDATION) ? "dash broken" : "dash" });
        swatch.style.borderColor = `var(${this.#colourOf(i)})`;
        const button = el(
          "button",
          {
            type: "button",
            "aria-pressed": String(!this.#hidden.has(name)),
            onclick: () => this.#switch(i, button),
          },
          swatch,
          el("bdi", { title: label }, label),
          " ", // else the name and its value are read as one word
          this.#values[i],
        );
        return el("li", {}, button);
      }),
    );
  }

  #switch(i, button) {
    const { name } = this.#series[i];
    const show = this.#hidden.delete(name);
    if (!show) this.#hidden.add(name);
    button.setAttribute("aria-pressed", String(show));
    this.#chart.setSeries(i + 1, { show });
  }

  #showValues(index) {
    this.#values.forEach((box, i) => {
      const points = this.#series[i].points;
      const value = index === null || index === undefined ? this.#latest(points) : this.#data[i + 1]?.[index];
      setText(box, this.#options.write(value ?? null));
    });
  }

  /** The last value; where the chart is about the present, none if nothing was measured for a while. */
  #latest(points) {
    const [t, value] = points.at(-1) ?? [0, null];
    const gap = t - (points.at(-2)?.[0] ?? t);
    return this.#options.present && this.#range[1] - t > Math.max(LATE_S, 2 * gap) ? null : value;
  }

  #inWords() {
    const latest = this.#series.map(
      ({ label, points }) => `${label} ${this.#options.write(this.#latest(points))}`,
    );
    return `${this.#options.title} over time. ${latest.length ? `Latest: ${latest.join(", ")}` : "Nothing measured"}`;
  }

  #toggle(button) {
    const asTable = this.#table.hidden;
    this.#table.hidden = !asTable;
    this.#canvas.hidden = asTable;
    button.setAttribute("aria-pressed", String(asTable));
    if (asTable) this.#fillTable();
    else this.#resize();
  }

  #fillTable() {
    const [times, ...columns] = this.#data;
    const head = el(
      "tr",
      {},
      el("th", { scope: "col" }, "Time"),
      ...this.#series.map(({ label }) => el("th", { scope: "col", class: "numeric" }, label)),
    );
    const rows = times.map((t, row) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, format.moment(t)),
        ...columns.map((values) => el("td", { class: "numeric" }, this.#options.write(values[row] ?? null))),
      ),
    );
    this.#table.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows.reverse())));
  }

  #width() {
    return Math.max(120, this.#canvas.clientWidth);
  }

  #resize() {
    const width = this.#width();
    if (this.#chart && !this.#canvas.hidden && width !== this.#chart.width)
      this.#chart.setSize({ width, height: HEIGHT });
  }
}

/** Means of equal figures may differ by a rounding error: such limits would leave uPlot looking for ticks without an end. */
function limits(low, high, fromZero) {
  if (low === null || high === null) return [0, 1];
  if (fromZero) return [0, high > 0 ? high * 1.08 : 1];
  const isFlat = high - low <= 1e-6 * Math.abs(high);
  const margin = isFlat ? Math.abs(high) * 0.05 || 1 : (high - low) * 0.08;
  return [low - margin, high + margin];
}

function transparent(rgb) {
  return rgb.replace("rgb(", "rgba(").replace(")", ", 0.1)");
}
