// A table that shows one page at a time, sorted by the column that was pressed.

import { el, fill, setText } from "./dom.js";
import * as format from "./format.js";

export class PagedTable {
  #options;
  #state;
  #body = el("tbody");
  #heads = new Map();
  #place = el("p", { class: "note", "aria-live": "polite" });
  #pages = [];
  #last = 1;
  #ask;

  /**
   * options: caption, noun, plural (if it is not the noun and an s), columns, sort, order, perPage, rowClass(row), load({sort, order, filter, page, perPage})
   * → {total, rows}. A column: id, name, cell(row), and if they hold: numeric, fixed (can't be
   * sorted by), drop (1 is the first to go where there is little room), ofMemories (hidden while the swarm has none).
   * ask() reads again; default: at once.
   */
  constructor(host, options, ask = () => this.refresh()) {
    this.#options = options;
    this.#ask = ask;
    this.#state = { sort: options.sort, order: options.order, filter: "", page: 1, perPage: options.perPage };
    host.append(this.#makeTable(), this.#makePager());
    this.#showSort();
  }

  filter(text) {
    this.#state.filter = text;
    this.#go(1);
  }

  sortBy(id, order) {
    this.#state.sort = id;
    this.#state.order = order;
    this.#showSort();
    this.#go(1);
  }

  async refresh() {
    const asked = JSON.stringify(this.#state);
    const { total, rows } = await this.#options.load(this.#state);
    if (asked !== JSON.stringify(this.#state)) return this.refresh(); // somebody turned the page meanwhile
    this.#last = Math.max(1, Math.ceil(total / this.#state.perPage));
    if (this.#state.page > this.#last) {
      this.#state.page = this.#last;
      return this.refresh();
    }
    this.#show(total, rows);
  }

  #makeTable() {
    const heads = this.#options.columns.map((column) => this.#makeHead(column));
    const table = el(
      "table",
      {},
      el("caption", { class: "visually-hidden" }, this.#options.caption),
      el("thead", {}, el("tr", {}, ...heads)),
      this.#body,
    );
    return el(
      "div",
      { class: "scroll", tabindex: "0", role: "group", "aria-label": `${this.#options.caption}, as a table` },
      table,
    );
  }

  #makeHead(column) {
    const inside = column.fixed
      ? column.name
      : el("button", { type: "button", onclick: () => this.#press(column) }, column.name);
    const head = el("th", { scope: "col", class: classOf(column) }, inside);
    this.#heads.set(column.id, head);
    return head;
  }

  #makePager() {
    const button = (words, text, step) =>
      el(
        "button",
        { class: "button", type: "button", "aria-label": words, onclick: () => this.#go(step()) },
        text,
      );
    this.#pages = [
      button("First page", "«", () => 1),
      button("Previous page", "‹ Previous", () => this.#state.page - 1),
      button("Next page", "Next ›", () => this.#state.page + 1),
      button("Last page", "»", () => this.#last),
    ];
    return el("div", { class: "pager" }, this.#place, el("div", { class: "pages" }, ...this.#pages));
  }

  #press({ id, numeric }) {
    const { sort, order } = this.#state;
    const first = numeric ? "desc" : "asc"; // of figures the largest are looked for
    this.sortBy(id, sort !== id ? first : order === "asc" ? "desc" : "asc");
  }

  #go(page) {
    this.#state.page = Math.min(Math.max(1, page), Math.max(1, this.#last));
    this.#ask();
  }

  #showSort() {
    const { sort, order } = this.#state;
    for (const [id, head] of this.#heads) {
      if (id === sort) head.setAttribute("aria-sort", order === "asc" ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
  }

  #show(total, rows) {
    fill(this.#body, ...(rows.length ? rows.map((row) => this.#makeRow(row)) : [this.#emptyRow()]));
    const { page, perPage } = this.#state;
    const from = (page - 1) * perPage + 1;
    setText(
      this.#place,
      total > perPage
        ? `${format.count(from)}–${format.count(Math.min(total, from + perPage - 1))} of ${this.#counted(total)}`
        : this.#counted(total),
    );
    const pressed = this.#pages.indexOf(document.activeElement);
    this.#pages.forEach((button, i) => (button.disabled = i < 2 ? page === 1 : page === this.#last));
    if (this.#pages[pressed]?.disabled) this.#pages[pressed < 2 ? 2 : 1].focus(); // the way back
    this.#pages[0].parentElement.hidden = this.#last === 1;
  }

  #counted(total) {
    return format.counted(total, this.#options.noun, this.#options.plural);
  }

  #makeRow(row) {
    const cells = this.#options.columns.map((column, i) =>
      el(i ? "td" : "th", { class: classOf(column), scope: i ? null : "row" }, ...[column.cell(row)].flat()),
    );
    return el("tr", { class: this.#options.rowClass?.(row) || null }, ...cells);
  }

  #emptyRow() {
    const text = this.#state.filter
      ? `No ${this.#options.noun} matches the filter.`
      : `No ${this.#options.noun} so far.`;
    return el("tr", { class: "empty" }, el("td", { colspan: this.#options.columns.length }, text));
  }
}

function classOf({ numeric, drop, ofMemories }) {
  const classes = [numeric ? "numeric" : "", drop ? `drop-${drop}` : "", ofMemories ? "of-memories" : ""];
  return classes.filter(Boolean).join(" ") || null;
}
