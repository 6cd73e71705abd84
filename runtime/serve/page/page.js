// The page: a conversation with the model that is served, its settings, and the conversations before.

import { Conversations, emptyConversation } from "./conversations.js";
import { make } from "./markdown.js";
import { Panel, Trace } from "./routes.js";
import { readModel, requestFor, stream } from "./server.js";
import { Sidebar } from "./sidebar.js";
import { TurnList, sends } from "./turns.js";

const $ = (id) => document.getElementById(id);
const FIELDS = [...$("options").querySelectorAll("input, textarea")];
const traces = new WeakMap(); // answers to what their words read; not kept
const panel = new Panel();
let model = null;
let running = null; // {stopper, conversation, turn} while an answer comes
let conversation = emptyConversation();

const kept = new Conversations((sentence) => notice(sentence));
const sidebar = new Sidebar(kept, {
  get conversation() {
    return conversation;
  },
  turnTo,
  settings,
  notice,
});
const turns = new TurnList($("turns"), panel, {
  name: () => model?.id ?? "model",
  regenerate: () => regenerate(),
  edit: (turn, text) => {
    conversation.turns.splice(conversation.turns.indexOf(turn), Infinity, { role: "user", content: text });
    answer();
  },
  copied: (promise, button) => {
    const text = button.textContent;
    const show = (said) => {
      $("announcer").textContent = button.textContent = said;
      setTimeout(() => (button.textContent = text), 1500);
    };
    promise.then(() => show("Copied"), (error) => problem(error.message));
  },
});

function say(text) {
  $("status").textContent = text;
}

// An error as text. retry: what the button does, null for none.
function problem(text, retry = null) {
  following(() => {
    $("problem").hidden = text === "";
    $("problem-text").textContent = text;
  });
  $("retry").hidden = retry === null;
  $("retry").onclick = retry;
}

function notice(text, undo = null) {
  $("notice").hidden = text === "";
  $("notice-text").textContent = text;
  $("undo").hidden = undo === null;
  $("undo").onclick = undo;
}

// Settings: one value for each field by its id.
function settings() {
  return Object.fromEntries(FIELDS.map((field) => [field.id, field.type === "checkbox" ? field.checked : field.value]));
}

function useSettings(values) {
  for (const field of FIELDS) {
    if (field.type === "checkbox") field.checked = values[field.id] ?? Boolean(model?.has_chat_template);
    else field.value = values[field.id] ?? field.defaultValue;
  }
  fitMode();
}

// Without a template there are no messages, only text that goes on.
function fitMode() {
  if (model && !model.has_chat_template) $("chat").checked = false;
  const isChat = $("chat").checked;
  $("chatting").hidden = !model?.has_chat_template;
  $("systems").hidden = !isChat;
  $("prompt").placeholder = isChat ? "Ask something" : "Text for the model to continue";
}

function show() {
  turns.show(conversation.turns, traces, !$("chat").checked, running?.conversation === conversation);
  if (conversation.turns.length === 0) {
    const text = $("chat").checked ? "Ask something, and the model answers." : "Write how a text begins, and the model goes on.";
    $("turns").replaceChildren(make("p", { className: "empty", textContent: model ? text : "" }));
  }
  else if (!$("chat").checked) $("prompt").placeholder = "More text, or nothing: the model goes on";
  if (!conversation.turns.some((turn) => traces.has(turn))) panel.hide();
  showControls();
}

function showControls() {
  $("go").textContent = running ? "Stop" : "Send";
  sidebar.show();
}

// What scrolls: the conversation on a desk, the whole page on a phone.
function scroller() {
  return getComputedStyle($("turns")).overflowY === "auto" ? $("turns") : document.scrollingElement;
}

function toEnd() {
  scroller().scrollTop = scroller().scrollHeight;
}

// Draw, and stay at the end where the end was in sight.
function following(draw) {
  const box = scroller();
  const wasAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  draw();
  if (wasAtEnd) toEnd();
}

function turnTo(chosen) {
  stop();
  problem("");
  notice("");
  say("");
  $("naming").hidden = true;
  conversation = chosen;
  useSettings(chosen.settings);
  show();
  toEnd();
  if (!sidebar.focus()) $("prompt").focus();
}

async function load() {
  problem("");
  try {
    model = await readModel($("key").value);
  } catch (error) {
    model = null;
    $("model").textContent = "";
    if (error.status === 401) $("locked").hidden = false;
    problem(error.message, load);
    if (error.status === 401) $("key").focus();
    return;
  }
  $("model").textContent = `${model.id} · ${model.max_model_len.toLocaleString("en")} tokens a text`;
  $("tracing").hidden = !model.gives_routes;
  $("max_tokens").defaultValue = model.has_chat_template ? "" : "128";
  useSettings(conversation.settings);
  show();
}

function stop() {
  running?.stopper.abort();
}

function regenerate() {
  if (running) return;
  if (conversation.turns.at(-1)?.role === "assistant") conversation.turns.pop();
  answer();
}

