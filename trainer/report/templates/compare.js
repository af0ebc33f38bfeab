// The charts of a comparison.
"use strict";
const axes = { tokens: "training tokens", hours: "hours of work", cost: "cost" };
let over = "tokens";

function curvesChart() {
  const traces = pageData.curves.map((run, i) => ({
    type: "scatter", mode: "lines+markers", name: run.name, x: run[over], y: run.perplexity,
    line: { color: colour(series[i % series.length]), dash: dashes[Math.floor(i / series.length) % dashes.length], width: 2 }, marker: { size: 5 },
  }));
  return { traces, layout: baseLayout(axes[over], "held-out perplexity", { showlegend: true, hovermode: "closest", xaxis: { tickformat: over === "tokens" ? "~s" : "" } }) };
}

function paretoChart() {
  const known = pageData.runs.filter((run) => run.bytes !== null && run.packed !== null);
  const front = pageData.pareto.map((name) => known.find((run) => run.name === name));
  const megabytes = (run) => run.bytes / 1e6;
  const traces = [
    { type: "scatter", mode: "lines", name: "Pareto front", x: front.map(megabytes), y: front.map((run) => run.packed), line: { color: colour("green"), width: 2, dash: "dot", shape: "hv" }, hoverinfo: "skip" },
    { type: "scatter", mode: "markers+text", name: "runs", x: known.map(megabytes), y: known.map((run) => run.packed), text: known.map((run) => run.name), textposition: "top center", cliponaxis: false, marker: { size: 10, color: known.map((run) => colour(pageData.pareto.includes(run.name) ? "green" : "blue")) }, hovertemplate: "%{text}: %{x:.4g} MB, %{y:.4g}<extra></extra>" },
  ];
  return { traces, layout: baseLayout("size, MB", "perplexity of the packed model", { hovermode: "closest", showlegend: false, margin: { l: 12, r: 40, t: 30, b: 12 } }) };
}

const choices = document.querySelector(".choices");
Object.entries(axes).filter(([key]) => pageData.curves.some((run) => run[key])).forEach(([key, title]) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = title;
  button.setAttribute("aria-pressed", key === over);
  button.addEventListener("click", () => {
    over = key;
    [...choices.children].forEach((other) => other.setAttribute("aria-pressed", other === button));
    onTheme.forEach((redraw) => redraw());
  });
  choices.append(button);
});

loadPlotly().then(() => Promise.all([chart("plot-curves", curvesChart), chart("plot-pareto", paretoChart)])).then(() => { root.dataset.ready = "true"; });
