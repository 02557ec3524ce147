"use strict";
// The page around the conversation: the list of conversations, the panels, the keys, the start.

const wide = matchMedia("(min-width: 62rem)");  // as in page.css
const panels = [$("chats"), $("settings")];
const NOTHING_TO_EXPORT = "No answer to export yet";

// --- conversations

// Keep a conversation in the browser.
function keep(chat) {
  if (chat.isDeleted) return;
  tellWhetherKept(writeChat(chat));
  drawChats();
}

function forget(id) {
  removeChat(id);
  drawChats();
}

function tellWhetherKept(isKept) {
  if (!isKept && $("full").hidden) announce($("full").textContent);
  $("full").hidden = isKept;
}

function drawChats() {
  $("list").replaceChildren(...readChats().map(drawChat));
}

function drawChat({ id, messages }) {
  const title = (messages[0]?.content ?? "").slice(0, 80);
  const open = button(title, () => go(id), "open");
  open.dir = "auto";
  if (id === state.chat.id) open.setAttribute("aria-current", "true");
  const remove = button("×", () => deleteChat(id, title), "delete");
  remove.title = "Delete";
  remove.setAttribute("aria-label", "Delete: " + title);
  const row = element("li", "");
  row.append(open, remove);
  return row;
}

// Show a conversation, a new one for the id "", and put it into the address, so that a reload and
// the browser's back button find it.
function go(id) {
  if (id !== state.chat.id) {
    showAddress(id, history.pushState);
    showChat(id);
  }
  if (!wide.matches) $("chats").close();
}

function showAddress(id, change) {
  if (location.hash.slice(1) !== id) change.call(history, null, "", "#" + id);
}

function showChat(id) {
  state.request?.controller.abort();  // what was written so far stays in its conversation
  state.request = null;
  state.chat = readChat(id) ?? newChat();
  state.editing = null;
  state.notice = null;
  draw();
  drawChats();
  scrollToEnd();
  focusText();
}

function deleteChat(id, title) {
  if (!confirm("Delete this chat?\n\n" + title)) return;
  removeChat(id);
  if (id === state.chat.id) {
    state.chat.isDeleted = true;  // an answer to it may still be on its way
    showAddress("", history.replaceState);
    showChat("");
  }
  drawChats();
}

function exportChats() {
  const { chat } = state;  // it may be too new to be kept
  const chats = [chat, ...readChats().filter(({ id }) => id !== chat.id)];
  const lines = chats.reverse().map(lineOf).filter(line => line);
  $("export").textContent = lines.length ? "Export as JSONL" : NOTHING_TO_EXPORT;
  if (!lines.length) return announce(NOTHING_TO_EXPORT);
  const link = element("a", "");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = server.name + ".jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// --- panels: beside the conversation where there is room, else above it

function openPanel(panel) {
  if (wide.matches) panel.open = true;
  else panel.showModal();
  showWhetherOpen();
}

function showWhetherOpen() {
  $("tune").setAttribute("aria-expanded", $("settings").open);
}

function arrangePanels() {
  for (const panel of panels) panel.close();
  if (wide.matches) openPanel($("chats"));
}

function toggleSettings() {
  const follow = isAtEnd();
  if ($("settings").open) $("settings").close();
  else openPanel($("settings"));
  showWhetherOpen();
  if (follow) scrollToEnd();
}

function enterKey() {
  if (!$("settings").open) toggleSettings();
  $("key").focus();
}

// --- keys

// Enter sends, unless it ends the composition of a word, as in Japanese (229: Safari's such Enter).
function onSendKey(event, act) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!state.request) act();
}

function onEscape(event) {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog:modal")) return;
  if (state.request) state.request.controller.abort();
  else if (state.editing) stopEditing();
}

// Not where the finger would only bring up the keyboard.
function focusText() {
  if (matchMedia("(hover: hover)").matches) text.focus({ preventScroll: true });
}

// --- the start

// The model's name, as a choice where the server has other models with such a page.
function drawModel() {
  const heading = document.querySelector("h1");
  document.title = server.name;
  if (server.models.length === 1) {
    heading.textContent = server.name;
    return;
  }
  const select = element("select", "");
  select.id = "model";
  select.autocomplete = "off";
  select.setAttribute("aria-label", "Model");
  select.append(...server.models.map(name => new Option(name)));
  select.value = server.name;
  select.onchange = () => location.assign(address.replace(/[^/]*$/, select.value) + location.hash);
  heading.append(select);
}

function listen() {
  $("form").onsubmit = event => {
    event.preventDefault();
    submit();
  };
  text.oninput = () => {
    keepDraft();
    refresh();
  };
  text.onkeydown = event => onSendKey(event, submit);
  document.onkeydown = onEscape;
  $("fresh").onclick = () => go("");
  $("menu").onclick = () => openPanel($("chats"));
  $("tune").onclick = toggleSettings;
  $("reset").onclick = resetSettings;
  $("export").onclick = exportChats;
  for (const panel of panels) {
    panel.onclose = showWhetherOpen;
    panel.querySelector(".close").onclick = () => panel.close();
    panel.onclick = event => {
      if (event.target.matches("dialog:modal")) panel.close();  // a click beside it
    };
  }
  wide.onchange = arrangePanels;
  window.onhashchange = () => showChat(location.hash.slice(1));
  window.onstorage = onOtherTab;
}

// Another tab has changed what is kept.
function onOtherTab() {
  drawChats();
  const { chat, request, editing } = state;
  const kept = readChat(chat.id);
  if (!kept || kept.changed <= chat.changed || request || editing) return;
  state.chat = kept;
  draw();
}

// --- drafts: what was typed and not sent, for a reload

function keepDraft() {
  const { chat, editing } = state;
  writeDraft({ words: text.value, id: chat.id, editing });
}

function showDraft() {
  const { words = "", id, editing } = readDraft();
  text.value = words;
  if (id === state.chat.id && state.chat.messages[editing?.index]) state.editing = editing;
  draw();
}

listen();
drawModel();
drawSettings();
drawKey();
arrangePanels();
showChat(location.hash.slice(1));
showDraft();
