"use strict";
// The heading of a rollout: what it earned, its spans, and an overview of all its tokens in the chosen colour.

function rolloutHeading(rollout, state, onJump) {
  const { packed } = rollout;
  const node = element("div", "rollout");
  const isCorrect = packed.reward >= 0.5;
  node.append(
    element("b", "", `#${packed.sample}`),
    element("span", `reward ${isCorrect ? "good" : "bad"}`, `${isCorrect ? "✓" : "✗"} reward ${figure(packed.reward)}`),
    overview(rollout, node, state, onJump),
  );
  const kinds = new Map();
  packed.spans.forEach(([start, , spanClass, type]) => {
    const key = `${spanClass} · ${type}`;
    if (!kinds.has(key)) kinds.set(key, { spanClass, start, count: 0 });
    kinds.get(key).count++;
  });
  for (const [name, { spanClass, start, count }] of kinds) {
    const chip = element("button", `chip ${spanClass}`, count > 1 ? `${name} × ${count}` : name);
    chip.type = "button";
    chip.title = "Go to the first of these spans";
    chip.addEventListener("click", () => onJump(Math.min(start, rollout.count - 1)));
    node.append(chip);
  }
  const facts = [`advantage ${figure(packed.advantage)}`, `${rollout.count} tokens`, packed.finish];
  if (!packed.spans.length && packed.annotation) facts.push(`spans: ${packed.annotation}`);
  node.append(element("span", "facts soft", facts.join(" · ")));
  node.title = [packed.feedback, packed.reflection].filter(Boolean).join("\n");
  return node;
}

function overview(rollout, node, state, onJump) {
  const canvas = element("canvas");
  canvas.width = 220;
  canvas.height = 14;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "All tokens of the rollout in the chosen colour");
  node.overview = () => drawOverview(canvas, rollout, state);
  node.overview();
  canvas.addEventListener("click", (event) => {
    const share = event.offsetX / canvas.clientWidth;
    onJump(Math.max(0, Math.min(rollout.count - 1, Math.floor(share * rollout.count))));
  });
  return canvas;
}

// Of the tokens that share a pixel the one with the strongest figure is drawn.
function drawOverview(canvas, rollout, state) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const values = valuesOf(state.metric, rollout);
  if (!values) return;
  const style = getComputedStyle(canvas);
  const colours = new Map();
  const isLowStrong = state.metric.scale === "probability";
  for (let x = 0; x < canvas.width; x++) {
    const start = Math.floor((x * rollout.count) / canvas.width);
    const end = Math.max(start + 1, Math.floor(((x + 1) * rollout.count) / canvas.width));
    let strongest = NaN;
    for (let token = start; token < Math.min(end, rollout.count); token++) {
      const value = values[token];
      if (Number.isNaN(value)) continue;
      const isStronger = isLowStrong ? value < strongest : Math.abs(value) > Math.abs(strongest);
      if (Number.isNaN(strongest) || isStronger) strongest = value;
    }
    const name = colourOf(state.metric, strongest).split(" ")[0];
    if (!name) continue;
    if (!colours.has(name)) colours.set(name, resolvedColour(style, name));
    context.fillStyle = colours.get(name);
    context.fillRect(x, 0, 1, canvas.height);
  }
}

// A custom property may hold light-dark(), which a canvas does not read: an element resolves it.
const resolver = element("span");
function resolvedColour(style, name) {
  const key = `${isDark()}/${name}`;
  if (!resolvedColour.known) resolvedColour.known = new Map();
  if (!resolvedColour.known.has(key)) {
    resolver.className = name;
    document.body.append(resolver);
    resolvedColour.known.set(key, getComputedStyle(resolver).backgroundColor);
    resolver.remove();
  }
  return resolvedColour.known.get(key);
}
