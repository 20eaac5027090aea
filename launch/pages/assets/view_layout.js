"use strict";
// Where every line of every rollout lies, worked out from widths of text alone, so that only what is seen is drawn.
//
// A token is never cut: it goes to the next line where it does not fit, and ends the line where it holds a newline.

const HEADER_PX = 40;
const LINE_PX = 24;
const GAP_PX = 14;
const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|[\ud83c-\ud83e]/;
const MANY = 0xffff;

const SHOWN = DATA.pieces.map(visible);
const WIDTHS = Uint16Array.from(SHOWN, (text) => Math.min(MANY, WIDE.test(text) ? 2 * text.length : text.length));
const ENDS_LINE = Uint8Array.from(DATA.pieces, (text) => (text.includes("\n") ? 1 : 0));

// First token of every line, and the number of tokens at the end.
function lineStarts(rollout, columns) {
  const { tokens } = rollout;
  const starts = [0];
  let used = 0;
  for (let index = 0; index < tokens.length; index++) {
    const width = WIDTHS[tokens[index]];
    if (used && used + width > columns) {
      starts.push(index);
      used = 0;
    }
    used += width;
    if (ENDS_LINE[tokens[index]] && index + 1 < tokens.length) {
      starts.push(index + 1);
      used = 0;
    }
  }
  starts.push(tokens.length);
  return Int32Array.from(starts);
}

class Layout {
  constructor(rollouts, columns) {
    this.rollouts = rollouts;
    this.lines = rollouts.map((rollout) => lineStarts(rollout, columns));
    this.tops = [0];
    for (const starts of this.lines) {
      this.tops.push(this.tops[this.tops.length - 1] + HEADER_PX + (starts.length - 1) * LINE_PX + GAP_PX);
    }
    this.height = this.tops[this.tops.length - 1];
  }

  lineTop(rollout, line) {
    return this.tops[rollout] + HEADER_PX + line * LINE_PX + 4;
  }

  lineOf(rollout, token) {
    return lastAtMost(this.lines[rollout].subarray(0, -1), token);
  }

  // What lies between two heights: [rollout, line], where line -1 is the heading.
  *between(from, to) {
    if (!this.rollouts.length) return;
    for (let rollout = lastAtMost(this.tops, Math.max(0, from)); rollout < this.rollouts.length; rollout++) {
      const top = this.tops[rollout];
      if (top > to) return;
      if (top + HEADER_PX >= from) yield [rollout, -1];
      const count = this.lines[rollout].length - 1;
      const first = Math.max(0, Math.floor((from - top - HEADER_PX) / LINE_PX) - 1);
      const last = Math.min(count - 1, Math.ceil((to - top - HEADER_PX) / LINE_PX));
      for (let line = first; line <= last; line++) yield [rollout, line];
    }
  }
}

// Index of the last of some rising numbers that is not above a value.
function lastAtMost(numbers, value) {
  let low = 0;
  let high = numbers.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (numbers[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}
