// Talks with the dashboard's server: single answers, and the stream of readings.

const ANSWER_WITHIN_MS = 15000;
const SILENCE_LIMIT_MS = 20000; // the server says something every 5 s
const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 30000;
const UNSEEN_MS = 30000;

/** The server said no, or nothing. */
export class Unanswered extends Error {}

/** Raises Unanswered. */
export async function get(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  const address = `api/v1/${path}${query ? `?${query}` : ""}`;
  let response;
  try {
    response = await fetch(address, { signal: AbortSignal.timeout(ANSWER_WITHIN_MS), cache: "no-store" });
  } catch {
    throw new Unanswered("The dashboard's server does not answer.");
  }
  if (!response.ok) throw new Unanswered(await reason(response));
  return response.json();
}

async function reason(response) {
  try {
    return (await response.json()).error || `The server answered ${response.status}.`;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

/** Readings as they come. After a loss it connects again, after a wait that grows.
 *
 * Browsers open few streams to one server, over all their tabs together, so a page that nobody sees has none: it asks
 * now and then, for its title.
 */
export class Readings {
  #source = null;
  #retryMs = FIRST_RETRY_MS;
  #timer = 0;
  #onReading;
  #onLost;

  /** onReading(swarm); onLost(milliseconds until the next try). */
  constructor(onReading, onLost) {
    this.#onReading = onReading;
    this.#onLost = onLost;
  }

  connect() {
    this.#close();
    this.#source = new EventSource("events");
    this.#source.addEventListener("swarm", (event) => this.#hear(event.data));
    this.#source.addEventListener("error", () => this.#lost());
    this.#watch();
  }

  /** Until the next connect only a reading now and then. */
  rest() {
    this.#close();
    this.#timer = setTimeout(() => this.#ask(), UNSEEN_MS);
  }

  async #ask() {
    const timer = this.#timer;
    const swarm = await get("swarm").catch(() => null);
    if (timer !== this.#timer) return; // seen again meanwhile
    if (swarm) this.#onReading(swarm);
    else this.#onLost(UNSEEN_MS);
    this.rest();
  }

  #hear(data) {
    this.#retryMs = FIRST_RETRY_MS;
    this.#watch();
    this.#onReading(JSON.parse(data));
  }

  #watch() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#lost(), SILENCE_LIMIT_MS);
  }

  #lost() {
    this.#close();
    const wait = this.#retryMs * (0.75 + Math.random() / 2); // many pages do not come back at once
    this.#retryMs = Math.min(this.#retryMs * 2, LONGEST_RETRY_MS);
    this.#timer = setTimeout(() => this.connect(), wait);
    this.#onLost(wait);
  }

  #close() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }
}
