"use strict";
// Elements of the page: found, made, spoken. Every text goes in by textContent, so that nothing that
// a person or a model writes is ever markup.

const $ = id => document.getElementById(id);

function element(kind, className, content = "") {
  const node = document.createElement(kind);
  node.className = className;
  node.textContent = content;
  return node;
}

function button(name, act, className = "") {
  const node = element("button", className, name);
  node.type = "button";
  node.onclick = act;
  return node;
}

// Tell those who cannot see the page.
function announce(words) {
  $("say").textContent = words;
}

function growWithText(box) {
  const borders = box.offsetHeight - box.clientHeight;
  box.style.height = "auto";
  box.style.height = box.scrollHeight + borders + "px";
}
