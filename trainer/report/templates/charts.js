// Charts in the page's own colours. A chart is a function that gives Plotly's traces and layout, called again when the theme changes.
"use strict";
const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const series = ["blue", "orange", "green", "violet", "soft"];
const dashes = ["solid", "dash", "dot", "dashdot", "longdash"];

function baseLayout(x, y, extra = {}) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, title: { standoff: 8 } };
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("soft") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 12, r: 14, t: 14, b: 12 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...extra,
    xaxis: { ...axis, ...extra.xaxis, title: { text: x, standoff: 8 } },
    yaxis: { ...axis, ...extra.yaxis, title: { text: y, standoff: 8 } },
  };
}

const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function chart(id, build) {
  const place = document.getElementById(id);
  if (!place) return;
  const redraw = () => {
    const { traces, layout } = build();
    return Plotly.react(place, traces, layout, options);
  };
  onTheme.push(redraw);
  return redraw();
}

function line(name, curve, colourName, extra = {}) {
  return { type: "scatter", mode: "lines", name, x: curve.x, y: curve.y, line: { color: colour(colourName), width: 2, ...extra.line }, ...extra.trace };
}

// Horizontal lines that share the plot's width, as shapes with a label at the right end.
function level(value, label, colourName, dash, { above = true, left = false } = {}) {
  const shape = { type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: colour(colourName), width: 1.5, dash } };
  const note = { xref: "paper", x: left ? 0.005 : 1, xanchor: left ? "left" : "right", y: value, yanchor: above ? "bottom" : "top", text: label, showarrow: false, font: { color: colour(colourName), size: 12 } };
  return { shape, note };
}

function shade(span, index) {
  const shape = { type: "rect", layer: "below", yref: "paper", y0: 0, y1: 1, x0: span.start, x1: span.end, line: { width: 0 }, fillcolor: colour("soft"), opacity: 0.06 + 0.07 * (index % 2) };
  const note = { yref: "paper", y: 0.9, yanchor: "top", x: (span.start + span.end) / 2, text: span.label, showarrow: false, font: { size: 11.5 } };
  return { shape, note };
}

function withMarks(layout, marks) {
  layout.shapes = marks.map((mark) => mark.shape);
  layout.annotations = marks.map((mark) => mark.note);
  return layout;
}
