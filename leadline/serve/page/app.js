// The page: one conversation, the question below it, and an answer that streams in.

import { Answer } from "/page/answer.js";
import { Api } from "/page/api.js";
import { empty, forServer, keep, kept, read as readConversation } from "/page/conversation.js";
import { dropped, pack, picked, read as readFiles } from "/page/files.js";
import { Meters } from "/page/meters.js";
import { answer as answerView, copy, element, fit, iconButton, question as questionView } from "/page/view.js";
import { inModes, inTokens, whole } from "/page/words.js";

const byId = (id) => document.getElementById(id);
const KEEP_EVERY_MS = 500;
const SETTINGS = { system: "s-system", tools: "s-tools", temperature: "s-temperature", topP: "s-top-p", maxTokens: "s-max-tokens", budget: "budget" };

const api = new Api(() => sessionStorage.getItem("leadline.key") ?? "");
const meters = new Meters(api);
let conversation = kept();
let model = null;
let running = null; // {answer, abort} while an answer comes
let retry = null; // what the button beside an error does
let fileTokens = null;
const views = new WeakMap(); // of a message: {shape, view}

// -- the conversation as it is shown -----------------------------------------------------------------------------

/** Show every message. Views that are still right keep their nodes: what is open stays open, what has focus keeps it. */
function show() {
  const { messages } = conversation;
  const results = new Map(messages.filter(({ role }) => role === "tool").map((each) => [each.tool_call_id, each.content]));
  const nodes = [];
  for (const message of messages) {
    if (message.role === "tool") continue; // shown with its call
    const isLast = message === messages.at(-1);
    const waits = isLast && message.finish === "tool_calls";
    const shape = `${isLast} ${waits} ${message.tool_calls?.filter(({ id }) => results.has(id)).length}`;
    let known = views.get(message);
    if (known?.shape !== shape) views.set(message, (known = { shape, view: viewOf(message, results, isLast, waits) }));
    known.view.update?.();
    nodes.push(known.view.node);
  }
  const list = byId("messages");
  for (const [place, node] of nodes.entries()) if (list.children[place] !== node) list.insertBefore(node, list.children[place] ?? null);
  while (list.children.length > nodes.length) list.lastChild.remove();
  byId("welcome").hidden = messages.length > 0;
  byId("save").disabled = messages.length === 0;
  meters.show(lastNumbers(), !running);
}

function viewOf(message, results, isLast, waits) {
  if (message.role === "user") return questionView(message, { edit: (text) => ask(text, conversation.messages.indexOf(message)) });
  return answerView(message, results, { again: isLast ? again : null, reply: waits ? reply : null });
}

function lastNumbers() {
  return conversation.messages.findLast(({ role }) => role === "assistant")?.numbers;
}

function store() {
  if (!keep(conversation)) notice("This conversation is too large for the browser to keep; download it before you leave.");
}

let storing = 0;
function storeSoon() {
  storing ||= setTimeout(() => {
    storing = 0;
    store();
  }, KEEP_EVERY_MS);
}

function scrollToEnd() {
  const scroller = byId("scroller");
  scroller.scrollTop = scroller.scrollHeight;
}

/** Whether the end is in sight: only then does the page follow a growing answer. */
function atEnd() {
  const scroller = byId("scroller");
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
}

// -- asking and answering ----------------------------------------------------------------------------------------

/** Ask a question; in place of the message at `place` and everything after it, if there is one. */
function ask(text, place = conversation.messages.length) {
  stop();
  conversation.messages.length = place;
  conversation.messages.push({ role: "user", content: text });
  run();
}

/** Answer the last question, or the results of tools, once more. */
function again() {
  stop();
  while (conversation.messages.at(-1)?.role === "assistant") conversation.messages.pop();
  if (conversation.messages.length) run();
}

/** Give the results of the calls that wait. */
function reply(results) {
  for (const { id, content } of results) conversation.messages.push({ role: "tool", tool_call_id: id, content });
  run();
}

