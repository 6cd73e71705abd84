// The conversations before: a list to choose from, and what can be done to the open one.

import { emptyConversation, exported, titleOf } from "./conversations.js";
import { make } from "./markdown.js";

const $ = (id) => document.getElementById(id);

// page: {conversation, turnTo(conversation), settings(), notice(text, undo)}; kept: Conversations.
export class Sidebar {
  constructor(kept, page) {
    [this._kept, this._page] = [kept, page];
    $("new").onclick = () => page.turnTo(emptyConversation(page.settings()));
    $("rename").onclick = () => this._startNaming();
    $("delete").onclick = () => this._remove();
    $("export").onclick = () => this._export();
    $("unnamed").onclick = () => this._endNaming();
    $("naming").onsubmit = (event) => {
      event.preventDefault();
      page.conversation.title = $("name").value.trim();
      kept.save(page.conversation, false);
      this.show();
      this._endNaming();
    };
    $("naming").onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // which would stop an answer
      this._endNaming();
    };
    kept.onChange(() => {
      kept.reload(page.conversation.id);
      this.show();
    });
  }

  show() {
    const { all, lasting } = this._kept;
    const open = this._page.conversation;
    const items = all.map((each) => {
      const choose = make("button", { type: "button", textContent: titleOf(each), onclick: () => this._page.turnTo(each) });
      if (each === open) choose.setAttribute("aria-current", "true");
      return make("li", {}, choose);
    });
    if (items.length === 0) items.push(make("li", { className: "note", textContent: "None yet." }));
    $("conversations").replaceChildren(...items);
    for (const id of ["rename", "delete"]) $(id).disabled = !all.includes(open);
    $("export").disabled = all.length === 0;
    $("kept").textContent = lasting;
  }

  // Put the focus on the open one, where it is in the list.
  focus() {
    const open = document.querySelector("#conversations [aria-current]");
    open?.focus();
    return Boolean(open);
  }

  _startNaming() {
    $("naming").hidden = false;
    $("name").value = titleOf(this._page.conversation);
    $("name").select();
  }

  _endNaming() {
    $("naming").hidden = true;
    $("rename").focus();
  }

  _remove() {
    const { conversation: gone } = this._page;
    this._page.turnTo(emptyConversation(this._page.settings()));
    this._kept.remove(gone);
    this.show();
    this._page.notice(`Deleted “${titleOf(gone)}”.`, () => {
      this._kept.save(gone, false);
      this._page.turnTo(gone);
    });
    $("undo").focus();
  }

  _export() {
    const address = URL.createObjectURL(new Blob([exported(this._kept.all)], { type: "application/json" }));
    make("a", { href: address, download: "conversations.json" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  }
}
