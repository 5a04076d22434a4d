// ---- Numbers
function number(v, unit) {
  if (v === null || v === undefined) return "–";
  if (unit === "share") return `${+(100 * v).toPrecision(3)}%`;
  if (unit === "points") return `${v > 0 ? "+" : ""}${+(100 * v).toPrecision(3)}`.replace("-", "−");
  if (unit === "bytes") return Math.abs(v) >= 2 ** 30 ? `${(v / 2 ** 30).toPrecision(3)} GiB` : `${Math.round(v / 2 ** 20)} MiB`;
  if (unit === "seconds") return `${+v.toPrecision(3)} s`;
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size >= 1e9) return v.toExponential(1).replace("e+", "e").replace(".0e", "e");
  if (size >= 1e6) return `${+(v / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(v / 1e3).toPrecision(3)}k`;
  if (size < 1e-3) return v.toExponential(1).replace("e-", "e−").replace(".0e", "e");
  return String(+v.toPrecision(3)).replace("-", "−");
}
const where = x => state.axis === "step" ? `step ${Math.round(x).toLocaleString("en")}` : state.axis === "minutes" ? `minute ${number(x)}` : `${number(x)} million tokens`;
function tickStep(span, count, unit) {
  const power = unit === "bytes" ? 2 ** Math.floor(Math.log2(span / count)) : 10 ** Math.floor(Math.log10(span / count));
  return power * (unit === "bytes" ? [1, 2, 4] : [1, 2, 5, 10]).find(m => span / (m * power) <= count + .001);
}
function ticks(low, high, step) {
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

// The vertical axis: its ends are labels, so that none of the data lies beyond the outermost ones.
function axisOf(panel, values, count) {
  values = values.filter(v => v !== null && v !== undefined && Number.isFinite(v) && (!panel.log || v > 0));
  let low = Math.min(...values), high = Math.max(...values);
  if (panel.log) {
    if (!values.length) [low, high] = [1e-8, 1];
    const a = Math.floor(Math.log10(low) + 1e-9), b = Math.max(Math.ceil(Math.log10(high) - 1e-9), a + 1), by = Math.ceil((b - a) / count);
    const marks = Array.from({ length: Math.ceil((b - a) / by) + 1 }, (_, i) => 10 ** (a + i * by));
    return { low: marks[0], high: marks.at(-1), marks };
  }
  if (!values.length) [low, high] = [0, 1];
  if (panel.unit === "share" || panel.stacked || panel.zero || panel.unit === "points") { low = Math.min(low, 0); high = Math.max(high, 0); }
  if (low > 0 && low < .25 * high) low = 0;
  if (high - low < 1e-9 * Math.max(1e-6, Math.abs(high))) { const pad = Math.abs(high) || 1; high += pad * .5; if (low !== 0) low -= pad * .5; }
  const step = tickStep(high - low, count, panel.unit);
  low = Math.floor(low / step + 1e-9) * step; high = Math.ceil(high / step - 1e-9) * step;
  return { low, high, marks: ticks(low, high, step) };
}

// ---- Drawing
function svg(name, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.append(node);
  return node;
}
function element(name, className, text, parent) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function swatch(fill, parent) {
  const node = element("span", "swatch", undefined, parent);
  node.style.setProperty("--run", fill);
  return node;
}
function lineSample(stroke, pattern, parent) {
  const icon = svg("svg", { width: 30, height: 10, "aria-hidden": true, class: "sample-line" }, parent);
  svg("line", { x1: 1, x2: 29, y1: 5, y2: 5, stroke, "stroke-width": 2.2, "stroke-dasharray": pattern }, icon);
}

function linesOf(panel, only) {
  const lines = [];
  for (const group of only ? [only] : visible()) {
    const run = group.runs[0];
    let base = null;
    panel.series.forEach(([key, label], s) => {
      if (!hasAny(group, key)) return;
      const line = { group, label, s, key, stroke: panel.stacked ? color(s) : colorOf(group, s), dash: panel.stacked ? "" : dashOf(group, s, panel.series.length) };
      if (group.alone) {
        Object.assign(line, { x: xs(run), soft: panel.exact ? column(run, key) : smooth(run, key), raw: column(run, key) });
        const bounds = panel.band && s === 0 && panel.band.every(k => has(run, k)) ? panel.band.map(k => smooth(run, k)) : null;
        if (bounds) [line.low, line.high] = bounds;
        if (panel.spread && groups.length === 1 && has(run, panel.spread)) {
          const sd = smooth(run, panel.spread), shifted = sign => line.soft.map((v, i) => v === null || sd[i] === null ? null : v + sign * sd[i]);
          [line.low, line.high] = [shifted(-1), shifted(1)];
        }
      } else {
        Object.assign(line, overRuns(group, key));
        if (state.band === "lines" || panel.stacked) delete line.low, delete line.high;
      }
      if (panel.stacked) {
        line.low = base || line.soft.map(() => 0);
        base = line.low.map((v, i) => v + (line.soft[i] || 0));
        Object.assign(line, { own: line.soft, high: base, soft: base });
      }
      lines.push(line);
    });
  }
  // The unsmoothed values stay where they do not hide the curves.
  for (const line of lines) line.noisy = !panel.stacked && !panel.exact && !!line.raw && lines.length <= 4;
  return lines;
}
function valuesOf(panel, lines, shown) {
  const values = [];
  for (const line of lines) {
    values.push(...line.soft, ...(line.low || []), ...(line.high || []));
    if (!line.group.alone && !line.low && !panel.stacked) line.members.forEach(member => values.push(...member.y));
    if (!line.noisy) continue;
    const run = line.group.runs[0], [low, high] = fences(run, line.key);
    for (const v of [...lowsOf(run, line.key), ...highsOf(run, line.key)]) if (v !== null && v >= low && v <= high) values.push(v);
  }
  if (!state.smoothing) for (const line of lines) if (line.group.alone && !panel.exact && !panel.stacked) {
    const [low, high] = fences(line.group.runs[0], line.key);
    if (Number.isFinite(high)) for (let i = values.length - 1; i >= 0; i--) if (lines.length === 1 && (values[i] > high || values[i] < low)) values.splice(i, 1);
  }
  if (panel.evals) for (const group of shown) for (const e of evalsOf(group)) values.push(e.low, e.high);
  if (panel.differences) for (const group of shown) for (const d of group.differences) values.push(d.value, d.low, d.high);
  return values;
}

function draw(chart) {
  const { panel, plot, only } = chart, width = plot.clientWidth, height = chart.node.classList.contains("wide") ? 360 : 200;
  if (!width) return;
  plot.replaceChildren();
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`); plot.setAttribute("height", height);
  const axis = panel.differences ? "step" : state.axis, shown = only ? [only] : visible();
  const lines = linesOf(panel, only), { low, high, marks } = axisOf(panel, valuesOf(panel, lines, shown), height > 200 ? 8 : 5);
  const box = { left: 14 + 6.6 * Math.max(3, ...marks.map(v => number(v, panel.unit).length)), right: width - 14, top: 10, bottom: height - 24 };
  const all = [...lines.flatMap(line => [line.x[0], line.x.at(-1)]), ...(panel.evals ? shown.flatMap(group => evalsOf(group).map(e => e.at)) : []),
    ...(panel.differences ? shown.flatMap(group => group.differences.map(d => d.step)) : [])].filter(v => v !== undefined && v !== null);
  let first = all.length ? Math.min(...all) : 0, last = all.length ? Math.max(...all) : 1;
  if (first === last) { first -= .5; last += .5; }
  const level = v => panel.log ? (Math.log(v) - Math.log(low)) / (Math.log(high) - Math.log(low)) : (v - low) / (high - low);
  const inset = (panel.evals || panel.differences) && shown.length > 1 ? Math.min(18, 4 * shown.length) : 0;  // for whiskers side by side
  const X = v => box.left + inset + (v - first) / (last - first) * (box.right - box.left - 2 * inset), Y = v => box.bottom - level(v) * (box.bottom - box.top);
  Object.assign(chart, { lines, first, last, X, left: box.left + inset, right: box.right - inset });

  for (const v of marks) {
    svg("line", { x1: box.left, x2: box.right, y1: Y(v), y2: Y(v), stroke: panel.differences && v === 0 ? "var(--muted)" : "var(--grid)" }, plot);
    svg("text", { x: box.left - 7, y: Y(v) + 4, "text-anchor": "end", class: "mark" }, plot).textContent = number(v, panel.unit);
  }
  for (const v of ticks(first, last, tickStep(last - first, Math.max(2, Math.floor(width / 62)))).filter(v => axis !== "step" || Number.isInteger(v))) {
    const text = axis === "tokens" && v ? `${number(v)}M` : number(v);
    svg("text", { x: X(v), y: height - 6, "text-anchor": X(v) + 3.3 * text.length > width - 2 ? "end" : "middle" }, plot).textContent = text;
  }
  svg("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, stroke: "var(--line)" }, plot);

  const clip = svg("clipPath", { id: chart.id }, plot);
  svg("rect", { x: box.left, y: box.top - 3, width: box.right - box.left, height: box.bottom - box.top + 5 }, clip);
  const layer = svg("g", { "clip-path": `url(#${chart.id})`, fill: "none", "stroke-linejoin": "round", "stroke-linecap": "butt" }, plot);
  const usable = v => v !== null && v !== undefined && (!panel.log || v > 0);
  const path = (x, values) => values.map((v, i) => usable(v) ? [X(x[i]), Y(v)] : null).filter(Boolean);
  const trace = points => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" L");
  const area = (upper, lower, attributes) => svg("path", { d: `M${trace(upper.concat(lower.reverse()))}Z`, stroke: "none", ...attributes }, layer);
  for (const line of lines) if (line.low) {
    const upper = path(line.x, line.high), lower = path(line.x, line.low);
    if (upper.length > 1) area(upper, lower, { fill: line.stroke, "fill-opacity": panel.stacked ? .8 : .14, ...(panel.stacked ? { stroke: "var(--card)", "stroke-width": .8 } : {}) });
    else if (upper.length) svg("path", { d: `M${trace([upper[0], lower[0]])}`, stroke: line.stroke, "stroke-width": panel.stacked ? 14 : 1.5, "stroke-opacity": .6 }, layer);
  }
  if (!panel.stacked) {
    for (const line of lines) drawNoise(line, lines.length > 1 ? .08 : .14, layer, { path, trace, area, X, Y, usable });
    for (const line of lines) {
      const soft = path(line.x, line.soft), thick = panel.series.length > 1 && groups.length > 1 && line.s ? 1.6 : 2.2;
      if (soft.length > 1) {
        if (line.noisy) svg("path", { d: `M${trace(soft)}`, stroke: "var(--card)", "stroke-width": thick + 2, "stroke-opacity": .75 }, layer);
        svg("path", { d: `M${trace(soft)}`, stroke: line.stroke, "stroke-width": thick, "stroke-dasharray": line.dash, class: "curve" }, layer);
      }
      if (longest <= 12 || soft.length === 1) for (const [cx, cy] of soft) svg("circle", { cx, cy, r: 2.5, fill: line.stroke }, layer);
    }
    drawSpikes(lines, plot, { box, low, high, X, unit: panel.unit });
  }
  if (panel.finite) for (const group of shown) for (const run of group.runs) for (const step of run.nonFinite.slice(0, 80)) {
    const x = X(xs(run)[Math.min(xs(run).length - 1, run.steps.findIndex(s => s >= step))]);
    svg("path", { d: `M${x - 3.5},${box.bottom - 9}l7,7m0,-7l-7,7`, stroke: "var(--bad)", "stroke-width": 1.6, class: "nonfinite" }, plot);
  }
  const points = panel.evals ? evalsOf : panel.differences ? group => group.differences.map(d => ({ ...d, at: d.step, grey: !d.clear })) : null;
  if (points) drawPoints(shown.filter(group => points(group).length), points, layer, plot, { X, Y, trace });
  chart.cursor = svg("line", { y1: box.top, y2: box.bottom, stroke: "var(--muted)", "stroke-width": 1, "stroke-dasharray": "3 3", visibility: "hidden" }, plot);
}

// Unsmoothed values behind a curve: a thin line, or where points are too dense for one, the area between their extremes.
function drawNoise(line, opacity, layer, { path, trace, area, X, Y, usable }) {
  if (!line.group.alone) {
    if (state.band === "lines") for (const member of line.members) {
      const points = path(member.x, member.y);
      if (points.length > 1) svg("path", { d: `M${trace(points)}`, stroke: line.stroke, "stroke-width": 1, "stroke-opacity": .4 }, layer);
    }
    return;
  }
  if (!line.noisy) return;
  const run = line.group.runs[0], lows = lowsOf(run, line.key), highs = highsOf(run, line.key);
  if (run.stepsPerPoint === 1 && line.raw.length < 160) {
    const raw = path(line.x, line.raw);
    if (state.smoothing > 0 && raw.length > 1) svg("path", { d: `M${trace(raw)}`, stroke: line.stroke, "stroke-width": 1, "stroke-opacity": .25 }, layer);
    return;
  }
  if (!state.smoothing && run.stepsPerPoint === 1) return;
  const columns = new Map();  // by pixel: lowest and highest
  line.x.forEach((x, i) => {
    if (!usable(lows[i]) || !usable(highs[i])) return;
    const at = Math.round(X(x) / 2) * 2, held = columns.get(at) || [lows[i], highs[i]];
    columns.set(at, [Math.min(held[0], lows[i]), Math.max(held[1], highs[i])]);
  });
  const ends = which => [...columns].map(([x, held]) => [x, Y(held[which])]);
  if (columns.size > 1) area(ends(1), ends(0), { fill: line.stroke, "fill-opacity": opacity, stroke: line.stroke, "stroke-opacity": opacity, "stroke-width": 1, class: "extremes" });
}

// Values beyond the axis: a mark at its edge, the farthest of each curve with its value.
function drawSpikes(lines, plot, { box, low, high, X, unit }) {
  for (const line of lines) {
    let labelled = false;
    const found = line.group.runs.flatMap(run => spikes(run, line.key).map(([i, v, up]) => ({ x: xs(run)[i], v, up })));
    for (const { x, v, up } of found.sort((a, b) => Math.abs(b.v) - Math.abs(a.v))) {
      if (up ? v <= high : v >= low) continue;
      const at = X(x), y = up ? box.top - 8 : box.bottom + 3, tip = up ? -6 : 6;
      const mark = svg("path", { d: `M${at - 4},${y + (up ? 6 : 0)}h8l-4,${tip}Z`, fill: line.stroke, class: "spike" }, plot);
      svg("title", {}, mark).textContent = `${number(v, unit)} at ${where(x)}, beyond the axis`;
      if (labelled || lines.length > 3) continue;
      const end = at > box.right - 60;
      svg("text", { x: at + (end ? -7 : 7), y: y + (up ? 7 : 5), "text-anchor": end ? "end" : "start", class: "spike-label" }, plot).textContent = number(v, unit);
      labelled = true;
    }
  }
}

function drawPoints(shown, points, layer, plot, { X, Y, trace }) {
  shown.forEach((group, k) => {
    const own = color(groups.length === 1 ? 2 : group.index), shift = (k - (shown.length - 1) / 2) * Math.min(7, 24 / shown.length);
    const found = points(group).map(p => [X(p.at) + shift, Y(p.value), p]);
    if (found.length > 1) svg("path", { d: `M${trace(found)}`, stroke: own, "stroke-width": groups.length > 1 ? 1.6 : 1, "stroke-dasharray": groups.length > 1 ? dash(group.index) : "1 4", "stroke-opacity": .75 }, layer);
    for (const [x, y, p] of found) {
      const stroke = p.grey ? "var(--muted)" : own;
      if (p.low !== null && p.high > p.low) svg("path", { d: `M${x},${Y(p.low)}V${Y(p.high)}M${x - 3},${Y(p.low)}h6M${x - 3},${Y(p.high)}h6`, stroke, fill: "none", "stroke-width": 1.5, "stroke-opacity": p.grey ? .7 : 1 }, plot);
      svg("circle", { cx: x, cy: y, r: 4.2, fill: p.grey ? "var(--card)" : own, stroke: p.grey ? own : "var(--card)", "stroke-width": 1.5 }, plot);
    }
  });
}

// ---- Pointing
function nearest(values, x) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (values[middle] < x) low = middle; else high = middle; }
  return high >= 0 && Math.abs(values[high] - x) < Math.abs(values[low] - x) ? high : low;
}
function point(x) {  // the dashed line, in every chart
  for (const chart of state.charts) {
    if (!chart.cursor) continue;
    const inside = x !== null && x >= chart.first && x <= chart.last && (state.axis === "step" || !chart.panel.differences);
    chart.cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) { chart.cursor.setAttribute("x1", chart.X(x)); chart.cursor.setAttribute("x2", chart.X(x)); }
  }
}
function hover(chart, event) {
  if (!chart.X) return;
  const { panel, tip, left, right } = chart, unit = panel.unit, rect = chart.plot.getBoundingClientRect();
  const at = chart.first + Math.min(1, Math.max(0, (event.clientX - rect.left - left) / (right - left))) * (chart.last - chart.first);
  tip.replaceChildren();
  const shown = chart.only ? [chart.only] : visible();
  const points = shown.flatMap(group => [...(panel.evals ? evalsOf(group) : []), ...(panel.differences ? group.differences.map(d => ({ ...d, at: d.step })) : [])].map(p => ({ ...p, group })));
  const anchors = chart.lines.length ? chart.lines.map(line => line.x[nearest(line.x, at)]) : points.map(p => p.at);
  const snapped = anchors.length ? anchors.reduce((a, b) => Math.abs(b - at) < Math.abs(a - at) ? b : a) : at;
  const heading = panel.differences ? `step ${snapped}` : where(snapped), size = Math.max(1, ...shown.flatMap(group => group.runs.map(run => run.stepsPerPoint)));
  element("strong", "", heading[0].toUpperCase() + heading.slice(1) + (size > 1 && state.axis === "step" && chart.lines.length ? ` and the ${size - 1} before it` : ""), tip);
  const table = element("table", "", undefined, tip);
  const row = (fill, label, ...cells) => {
    const tr = element("tr", "", undefined, table), td = element("td", "", undefined, tr);
    if (fill) swatch(fill, td);
    td.append(` ${label}`);
    cells.forEach(cell => element("td", "", cell, tr));
  };
  for (const line of panel.stacked ? [...chart.lines].reverse() : chart.lines) {
    const i = nearest(line.x, snapped);
    if (line.x[i] === undefined || snapped > line.x.at(-1) + (chart.last - chart.first) * .02) continue;
    const who = groups.length > 1 && !chart.only ? (panel.series.length > 1 ? `${line.group.name}, ${line.label}` : line.group.name) : line.label;
    if (!line.group.alone) {
      row(line.stroke, who, number((line.own || line.soft)[i], unit), panel.stacked || !line.low ? "" : `${number(line.low[i], unit)} to ${number(line.high[i], unit)}`, `${line.n[i]} runs`);
      continue;
    }
    const run = line.group.runs[0], soft = (line.own || line.soft)[i];
    row(line.stroke, who, number(line.raw[i], unit), state.smoothing > 0 && !panel.exact ? `(${number(soft, unit)})` : "");
    if (run.highs[line.key] && run.highs[line.key][i] !== null && !panel.stacked) row("", "smallest to largest", `${number(run.lows[line.key][i], unit)} to ${number(run.highs[line.key][i], unit)}`, "");
    if (panel.band && line.low) row("", "range", `${number(lowsOf(run, panel.band[0])[i], unit)} to ${number(highsOf(run, panel.band[1])[i], unit)}`, "");
  }
  for (const p of points) if (Math.abs(chart.X(p.at) - chart.X(snapped)) < 6) {
    const own = color(groups.length === 1 ? 2 : p.group.index), name = groups.length > 1 ? p.group.name : "held-out";
    const interval = p.low === null || p.low === p.high ? "" : `${number(p.low, unit)} to ${number(p.high, unit)}`;
    row(own, panel.evals && chart.lines.length && groups.length > 1 ? `${name}, held-out` : name, number(p.value, unit), interval, panel.differences ? (p.clear ? "" : "within its error") : "");
  }
  if (state.smoothing > 0 && chart.lines.some(line => line.group.alone) && !panel.exact) element("div", "muted", "in brackets: smoothed", tip);
  tip.style.display = "block";
  const host = chart.node.getBoundingClientRect(), x = event.clientX - host.left;
  tip.style.left = `${Math.max(4, Math.min(host.width - tip.offsetWidth - 4, x + 16 + tip.offsetWidth > host.width ? x - 16 - tip.offsetWidth : x + 16))}px`;
  tip.style.top = `${rect.top - host.top + 6}px`;
  point(snapped);
}
