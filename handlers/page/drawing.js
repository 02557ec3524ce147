"use strict";
// The conversation as elements. `draw` builds them anew after each change; only the pieces of an
// answer that is being written are added to what is there.

const [talk, scroll, text, send] = ["talk", "scroll", "text", "send"].map($);

function draw() {
  const parts = state.chat.messages.map(drawMessage);
  if (state.request) parts.push(drawLive());
  const notice = state.notice ?? unanswered();
  if (notice && !isBesideActions(notice)) parts.push(drawNotice(notice));
  if (!parts.length) parts.push(drawEmpty());
  talk.replaceChildren(...parts);
  refresh();
}

function refresh() {
  send.textContent = state.request ? "Stop" : "Send";
  send.disabled = !state.request && !text.value.trim();
  growWithText(text);
}

function drawEmpty() {
  const empty = element("p", "", "This is a small model: it makes small talk, and it makes things up.");
  empty.id = "empty";
  empty.prepend(element("strong", "", "Say something."));
  return empty;
}

// --- messages

function drawMessage(message, index) {
  if (state.editing?.index === index) return drawEditor();
  const isLast = index === state.chat.messages.length - 1;
  const isMine = message.role === "user";
  const node = element("div", isMine ? "message from-me" : "message from-model");
  if (isLast && message.candidates) node.append(drawCandidates(message));
  else node.append(drawBubble(message.content, isMine ? "mine" : "theirs"));
  if (!state.request) node.append(drawActions(message, index, isLast));
  return node;
}

function drawBubble(content, side) {
  const bubble = element("div", "turn " + side, content);
  bubble.dir = "auto";
  return bubble;
}

function drawActions(message, index, isLast) {
  const actions = element("div", isLast ? "actions last" : "actions");
  actions.append(button("Copy", event => copy(message.content, event.target)));
  if (message.role === "user") actions.append(button("Edit", () => edit(index)));
  else if (isLast) actions.append(button("Regenerate", regenerate));
  if (isLast && state.notice && isBesideActions(state.notice)) {
    actions.append(drawNotice(state.notice));
  }
  return actions;
}

function drawEditor() {
  const box = element("textarea", "", state.editing.draft);
  box.dir = "auto";
  box.setAttribute("aria-label", "Edited message");
  box.oninput = () => {
    state.editing.draft = box.value;
    keepDraft();
    growWithText(box);
  };
  box.onkeydown = event => onSendKey(event, sendEdited);
  const actions = element("div", "actions last");
  actions.append(button("Send", sendEdited), button("Cancel", stopEditing));
  const node = element("div", "message from-me editor");
  node.append(box, actions);
  return node;
}

// --- answers

function drawLive() {
  const node = element("div", "message from-model");
  node.append(...state.request.bubbles);
  return node;
}

function drawCandidates(message) {
  const group = element("fieldset", "candidates");
  group.append(element("legend", "", "Pick the answer to go on with"));
  group.append(...message.candidates.map(candidate => drawCandidate(message, candidate)));
  return group;
}

function drawCandidate(message, candidate) {
  const radio = element("input", "");
  radio.type = "radio";
  radio.name = "candidate";
  radio.checked = candidate === message.content;
  radio.disabled = state.request !== null;
  radio.onchange = () => {
    message.content = candidate;
    keep(state.chat);
  };
  const words = element("span", "", candidate);
  words.dir = "auto";
  const label = element("label", "turn theirs candidate");
  label.append(radio, words);
  return label;
}

// --- what is said below them, or beside the actions of an answer that has come

function drawNotice({ words, isBad, actions }) {
  const node = element("div", isBad ? "note bad" : "note");
  node.append(element("span", "", words));
  node.append(...actions.map(([name, act]) => button(name, act)));
  return node;
}

function isBesideActions(notice) {
  return !notice.isBad && state.chat.messages.at(-1)?.role === "assistant";
}

// Of a message that has no answer, because the page was closed meanwhile.
function unanswered() {
  const { request, editing, chat } = state;
  if (request || editing || chat.messages.at(-1)?.role !== "user") return null;
  return { words: "No answer yet.", isBad: false, actions: [["Try again", tryAgain]] };
}

function isAtEnd() {
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
}

function scrollToEnd() {
  scroll.scrollTop = scroll.scrollHeight;
}
