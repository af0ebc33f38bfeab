// The charts of the chapter about the inside of the model.
"use strict";
const inside = pageData.inside;
const tones = { full_precision: "green", ptq: "orange", qat: "blue" };

function perModel(build) {
  return Object.entries(inside.models).map(([model, name]) => ({ name, ...build(model, colour(tones[model])) }));
}

function fractionsChart() {
  const bins = inside.fractions.qat.length;
  const x = Array.from({ length: bins }, (_, i) => (i + 0.5) / bins - 0.5);
  const traces = perModel((model, ink) => ({ type: "scatter", mode: "lines", x, y: inside.fractions[model], line: { color: ink, width: 2, shape: "hvh" } }));
  return { traces, layout: baseLayout("steps from the nearest grid point", "density (1: chance)", { yaxis: { rangemode: "tozero" } }) };
}

function layersOf(field, title, extra = {}) {
  return () => {
    const traces = perModel((model, ink) => ({ type: "scatter", mode: "markers", x: inside[field].names, y: inside[field][model], marker: { color: ink, size: 5 } }));
    return { traces, layout: baseLayout("", title, { hovermode: "closest", xaxis: { showticklabels: false, showgrid: false }, ...extra }) };
  };
}

function pruningChart() {
  const traces = perModel((model, ink) => ({ type: "scatter", mode: "lines+markers", x: inside.pruning.shares.map((share) => 100 * share), y: inside.pruning[model], line: { color: ink, width: 2 } }));
  return { traces, layout: baseLayout("MLP channels switched off, per cent", "perplexity", { yaxis: { type: "log" } }) };
}

function ablationChart() {
  const groups = inside.ablation;
  const traces = [{ type: "bar", orientation: "h", x: groups.map((group) => group.cost), y: groups.map((group) => group.name), marker: { color: colour("blue") }, hovertemplate: "%{y}: %{x:.3g} nats a token<extra></extra>" }];
  return { traces, layout: baseLayout("loss that its quantization costs, nats a token", "", { hovermode: "closest", yaxis: { autorange: "reversed" } }) };
}

if (inside) {
  pageCharts.push(
    () => inside.fractions && chart("plot-fractions", fractionsChart),
    () => inside.near && chart("plot-near", layersOf("near", "share near", { yaxis: { tickformat: ".0%" } })),
    () => inside.sqnr && chart("plot-sqnr", layersOf("sqnr", "SQNR, dB")),
    () => inside.worst && chart("plot-worst", layersOf("worst", "largest / median channel", { yaxis: { type: "log" } })),
    () => inside.pruning && chart("plot-pruning", pruningChart),
    () => inside.ablation && chart("plot-ablation", ablationChart),
  );
}
