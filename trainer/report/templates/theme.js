// Before the first paint: the theme that the reader chose, or the system's.
(() => {
  let chosen = null;
  try { chosen = localStorage.getItem("qatapult-theme"); } catch { /* storage is off for local files in some browsers */ }
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = chosen || system;
})();
