"use strict";
// The page as a whole: what is chosen, the filters, the keys, and the one or two panes.

const ANY = "any";
const state = { metric: METRICS[0], reward: ANY, type: ANY, route: ANY };
const panes = [];

function fillSelect(select, names) {
  select.replaceChildren(...names.map((name) => element("option", "", name)));
}

function isKept(rollout, { reward, type, route }) {
  const { packed } = rollout;
  if (reward === "correct" && packed.reward < 0.5) return false;
  if (reward === "wrong" && packed.reward >= 0.5) return false;
  if (reward.startsWith("= ") && figure(packed.reward) !== reward.slice(2)) return false;
  if (type !== ANY && !packed.spans.some((span) => typeName(span) === type)) return false;
  if (route === "none") return !packed.routes.some((each) => each.positions);
  return route === ANY || packed.routes.some((each) => each.positions && routeName(rollout, each.route) === route);
}

// Whether the filters speak of other tokens than this one.
function isFaded(rollout, token, { type, route }) {
  if (type !== ANY) {
    const index = rollout.spanIndex[token];
    if (index < 0 || typeName(rollout.packed.spans[index]) !== type) return true;
  }
  if (route === ANY || route === "none") return false;
  return !(rollout.routeBits[token] & (1 << routeNumber(route)));
}

function typeName([, , spanClass, type]) {
  return `${spanClass} · ${type}`;
}

function choose(metric) {
  if (!isRecorded(metric)) return;
  state.metric = metric;
  for (const button of document.querySelectorAll("#metrics button")) {
    button.setAttribute("aria-checked", String(button.dataset.metric === metric.id));
  }
  drawLegend(document.getElementById("legend"), metric);
  panes.forEach((pane) => pane.recolour());
}

function makeMetricButtons() {
  const parent = document.getElementById("metrics");
  METRICS.forEach((metric, index) => {
    const button = element("button", "", metric.name);
    button.append(element("kbd", "", String(index + 1)));
    button.type = "button";
    button.dataset.metric = metric.id;
    button.setAttribute("role", "radio");
    button.disabled = !isRecorded(metric);
    button.title = button.disabled ? "Not recorded; set logging.token_figures=measured in the next run" : metric.says;
    button.addEventListener("click", () => choose(metric));
    parent.append(button);
  });
}

function makeFilters() {
  const rollouts = allRollouts();
  const rewards = [...new Set(rollouts.map((rollout) => rollout.packed.reward))].sort((a, b) => a - b);
  const types = [...new Set(rollouts.flatMap((rollout) => rollout.packed.spans.map(typeName)))].sort();
  const single = rewards.length > 2 && rewards.length <= 12 ? rewards.map((reward) => `= ${figure(reward)}`) : [];
  const choices = { reward: [ANY, "correct", "wrong", ...single], type: [ANY, ...types], route: [ANY, ...ROUTES, "none"] };
  for (const [name, names] of Object.entries(choices)) {
    const select = document.getElementById(name);
    fillSelect(select, names);
    select.addEventListener("change", () => {
      state[name] = names[select.selectedIndex];
      panes.forEach((pane) => pane.arrange());
    });
  }
}

function addPane(sourceIndex) {
  const pane = new Pane(state, SOURCES[sourceIndex], panes.length);
  panes.push(pane);
  document.getElementById("panes").append(pane.root);
  pane.showSource(sourceIndex);
}

function setCompare(isOn) {
  document.getElementById("compare").setAttribute("aria-pressed", String(isOn));
  if (isOn && panes.length === 1) {
    addPane(SOURCES.length - 1);
    const wanted = panes[0].source.groups[panes[0].group]?.prompt;
    const same = panes[1].source.groups.findIndex((group) => group.prompt === wanted);
    panes[1].showGroup(Math.max(0, same));
  } else if (!isOn && panes.length === 2) {
    panes.pop().root.remove();
  }
}

// Arrow keys and letters inside a pane.
function moveCursor(pane, event) {
  const { layout } = pane;
  if (!layout.rollouts.length || event.ctrlKey || event.metaKey || event.altKey) return;
  const at = pane.cursor ?? { rollout: lastAtMost(layout.tops.slice(0, -1), pane.scroller.scrollTop), token: -1 };
  const last = layout.rollouts[at.rollout].count - 1;
  const line = layout.lineOf(at.rollout, Math.max(0, at.token));
  const starts = layout.lines[at.rollout];
  const inLine = (other) => Math.min(starts[other] + at.token - starts[line], starts[other + 1] - 1);
  const moves = {
    ArrowRight: () => [at.rollout, Math.min(last, at.token + 1)],
    ArrowLeft: () => [at.rollout, Math.max(0, at.token - 1)],
    ArrowDown: () => [at.rollout, line + 2 < starts.length ? inLine(line + 1) : last],
    ArrowUp: () => [at.rollout, line > 0 ? inLine(line - 1) : 0],
    j: () => [Math.min(layout.rollouts.length - 1, at.rollout + 1), 0],
    k: () => [Math.max(0, at.rollout - 1), 0],
    n: () => nextRouted(layout, at, 1),
    p: () => nextRouted(layout, at, -1),
  };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  const [rollout, token] = move();
  if (layout.rollouts[rollout].count) pane.moveTo(rollout, token);
}

function nextRouted(layout, at, direction) {
  for (let rollout = at.rollout; rollout >= 0 && rollout < layout.rollouts.length; rollout += direction) {
    const bits = layout.rollouts[rollout].routeBits;
    const edge = direction > 0 ? 0 : bits.length - 1;
    let token = rollout === at.rollout ? at.token + direction : edge;
    for (; token >= 0 && token < bits.length; token += direction) if (bits[token]) return [rollout, token];
  }
  return [at.rollout, Math.max(0, at.token)];
}

function onKey(event) {
  if (event.target.closest("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const number = Number(event.key);
  if (number >= 1 && number <= METRICS.length) choose(METRICS[number - 1]);
  else if (event.key === "t") document.getElementById("theme").click();
  else if (event.key === "c") document.getElementById("compare").click();
  else if (event.key === "Escape") {
    panes.forEach((pane) => { pane.cursor = null; pane.recolour(); });
    hideDetail();
  }
}

makeMetricButtons();
makeFilters();
addPane(0);
const compare = document.getElementById("compare");
compare.disabled = SOURCES.length < 2 && SOURCES[0].groups.length < 2;
compare.addEventListener("click", () => setCompare(panes.length === 1));
if (new Set(SOURCES.map((source) => source.run)).size > 1) setCompare(true);
watchTheme(document.getElementById("theme"), () => panes.forEach((pane) => pane.recolour()));
document.addEventListener("keydown", onKey);
choose(METRICS[0]);