async function send() {
  if (running) return;
  if (model === null) await load();
  if (model === null) return;
  const text = $("prompt").value;
  const isAllowed = text.trim() !== "" || (!$("chat").checked && conversation.turns.length > 0);
  if (!isAllowed) {
    $("prompt").focus();
    return;
  }
  if (!isValid()) return;
  if (text) conversation.turns.push({ role: "user", content: text });
  $("prompt").value = "";
  await answer();
}

// Whether the settings are; else the browser says which is not and what it may be.
function isValid() {
  if ($("options").checkValidity()) return true;
  $("settings").open = true;
  return $("options").reportValidity();
}

// Let the model answer the turns so far. What came is kept whatever happens.
async function answer() {
  if (!isValid()) return;
  problem("");
  notice("");
  conversation.settings = settings();
  kept.save(conversation);
  const wantsRoutes = $("trace").checked && model.gives_routes;
  const [path, body] = requestFor(model, conversation.turns, conversation.settings, wantsRoutes);
  const turn = { role: "assistant", content: "" };
  const mine = { stopper: new AbortController(), conversation, turn };
  running = mine;
  conversation.turns.push(turn);
  show();
  toEnd();
  $("prompt").focus({ preventScroll: true });
  $("announcer").textContent = "The model reads.";
  say("reading the prompt");
  let failed = null;
  try {
    await receive(stream(path, body, $("key").value, mine.stopper.signal), mine);
  } catch (error) {
    failed = error;
  }
  running = null;
  finish(mine, failed);
}

// An answer's events into its turn.
async function receive(events, { conversation: its, turn }) {
  const start = performance.now();
  let first = 0;
  let count = 0;
  for await (const event of events) {
    if (event.prompt_blocks) {
      traces.set(turn, new Trace(event));
      if (its === conversation) show();
      continue;
    }
    const choice = event.choices[0];
    if (!choice || choice.delta?.role) continue;
    const text = choice.delta ? (choice.delta.content ?? "") : choice.text;
    first ||= performance.now();
    count += 1;
    turn.content += text;
    traces.get(turn)?.add(text, choice.routes);
    if (choice.finish_reason) turn.end = choice.finish_reason;
    const seconds = (performance.now() - first) / 1000;
    const speed = count > 1 && seconds > 0 ? ` · ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
    drawSoon(its, turn, `${count} token${count > 1 ? "s" : ""} · first after ${((first - start) / 1000).toFixed(2)} s${speed}`);
  }
}

let latest = null; // what the next frame draws: one drawing a frame, however fast the tokens come

function drawSoon(its, turn, status) {
  if (latest === null) requestAnimationFrame(draw);
  latest = { its, turn, status };
}

function draw() {
  if (latest?.its === conversation) {
    following(() => turns.update(latest.turn));
    say(latest.status);
  }
  latest = null;
}

function finish({ conversation: its, turn }, error) {
  draw();
  if (error) turn.end = error.name === "AbortError" ? "stopped" : "failed";
  if (error && turn.content === "") its.turns.splice(its.turns.indexOf(turn), 1);
  if (kept.all.includes(its)) kept.save(its); // else it was deleted meanwhile
  if (its !== conversation) {
    showControls();
    return;
  }
  following(show);
  if (!error) $("announcer").textContent = `Answer: ${turns.plainText(turn) || "nothing"}`;
  else if (error.name === "AbortError") $("announcer").textContent = "Stopped.";
  else {
    say("");
    problem(error.message ?? String(error), regenerate);
    if (error.status === 401) $("locked").hidden = false;
  }
}

function listen() {
  $("form").onsubmit = (event) => {
    event.preventDefault();
    if (running) stop();
    else send();
  };
  $("prompt").onkeydown = (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    send();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  $("options").onsubmit = (event) => event.preventDefault();
  $("options").onchange = (event) => {
    fitMode();
    if (kept.all.includes(conversation)) {
      conversation.settings = settings();
      kept.save(conversation, false);
    }
    if (event.target === $("chat")) show();
  };
  $("locked").onsubmit = (event) => {
    event.preventDefault();
    load();
  };
  window.addEventListener("pagehide", () => running && kept.save(running.conversation));
}

// ?prompt=…&tokens=…&trace=1 starts at once: a link to an example.
async function begin() {
  if (window.matchMedia("(max-width: 60rem)").matches) $("past").open = $("settings").open = false;
  listen();
  const query = new URLSearchParams(location.search);
  const isExample = query.has("prompt");
  if (!isExample && kept.all.length > 0) conversation = kept.all[0];
  await load();
  if (!$("locked").hidden) return;
  $("prompt").focus();
  toEnd();
  if (query.has("tokens")) $("max_tokens").value = query.get("tokens");
  if (query.get("trace") === "1" && model?.gives_routes) $("trace").checked = true;
  if (!isExample) return;
  history.replaceState(null, "", location.pathname); // read again, the page does not ask again
  $("prompt").value = query.get("prompt");
  await send();
}

begin();
