// ---- The page: which charts there are, the controls, and rows without gaps.

// Spreads a grid's cards over as few rows as its width needs, and evenly over these, so that no row is left part empty.
function balance(grid) {
  const most = Math.max(1, Math.min(4, Math.floor((grid.clientWidth + 14) / (+grid.dataset.least + 14))));
  let waiting = [];
  const flush = () => {
    const rows = Math.ceil(waiting.length / most), few = Math.floor(waiting.length / Math.max(1, rows)), fewer = rows - waiting.length % Math.max(1, rows);
    let at = 0;
    for (let row = 0; row < rows; row++) {
      const size = few + (row >= fewer ? 1 : 0);
      for (let i = 0; i < size; i++) waiting[at++].style.gridColumn = `span ${12 / size}`;
    }
    waiting = [];
  };
  for (const card of grid.children) {
    if (card.classList.contains("wide")) { flush(); card.style.gridColumn = "1 / -1"; } else waiting.push(card);
  }
  flush();
}
const balanceAll = () => document.querySelectorAll(".grid").forEach(balance);

function quietNow(panel) {
  const values = [...panel.series.map(([key]) => key), ...(panel.band || [])].flatMap(key => runs.flatMap(run => [...(column(run, key) || []), ...highsOf(run, key)])).filter(v => v !== null);
  const still = panel.quiet ? 0 : panel.constant;
  return still !== undefined && values.every(v => v === still);
}

function addChart(panel, parent, only) {
  const node = element("div", "card chart", undefined, parent), head = element("div", "head", undefined, node), words = element("div", "", undefined, head);
  const title = element("h3", "", panel.title, words);
  if (only && groups.length > 1) { title.append(", ", swatch(color(only.index)), ` ${only.name}`); }
  if (panel.note) element("p", "note", panel.note, words);
  const grow = element("button", "grow", "⤢", head);
  grow.title = "Enlarge or shrink"; grow.setAttribute("aria-label", `Enlarge ${panel.title}`);
  const series = panel.series.map(([key, label], s) => [key, label, s]).filter(([key]) => (only ? [only] : groups).some(group => hasAny(group, key)));
  const anyEvals = panel.evals && series.length && runs.some(run => run.evals.length);
  if (series.length > 1 || anyEvals) {
    const legend = element("div", "legend", undefined, node);
    for (const [, label, s] of series) {
      const item = element("span", "", undefined, legend);
      if (panel.stacked) swatch(color(s), item);
      else lineSample(groups.length === 1 ? color(s) : "currentColor", dashOf(groups[0], s, panel.series.length), item);
      item.append(label);
    }
    if (anyEvals) {
      const item = element("span", "", undefined, legend), icon = svg("svg", { width: 12, height: 16, "aria-hidden": true }, item), own = groups.length === 1 ? color(2) : "currentColor";
      svg("path", { d: "M6,1V15M3,1h6M3,15h6", stroke: own, "stroke-width": 1.5 }, icon); svg("circle", { cx: 6, cy: 8, r: 4, fill: own }, icon);
      item.append("held-out");
    }
  }
  const plot = svg("svg", { class: "plot", height: 200, role: "img", "aria-label": `${panel.title} by ${panel.differences ? "step" : state.axis}. ${panel.note}` }, node);
  const chart = { panel, node, plot, only, id: `clip${state.charts.length}`, tip: element("div", "tip", undefined, node) };
  grow.onclick = () => { node.classList.toggle("wide"); balance(parent); draw(chart); };
  plot.addEventListener("pointermove", event => hover(chart, event));
  plot.addEventListener("pointerdown", event => hover(chart, event));
  plot.addEventListener("pointerleave", () => { chart.tip.style.display = "none"; point(null); });
  state.charts.push(chart);
}

// Without correction the values after it are those before it, and a curve would lie under another.
const repeats = key => key.endsWith("/after") && runs.every(run => String(column(run, key)) === String(column(run, key.replace("/after", "/before"))));
function arranged(panel) {
  panel = { ...panel, series: panel.series.filter(([key]) => !repeats(key)) };
  if (groups.length === 1) return groups[0].alone || !panel.evals ? [panel] : [{ ...panel, note: panel.note.replace("± one standard error", "with the band over the runs") }];
  const found = [];
  if (panel.evals) {
    const alone = groups.every(group => group.alone);
    found.push({ title: "Held-out accuracy", note: alone ? "Whiskers: ± one standard error." : "Mean over the runs of a group; whiskers: the band, or of a single run ± one standard error.", unit: "share", evals: true, series: [] });
    found.push({ title: `Held-out accuracy minus that of ${baseline.name}`, note: "In points, with 95 % intervals. Hollow and grey: within the error.", unit: "points", differences: true, series: [] });
  }
  const { evals, note, ...rest } = panel, words = evals ? note.split(" Points:")[0] : note;
  if (panel.split) return [...found, ...panel.series.map(s => ({ ...rest, note: words, title: panel.series.length > 1 ? s[2] : panel.title, series: [s] }))];
  return [...found, { ...rest, note: words }];
}

