// Runs before the first paint, so that a saved choice of colours does not flash. A module would run too late.
(() => {
  const KEY = "talkoot-theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  const saved = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is switched off
    }
  };

  const save = (theme) => {
    try {
      if (theme === null) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, theme);
    } catch {
      // the choice then lasts until the page is closed
    }
  };

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  const tell = () => {
    document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
    dispatchEvent(new CustomEvent("theme"));
  };

  const toggle = () => {
    const theme = isDark() ? "light" : "dark";
    const follows = (theme === "dark") === system.matches;
    if (follows) delete root.dataset.theme;
    else root.dataset.theme = theme;
    save(follows ? null : theme);
    tell();
  };

  const first = saved();
  if (first === "light" || first === "dark") root.dataset.theme = first;
  system.addEventListener("change", tell);
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", toggle);
    tell();
  });
})();