async function run() {
  trouble(null);
  const body = request();
  if (!body) {
    show();
    store();
    return;
  }
  const abort = new AbortController();
  const answer = new Answer(chosenMode(), tokensBefore());
  const mine = { answer, abort };
  running = mine;
  conversation.messages.push(answer.message);
  show();
  scrollToEnd();
  store();
  busy(true);
  let problem = null;
  try {
    for await (const chunk of api.answer(body, abort.signal)) {
      answer.add(chunk);
      redraw();
    }
  } catch (error) {
    if (error.name !== "AbortError") problem = error;
  }
  answer.message.tool_calls = answer.message.tool_calls.filter(Boolean);
  answer.message.finish ??= abort.signal.aborted ? "stopped" : "failed";
  if (problem) answer.message.finish = "failed";
  if (running === mine) {
    running = null;
    busy(false);
    finish(answer.message, problem);
  }
}

/** What is left to do when an answer has ended. */
function finish(message, problem) {
  const follows = atEnd();
  const said = message.content || message.reasoning_content || message.tool_calls.length;
  if (!said && message.finish !== "stop" && message.finish !== "length") conversation.messages.pop();
  show();
  if (problem) trouble(problem, again);
  byId("status").textContent = problem ? "" : message.finish === "stopped" ? "Stopped" : "The answer is complete";
  if (follows) scrollToEnd();
  store();
}

/** End the running answer; what it has said stays. */
function stop() {
  const ended = running;
  if (!ended) return;
  running = null;
  ended.abort.abort();
  ended.answer.message.finish = "stopped";
  ended.answer.message.tool_calls = ended.answer.message.tool_calls.filter(Boolean);
  busy(false);
  finish(ended.answer.message, null);
}

let drawing = 0;
function redraw() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    if (!running) return;
    const follows = atEnd();
    views.get(running.answer.message).view.update();
    meters.show(running.answer.numbers, false);
    if (follows) scrollToEnd();
    storeSoon();
  });
}

function busy(is) {
  const hadFocus = document.activeElement === byId(is ? "send" : "stop");
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  if (hadFocus) byId("question").focus();
  if (is) byId("status").textContent = "Answering";
}

/** About how many tokens the conversation has before the next answer. */
function tokensBefore() {
  const { messages } = conversation;
  const place = messages.findLastIndex(({ role, numbers }) => role === "assistant" && numbers.exact);
  const characters = messages.slice(place + 1).reduce((sum, { content }) => sum + content.length, 0);
  const known = place >= 0 ? messages[place].numbers.context : (fileTokens ?? 0) + conversation.settings.system.length / 4;
  return Math.round(known + characters / 4);
}

/** The body of the request, or null if something typed has to be put right first. */
function request() {
  const { settings, messages, files } = conversation;
  const mode = chosenMode();
  const thinking = { type: mode === "non-think" ? "disabled" : "enabled" };
  const system = [settings.system.trim(), pack(files)].filter(Boolean).join("\n\n");
  const body = { model: model?.id, messages: forServer(messages, system), stream: true, stream_options: { include_usage: true }, thinking };
  try {
    if (mode !== "non-think") {
      body.reasoning_effort = mode;
      const budget = number(settings.budget, "The thinking budget");
      if (budget !== null) thinking.budget_tokens = budget;
    }
    Object.assign(body, given({
      temperature: number(settings.temperature, "The temperature"),
      top_p: number(settings.topP, "Top-p"),
      max_tokens: number(settings.maxTokens, "Most tokens"),
      tools: tools(settings.tools),
    }));
  } catch (error) {
    trouble(error, again);
    return null;
  }
  return body;
}

function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

function number(text, what) {
  if (!text.trim()) return null;
  const value = Number(text);
  if (!Number.isFinite(value) || value < 0) throw new Error(`${what} is no number (${text.trim()}); correct it, or leave it empty.`);
  return value;
}

