// What is drawn. A series is [column, label, title of its own]; a panel without data, or with nothing but zeros when
// `quiet`, is left out. Where several groups share the page, the series of a `split` panel have a chart each, so that
// colour and dash both stand for the group.
const SECTIONS = [
  ["Learning", [
    { title: "Accuracy", note: "Share of responses whose answer is right. Points: held-out evaluations, ± one standard error.", unit: "share", evals: true, split: true,
      series: [["accuracy/before", "first attempts", "Training accuracy, first attempts"], ["accuracy/after", "after correction", "Training accuracy, after correction"]] },
    { title: "Reward", note: "Mean over the step's responses, as trained on." + (groups.length === 1 && groups[0].alone ? " The band is ± one standard deviation." : ""), series: [["reward/mean", "mean"]], spread: "reward/std" },
    { title: "Collapsed groups", note: "Share of groups whose rewards are all equal: they have no advantage and teach nothing.", unit: "share", split: true,
      series: [["collapsed/before", "before correction", "Collapsed groups, before correction"], ["collapsed/after", "after correction", "Collapsed groups, after correction"]] },
  ]],
  ["Advantage and entropy", [
    { title: "Advantage variance", zero: true, note: "Over all responses of the step. Zero is advantage collapse.", series: [["advantage/var", "variance"]] },
    { title: "Entropy", zero: true, note: "Of the policy's next-token distribution, in nats.", split: true,
      series: [["entropy/token_mean", "mean over tokens", "Entropy, mean over tokens"], ["entropy/response_mean", "mean over responses", "Entropy, mean over responses"]] },
    { title: "Entropy-driven weights", note: "1 / P̂, the factor on a response's advantage; the band spans smallest to largest.", series: [["eda/weight_mean", "mean"]], band: ["eda/weight_min", "eda/weight_max"], constant: 1 },
  ]],
  ["Rollout and correction", [
    { title: "Replaced groups", note: "Groups that were dropped because their rewards were all equal, and the rounds in which others took their place.", quiet: true, series: [["resample/dropped", "groups dropped"], ["resample/rounds", "rounds"]] },
    { title: "Accuracy of everything sampled", note: "Share of first attempts whose answer is right, those of dropped groups included.", unit: "share", quiet: true, series: [["resample/accuracy", "first attempts"]] },
    { title: "Response length", zero: true, note: "Tokens; the band spans shortest to longest.", series: [["length/mean", "mean"]], band: ["length/min", "length/max"] },
    { title: "Truncated", note: "Share of first attempts cut off by the length limit.", unit: "share", quiet: true, series: [["length/truncated", "truncated"]] },
    { title: "Corrections", note: "Responses corrected, by kind.", quiet: true, series: [["correction/reflect", "reflect"], ["correction/answer", "answer"], ["correction/solution", "solution"], ["correction/hint", "hint"], ["correction/fallbacks", "too long for the kind drawn"], ["correction/truncated", "solutions cut"]] },
    { title: "Injected tokens", note: "Share of tokens that the policy did not sample.", unit: "share", quiet: true, series: [["tokens/injected_share", "injected"]] },
    { title: "Superseded tokens", note: "Share of tokens of corrected attempts, which have no loss.", unit: "share", quiet: true, series: [["masked/superseded", "masked"]] },
    { title: "Failed first attempts", note: "Share of responses without a readable answer, or whose grading timed out.", unit: "share", quiet: true,
      series: [["outcome_share/unparseable", "unparseable"], ["outcome_share/timed_out", "timed out"]] },
    { title: "Not judged", note: "Counts over both gradings: answers and reward functions that timed out, functions that failed, responses skipped because of it.", quiet: true,
      series: [["grading/answers_timed_out", "answers timed out"], ["grading/functions_timed_out", "functions timed out"], ["grading/functions_failed", "functions failed"], ["grading/skipped", "skipped"]] },
  ]],
  ["Optimisation", [
    { title: "Loss", note: "Its sign and size mean little in policy gradients; jumps do. × marks a step where it was not finite.", finite: true, series: [["loss", "loss"]] },
    { title: "Gradient norm", zero: true, note: "Before clipping. × marks a step where it was not finite.", finite: true, series: [["grad/norm", "norm"]] },
    { title: "Skipped optimizer steps", note: "Because loss or gradient norm was not finite.", quiet: true, series: [["optim/skipped", "skipped"]] },
    { title: "KL to the reference", note: "Mean over tokens, in nats.", quiet: true, series: [["kl/mean", "KL"]] },
    { title: "Clipped", note: "Share of tokens whose importance ratio lay outside the clip range.", unit: "share", quiet: true,
      series: [["clip/region", "all"], ["clip/low", "below"], ["clip/high", "above"]] },
    { title: "Importance ratio", note: "The current policy's token probability over that of the policy that sampled.", series: [["ratio/mean", "mean"], ["ratio/max", "largest"]], constant: 1 },
    { title: "Trainer over sampler", note: "The trainer's token probability over the sampler's, before truncation or masking.",
      series: [["ratio/sampler_mean", "mean"], ["ratio/sampler_p99", "99th percentile"], ["ratio/sampler_max", "largest"]], constant: 1 },
    { title: "Bounded ratios", note: "Share of ratios outside their bounds; these are truncated or masked.", unit: "share", quiet: true, series: [["ratio/sampler_truncated", "bounded"]] },
    { title: "Learning rate", zero: true, note: "", exact: true, series: [["optim/lr", "learning rate"]] },
    { title: "Staleness", note: "Steps that were learnt from between the weights that sampled and those that learn.", quiet: true, series: [["rollout/staleness", "steps"]] },
    { title: "Drift", note: "Absolute difference between values recorded while sampling and recomputed ones, in nats. Growth means that sampler and trainer disagree.", log: true,
      series: [["drift/logprob_max", "logprob, largest"], ["drift/logprob_mean", "logprob, mean"], ["drift/entropy_max", "entropy, largest"]] },
  ]],
  ["Cost", [
    { title: "Time per step", note: "Seconds in each phase.", stacked: true, unit: "seconds",
      series: [["time/rollout", "rollout"], ["time/reward", "reward"], ["time/correction", "correction"], ["time/score", "score"], ["time/update", "update"], ["time/other", "other"]] },
    { title: "Generated tokens", note: "By the policy in each step: first attempts and continuations, those of dropped groups included.", series: [["tokens/generated", "tokens"]], zero: true },
    { title: "Throughput", note: "Tokens per second, over the whole step.", series: [["throughput/tokens_per_s", "tokens/s"]], zero: true },
    { title: "Peak memory", note: "Of this process, up to this step.", exact: true, unit: "bytes", series: [["memory/peak_bytes", "peak"]], zero: true },
  ]],
];
const INTERNAL = ["correction/rejected_solutions", "time/total", "reward/std", "outcome/correct", "outcome/wrong", "outcome/unparseable", "outcome/timed_out", "outcome_share/correct", "outcome_share/wrong"];

