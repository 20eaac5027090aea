"use strict";
// What colours a token: the figure that is chosen, its scale over everything on the page, and the legend.

const NUM_BINS = 9;

function exponential(column) {
  return column && column.map(Math.exp);
}

// The policy-gradient weight of a token as a share of the largest on the page.
let largestWeight = null;
function weightScale() {
  largestWeight ??= allRollouts().reduce((most, rollout) => {
    const weights = rollout.column("pgWeight");
    return weights ? weights.reduce((a, b) => Math.max(a, b), most) : most;
  }, 0);
  return largestWeight || 1;
}

function advantages(rollout) {
  const values = rollout.column("advantage");
  const weights = rollout.column("pgWeight");
  return values && values.map((value, index) => value * (weights ? weights[index] / weightScale() : 1));
}

function mismatch(rollout) {
  const policy = rollout.column("policyLogprob");
  const sampler = rollout.column("rolloutLogprob");
  return policy && sampler && policy.map((value, index) => value - sampler[index]);
}

const METRICS = [
  { id: "route", name: "Route", scale: "routes", says: "Tokens that take a route; the others take the policy gradient only" },
  { id: "kl", name: "KL", scale: "sequential", says: "Divergence between teacher and student, nats, before any clip",
    of: (rollout) => rollout.routed("kl") },
  { id: "advantage", name: "Advantage", scale: "diverging",
    says: "Advantage × policy-gradient weight, as a share of the largest weight", of: advantages },
  { id: "entropy", name: "Entropy", scale: "sequential", says: "Entropy of the student, nats",
    of: (rollout) => rollout.column("entropy") },
  { id: "student", name: "Student p", scale: "probability", says: "Probability of the token under the student",
    of: (rollout) => exponential(rollout.column("policyLogprob") ?? rollout.column("rolloutLogprob")) },
  { id: "teacher", name: "Teacher p", scale: "probability", says: "Probability of the token under the teacher",
    of: (rollout) => exponential(rollout.routed("teacherLogprob")) },
  { id: "mismatch", name: "Mismatch", scale: "diverging", says: "Log-prob of the learner − log-prob of the sampler, nats",
    of: mismatch },
  { id: "version", name: "Version", scale: "ordinal", says: "Version of the weights that wrote the token",
    of: (rollout) => rollout.column("version") },
];

function valuesOf(metric, rollout) {
  return metric.of ? rollout.once(`metric/${metric.id}`, () => metric.of(rollout)) : rollout.routeBits;
}

function isRecorded(metric) {
  return metric.scale === "routes" || allRollouts().some((rollout) => {
    const { columns, routes } = rollout.packed;
    const ofRoutes = (name) => routes.some((route) => name in route.columns);
    const needs = { kl: ofRoutes("kl"), teacher: ofRoutes("teacherLogprob"), advantage: "advantage" in columns,
      entropy: "entropy" in columns, student: "policyLogprob" in columns || "rolloutLogprob" in columns,
      mismatch: "policyLogprob" in columns && "rolloutLogprob" in columns, version: "version" in columns };
    return needs[metric.id];
  });
}

// The value that `share` of all numbers lie below; a sample is enough for a colour scale.
function quantile(metric, share) {
  const sample = [];
  const rollouts = allRollouts();
  const stride = Math.max(1, Math.floor(rollouts.reduce((sum, rollout) => sum + rollout.count, 0) / 20000));
  for (const rollout of rollouts) {
    const values = valuesOf(metric, rollout);
    const isSparse = metric.id === "kl";
    for (let index = 0; values && index < values.length; index += isSparse ? 1 : stride) {
      if (!Number.isNaN(values[index])) sample.push(Math.abs(values[index]));
    }
  }
  sample.sort((a, b) => a - b);
  return sample.length ? sample[Math.min(sample.length - 1, Math.floor(share * sample.length))] : 1;
}

// Upper bounds of all bins but the last, in rising order, with the classes of the bins.
function makeScale(metric) {
  const steps = Array.from({ length: NUM_BINS - 1 }, (_, index) => index + 1);
  const classes = (letter) => Array.from({ length: NUM_BINS }, (_, index) => letter + index);
  if (metric.scale === "probability") {
    return { bounds: [0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95], classes: classes("s").reverse() };
  }
  if (metric.scale === "ordinal") {
    const versions = new Set();
    for (const rollout of allRollouts()) for (const value of valuesOf(metric, rollout) ?? []) versions.add(value);
    const sorted = [...versions].sort((a, b) => a - b);
    const spread = sorted.length > 1 ? (NUM_BINS - 1) / (sorted.length - 1) : 0;
    const names = sorted.map((_, index) => `s${Math.round(index * spread)}`);
    return { bounds: sorted.slice(0, -1).map((value) => value + 0.5), classes: names, names: sorted.map(String) };
  }
  const limit = quantile(metric, 0.99) || 1e-6;
  if (metric.scale === "diverging") {
    return { bounds: steps.map((step) => ((2 * step) / NUM_BINS - 1) * limit), classes: classes("d") };
  }
  return { bounds: steps.map((step) => limit * (step / NUM_BINS) ** 2), classes: classes("s") };
}

const scales = new Map();
function scaleOf(metric) {
  if (!scales.has(metric.id)) scales.set(metric.id, makeScale(metric));
  return scales.get(metric.id);
}

// Class of a token's colour; "" where there is no figure.
function colourOf(metric, value) {
  if (metric.scale === "routes") {
    if (!value) return "";
    const first = 31 - Math.clz32(value & -value);
    return `k${first % 7}${value & (value - 1) ? " many" : ""}`;
  }
  if (Number.isNaN(value)) return "";
  const { bounds, classes } = scaleOf(metric);
  let bin = 0;
  while (bin < bounds.length && value > bounds[bin]) bin++;
  return classes[bin];
}

function figure(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return String(Number(value.toPrecision(3)));
  return value.toExponential(1);
}

function drawLegend(parent, metric) {
  const items = [];
  const item = (className, text) => {
    const node = element("span", "item");
    node.append(element("i", className), element("span", "", text));
    return node;
  };
  if (metric.scale === "routes") {
    ROUTES.forEach((name, number) => items.push(item(`k${number % 7}`, name)));
  } else if (scaleOf(metric).names) {
    scaleOf(metric).names.slice(0, 12).forEach((name, index) => items.push(item(scaleOf(metric).classes[index], name)));
  } else {
    const { bounds, classes } = scaleOf(metric);
    const swatches = element("span", "swatches");
    classes.forEach((name, bin) => {
      const swatch = element("i", name);
      swatch.title = bin < bounds.length ? `up to ${figure(bounds[bin])}` : `above ${figure(bounds[bin - 1])}`;
      swatches.append(swatch);
    });
    const scale = element("span", "scale");
    scale.append(element("span", "", `≤ ${figure(bounds[0])}`), swatches,
      element("span", "", `> ${figure(bounds[bounds.length - 1])}`));
    items.push(scale);
  }
  parent.replaceChildren(...items, element("span", "soft", metric.says));
}
