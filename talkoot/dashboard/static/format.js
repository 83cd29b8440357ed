// How figures are written. null means "cannot see" and is a dash; 0 is a figure like any other.

export const UNKNOWN = "–";

const digits = [0, 1, 2].map((most) => new Intl.NumberFormat("en", { maximumFractionDigits: most }));
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

const known = (write) => (value) => (Number.isFinite(value) ? write(value) : UNKNOWN);

export const count = known((value) => digits[0].format(value));
export const compact = known((value) => (Math.abs(value) < 10000 ? small(value) : short.format(value)));
export const percent = known((value) => `${small(100 * value)}%`);
export const loss = known((value) => value.toFixed(3));
export const rate = known((value) => (value < 10 ? small(value) : compact(value)));
export const milliseconds = known((value) =>
  value < 1000 ? `${small(value)} ms` : `${small(value / 1000)} s`,
);
export const bytes = known((value) => scaled(value, ["B", "kB", "MB", "GB", "TB"]));
export const duration = known(writeDuration);
export const clock = known((t) => new Date(t * 1000).toLocaleTimeString("en-GB"));
export const moment = known((t) => {
  const date = new Date(t * 1000);
  const day = date.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
  return `${day}, ${date.toLocaleTimeString("en-GB")}`;
});
export const hours = known((value) => (value < 10 ? value.toFixed(1) : compact(value)));

/** A number with the noun it counts: "1 node", "3 nodes". */
export function counted(number, noun, plural = `${noun}s`) {
  return `${count(number)} ${number === 1 ? noun : plural}`;
}

/** What a tick of a time axis says, for ticks `step` seconds apart. */
export function tick(t, step) {
  const date = new Date(t * 1000);
  if (step >= 86400 || (step >= 3600 && date.getHours() === 0 && date.getMinutes() === 0)) {
    return date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  }
  const clockTime = { hour: "2-digit", minute: "2-digit", second: step < 60 ? "2-digit" : undefined };
  return date.toLocaleTimeString("en-GB", clockTime);
}

function small(value) {
  const size = Math.abs(value);
  return digits[size >= 100 ? 0 : size >= 10 ? 1 : 2].format(value);
}

function scaled(value, units) {
  let unit = 0;
  while (Math.abs(value) >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${small(value)} ${units[unit]}`;
}

function writeDuration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}
