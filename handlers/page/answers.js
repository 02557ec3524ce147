"use strict";
// From a message to its answer: sent, edited, stopped, tried again, regenerated.

function submit() {
  if (running) return running.controller.abort();
  const words = cleaned(text.value).trim();
  if (!words || tellIfTooLong(words)) return;
  text.value = "";
  say(words, chat.messages.length);
}

function tellIfTooLong(words) {
  if (bytesOf(words) <= MAX_BYTES) return false;
  notice = { words: TOO_LONG, isBad: true, actions: [] };
  draw();
  scrollToEnd();
  announce(TOO_LONG);
  return true;
}

// Put a message at `index`, in the place of what stood there and after it, and ask for an answer.
function say(words, index) {
  const before = chat.messages;
  const earlier = before.slice(0, index).map(({ role, content }) => ({ role, content }));
  chat.messages = [...earlier, { role: "user", content: words }];
  editing = null;
  showAddress(chat.id, history.replaceState);
  keep(chat);
  answer({ sent: { before, index, words } });
}

// Ask for `n` answers to the conversation. `earlier` is the answer that they are alternatives to,
// `sent` what is to be taken back if the message is too long.
async function answer({ n = 1, earlier = null, sent = null }) {
  const mine = { chat, controller: new AbortController(), bubbles: [] };
  for (let i = 0; i < n; i++) mine.bubbles.push(drawBubble("", "theirs live"));
  running = mine;
  notice = null;
  draw();
  scrollToEnd();
  announce("Writing an answer");
  const outcome = await attempt(mine, n);
  takeIn(mine, earlier);
  if (running !== mine) return;  // another conversation is shown by now
  running = null;
  if (outcome.problem?.kind === "long" && sent) takeBack(sent);
  notice = noticeOf(outcome, earlier ? regenerate : tryAgain);
  draw();
  scrollToEnd();
  announce(outcome.problem ? notice.words : spoken(chat.messages.at(-1)));
  if (document.activeElement === document.body) focusText();
}

// How the request went: {figures} of an answer that is whole, {problem}, or {} if it was stopped.
async function attempt({ chat, controller, bubbles }, n) {
  const addPiece = (index, piece) => {
    const follow = isAtEnd();
    bubbles[index].append(piece);
    if (follow) scrollToEnd();
  };
  try {
    const values = settingsToSend();
    return { figures: await requestAnswers(chat.messages, n, values, controller.signal, addPiece) };
  } catch (error) {
    if (controller.signal.aborted) return {};
    if (!(error instanceof Problem)) console.error(error);
    return { problem: error };
  }
}

// Add what was written to its conversation, also where it was stopped or broken off.
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

// What is told below the conversation when an answer has ended.
function noticeOf({ problem, figures }, again) {
  const last = chat.messages.at(-1);
  const retry = last?.role === "user" ? [["Try again", again]] : [];
  if (!problem) {
    let words = "Stopped.";
    if (figures) words = last.role === "user" ? "No answer came to mind." : summary(figures);
    return { words, isBad: false, actions: retry };
  }
  let actions = [["Try again", again]];
  if (problem.kind === "long") actions = [];
  if (problem.kind === "key") actions.unshift(["Enter the key", enterKey]);
  return { words: problem.message, isBad: true, actions };
}

// The rate counts the tokens of all answers and the time from sending to the end.
function summary({ tokens, seconds, reasons }) {
  const parts = [`${tokens} tokens`, `${Number((tokens / seconds).toPrecision(2))} a second`];
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
  chat.messages = before;
  if (index < before.length) editing = { index, draft: words };
  else text.value = words;
  if (before.length) keep(chat);
  else forget(chat.id);
}

// Ask again; what there is of an answer that broke off is written anew.
function tryAgain() {
  if (running) return;
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  answer({});
}

function regenerate() {
  if (!running) answer({ n: candidates(), earlier: chat.messages.pop() });
}

// --- an earlier message

function edit(index) {
  editing = { index, draft: chat.messages[index].content };
  notice = null;
  draw();
  const box = talk.querySelector(".editor textarea");
  growWithText(box);
  box.focus();
  box.setSelectionRange(box.value.length, box.value.length);
}

function sendEdited() {
  const words = cleaned(editing.draft).trim();
  if (words && !running && !tellIfTooLong(words)) say(words, editing.index);
}

function stopEditing() {
  editing = null;
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
