// What every page has: the theme switch, tables that sort and filter, and Plotly out of its compressed block.
"use strict";
const root = document.documentElement;
const pageData = JSON.parse(document.getElementById("data").textContent);
const onTheme = [];

function setTheme(theme, keep = true) {
  root.dataset.theme = theme;
  if (keep) try { localStorage.setItem("qatapult-theme", theme); } catch { /* see theme.js */ }
  onTheme.forEach((redraw) => redraw());
}
document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

// Paper is white: print in light colours, with everything unfolded.
let themeOnScreen = null;
addEventListener("beforeprint", () => {
  themeOnScreen = root.dataset.theme;
  document.querySelectorAll("details").forEach((part) => { part.dataset.was = part.open; part.open = true; });
  setTheme("light", false);
});
addEventListener("afterprint", () => {
  document.querySelectorAll("details").forEach((part) => { part.open = part.dataset.was === "true"; });
  setTheme(themeOnScreen, false);
});

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");  // absent figures stay at the end
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
        return descending ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
document.querySelectorAll("table.sortable").forEach(sortable);

document.querySelectorAll("input[data-filters]").forEach((input) => {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    rows.forEach((row) => { row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted); });
  });
});

async function loadPlotly() {
  const packed = document.getElementById("plotly").textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}
