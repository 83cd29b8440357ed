// A heat map on one canvas: fast with 65,536 cells, and usable with a pointer, a finger or the keyboard.

import { colour } from "./dom.js";

export const LARGEST_CELL = 56; // CSS pixels
const ROUNDED_FROM = 8; // device pixels; smaller cells are drawn as an image
export const TALLEST = 540; // CSS pixels
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Heatmap {
  #canvas;
  #pixels = document.createElement("canvas");
  #columns = 1;
  #levels = new Uint8Array(0);
  #palette = [];
  #missing = "";
  #cell = 1; // device pixels
  #current = -1;
  #latest = 0; // where the keyboard goes on after the pointer or the focus was elsewhere
  #open;
  #point;

  /** open(index) when a cell is chosen; point(index or -1, box) when one is pointed at. */
  constructor(canvas, open, point) {
    this.#canvas = canvas;
    this.#open = open;
    this.#point = point;
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#goTo(this.#at(event)));
    canvas.addEventListener("pointerleave", () => this.#goTo(-1));
    canvas.addEventListener("click", (event) => this.#choose(this.#at(event)));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#goTo(-1));
  }

  /** levels: one per cell, row by row: 0 is "no host", l > 0 is palette[l - 1]. Colours are names of properties. */
  show(levels, columns, palette, missing) {
    this.#levels = levels;
    this.#columns = columns;
    this.#palette = palette;
    this.#missing = missing;
    this.draw();
  }

  draw() {
    const rows = Math.ceil(this.#levels.length / this.#columns);
    const scale = devicePixelRatio || 1;
    const width = this.#canvas.parentElement.clientWidth;
    if (!rows || !width) return;
    const fitting =
      Math.min(width / this.#columns, Math.min(TALLEST, innerHeight * 0.75) / rows, LARGEST_CELL) * scale;
    this.#cell =
      fitting >= 2 ? Math.floor(fitting) : Math.max(fitting, (width / this.#columns) * scale * 0.5);
    this.#canvas.width = Math.ceil(this.#columns * this.#cell);
    this.#canvas.height = Math.ceil(rows * this.#cell);
    this.#canvas.style.width = `${this.#canvas.width / scale}px`;
    this.#canvas.style.height = `${this.#canvas.height / scale}px`;
    const colours = [this.#missing, ...this.#palette].map(colour);
    if (this.#cell >= ROUNDED_FROM) this.#drawCells(colours);
    else this.#drawImage(colours, rows);
    this.#drawCurrent();
  }

  #drawCells(colours) {
    const context = this.#canvas.getContext("2d");
    const size = this.#cell;
    const gap = Math.max(1, Math.round(size / 14));
    const crosses = new Path2D();
    colours.forEach((fill, level) => {
      const cells = new Path2D();
      for (let i = 0; i < this.#levels.length; i += 1) {
        if (this.#levels[i] !== level) continue;
        const [x, y] = this.#corner(i);
        cells.roundRect(x, y, size - gap, size - gap, size / 6);
        if (level === 0) addCross(crosses, x, y, size - gap);
      }
      context.fillStyle = fill;
      context.fill(cells);
    });
    context.strokeStyle = colour("--surface");
    context.lineWidth = Math.max(1, size / 10);
    context.lineCap = "round";
    context.stroke(crosses);
  }

  #drawImage(colours, rows) {
    this.#pixels.width = this.#columns;
    this.#pixels.height = rows;
    const context = this.#pixels.getContext("2d", { willReadFrequently: true });
    const image = context.createImageData(this.#columns, rows);
    const words = new Uint32Array(image.data.buffer);
    const packed = colours.map((fill) => pack(context, fill));
    for (let i = 0; i < this.#levels.length; i += 1) words[i] = packed[this.#levels[i]];
    context.putImageData(image, 0, 0);
    const target = this.#canvas.getContext("2d");
    target.imageSmoothingEnabled = this.#cell < 1;
    target.drawImage(this.#pixels, 0, 0, this.#canvas.width, this.#canvas.height);
  }

  #drawCurrent() {
    if (this.#current < 0) return;
    const context = this.#canvas.getContext("2d");
    const [x, y] = this.#corner(this.#current);
    const size = Math.max(this.#cell, 6);
    context.lineWidth = Math.max(2, size / 9);
    context.strokeStyle = colour("--ink");
    context.strokeRect(
      x + context.lineWidth / 2,
      y + context.lineWidth / 2,
      size - context.lineWidth,
      size - context.lineWidth,
    );
  }

  #corner(index) {
    return [(index % this.#columns) * this.#cell, Math.floor(index / this.#columns) * this.#cell];
  }

  #at(event) {
    const scale = devicePixelRatio || 1;
    const column = Math.floor((event.offsetX * scale) / this.#cell);
    const index = Math.floor((event.offsetY * scale) / this.#cell) * this.#columns + column;
    return column >= 0 && column < this.#columns && index >= 0 && index < this.#levels.length ? index : -1;
  }

  #choose(index) {
    if (index >= 0) this.#open(index);
  }

  #key(event) {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#choose(this.#current);
    } else if (event.key === "Home" || event.key === "End" || event.key in STEPS) {
      event.preventDefault();
      this.#goTo(this.#target(event.key));
    }
  }

  #target(key) {
    const last = this.#levels.length - 1;
    if (key === "Home") return 0;
    if (key === "End") return last;
    if (this.#current < 0) return Math.min(last, this.#latest);
    const [right, down] = STEPS[key];
    return Math.min(last, Math.max(0, this.#current + right + down * this.#columns));
  }

  #goTo(index) {
    if (index === this.#current) return;
    this.#current = index;
    if (index >= 0) this.#latest = index;
    this.draw();
    const scale = devicePixelRatio || 1;
    const [x, y] = index < 0 ? [0, 0] : this.#corner(index);
    const box = this.#canvas.getBoundingClientRect();
    this.#point(index, {
      x: box.x + (x + this.#cell / 2) / scale,
      y: box.y + y / scale,
      height: this.#cell / scale,
    });
  }
}

function addCross(path, x, y, size) {
  const [near, far] = [size * 0.3, size * 0.7];
  path.moveTo(x + near, y + near);
  path.lineTo(x + far, y + far);
  path.moveTo(x + far, y + near);
  path.lineTo(x + near, y + far);
}

/** A colour as the 32 bits that image data has for it, whatever the byte order. */
function pack(context, fill) {
  context.fillStyle = fill;
  context.fillRect(0, 0, 1, 1);
  return new Uint32Array(context.getImageData(0, 0, 1, 1).data.buffer)[0];
}
