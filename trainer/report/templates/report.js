// The charts of one run's report.
"use strict";
const { report, curves, spans, events } = pageData;
const metric = report.metrics.perplexity;
const short = (value) => Number(value.toPrecision(4)).toLocaleString("en");

function recoveryChart() {
  const points = curves["eval/perplexity"];
  const levels = [
    level(metric.full_precision, `full precision ${short(metric.full_precision)}`, "green", "dash"),
    metric.full_precision_tuned && level(metric.full_precision_tuned, `fine-tuned ${short(metric.full_precision_tuned)}`, "green", "dot", { above: false, left: true }),
    metric.ptq && level(metric.ptq, `PTQ, rtn ${short(metric.ptq)}`, "orange", "dash"),
    metric.best_ptq && metric.best_ptq_method !== "rtn" && level(metric.best_ptq, `PTQ, ${metric.best_ptq_method} ${short(metric.best_ptq)}`, "orange", "dot"),
  ].filter(Boolean);
  const traces = [{ ...line("QAT", points, "blue", { line: { width: 2.5 } }), mode: "lines+markers", marker: { size: 7 }, hovertemplate: "%{y:.4g}" }];
  const best = points.x.indexOf(report.training.best_tokens);
  if (best >= 0) {
    traces.push({ type: "scatter", mode: "markers", name: "best checkpoint", x: [points.x[best]], y: [points.y[best]], marker: { symbol: "star", size: 16, color: colour("ink") }, hovertemplate: "best checkpoint" });
  }
  if (metric.packed) {
    traces.push({ type: "scatter", mode: "markers", name: "packed integers", x: [points.x.at(-1)], y: [metric.packed], marker: { symbol: "diamond-open", size: 12, color: colour("violet"), line: { width: 2.5 } }, hovertemplate: "packed integers %{y:.4g}" });
  }
  const layout = baseLayout("training tokens", "held-out perplexity", { xaxis: { tickformat: "~s" } });
  return { traces, layout: withMarks(layout, [...spans.map(shade), ...levels]) };
}

function curveChart(names, title, type = "linear") {
  const drawn = names.filter((name) => curves[name]);
  const traces = drawn.map((name, i) => line(name, curves[name], series[i], { line: { width: 1.7 } }));
  const marks = events.filter((event) => event.tokens != null).map((event) => ({
    shape: { type: "line", yref: "paper", y0: 0, y1: 1, x0: event.tokens, x1: event.tokens, line: { color: colour("warn"), dash: "dot" } },
    note: { yref: "paper", y: 1, x: event.tokens, text: event.event, showarrow: false, font: { color: colour("warn") } },
  }));
  const layout = baseLayout("training tokens", title, { showlegend: drawn.length > 1, xaxis: { tickformat: "~s" }, yaxis: { type, exponentformat: "power" } });
  return { traces, layout: withMarks(layout, [...spans.map(shade).map((mark) => ({ ...mark, note: { ...mark.note, text: "" } })), ...marks]) };
}

function costChart() {
  const stages = Object.keys(report.cost);
  const minutes = stages.map((stage) => report.cost[stage].seconds / 60);
  const traces = [{ type: "bar", orientation: "h", x: minutes, y: stages, marker: { color: colour("blue") }, hovertemplate: "%{x:.3g} min<extra></extra>" }];
  return { traces, layout: baseLayout("minutes", "", { hovermode: "closest", yaxis: { autorange: "reversed" } }) };
}

function layersChart() {
  const key = report.layers[0].error_before != null ? "error" : "sqnr_db";
  const names = report.layers.map((layer) => layer.name);
  const dots = (name, field, colourName) => ({ type: "scatter", mode: "markers", name, x: names, y: report.layers.map((layer) => layer[field]), marker: { color: colour(colourName), size: 6 } });
  const traces = key === "error" ? [dots("after PTQ", "error_before", "orange"), dots("after QAT", "error_after", "blue")] : [dots("packed against fake-quantized", "sqnr_db", "blue")];
  const title = key === "error" ? "relative weight error" : "SQNR, dB";
  return { traces, layout: baseLayout("", title, { hovermode: "closest", xaxis: { showticklabels: false } }) };
}

const pageCharts = [
  () => chart("plot-recovery", recoveryChart),
  () => chart("plot-loss", () => curveChart(["train/loss", "train/kl"], "loss, nats per token")),
  () => chart("plot-learning-rate", () => curveChart(["train/learning_rate"], "learning rate")),
  () => chart("plot-grad-norm", () => curveChart(["train/grad_norm"], "gradient norm", "log")),
  () => chart("plot-throughput", () => curveChart(["train/tokens_per_second"], "tokens per second")),
  () => chart("plot-cost", costChart),
  () => chart("plot-layers", layersChart),
];
