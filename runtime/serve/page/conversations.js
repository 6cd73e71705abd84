// Conversations, kept in the browser's storage as far as it keeps anything: each under a key of its own, so that two tabs do not
// overwrite each other's. What is found there is checked, for anything of this address may have written it.

const PREFIX = "bilevel:conversation:";
const ENDS = ["stop", "length", "dead_end", "stopped", "failed"];
const FULL = "The browser's storage is full: what is said now lasts as long as this tab. Export or delete some.";

export function emptyConversation(settings = {}) {
  const id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;
  return { id, title: "", changed: Date.now(), settings: { ...settings }, turns: [] };
}

// What a conversation is called: its name, or how it begins.
export function titleOf(conversation) {
  const first = conversation.turns.find((turn) => turn.content.trim());
  const text = conversation.title || (first ? first.content.trim().replace(/\s+/g, " ") : "New conversation");
  return text.length > 60 ? `${text.slice(0, 59)}…` : text;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function readTurn(value) {
  if (!isObject(value) || !["user", "assistant"].includes(value.role) || typeof value.content !== "string") return null;
  const turn = { role: value.role, content: value.content };
  if (ENDS.includes(value.end)) turn.end = value.end;
  return turn;
}

// A conversation out of what was stored, or null where it is none.
function readConversation(id, text) {
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {
    return null;
  }
  if (!isObject(value) || !Array.isArray(value.turns)) return null;
  const turns = value.turns.map(readTurn);
  if (turns.length === 0 || turns.includes(null)) return null;
  const settings = Object.entries(isObject(value.settings) ? value.settings : {});
  return {
    id,
    title: typeof value.title === "string" ? value.title.slice(0, 200) : "",
    changed: Number.isFinite(value.changed) ? value.changed : 0,
    settings: Object.fromEntries(settings.filter(([, each]) => typeof each === "string" || typeof each === "boolean")),
    turns,
  };
}

export class Conversations {
  // onProblem(sentence): storage is full; said once until something is kept again.
  constructor(onProblem) {
    this.all = [];
    this._onProblem = onProblem;
    this._isFull = false;
    this._storage = null;
    try {
      this._storage = window.localStorage;
      this._storage.getItem(PREFIX);
      this.reload();
    } catch {
      this._storage = null;
    }
  }

  // How long they last, as a sentence.
  get lasting() {
    if (!this._storage) return "This browser keeps nothing: they last as long as this tab.";
    return this._isFull ? FULL : "Kept in this browser only.";
  }

  // Read what is stored; those that are not (storage is full or refused) stay.
  reload(except = null) {
    if (!this._storage) return;
    const found = new Map(this.all.filter((each) => each.isUnsaved || each.id === except).map((each) => [each.id, each]));
    for (let place = 0; place < this._storage.length; place++) {
      const key = this._storage.key(place);
      if (!key.startsWith(PREFIX)) continue;
      const id = key.slice(PREFIX.length);
      const read = found.has(id) ? null : readConversation(id, this._storage.getItem(key));
      if (read) found.set(id, read);
    }
    this.all = [...found.values()].sort((a, b) => b.changed - a.changed);
  }

  save(conversation, isChanged = true) {
    if (isChanged) conversation.changed = Date.now();
    if (!this.all.includes(conversation)) this.all.push(conversation);
    this.all.sort((a, b) => b.changed - a.changed);
    if (!this._storage) return;
    const { isUnsaved: _, ...kept } = conversation;
    try {
      this._storage.setItem(PREFIX + conversation.id, JSON.stringify(kept));
      delete conversation.isUnsaved;
      this._isFull = false;
    } catch {
      conversation.isUnsaved = true;
      if (!this._isFull) this._onProblem(FULL);
      this._isFull = true;
    }
  }

  remove(conversation) {
    this.all = this.all.filter((each) => each !== conversation);
    try {
      this._storage?.removeItem(PREFIX + conversation.id);
    } catch {
      // Then it was not stored.
    }
  }

  // Called when another tab changed something.
  onChange(react) {
    window.addEventListener("storage", (event) => {
      if (event.key === null || event.key.startsWith(PREFIX)) react();
    });
  }
}

// A file for the user: conversations as the API's messages, with their settings.
export function exported(conversations) {
  const content = conversations.map((each) => ({
    title: titleOf(each),
    changed: new Date(each.changed).toISOString(),
    settings: each.settings,
    messages: each.turns.map(({ role, content, end }) => (end ? { role, content, end } : { role, content })),
  }));
  return `${JSON.stringify({ format: "bilevel-conversations", version: 1, conversations: content }, null, 2)}\n`;
}
