"use strict";
// One side of the page: a group of rollouts of one source, of which only the lines in sight are in the document.

const OVERSCAN_PX = 240;

class Pane {
  constructor(state, source, number) {
    Object.assign(this, { state, number, source, group: 0, drawn: new Map(), cursor: null });
    this.root = element("section", "pane");
    this.root.setAttribute("aria-label", number ? "Compared rollouts" : "Rollouts");
    this.sourceSelect = this.select("Run and step", SOURCES.map((each) => each.title), (value) => this.showSource(value));
    this.groupSelect = this.select("Prompt", [], (value) => this.showGroup(value));
    this.facts = element("span", "soft");
    this.question = element("div", "question");
    this.question.dir = "auto";
    const choose = element("div", "row");
    choose.append(this.sourceSelect, this.groupSelect, this.facts);
    const head = element("div", "pane-head");
    head.append(choose, this.question);
    this.scroller = element("div", "scroller");
    this.scroller.tabIndex = 0;
    this.scroller.setAttribute("role", "region");
    this.scroller.setAttribute("aria-label", "Tokens; arrow keys move from one to the next");
    this.canvas = element("div", "canvas");
    this.scroller.append(this.canvas);
    this.root.append(head, this.scroller);
    this.listen();
  }

  select(label, names, onChange) {
    const select = element("select");
    select.setAttribute("aria-label", label);
    fillSelect(select, names);
    select.addEventListener("change", () => onChange(select.selectedIndex));
    return select;
  }

  listen() {
    this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    this.scroller.addEventListener("mouseover", (event) => {
      const place = event.target.place;
      if (place) showDetail(this.layout.rollouts[place.rollout], place.token, event.target);
      else this.showCursor();
    });
    this.scroller.addEventListener("mouseleave", () => this.showCursor());
    this.scroller.addEventListener("click", (event) => {
      if (event.target.place) this.moveTo(event.target.place.rollout, event.target.place.token);
    });
    this.scroller.addEventListener("keydown", (event) => moveCursor(this, event));
    this.scroller.addEventListener("blur", () => { this.cursor = null; this.recolour(); hideDetail(); });
    new ResizeObserver(() => this.arrange()).observe(this.scroller);
  }

  showSource(index) {
    const wanted = this.source.groups[this.group]?.prompt;
    this.source = SOURCES[index];
    this.sourceSelect.selectedIndex = index;
    fillSelect(this.groupSelect, this.source.groups.map((group, number) => {
      const correct = group.rollouts.filter((rollout) => rollout.packed.reward >= 0.5).length;
      return `${number + 1} of ${this.source.groups.length} · ${correct}/${group.rollouts.length} correct · ${group.prompt}`;
    }));
    this.showGroup(Math.max(0, this.source.groups.findIndex((group) => group.prompt === wanted)));
  }

  showGroup(index) {
    this.group = index;
    this.groupSelect.selectedIndex = index;
    const group = this.source.groups[index];
    this.question.replaceChildren();
    if (group) {
      const answer = element("bdi", "", group.answer);
      this.question.append(element("bdi", "", group.question), element("span", "soft", "  Reference: "), answer);
    }
    this.scroller.scrollTop = 0;
    this.arrange();
  }

  // Lay out what the filters leave, and draw it anew.
  arrange() {
    const all = this.source.groups[this.group]?.rollouts ?? [];
    const kept = all.filter((rollout) => isKept(rollout, this.state));
    this.cursor = null;
    this.drawn.clear();
    this.canvas.replaceChildren();
    this.layout = new Layout(kept, this.columns());
    this.canvas.style.height = `${Math.max(this.layout.height, 1)}px`;
    const mean = all.reduce((sum, rollout) => sum + rollout.packed.reward, 0) / (all.length || 1);
    this.facts.textContent = `${kept.length} of ${all.length} rollouts, mean reward ${figure(mean)}`;
    if (!kept.length) this.canvas.append(element("div", "empty", "No rollout of this group passes the filters."));
    this.draw();
  }

  columns() {
    const probe = element("span", "line", "0".repeat(100));
    probe.style.width = "max-content";
    probe.style.padding = "0";
    this.canvas.append(probe);
    const width = probe.getBoundingClientRect().width / 100;
    probe.remove();
    return Math.max(20, Math.floor((this.scroller.clientWidth - 30) / (width || 8)) - 1);
  }

  draw() {
    const from = this.scroller.scrollTop - OVERSCAN_PX;
    const to = this.scroller.scrollTop + this.scroller.clientHeight + OVERSCAN_PX;
    const wanted = new Set();
    for (const [rollout, line] of this.layout.between(from, to)) {
      const key = `${rollout}/${line}`;
      wanted.add(key);
      if (this.drawn.has(key)) continue;
      const node = line < 0 ? this.heading(rollout) : this.line(rollout, line);
      const top = line < 0 ? this.layout.tops[rollout] : this.layout.lineTop(rollout, line);
      node.style.transform = `translateY(${top}px)`;
      this.drawn.set(key, node);
      this.canvas.append(node);
    }
    for (const [key, node] of this.drawn) {
      if (wanted.has(key)) continue;
      node.remove();
      this.drawn.delete(key);
    }
  }

  line(rollout, line) {
    const item = this.layout.rollouts[rollout];
    const starts = this.layout.lines[rollout];
    const node = element("div", "line");
    for (let token = starts[line]; token < starts[line + 1]; token++) {
      const span = element("span", "", SHOWN[item.tokens[token]]);
      span.place = { rollout, token };
      this.colour(span);
      node.append(span);
    }
    return node;
  }

  colour(span) {
    const { rollout, token } = span.place;
    const item = this.layout.rollouts[rollout];
    const values = valuesOf(this.state.metric, item);
    const colour = values ? colourOf(this.state.metric, values[token]) : "";
    const index = item.spanIndex[token];
    const kind = index < 0 ? "" : ` ${item.packed.spans[index][2]}`;
    const off = isFaded(item, token, this.state) ? " off" : "";
    const isCursor = this.cursor && this.cursor.rollout === rollout && this.cursor.token === token;
    span.className = `t ${colour}${kind}${off}${isCursor ? " cursor" : ""}`;
    if (isCursor) span.id = `cursor-${this.number}`;
    else span.removeAttribute("id");
  }

  recolour() {
    for (const node of this.drawn.values()) {
      for (const child of node.children) if (child.place) this.colour(child);
      if (node.overview) node.overview();
    }
  }

  heading(rollout) {
    return rolloutHeading(this.layout.rollouts[rollout], this.state, (token) => this.moveTo(rollout, token));
  }

  spanAt(rollout, token) {
    const line = this.drawn.get(`${rollout}/${this.layout.lineOf(rollout, token)}`);
    return line && [...line.children].find((child) => child.place.token === token);
  }

  moveTo(rollout, token) {
    this.cursor = { rollout, token };
    const top = this.layout.lineTop(rollout, this.layout.lineOf(rollout, token));
    const { scrollTop, clientHeight } = this.scroller;
    if (top < scrollTop + HEADER_PX || top + 2 * LINE_PX > scrollTop + clientHeight) {
      this.scroller.scrollTop = Math.max(0, top - clientHeight / 3);
    }
    this.draw();
    this.recolour();
    this.scroller.setAttribute("aria-activedescendant", `cursor-${this.number}`);
    this.scroller.focus({ preventScroll: true });
    this.showCursor();
  }

  showCursor() {
    const span = this.cursor && this.spanAt(this.cursor.rollout, this.cursor.token);
    if (span) showDetail(this.layout.rollouts[this.cursor.rollout], this.cursor.token, span);
    else hideDetail();
  }
}
