// Requests to the server, its streams, and its errors as sentences.

// A sentence for the user. status: HTTP's; null where the stream told of the error, 0 where the connection was lost.
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const LOST = "The connection to the server was lost. Look whether it still runs, then try again.";

async function ask(path, options) {
  let response = null;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Look whether it still runs, then try again.", 0);
  }
  if (response.ok) return response;
  throw new ServerError(await sentenceOf(response), response.status);
}

async function sentenceOf(response) {
  if (response.status === 401) return "This server asks for an API key, and the one given is missing or wrong: enter it at the top.";
  let said = null;
  try {
    said = (await response.json()).error.message;
  } catch {
    // Not this server's words: a proxy's, perhaps.
  }
  return typeof said === "string" ? said : `The server answered with status ${response.status} and no reason; try again.`;
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// The card of the model that is served.
export async function readModel(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data[0];
}

// Events of one answer. Throws ServerError, also where the stream ends before it says that it does; AbortError where it was stopped.
export async function* stream(path, body, key, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let read = null;
    try {
      read = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new ServerError(LOST, 0);
    }
    if (read.done) throw new ServerError(LOST, 0);
    held += read.value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (!part.startsWith("data: {")) continue;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new ServerError(event.error.message, null);
      yield event;
    }
  }
}

const NUMBERS = [
  "temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
];

// Where to send the turns of a conversation, and the body. An empty setting is the server's default, but for max_tokens: all
// there is room for.
export function requestFor(model, turns, settings, wantsRoutes) {
  const body = { model: model.id, max_tokens: -1 };
  for (const name of NUMBERS) if (settings[name]) body[name] = Number(settings[name]);
  if (wantsRoutes) body.routes = true;
  if (!settings.chat) return ["v1/completions", { ...body, prompt: turns.map((turn) => turn.content).join("") }];
  const messages = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const { role, content } of turns) {
    const last = messages.at(-1);
    // A question that got no answer and the one after it are one: templates want turns to alternate.
    if (role === "user" && last?.role === "user") last.content += `\n\n${content}`;
    else if (content) messages.push({ role, content });
  }
  return ["v1/chat/completions", { ...body, messages }];
}
