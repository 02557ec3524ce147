"use strict";
// The requests for answers.

const address = location.pathname.replace(/(\/1\.0)?\/*$/, "");  // ".../predictions/NAME"
const MAX_BYTES = 1e6;  // of all messages: the server reads a body of 1,048,576

// A request that failed. `kind` is "key", "long", "busy", "lost" or "other"; the message is a line
// for the person who reads the page.
class Problem extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

const TOO_LONG = "That message is too long for this model. Shorten it, then send it again.";

// Ask for `n` answers to a conversation. `onPiece(index, text)` gets their text as it comes.
// Returns {tokens, seconds, reasons}: the tokens of all answers, the seconds from sending to the
// end, and why each answer ended ("stop" or "length"). Throws a Problem, or what an abort throws.
async function requestAnswers(messages, n, values, signal, onPiece) {
  const body = {
    model: server.name, messages: lastThatFit(messages), n, ...values,
    stream: true, stream_options: { include_usage: true },
  };
  const began = performance.now();
  const response = await post(JSON.stringify(body), signal);
  if (!response.ok) throw await problemOf(response);
  const reasons = [];
  let tokens = 0;
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Problem("other", "That did not work: " + event.error.message);
    for (const choice of event.choices) {
      onPiece(choice.index, choice.delta.content ?? "");
      if (choice.finish_reason) reasons[choice.index] = choice.finish_reason;
    }
    if (event.usage) tokens = event.usage.completion_tokens;
  }
  return { tokens, seconds: (performance.now() - began) / 1000, reasons };
}

// The newest messages that one request can carry; the model would forget the older ones anyway.
function lastThatFit(messages) {
  const fitting = [];
  let bytes = 0;
  for (const { role, content } of messages.slice(-server.max_messages).reverse()) {
    bytes += bytesOf(content);
    if (fitting.length && bytes > MAX_BYTES) break;
    fitting.unshift({ role, content });
  }
  return fitting;
}

// What a message takes in a request's body.
function bytesOf(content) {
  return new Blob([JSON.stringify({ role: "assistant", content })]).size;
}

async function post(body, signal) {
  const headers = { "content-type": "application/json" };
  const key = readKey();
  if (key) headers.authorization = "Bearer " + key;
  try {
    return await fetch(address + "/1.0/v1/chat/completions", { method: "POST", signal, headers, body });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Problem("lost", "The server cannot be reached. Is it still running?");
  }
}

// What a refusal means: the handler's, TorchServe's own, or that of a proxy before them.
async function problemOf(response) {
  const body = await response.json().catch(() => null) ?? {};
  const isKey = response.status === 401 || (response.status === 403 && !body.error);
  if (isKey || body.type === "InvalidKeyException") {
    const found = readKey() ? "The server does not take this key." : "The server asks for a key.";
    return new Problem("key", found + " Enter the right one in the settings.");
  }
  if (response.status === 413 || body.error?.code === "context_length_exceeded") {
    return new Problem("long", TOO_LONG);
  }
  if (response.status === 503 || response.status === 429) {
    return new Problem("busy", `The server is busy. Try again ${waitOf(response)}.`);
  }
  const reason = body.error?.message || body.message || "status " + response.status;
  return new Problem("other", "That did not work: " + reason);
}

// How long Retry-After asks to wait, in words; it may also be a date, or missing.
function waitOf(response) {
  const seconds = +response.headers.get("retry-after");
  if (!(seconds > 0)) return "in a moment";
  return seconds === 1 ? "in a second" : `in ${seconds} seconds`;
}

// The events of a stream, which must end with [DONE].
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(endOfStream);
    if (done) throw new Problem("lost", "The connection was lost in the middle of the answer.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

// A broken connection is an end that came too early; an abort is not.
function endOfStream(error) {
  if (error.name === "AbortError") throw error;
  return { done: true };
}
