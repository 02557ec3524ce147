"use strict";
// What the page knows: about the server, and what it shows and does now. All files share `state`.

// {name, models, settings, max_messages}: `models` are the names of all that have such a page,
// `settings` is JSON Schema by the name of a setting.
const server = JSON.parse($("server").textContent);

const state = {
  chat: newChat(),  // the conversation that is shown
  request: null,    // for the answer that is being written in it: {chat, controller, bubbles}
  editing: null,    // the message that is being edited: {index, draft}
  notice: null,     // a line below the conversation: {words, isBad, actions}
  chosen: readEntry("settings") ?? {},  // settings by name, those that are not the default
};
