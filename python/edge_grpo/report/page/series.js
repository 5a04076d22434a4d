"use strict";
// The page's data as curves: smoothed for each run, and for a group the mean and band over its runs.
const page = JSON.parse(document.getElementById("data").textContent), runs = page.runs;
const groups = page.groups.map((group, index) => ({ ...group, index, runs: group.runs.map(i => runs[i]), alone: group.runs.length === 1 }));
const baseline = groups[page.baseline];
const longest = Math.max(0, ...runs.map(run => run.steps.length));
const AXES = { step: "steps", minutes: "minutes", tokens: "tokens" };
const state = { smoothing: 0, axis: "step", band: "range", hidden: new Set(), charts: [] };
const byId = id => document.getElementById(id);
const visible = () => groups.filter(group => !state.hidden.has(group.index));

// Colour and dash both tell curves apart: no colour alone does for every reader. Eight of each, in pairs that repeat
// after 64 curves.
const COLORS = 8;
const DASHES = ["", "7 4", "2 3.5", "11 3 2 3", "14 5", "5 2 1.5 2 1.5 2", "1 6", "10 2.5"];
const color = index => `var(--c${index % COLORS})`;
const dash = index => DASHES[(index + Math.floor(index / COLORS)) % DASHES.length];
const colorOf = (group, s) => color(groups.length === 1 ? s : group.index);
const dashOf = (group, s, series) => dash(groups.length === 1 || series > 1 ? s : group.index);

const column = (run, key) => run.columns[key];
const has = (run, key) => (column(run, key) || []).some(v => v !== null);
const hasAny = (group, key) => group.runs.some(run => has(run, key));
const xs = run => run[AXES[state.axis]];
const lowsOf = (run, key) => run.lows[key] || column(run, key) || [];
const highsOf = (run, key) => run.highs[key] || column(run, key) || [];
function quantile(sorted, q) { return sorted[Math.min(sorted.length - 1, Math.max(0, Math.floor(q * (sorted.length - 1) + 1e-9)))]; }

const remembered = new Map();
function remember(name, make) {
  if (!remembered.has(name)) {
    if (remembered.size > 6000) remembered.clear();
    remembered.set(name, make());
  }
  return remembered.get(name);
}

// The values between which a run's curve lies, but for its outliers: a spike must flatten neither the axis nor the mean.
function fences(run, key) {
  return remember(`fences ${run.index} ${key}`, () => {
    const sorted = [...lowsOf(run, key), ...(run.highs[key] || [])].filter(v => v !== null).sort((a, b) => a - b);
    if (sorted.length < 20) return [-Infinity, Infinity];
    const low = quantile(sorted, .03), high = quantile(sorted, .97), reach = 3 * (high - low);
    return reach > 0 ? [low - reach, high + reach] : [-Infinity, Infinity];
  });
}
function spikes(run, key) {  // [index, value, up], the farthest first
  return remember(`spikes ${run.index} ${key}`, () => {
    const [low, high] = fences(run, key), lows = lowsOf(run, key), highs = highsOf(run, key), found = [];
    highs.forEach((v, i) => { if (v !== null && v > high) found.push([i, v, true]); });
    lows.forEach((v, i) => { if (v !== null && v < low) found.push([i, v, false]); });
    return found.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 12);
  });
}
function smooth(run, key) {
  return remember(`smooth ${run.index} ${state.smoothing} ${key}`, () => {
    const values = column(run, key) || [];
    if (!state.smoothing) return values;
    const [low, high] = fences(run, key);
    let mean = 0, weight = 0;  // an exponential mean without the pull of its start
    return values.map(v => {
      if (v === null) return null;
      mean = state.smoothing * mean + (1 - state.smoothing) * Math.min(high, Math.max(low, v));
      weight = state.smoothing * weight + (1 - state.smoothing);
      return mean / weight;
    });
  });
}

// Mean and band over a group's runs, wherever at least one of them has a value; `n` says how many.
function overRuns(group, key, values = smooth) {
  return remember(`group ${group.index} ${state.smoothing} ${state.axis} ${state.band} ${key}`, () => {
    const members = group.runs.filter(run => has(run, key)).map(run => {
      const at = values(run, key), x = xs(run), kept = at.map((v, i) => i).filter(i => at[i] !== null);
      return { run, x: kept.map(i => x[i]), y: kept.map(i => at[i]) };
    });
    let all = [...new Set(members.flatMap(member => member.x))].sort((a, b) => a - b);
    if (all.length > 800) { const by = Math.ceil(all.length / 800); all = all.filter((_, i) => i % by === 0 || i === all.length - 1); }
    const result = { x: [], soft: [], low: [], high: [], n: [], members };
    const at = members.map(() => 0);
    for (const x of all) {
      const here = [];
      members.forEach((member, m) => {
        while (at[m] + 1 < member.x.length && member.x[at[m] + 1] <= x) at[m]++;
        const i = at[m], j = Math.min(i + 1, member.x.length - 1);
        if (x < member.x[0] || x > member.x.at(-1)) return;
        const share = member.x[j] > member.x[i] ? (x - member.x[i]) / (member.x[j] - member.x[i]) : 0;
        here.push(member.y[i] + share * (member.y[j] - member.y[i]));
      });
      if (!here.length) continue;
      const [mean, low, high] = spread(here);
      result.x.push(x); result.soft.push(mean); result.low.push(low); result.high.push(high); result.n.push(here.length);
    }
    return result;
  });
}
function spread(values) {  // mean, and the ends of the band
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  if (state.band === "range") return [mean, Math.min(...values), Math.max(...values)];
  const error = values.length > 1 ? Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (values.length - 1) / values.length) : 0;
  return [mean, mean - error, mean + error];
}

// A group's held-out evaluations: of one run with their own error, of several with the band over the runs.
function evalsOf(group) {
  if (group.alone) return group.runs[0].evals.map(e => ({ at: e[state.axis], value: e.accuracy, low: e.accuracy - (e.stderr || 0), high: e.accuracy + (e.stderr || 0), n: 1 }));
  const steps = [...new Set(group.runs.flatMap(run => run.evals.map(e => e.step)))].sort((a, b) => a - b);
  return steps.map(step => {
    const here = group.runs.flatMap(run => run.evals.filter(e => e.step === step));
    const [value, low, high] = spread(here.map(e => e.accuracy));
    return { at: here.reduce((sum, e) => sum + e[state.axis], 0) / here.length, value, low, high, n: here.length };
  });
}
