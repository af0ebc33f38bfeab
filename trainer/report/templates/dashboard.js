// The live page: asks for states and for what is new in the ticked curves, every two seconds, and only while it is looked at.
"use strict";
const table = document.querySelector("#runs tbody");
const pick = (id) => document.getElementById(id);
const curvesOf = new Map();  // run → { version, tokens, hours, values } of the chosen figure
const rowOf = new Map();
let ticked = new Set();
let over = "tokens", logScale = false, logRun = null, chosen = false, drawnAs = "";

const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)} %`);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const clock = (seconds) => (seconds == null ? "–" : seconds < 3600 ? `${Math.ceil(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`);


function makeRow(name) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  const label = document.createElement("label");
  const box = document.createElement("input");
  box.type = "checkbox";
  box.addEventListener("change", () => {
    if (box.checked) ticked.add(name); else ticked.delete(name);
    chosen = true;
    refreshCurves();
  });
  label.append(box, " ", name);
  head.append(label);
  row.append(head);
  for (let i = 0; i < 7; i += 1) row.insertCell();
  const open = row.insertCell();
  const report = document.createElement("a");
  report.href = `/report/${encodeURIComponent(name)}`;
  report.textContent = "report";
  const log = document.createElement("button");
  log.type = "button";
  log.textContent = "log";
  log.addEventListener("click", () => { logRun = name; refreshLog().then(() => pick("log-card").scrollIntoView()); });
  open.append(report, " ", log);
  rowOf.set(name, { row, box, report });
  return row;
}

function showRuns(runs) {
  const wanted = pick("filter").value.toLowerCase();
  const names = new Set(runs.map((run) => run.name));
  [...rowOf.keys()].filter((name) => !names.has(name)).forEach((name) => { rowOf.get(name).row.remove(); rowOf.delete(name); ticked.delete(name); });
  runs.forEach((run) => {
    if (!rowOf.has(run.name)) table.append(makeRow(run.name));
    const { row, box, report } = rowOf.get(run.name);
    const share = run.tokens_total ? Math.min(1, (run.tokens ?? 0) / run.tokens_total) : 0;
    const texts = [run.state, run.format, percent(run.state === "finished" ? 1 : share), run.loss == null ? "–" : run.loss.toPrecision(4), percent(run.recovery), run.tokens_per_second == null ? "–" : compact.format(run.tokens_per_second), clock(run.seconds_left)];
    texts.forEach((text, i) => { if (row.cells[i + 1].textContent !== text) row.cells[i + 1].textContent = text; });
    row.cells[1].className = run.state === "finished" ? "ok" : run.state === "failed" ? "bad" : "";
    row.cells[1].title = run.reason;
    report.hidden = !run.report;
    row.hidden = !`${run.name} ${run.format} ${run.state}`.toLowerCase().includes(wanted);
    box.checked = ticked.has(run.name);
  });
  const count = (state) => runs.filter((run) => run.state === state).length;
  pick("summary").textContent = `${runs.length} runs: ${count("running")} running, ${count("finished")} finished` + (count("failed") ? `, ${count("failed")} failed` : "");
  if (!chosen && runs.length) {  // before the reader chooses: what is running, else the first ones
    const running = runs.filter((run) => run.state === "running");
    ticked = new Set((running.length ? running : runs).slice(0, 8).map((run) => run.name));
    ticked.forEach((name) => { rowOf.get(name).box.checked = true; });
  }
}

function curvesChart() {
  const traces = [...ticked].filter((name) => curvesOf.has(name)).map((name, i) => ({
    type: "scatter", mode: curvesOf.get(name).values.length > 60 ? "lines" : "lines+markers", name, x: curvesOf.get(name)[over], y: curvesOf.get(name).values,
    line: { color: colour(series[i % series.length]), dash: dashes[Math.floor(i / series.length) % dashes.length], width: 2 }, marker: { size: 5 },
  }));
  const layout = baseLayout(over === "tokens" ? "training tokens" : "hours since the first point", pick("metric").value, { showlegend: true, hovermode: "closest", uirevision: pick("metric").value + over, xaxis: { tickformat: over === "tokens" ? "~s" : "" }, yaxis: { type: logScale ? "log" : "linear" } });
  return { traces, layout };
}

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(20000) });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

async function refreshCurves() {
  const metric = pick("metric").value;
  const query = [...ticked].slice(0, pageData.most).map((name) => `run=${encodeURIComponent(curvesOf.has(name) ? `${name}:${curvesOf.get(name).version}` : name)}`);
  const fresh = query.length ? await (await ask(`/api/curves?metric=${encodeURIComponent(metric)}&${query.join("&")}`)).json() : {};
  if (metric !== pick("metric").value) return;  // the reader chose another one meanwhile
  Object.entries(fresh).forEach(([name, curve]) => curvesOf.set(name, curve));
  const shown = [...ticked].join("\n") + metric;
  if (Object.keys(fresh).length || shown !== drawnAs) onTheme.forEach((redraw) => redraw());
  drawnAs = shown;
}

async function refreshLog() {
  if (logRun === null) return;
  const text = await (await ask(`/api/log?run=${encodeURIComponent(logRun)}`)).text();
  pick("log-card").hidden = false;
  pick("log-title").textContent = `Log of ${logRun}`;
  const pane = pick("log");
  const atEnd = pane.scrollTop + pane.clientHeight >= pane.scrollHeight - 4;
  if (pane.textContent !== text) pane.textContent = text;
  if (atEnd) pane.scrollTop = pane.scrollHeight;
}

async function tick() {
  if (!document.hidden) {
    try {
      showRuns(await (await ask("/api/runs")).json());
      await refreshCurves();
      await refreshLog();
      pick("pulse").textContent = "live";
    } catch (error) {
      pick("pulse").textContent = `not connected: ${error.message}`;
    }
    root.dataset.ready = "true";
  }
  setTimeout(tick, 2000);
}

pick("metric").addEventListener("change", () => { curvesOf.clear(); refreshCurves(); });
pick("filter").addEventListener("input", () => ask("/api/runs").then((answer) => answer.json()).then(showRuns));
pick("none").addEventListener("click", () => { ticked.clear(); chosen = true; rowOf.forEach(({ box }) => { box.checked = false; }); refreshCurves(); });
pick("log-scale").addEventListener("click", (event) => { logScale = !logScale; event.target.setAttribute("aria-pressed", logScale); onTheme.forEach((redraw) => redraw()); });
document.querySelectorAll("[data-over]").forEach((button) => button.addEventListener("click", () => {
  over = button.dataset.over;
  document.querySelectorAll("[data-over]").forEach((other) => other.setAttribute("aria-pressed", other === button));
  onTheme.forEach((redraw) => redraw());
}));
chart("plot-curves", curvesChart).then(tick);
