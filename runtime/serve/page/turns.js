// The turns of a conversation as they are shown, each with what can be done to it.

import { make, render } from "./markdown.js";
import { Words } from "./routes.js";

const ENDS = {
  length: "ended at the token limit",
  dead_end: "ended: no token fitted",
  stopped: "stopped",
  failed: "cut off by an error",
};

function button(text, label, act) {
  return make("button", { type: "button", className: "plain", textContent: text, ariaLabel: label, onclick: act });
}

// Put a text on the clipboard. Where the page came over plain HTTP from another machine, browsers only know the old way.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const focused = document.activeElement;
    const area = make("textarea", { value: text, className: "hidden" });
    document.body.append(area);
    area.select();
    const isDone = document.execCommand("copy");
    area.remove();
    focused?.focus();
    if (!isDone) throw new Error("This browser lets no page copy; select the text and copy it yourself.");
  }
}

// actions: {edit(turn, text), regenerate(), copied(promise, button), name(): the model's}
export class TurnList {
  constructor(container, panel, actions) {
    [this._container, this._panel, this._actions] = [container, panel, actions];
    container.addEventListener("click", (event) => {
      if (!event.target.classList.contains("copy-code")) return;
      const code = event.target.closest(".code").querySelector("code");
      actions.copied(copy(code.textContent), event.target);
    });
  }

  // Show all turns. traces: answers to what they read, where that is known. isText: plain text, not Markdown.
  show(turns, traces, isText, isRunning) {
    this._rows = new Map();
    const articles = turns.map((turn, place) => this._article(turn, traces.get(turn), isText, isRunning, place === turns.length - 1));
    this._container.replaceChildren(...articles);
    this._container.classList.toggle("verbatim", isText);
  }

  // Show what was added to an answer.
  update(turn) {
    this._rows.get(turn)?.draw();
  }

  // An answer's text as it reads, without marks and buttons.
  plainText(turn) {
    const body = this._rows.get(turn)?.body.cloneNode(true);
    for (const bar of body?.querySelectorAll(".bar") ?? []) bar.remove();
    return body ? body.textContent : turn.content;
  }

  _article(turn, trace, isText, isRunning, isLast) {
    const isAnswer = turn.role === "assistant";
    const who = isAnswer ? this._actions.name() : "You";
    const body = make("div", { className: "body" });
    const article = make("article", { className: `turn ${turn.role}`, ariaLabel: who }, make("h2", { textContent: who }), body);
    const draw = this._drawing(turn, trace, body, isText || !isAnswer);
    this._rows.set(turn, { body, draw });
    draw();
    const isWaiting = isRunning && isLast && isAnswer;
    article.classList.toggle("running", isWaiting);
    article.ariaBusy = String(isWaiting);
    const tools = make("p", { className: "row tools" });
    if (ENDS[turn.end]) tools.append(make("span", { className: "note", textContent: ENDS[turn.end] }));
    if (isAnswer && !isWaiting) {
      if (turn.content) tools.append(button("Copy", "Copy the answer", (event) => this._actions.copied(copy(turn.content), event.target)));
      else tools.append(make("span", { className: "note", textContent: "an empty answer" }));
      if (isLast && !isRunning) tools.append(button("Regenerate", "Regenerate the answer", () => this._actions.regenerate()));
    }
    if (!isAnswer && !isRunning) {
      tools.append(button("Edit", "Edit the message", () => this._edit(turn, article)));
      if (isLast) tools.append(button("Answer", "Answer the message", () => this._actions.regenerate()));
    }
    if (tools.hasChildNodes()) article.append(tools);
    return article;
  }

  _drawing(turn, trace, body, isText) {
    if (trace) {
      const words = new Words(body, trace, this._panel);
      return () => words.draw();
    }
    body.classList.toggle("text", isText);
    if (!isText) return () => render(body, turn.content);
    return () => {
      // Only what is new is added, so that what is selected stays so.
      const shown = body.firstChild ?? body.appendChild(document.createTextNode(""));
      shown.appendData(turn.content.slice(shown.length));
    };
  }

  _edit(turn, article) {
    const area = make("textarea", { value: turn.content, ariaLabel: "Edited message" });
    const form = make("form", {}, area);
    const done = make("button", { textContent: "Ask again from here" });
    const close = () => {
      form.remove();
      for (const part of article.children) part.hidden = false;
      article.querySelector(".tools button").focus();
    };
    form.append(make("p", { className: "row tools" }, done, button("Cancel", "Cancel the edit", close)));
    form.onsubmit = (event) => {
      event.preventDefault();
      if (area.value.trim()) this._actions.edit(turn, area.value);
    };
    form.onkeydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.target === area && sends(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    };
    for (const part of article.children) part.hidden = part.tagName !== "H2";
    article.append(form);
    area.focus();
  }
}

// Whether a key sends a message: Enter alone, not inside an input method, and not on a touch keyboard, which has no Shift+Enter.
export function sends(event) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey) return false;
  return event.ctrlKey || event.metaKey || !window.matchMedia("(pointer: coarse)").matches;
}
