"use strict";
// The card with everything that is known of one token.

const detail = document.getElementById("detail");

function showDetail(rollout, token, anchor) {
  detail.replaceChildren(...detailNodes(rollout, token));
  detail.hidden = false;
  const box = anchor.getBoundingClientRect();
  const size = detail.getBoundingClientRect();
  const below = box.bottom + 8 + size.height <= innerHeight;
  detail.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  detail.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)}px`;
}

function hideDetail() {
  detail.hidden = true;
}

function detailNodes(rollout, token) {
  const head = element("div");
  head.append(element("span", "piece", visible(rollout.piece(token))), ` token ${token + 1} of ${rollout.count}`);
  const table = element("table");
  for (const [name, value] of figuresOf(rollout, token)) {
    const row = element("tr");
    row.append(element("th", "", name), element("td", "", value));
    table.append(row);
  }
  const lists = element("div", "candidates");
  for (const [whose, title] of [["policy", "Student's likeliest"], ["teacher", "Teacher's likeliest"]]) {
    const found = rollout.candidates(token, whose);
    if (found.length) lists.append(candidateList(title, found, rollout.piece(token)));
  }
  return [head, table, lists];
}

function figuresOf(rollout, token) {
  const at = (column) => (column && !Number.isNaN(column[token]) ? column[token] : null);
  const probability = (value) => `${figure(Math.exp(value))} (log ${figure(value)})`;
  const rows = [];
  const add = (name, value, format = figure) => { if (value !== null) rows.push([name, format(value)]); };
  for (const route of rollout.packed.routes) {
    const row = rollout.positions(route).indexOf(token);
    if (row < 0) continue;
    const weights = rollout.once(`weights/${route.route}`, () => (
      "weight" in route.columns ? decode(route.columns.weight, Float32Array) : null));
    const weight = weights ? `, weight ${figure(weights[row])}` : "";
    rows.push(["route", `${routeName(rollout, route.route)} (λ ${figure(route.weight)}${weight})`]);
  }
  const span = rollout.spanIndex[token];
  if (span >= 0) {
    const [start, end, spanClass, type, importance] = rollout.packed.spans[span];
    rows.push(["span", `${spanClass} · ${type}, tokens ${start + 1}-${end}, importance ${figure(importance)}`]);
  }
  add("student p", at(rollout.column("policyLogprob")), probability);
  add("sampler p", at(rollout.column("rolloutLogprob")), probability);
  add("mismatch", at(valuesOf(METRICS.find((each) => each.id === "mismatch"), rollout)), (v) => `${figure(v)} nats`);
  add("teacher p", at(rollout.routed("teacherLogprob")), probability);
  add("KL", at(rollout.routed("kl")), (value) => `${figure(value)} nats`);
  add("entropy", at(rollout.column("entropy")), (value) => `${figure(value)} nats`);
  add("advantage", at(rollout.column("advantage")));
  add("gradient weight", at(rollout.column("pgWeight")));
  add("version", at(rollout.column("version")), String);
  return rows;
}

function candidateList(title, found, own) {
  const list = element("div");
  list.append(element("h3", "", title));
  for (const { piece, probability } of found) {
    const row = element("div", piece === own ? "candidate own" : "candidate");
    const bar = element("i");
    bar.style.width = `${100 * probability}%`;
    row.append(bar, element("b", "", visible(piece)), element("span", "", figure(probability)));
    list.append(row);
  }
  return list;
}
