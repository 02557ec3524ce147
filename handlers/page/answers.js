"use strict";
// From a message to its answer: sent, edited, stopped, tried again, regenerated.

function submit() {
  if (state.request) return state.request.controller.abort();
  const words = cleaned(text.value).trim();
  if (!words || tellIfTooLong(words)) return;
  text.value = "";
  say(words, state.chat.messages.length);
}

function tellIfTooLong(words) {
  if (bytesOf(words) <= MAX_BYTES) return false;
  state.notice = { words: TOO_LONG, isBad: true, actions: [] };
  draw();
  scrollToEnd();
  announce(TOO_LONG);
  return true;
}

// Put a message at `index`, in place of what was there and after it, and ask for an answer.
function say(words, index) {
  const { chat } = state;
  const before = chat.messages;
  const earlier = before.slice(0, index).map(({ role, content }) => ({ role, content }));
  chat.messages = [...earlier, { role: "user", content: words }];
  state.editing = null;
  showAddress(chat.id, history.replaceState);
  keep(chat);
  keepDraft();
  ask({ sent: { before, index, words } });
}

// Ask again for the last answer, `n` of them. What there was of it is one more to pick from.
function askAgain(n) {
  if (state.request) return;
  const { messages } = state.chat;
  const earlier = messages.at(-1)?.role === "assistant" ? messages.pop() : null;
  ask({ n, earlier });
}

const tryAgain = () => askAgain(1);
const regenerate = () => askAgain(candidates());

// Ask for `n` answers to the conversation that is shown. `earlier` is the answer that they are
// alternatives to; `sent` is what to take back if the message is too long.
async function ask({ n = 1, earlier = null, sent = null }) {
  const request = { chat: state.chat, controller: new AbortController(), bubbles: [] };
  for (let i = 0; i < n; i++) request.bubbles.push(drawBubble("", "theirs live"));
  state.request = request;
  state.notice = null;
  draw();
  scrollToEnd();
  announce("Thinking of an answer");
  const outcome = await attempt(request);
  takeIn(request, earlier);
  if (state.request !== request) return;  // another conversation is shown by now
  state.request = null;
  if (outcome.problem?.kind === "long" && sent) takeBack(sent);
  state.notice = noticeOf(outcome);
  draw();
  scrollToEnd();
  announce(outcome.problem ? state.notice.words : spoken(state.chat.messages.at(-1)));
  if (document.activeElement === document.body) focusText();
}

// How the request went: {figures} of an answer that is whole, {problem}, or {} if it was stopped.
async function attempt({ chat, controller, bubbles }) {
  const addPiece = (index, piece) => {
    const follow = isAtEnd();
    bubbles[index].append(piece);
    if (follow) scrollToEnd();
  };
  try {
    const { messages } = chat;
    const { signal } = controller;
    return {
      figures: await requestAnswers(messages, bubbles.length, settingsToSend(), signal, addPiece),
    };
  } catch (error) {
    if (controller.signal.aborted) return {};
    if (!(error instanceof Problem)) console.error(error);
    return { problem: error };
  }
}

// Add what was written to its conversation, also if it was stopped or broke off.
function takeIn({ chat, bubbles }, earlier) {
  const texts = bubbles.map(bubble => bubble.textContent).filter(words => words.trim());
  if (texts.length) {
    if (earlier) texts.push(earlier.content);
    const candidates = [...new Set(texts)];
    const message = { role: "assistant", content: texts[0] };
    if (candidates.length > 1) message.candidates = candidates;
    chat.messages.push(message);
  } else if (earlier) {
    chat.messages.push(earlier);
  }
  keep(chat);
}

// What to say below the conversation when an answer has ended.
function noticeOf({ problem, figures }) {
  const last = state.chat.messages.at(-1);
  const retry = [["Try again", tryAgain]];
  if (problem) {
    const actions = problem.kind === "long" ? [] : retry;
    if (problem.kind === "key") actions.unshift(["Enter the key", enterKey]);
    return { words: problem.message, isBad: true, actions };
  }
  const unanswered = last?.role === "user";
  let words = "Stopped.";
  if (figures) words = unanswered ? "No answer came to mind." : summary(figures);
  return { words, isBad: false, actions: unanswered ? retry : [] };
}

// The tokens are those of the answers that are given, the time is that from sending to the end.
function summary({ tokens, seconds, reasons }) {
  const parts = [`${tokens} tokens`, `${Number(seconds.toPrecision(2))} s`];
  if (reasons.length === 1 && reasons[0] === "length") parts.push("cut at the set length");
  return parts.join(" · ");
}

function spoken(message) {
  if (message?.role !== "assistant") return "No answer";
  if (message.candidates) return `${message.candidates.length} answers to pick from`;
  return message.content;
}

// A message that cannot be sent goes back to where it was typed, the conversation to what it was.
function takeBack({ before, index, words }) {
  const { chat } = state;
  chat.messages = before;
  if (index < before.length) state.editing = { index, draft: words };
  else text.value = [words, text.value].filter(typed => typed).join("\n");
  if (before.length) keep(chat);
  else forget(chat.id);
  keepDraft();
}

// --- an earlier message

function edit(index) {
  state.editing = { index, draft: state.chat.messages[index].content };
  state.notice = null;
  draw();
  const box = talk.querySelector(".editor textarea");
  growWithText(box);
  box.focus();
  box.setSelectionRange(box.value.length, box.value.length);
}

function sendEdited() {
  const words = cleaned(state.editing.draft).trim();
  if (words && !state.request && !tellIfTooLong(words)) say(words, state.editing.index);
}

function stopEditing() {
  state.editing = null;
  keepDraft();
  draw();
  focusText();
}

// `navigator.clipboard` exists on https and on this machine only.
async function copy(words, from) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    copied = copyBySelection(words);
  }
  from.textContent = copied ? "Copied" : "Not copied";
  announce(from.textContent);
  setTimeout(() => { from.textContent = "Copy" }, 1500);
}

function copyBySelection(words) {
  const box = element("textarea", "hidden");
  box.value = words;
  document.body.append(box);
  box.select();
  const copied = document.execCommand("copy");
  box.remove();
  return copied;
}