function build() {
  const left = [], known = new Set(INTERNAL), host = byId("sections");
  const worthDrawing = panel => {
    if (panel.differences) return groups.some(group => group.differences.length);
    const data = (panel.evals && runs.some(run => run.evals.length)) || runs.some(run => panel.series.some(([key]) => has(run, key)));
    if (data && panel.series.length && quietNow(panel)) { left.push(`${panel.title} (always ${panel.quiet ? 0 : panel.constant})`); return false; }
    return data;
  };
  const section = (title, wanted) => {
    const panels = wanted.flatMap(arranged).filter(worthDrawing);
    if (!panels.length) return;
    element("h2", "", title, host);
    const grid = element("div", "grid charts", undefined, host);
    grid.dataset.least = 400;
    for (const panel of panels) {
      if (panel.stacked) groups.filter(group => panel.series.some(([key]) => hasAny(group, key))).forEach(group => addChart(panel, grid, group));
      else addChart(panel, grid, null);
    }
  };
  // Accuracy, format and the user's own functions, unweighted: drawn when there is more than one.
  const parts = [...new Set(runs.flatMap(run => Object.keys(run.columns)))].filter(key => key.startsWith("reward/") && !["reward/mean", "reward/std"].includes(key)).sort();
  if (parts.length > 1) SECTIONS[2][1].push({ title: "Reward by part", note: "Mean of each part, before weighting.", series: parts.map(key => [key, key.slice(7)]) });
  else parts.forEach(key => known.add(key));
  for (const [title, panels] of SECTIONS) {
    panels.forEach(panel => [...panel.series.map(([key]) => key), ...(panel.band || [])].forEach(key => known.add(key)));
    section(title, panels);
  }
  const others = [...new Set(runs.flatMap(run => Object.keys(run.columns)))].filter(key => !known.has(key) && !key.startsWith("eval/") && runs.some(run => has(run, key)));
  section("Other metrics", others.sort().map(key => ({ title: key, note: "", quiet: true, series: [[key, key]] })));
  if (left.length) element("p", "note", `Not drawn: ${left.join(", ")}.`, host).style.marginTop = "12px";
  if (!state.charts.length) element("p", "card", "No step has been recorded yet.", host).style.marginTop = "18px";
}
const redraw = () => state.charts.forEach(draw);

function controls() {
  byId("controls").hidden = !state.charts.length;
  byId("toggles").hidden = groups.length === 1;
  if (groups.length > 1) groups.forEach((group, i) => {
    const button = element("button", "", undefined, byId("toggles"));
    lineSample(color(i), dash(i), button); button.append(group.name);
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      if (state.hidden.has(i)) state.hidden.delete(i); else state.hidden.add(i);
      button.setAttribute("aria-pressed", String(!state.hidden.has(i)));
      redraw();
    };
  });
  const slider = byId("smoothing");
  const set = value => { state.smoothing = value; byId("smoothing-value").textContent = value ? value.toFixed(2) : "off"; };
  slider.value = longest > 400 ? .94 : longest > 150 ? .9 : longest > 40 ? .8 : longest > 15 ? .6 : 0;
  set(+slider.value);
  slider.oninput = () => { set(+slider.value); redraw(); };
  byId("band-label").hidden = groups.every(group => group.alone);
  byId("band").oninput = () => { state.band = byId("band").value; redraw(); };
  const buttons = [...document.querySelectorAll("[data-axis]")];
  for (const button of buttons) {
    button.hidden = !runs.every(run => !run.steps.length || (run[AXES[button.dataset.axis]] || []).some(v => v > 0));
    button.onclick = () => {
      state.axis = button.dataset.axis;
      buttons.forEach(other => other.setAttribute("aria-pressed", String(other === button)));
      redraw();
    };
  }
  buttons[0].parentElement.hidden = buttons.filter(button => !button.hidden).length < 2;
}

const table = document.querySelector("table.config"), only = byId("only-differences");
if (only) { const apply = () => table.classList.toggle("only", only.checked); only.onchange = apply; apply(); }
build(); controls(); completions(); balanceAll(); redraw();
let waiting = 0;
new ResizeObserver(() => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => { balanceAll(); redraw(); }); }).observe(byId("sections"));
