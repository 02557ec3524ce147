"use strict";
// The form of settings, built from the JSON Schema that the server puts into the page, so that it
// shows whatever this server's model can do. An empty field means the default.

const OWN = "the model's";
const NAMES = { n: "Candidates" };  // where the setting's own name would tell too little
const HELP = {
  n: "answers among which Regenerate lets you pick",
  seed: "the same seed gives the same answer; empty or -1: another each time",
  stop: "what ends the answer, one a line; \\n is a line break",
  bad_words: "what the answer must not contain, one a line",
  pick: "the rule that chooses among the candidates drawn",
};

// --- a setting: its kind, its text in a field, its value

function kindOf(schema) {
  if (schema.enum) return "choice";
  if (schema.type === "number" || schema.type === "integer") return schema.type;
  if (Array.isArray(schema.default)) return "words";
  return "";  // no field can show it
}

function textOf(value) {
  if (Array.isArray(value)) return value.map(word => word.replaceAll("\n", "\\n")).join("\n");
  return value === undefined ? "" : String(value);
}

// The value of a field's text; undefined for the default. Throws an Error that says what is wanted.
function valueOf(text, schema) {
  if (!text.trim()) return undefined;
  if (kindOf(schema) === "choice") {
    if (!schema.enum.includes(text)) throw new Error("wanted one of " + schema.enum.join(", "));
    return text;
  }
  if (kindOf(schema) === "words") {
    return text.split("\n").filter(line => line).map(line => line.replaceAll("\\n", "\n"));
  }
  const value = Number(text.trim().replace(",", "."));
  const whole = schema.type === "number" || Number.isSafeInteger(value);
  if (!whole || !(value >= schema.minimum && value <= schema.maximum)) {
    throw new Error("wanted " + wanted(schema));
  }
  return value;
}

function wanted(schema) {
  const kind = schema.type === "integer" ? "a whole number" : "a number";
  if (schema.maximum >= 1e9) return schema.minimum < 0 ? kind : `${kind} from ${schema.minimum}`;
  return `${kind} from ${schema.minimum} to ${schema.maximum}`;
}

// --- what is sent

// What the person chose; the server fills in the model's own settings. `n` is for Regenerate.
function settingsToSend() {
  const names = Object.keys(state.chosen).filter(name => name !== "n");
  return Object.fromEntries(names.map(name => [name, chosenValue(name)]));
}

function candidates() {
  return chosenValue("n") ?? server.settings.n.default;
}

// What the person chose, if this server takes it: it may have been chosen for another model.
function chosenValue(name) {
  try {
    return valueOf(textOf(state.chosen[name]), server.settings[name]);
  } catch {
    return undefined;
  }
}

// --- the form

function drawSettings() {
  const shown = Object.entries(server.settings).filter(([, schema]) => kindOf(schema));
  $("fields").replaceChildren(...shown.map(([name, schema]) => drawSetting(name, schema)));
}

function drawSetting(name, schema) {
  const kind = kindOf(schema);
  const isWords = kind === "words";
  const field = element({ words: "textarea", choice: "select" }[kind] ?? "input", "");
  const help = element("p", "help", HELP[name] ?? schema.description ?? "");
  const label = element("label", "", NAMES[name] ?? readable(name));
  field.id = label.htmlFor = "setting-" + name;
  help.id = field.id + "-help";
  field.setAttribute("aria-describedby", help.id);
  field.placeholder = isWords ? "none" : schema.default ?? (name === "seed" ? "random" : OWN);
  if (kind === "choice") {
    field.append(new Option(OWN, ""), ...schema.enum.map(value => new Option(value)));
  }
  field.value = textOf(chosenValue(name));
  field.autocomplete = "off";
  if (isWords) field.rows = 2;
  else field.inputMode = schema.minimum < 0 ? "text" : "decimal";  // some phones' decimals lack "-"
  field.oninput = () => choose(name, schema, field, help);
  const setting = element("div", isWords ? "setting words" : "setting");
  setting.append(label, field, help);
  return setting;
}

function readable(name) {
  const words = name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

// Keep what a field says; where that is no value, say what is wanted and take the default.
function choose(name, schema, field, help) {
  let problem = "";
  try {
    state.chosen[name] = valueOf(field.value, schema);  // undefined is left out of JSON
  } catch (error) {
    problem = error.message;
    delete state.chosen[name];
  }
  field.setAttribute("aria-invalid", problem !== "");
  help.textContent = problem || (HELP[name] ?? schema.description ?? "");
  tellWhetherKept(writeEntry("settings", state.chosen));
}

function resetSettings() {
  state.chosen = {};
  tellWhetherKept(writeEntry("settings", state.chosen));
  drawSettings();
}

function drawKey() {
  $("key").value = readKey();
  $("keep-key").checked = readEntry("key") !== null;
  $("key").oninput = $("keep-key").onchange = () => {
    tellWhetherKept(writeKey($("key").value.trim(), $("keep-key").checked));
  };
}