function tools(text) {
  if (!text.trim()) return null;
  let found = null;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are no JSON (${error.message}); correct them in the settings.`);
  }
  if (!Array.isArray(found)) throw new Error("The tools are no list; put [ and ] around them in the settings.");
  return found;
}

// -- trouble and notices -----------------------------------------------------------------------------------------

function trouble(error, again = null) {
  retry = again;
  byId("trouble").hidden = !error;
  byId("retry").hidden = !again;
  const text = error?.message ?? "";
  byId("trouble-text").textContent = text.charAt(0).toUpperCase() + text.slice(1);
  if (error) scrollToEnd();
  if (error?.status === 401) openSettings("s-key");
}

let noticeTimer = 0;
function notice(text) {
  clearTimeout(noticeTimer);
  byId("notice").textContent = text;
  byId("notice").hidden = false;
  noticeTimer = setTimeout(() => (byId("notice").hidden = true), 6000);
}

// -- files -------------------------------------------------------------------------------------------------------

async function addFiles(found) {
  try {
    conversation.files = await readFiles(await found, conversation.files);
  } catch (error) {
    notice(`The files could not be read: ${error.message}`);
    return;
  }
  filesChanged();
}

function filesChanged() {
  store();
  showFiles();
  countFiles();
}

async function countFiles() {
  const { files } = conversation;
  fileTokens = null;
  const text = pack(files);
  if (!text) return;
  try {
    const count = await api.count(text);
    if (files !== conversation.files) return;
    fileTokens = count;
    showFiles();
  } catch (error) {
    byId("files-summary").title = error.message;
  }
}

function showFiles() {
  const { files } = conversation;
  byId("files").hidden = !files.length;
  const size = fileTokens === null ? "" : ` · ${inTokens(fileTokens)}`;
  byId("files-summary").textContent = `${whole(files.length)} ${files.length === 1 ? "file" : "files"}${size}`;
  byId("files").classList.toggle("over", Boolean(model) && fileTokens >= model.max_model_len);
  byId("files-list").replaceChildren(...files.map((file) => {
    const remove = iconButton("close", `Remove ${file.name}`, () => {
      conversation.files = conversation.files.filter((each) => each !== file);
      filesChanged();
    });
    const name = element("span", { className: "path", title: file.name }, file.name);
    const note = element("span", { className: "facts" }, file.note ?? "");
    return element("li", { className: file.text === null ? "left-out" : "" }, name, note, remove);
  }));
}

// -- modes and settings ------------------------------------------------------------------------------------------

function chosenMode() {
  const offered = model?.modes ?? [];
  const { mode } = conversation.settings;
  return offered.includes(mode) ? mode : (model?.default_mode ?? mode) || "high";
}

function showModes() {
  const chosen = chosenMode();
  const choices = (model?.modes ?? []).map((mode) => {
    const input = element("input", { type: "radio", name: "mode", value: mode, checked: mode === chosen });
    input.addEventListener("change", () => {
      conversation.settings.mode = mode;
      byId("budget-field").classList.toggle("off", mode === "non-think");
      store();
    });
    return element("label", {}, input, element("span", {}, inModes(mode)));
  });
  byId("modes").replaceChildren(byId("modes").firstElementChild, ...choices);
  byId("budget-field").classList.toggle("off", chosen === "non-think");
}

function showSettings() {
  for (const [name, id] of Object.entries(SETTINGS)) byId(id).value = conversation.settings[name];
}

function openSettings(focus) {
  if (!byId("settings").open) byId("settings").showModal();
  byId("s-key").value = api.key();
  if (focus) byId(focus).focus();
}

async function connect() {
  try {
    model = await api.model();
  } catch (error) {
    trouble(error, connect);
    return;
  }
  trouble(null);
  meters.limit = model.max_model_len;
  byId("model").textContent = model.id;
  document.title = `${model.id} · leadline`;
  byId("welcome-model").textContent = `${model.id} reads up to ${inTokens(model.max_model_len)}.`;
  showModes();
  countFiles();
  meters.show(lastNumbers());
}

// -- theme -------------------------------------------------------------------------------------------------------

const THEMES = { "": "Follows the system", light: "Light", dark: "Dark" };

function showTheme() {
  const chosen = document.documentElement.dataset.theme ?? "";
  const next = Object.keys(THEMES)[(Object.keys(THEMES).indexOf(chosen) + 1) % 3];
  byId("theme").title = `Colours: ${THEMES[chosen].toLowerCase()}`;
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[chosen].toLowerCase()}; change to: ${THEMES[next].toLowerCase()}`);
  return next;
}

