// A part of the page that reads its own figures: only while somebody can see it, and never twice at once.

import { Unanswered } from "./api.js";

export class Section {
  /** Is fulfilled once it has tried to load, and shows its figures or why it has none. */
  settled;
  #settle;
  #stale = false; // nothing to read before the first reading of the swarm
  #visible = false;
  #loading = false;
  #hasLoaded = false;
  #loadedAt = -Infinity;
  #load;
  #problem;
  #restMs;

  /** load() reads and draws. restMs() is the least time between two readings that no person asked for. */
  constructor(element, load, restMs = () => 0) {
    this.settled = new Promise((settle) => (this.#settle = settle));
    this.#load = load;
    this.#restMs = restMs;
    this.#problem = element.querySelector(".problem");
    new IntersectionObserver((entries) => this.#see(entries.at(-1).isIntersecting), {
      rootMargin: "300px",
    }).observe(element);
    document.addEventListener("visibilitychange", () => this.#proceed());
  }

  /** There is a newer reading of the swarm. */
  invalidate() {
    this.#stale = true;
    this.#proceed();
  }

  /** A person wants to see something else. */
  reload() {
    this.#loadedAt = -Infinity;
    this.invalidate();
  }

  /** What it showed is gone. */
  forget() {
    this.#hasLoaded = false;
    this.#say("");
  }

  #see(visible) {
    this.#visible = visible;
    this.#proceed();
  }

  async #proceed() {
    const rested = performance.now() - this.#loadedAt >= this.#restMs();
    const wanted = this.#visible || !this.#hasLoaded; // once for all, so that nothing jumps when it is scrolled to
    if (!this.#stale || !wanted || this.#loading || !rested || document.hidden) return;
    this.#loading = true;
    this.#stale = false;
    this.#loadedAt = performance.now();
    try {
      await this.#load();
      this.#hasLoaded = true;
      this.#say("");
    } catch (error) {
      if (!(error instanceof Unanswered)) throw error;
      this.#say(this.#hasLoaded ? `These figures may be old: ${error.message}` : error.message);
    } finally {
      this.#settle();
      this.#loading = false;
    }
    this.#proceed();
  }

  #say(text) {
    if (!this.#problem) return;
    this.#problem.textContent = text;
    this.#problem.hidden = !text;
  }
}
