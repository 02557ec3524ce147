"use strict";
// What is kept in this browser: conversations, settings, drafts and the key. Nothing of it is sent anywhere
// but to the server, with a request.
//
// A conversation is {id, changed, messages}, a message {role, content} in OpenAI's roles; the last
// answer may have `candidates`, texts of which `content` is the one that was picked. Each
// conversation has an entry of its own, so that two tabs do not overwrite each other's.

const PREFIX = "gptchat.";
const CHAT = "chat.";
const LONGEST_LINE = 1e6;  // characters, in a file that gptchat trains on

// The value of an entry; null if there is none, or it cannot be read.
function readEntry(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

// Keep a value. False where the browser's storage is full or turned off.
function writeEntry(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function removeEntry(name) {
  try {
    localStorage.removeItem(PREFIX + name);
  } catch { /* storage is turned off: nothing was kept */ }
}

// --- conversations

function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 6);
  return { id, changed: 0, messages: [] };
}

function isMessage(message) {
  return typeof message?.role === "string" && typeof message.content === "string";
}

function readChat(id) {
  const chat = readEntry(CHAT + id);
  return Array.isArray(chat?.messages) && chat.messages.every(isMessage) ? chat : null;
}

function writeChat(chat) {
  chat.changed = Date.now();
  return writeEntry(CHAT + chat.id, chat);
}

function removeChat(id) {
  removeEntry(CHAT + id);
}

// All conversations, the last changed first.
function readChats() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter(name => name.startsWith(PREFIX + CHAT));
  } catch { /* storage is turned off */ }
  const chats = names.map(name => readChat(name.slice((PREFIX + CHAT).length)));
  return chats.filter(chat => chat).sort((a, b) => b.changed - a.changed);
}

// Text that training and server accept: no NUL, no half of a surrogate pair.
function cleaned(text) {
  return text.replaceAll("\0", "").replace(/\p{Surrogate}/gu, "\ufffd");
}

// The JSONL line of a conversation, from its first words to its last answer; "" if there is none.
// The oldest messages of a line that would be too long are left out.
function lineOf(chat) {
  const messages = chat.messages.map(({ role, content }) => ({ role, content: cleaned(content) }));
  const filled = messages.filter(message => message.content.trim());
  while (filled.length && filled.at(-1).role !== "assistant") filled.pop();
  for (; filled.length > 1; filled.shift()) {
    const line = JSON.stringify({ messages: filled });
    if (line.length <= LONGEST_LINE) return line + "\n";
  }
  return "";
}

// --- the draft, for this tab

function writeDraft(draft) {
  try {
    sessionStorage.setItem(PREFIX + "draft", JSON.stringify(draft));
  } catch { /* storage is full or turned off: the draft is in the page only */ }
}

function readDraft() {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + "draft")) ?? {};
  } catch {
    return {};
  }
}

// --- the key: for this tab, or for this browser if the person wants that

function readKey() {
  try {
    return sessionStorage.getItem(PREFIX + "key") ?? readEntry("key") ?? "";
  } catch {
    return "";
  }
}

// Keep the key. False where the browser does not let us.
function writeKey(key, keep) {
  removeEntry("key");
  try {
    sessionStorage.removeItem(PREFIX + "key");
    if (keep) return writeEntry("key", key);
    sessionStorage.setItem(PREFIX + "key", key);
    return true;
  } catch {
    return false;
  }
}
