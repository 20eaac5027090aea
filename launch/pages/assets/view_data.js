"use strict";
// Rollouts out of the packed data: columns of numbers by token, decoded when a rollout is first looked at.

const DATA = pageData();
const UNKNOWN = NaN;

function decode(text, Type) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = characters.charCodeAt(at);
  return new Type(bytes.buffer);
}

class Rollout {
  constructor(packed, source, group) {
    Object.assign(this, { packed, source, group, cache: new Map() });
    this.tokens = decode(packed.tokens, Uint32Array);
    this.count = packed.count;
  }

  piece(index) {
    return DATA.pieces[this.tokens[index]];
  }

  // Of every token; null where the run has not recorded it.
  column(name) {
    return this.once(name, () => (name in this.packed.columns ? decode(this.packed.columns[name], Float32Array) : null));
  }

  // Of the tokens of routes, at their places among all tokens; of several routes the first that knows it.
  routed(name) {
    return this.once(`route/${name}`, () => {
      const known = this.packed.routes.filter((route) => name in route.columns);
      if (!known.length) return null;
      const whole = new Float32Array(this.count).fill(UNKNOWN);
      for (const route of [...known].reverse()) {
        const values = decode(route.columns[name], Float32Array);
        this.positions(route).forEach((position, row) => { whole[position] = values[row]; });
      }
      return whole;
    });
  }

  positions(route) {
    return this.once(`positions/${this.packed.routes.indexOf(route)}`, () => decode(route.positions, Uint32Array));
  }

  // Bits of the routes that each token takes, by their numbers on the page.
  get routeBits() {
    return this.once("bits", () => {
      const bits = new Uint32Array(this.count);
      for (const route of this.packed.routes) {
        const bit = 1 << routeNumber(routeName(this, route.route));
        for (const position of this.positions(route)) bits[position] |= bit;
      }
      return bits;
    });
  }

  // Index of the first span that each token lies in, or -1.
  get spanIndex() {
    return this.once("spans", () => {
      const found = new Int16Array(this.count).fill(-1);
      this.packed.spans.forEach(([start, end], index) => {
        for (let token = start; token < Math.min(end, this.count); token++) if (found[token] < 0) found[token] = index;
      });
      return found;
    });
  }

  // The most likely tokens at a position, by whose they are; empty where they were not recorded.
  candidates(position, whose) {
    for (const route of this.packed.routes) {
      const row = this.positions(route).indexOf(position);
      if (row < 0 || !(whose in route.candidates)) continue;
      const { size } = route.candidates[whose];
      const key = `${whose}/${this.packed.routes.indexOf(route)}`;
      const tokens = this.once(`${key}/tokens`, () => decode(route.candidates[whose].tokens, Uint32Array));
      const logprobs = this.once(`${key}/logprobs`, () => decode(route.candidates[whose].logprobs, Float32Array));
      return Array.from({ length: size }, (_, rank) => rank + row * size)
        .filter((entry) => !Number.isNaN(logprobs[entry]))
        .map((entry) => ({ piece: DATA.pieces[tokens[entry]], probability: Math.exp(logprobs[entry]) }));
    }
    return [];
  }

  once(name, make) {
    if (!this.cache.has(name)) this.cache.set(name, make());
    return this.cache.get(name);
  }
}

const SOURCES = DATA.sources.map((source) => ({
  ...source,
  title: `${source.run} · step ${source.step}`,
  groups: source.groups.map((group) => ({
    ...group,
    rollouts: group.rollouts.map((packed) => new Rollout(packed, source, group)),
  })),
}));

// Every route of any run on the page; one of the same name has the same number, and colour, in all of them.
const ROUTES = [...new Set([
  ...SOURCES.flatMap((source) => source.routes),
  ...allRollouts().flatMap((rollout) => rollout.packed.routes.map((route) => routeName(rollout, route.route))),
])];

// Of a run without a configuration routes have no names.
function routeName(rollout, index) {
  return rollout.source.routes[index] ?? `route ${index}`;
}

function routeNumber(name) {
  return ROUTES.indexOf(name);
}

function allRollouts() {
  return SOURCES.flatMap((source) => source.groups.flatMap((group) => group.rollouts));
}

// Text as it can be shown in a line: what would break the line, turn its direction or be invisible becomes a sign.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
const SIGNS = { "\n": "⏎", "\t": "⇥", "\r": "␍", "\u007f": "␡" };

function visible(text) {
  if (text === "") return "∅";
  return text.replace(UNSEEN, (char) => {
    const code = char.charCodeAt(0);
    if (char in SIGNS) return SIGNS[char];
    return code < 32 ? String.fromCharCode(0x2400 + code) : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
  });
}
