// ---- Completions. Text enters the page as text nodes only.
function completions() {
  const all = runs.flatMap(run => run.completions.map(sample => ({ ...sample, run })));
  if (!all.length) return;
  byId("completions").hidden = false;
  const option = (select, value, label) => { element("option", "", label, select).value = value; };
  option(byId("filter-run"), "", "all"); runs.forEach((run, i) => option(byId("filter-run"), i, run.name));
  byId("filter-run-label").hidden = runs.length < 2;
  option(byId("filter-step"), "", "all"); [...new Set(all.map(s => s.step))].sort((a, b) => b - a).forEach(step => option(byId("filter-step"), step, step));
  all.sort((a, b) => b.step - a.step || a.run.index - b.run.index);
  let limit = 8;
  const show = () => {
    const run = byId("filter-run").value, step = byId("filter-step").value, kind = byId("filter-kind").value, outcome = byId("filter-outcome").value, text = byId("filter-text").value.toLowerCase();
    const found = all.filter(s => (run === "" || s.run.index === +run) && (step === "" || s.step === +step) && (outcome === "" || s.outcome === outcome)
      && (kind === "" || (kind === "none" ? !s.correction : kind === "corrected" ? s.correction : s.correction === kind))
      && (!text || `${s.problem} ${s.answer} ${s.segments.map(part => part[1]).join("")}`.toLowerCase().includes(text)));
    byId("filter-count").textContent = `${found.length} of ${all.length}`;
    byId("more").hidden = found.length <= limit;
    byId("samples").replaceChildren(...found.slice(0, limit).map(sampleCard));
    balance(byId("samples"));
  };
  ["run", "step", "kind", "outcome", "text"].forEach(name => byId(`filter-${name}`).addEventListener("input", () => { limit = 8; show(); }));
  byId("more").onclick = () => { limit += 24; show(); };
  show();
  for (const run of runs) if (run.prompt) {
    const details = element("details", "prompt", undefined, byId("prompts"));
    details.style.marginTop = "12px";
    element("summary", "muted", `A prompt as the model reads it${runs.length > 1 ? `: ${run.name}` : ""}`, details);
    element("pre", "", run.prompt, details);
  }
}
function sampleCard(s) {
  const card = element("div", "card sample"), meta = element("div", "meta", undefined, card);
  if (runs.length > 1) { const who = element("span", "", undefined, meta); swatch(color(groups.find(group => group.runs.includes(s.run)).index), who); who.append(` ${s.run.name}`); }
  element("span", "", `step ${s.step}`, meta);
  if (s.index !== null && s.index !== undefined) element("span", "", `example ${s.index}`, meta);
  element("span", "", s.correction ? `correction: ${s.correction}` : "untouched", meta);
  element("p", "problem", s.problem ?? "", card);
  const pre = element("pre", "", undefined, card);
  pre.tabIndex = 0;
  for (const [who, text] of s.segments) {
    const part = element("span", who === "sampled" ? "" : who, text, pre);
    if (who !== "sampled") part.title = who === "injected" ? "injected by correction" : "the policy, continuing";
  }
  if (s.cut) element("span", "muted", ` … ${s.cut} more characters`, pre);
  const verdict = element("div", "verdict", undefined, card), label = outcome => String(outcome).replace("_", " ");
  const result = element("span", "", undefined, verdict);
  if (s.correction && s.outcome_before) { element("span", s.outcome_before, label(s.outcome_before), result); result.append(" → "); }
  if (s.outcome) element("strong", s.outcome, label(s.outcome), result);
  element("span", "", `reward ${s.correction ? `${number(s.reward_before)} → ` : ""}${number(s.reward)}`, verdict);
  element("span", "", `advantage ${number(s.advantage)}`, verdict);
  element("span", "", `weight ${number(s.weight)}`, verdict);
  if (s.answer !== null && s.answer !== undefined) element("span", "muted", `expected: ${s.answer}`, verdict);
  return card;
}

