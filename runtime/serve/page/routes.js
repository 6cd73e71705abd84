// What each word of an answer was chosen from: the words to walk through, and the panel with the blocks that one of them read.

import { make } from "./markdown.js";

const $ = (id) => document.getElementById(id);

// One answer's routes as they come. blocks: the text of each block of the context so far.
export class Trace {
  constructor(event) {
    this.size = event.block_size;
    this.layers = event.routed_layers;
    this.blocks = event.prompt_blocks[0].slice();
    this.words = [];
    this.chosen = null; // by the user; null: the newest
  }

  add(text, routes) {
    this.words.push({ text, routes });
    if (!routes) return;
    const block = Math.floor((routes.position + 1) / this.size);
    this.blocks[block] = (this.blocks[block] ?? "") + text;
  }

  // The word to show, -1 for none.
  get current() {
    return this.chosen ?? this.words.findLastIndex((word) => word.routes);
  }
}

// The words of a traced answer in ``container``: one of them can be chosen, by mouse or with the arrow keys.
export class Words {
  constructor(container, trace, panel) {
    Object.assign(container, { role: "listbox", ariaLabel: "Words of the answer", ariaOrientation: "horizontal" });
    container.classList.add("text", "traced");
    [this._container, this._trace, this._panel, this._marked] = [container, trace, panel, null];
    container.addEventListener("click", (event) => this._choose([...container.children].indexOf(event.target)));
    container.addEventListener("keydown", (event) => this._walk(event));
  }

  // Add the words that are new, and mark the one that is shown.
  draw() {
    const { words, current } = this._trace;
    for (const word of words.slice(this._container.children.length)) {
      this._container.append(make("span", { role: "option", ariaSelected: "false", tabIndex: -1, textContent: word.text }));
    }
    const element = this._container.children[current];
    if (!element) return;
    if (this._marked && this._marked !== element) Object.assign(this._marked, { ariaSelected: "false", tabIndex: -1 });
    this._marked = Object.assign(element, { ariaSelected: "true", tabIndex: 0 });
    this._panel.show(this._trace);
  }

  _choose(index) {
    if (!this._trace.words[index]?.routes) return;
    this._trace.chosen = index;
    this.draw();
    this._marked.focus();
    this._panel.tell(this._trace);
  }

  _walk(event) {
    const { words, current } = this._trace;
    const last = words.findLastIndex((word) => word.routes);
    const target = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: last }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this._choose(Math.max(0, Math.min(last, target)));
  }
}

export class Panel {
  constructor() {
    this._trace = null;
    $("hide").onclick = () => this.hide();
    $("layer").onchange = () => this._trace && this.show(this._trace);
  }

  // Shade the blocks that the word before the current one read when that one was chosen.
  show(trace) {
    if (this._trace !== trace) {
      this._trace = trace;
      const options = trace.layers.map((layer, place) => new Option(`layer ${layer}`, place));
      $("layer").replaceChildren(new Option("any layer", ""), ...options);
    }
    $("routes").hidden = false;
    document.body.classList.add("tracing");
    const word = trace.words[trace.current];
    if (!word) return;
    $("word").textContent = word.text;
    const { layers, end } = this._read(trace, word);
    const drawn = trace.blocks.slice(0, end).map((text, block) => {
      const read = layers.filter((layer) => layer.includes(block)).length;
      const title = `block ${block}: read in ${read} of ${layers.length} layers`;
      const span = make("span", { className: "block", title }, make("sub", { textContent: block }), text);
      span.classList.toggle("candidate", word.routes.candidates.includes(block));
      if (read) span.style.setProperty("--read", read / layers.length);
      return span;
    });
    $("blocks").replaceChildren(...drawn);
  }

  // Say in words, for who does not see the shades, what was read.
  tell(trace) {
    const word = trace.words[trace.current];
    const { layers } = this._read(trace, word);
    const counts = new Map();
    for (const block of layers.flat()) counts.set(block, (counts.get(block) ?? 0) + 1);
    const parts = [...counts].sort((a, b) => a[0] - b[0]).map(([block, count]) => `block ${block} in ${count}`);
    $("reads").textContent = `“${word.text}”, of ${layers.length} layers: ${parts.join(", ")}`;
  }

  hide() {
    this._trace = null;
    $("routes").hidden = true;
    document.body.classList.remove("tracing");
    $("blocks").replaceChildren();
    $("reads").textContent = "";
  }

  _read(trace, word) {
    const chosen = $("layer").value;
    const layers = chosen === "" ? word.routes.blocks : [word.routes.blocks[Number(chosen)]];
    return { layers, end: Math.floor(word.routes.position / trace.size) + 1 };
  }
}