function changeTheme() {
  const next = showTheme();
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("leadline.theme", next);
  showTheme();
}

// -- download and load -------------------------------------------------------------------------------------------

function download() {
  const blob = new Blob([JSON.stringify(conversation, null, 1)], { type: "application/json" });
  const url = URL.createObjectURL(blob);
  const name = `leadline-${new Date().toISOString().slice(0, 16).replace(/[T:]/g, "-")}.json`;
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function load(file) {
  try {
    use(readConversation(await file.text()));
  } catch (error) {
    notice(`${file.name} was not loaded: ${error.message}.`);
  }
}

function use(changed) {
  stop();
  conversation = changed;
  fileTokens = null;
  trouble(null);
  store();
  showAll();
  countFiles();
  scrollToEnd();
}

function showAll() {
  show();
  showFiles();
  showModes();
  showSettings();
}

// -- what hands do -----------------------------------------------------------------------------------------------

function submit() {
  const area = byId("question");
  const text = area.value;
  if (!text.trim() || running) return;
  area.value = "";
  fit(area);
  ask(text);
}

function listen() {
  const on = (id, kind, act) => byId(id).addEventListener(kind, act);
  on("composer", "submit", (event) => {
    event.preventDefault();
    submit();
  });
  on("question", "input", () => fit(byId("question")));
  on("question", "keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  on("stop", "click", stop);
  on("retry", "click", () => retry?.());
  on("new", "click", () => {
    use(empty(conversation.settings));
    byId("question").focus();
  });
  on("save", "click", download);
  on("load", "click", () => byId("pick-conversation").click());
  on("pick-conversation", "change", ({ target }) => {
    if (target.files.length) load(target.files[0]);
    target.value = "";
  });
  on("theme", "click", changeTheme);
  on("open-settings", "click", () => openSettings());
  on("settings", "close", () => {
    sessionStorage.setItem("leadline.key", byId("s-key").value.trim());
    if (!model) connect();
  });
  for (const [name, id] of Object.entries(SETTINGS)) {
    on(id, "input", () => {
      conversation.settings[name] = byId(id).value;
      storeSoon();
    });
  }
  on("attach", "click", () => byId("pick-files").click());
  on("attach-folder", "click", () => byId("pick-folder").click());
  for (const id of ["pick-files", "pick-folder"]) {
    on(id, "change", ({ target }) => {
      addFiles(picked(target.files));
      target.value = "";
    });
  }
  on("files-clear", "click", (event) => {
    event.preventDefault(); // inside a summary it would also open the list
    conversation.files = [];
    filesChanged();
    byId("question").focus();
  });
  on("messages", "click", ({ target }) => {
    if (target.matches(".copy")) copy(target.closest("figure").querySelector("code").textContent, target);
  });
  document.addEventListener("keydown", keys);
  drops();
  addEventListener("pagehide", () => {
    stop();
    store();
  });
}

function keys(event) {
  if (event.defaultPrevented || byId("settings").open || event.isComposing) return;
  const typing = event.target.matches("textarea, input:not([type=radio])");
  if (event.key === "Escape" && running) {
    stop();
    byId("question").focus();
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    byId("question").focus();
  }
}

function drops() {
  const zone = byId("dropzone");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    zone.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) zone.hidden = true;
  });
  addEventListener("drop", (event) => {
    zone.hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    addFiles(dropped(event.dataTransfer));
  });
}

listen();
showTheme();
showAll();
connect();
scrollToEnd();
byId("question").focus();
