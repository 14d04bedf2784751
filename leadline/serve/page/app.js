// The page: one conversation, the question below it, and an answer that streams in.

import { Answer } from "/page/answer.js";
import { Api } from "/page/api.js";
import { Attachments } from "/page/attachments.js";
import { switchColours } from "/page/colours.js";
import { empty, keep, kept, read } from "/page/conversation.js";
import { Meters } from "/page/meters.js";
import { modeOf, requestOf } from "/page/request.js";
import { answer as answerView, copy, element, fit, question as questionView } from "/page/view.js";
import { inModes, inTokens } from "/page/words.js";

const byId = (id) => document.getElementById(id);
const KEEP_EVERY_MS = 500;
const NOTICE_MS = 8000;
const SETTINGS = {
  system: "s-system",
  tools: "s-tools",
  temperature: "s-temperature",
  topP: "s-top-p",
  maxTokens: "s-max-tokens",
  budget: "budget",
};

const api = new Api(() => sessionStorage.getItem("leadline.key") ?? "");
const meters = new Meters(api);
const attachments = new Attachments(api, { changed: filesChanged, notice });
const views = new WeakMap(); // of a message: {shape, view}
let conversation = kept();
let model = null;
let running = null; // {answer, abort} while an answer comes
let retry = null; // what the button beside an error does
let toldKept = "all";

// -- the conversation as it is shown -----------------------------------------------------------------------------

/** Show every message. Views that are still right keep their nodes, so that what is open or has focus stays so. */
function show() {
  const { messages } = conversation;
  const results = new Map(
    messages.filter(({ role }) => role === "tool").map((each) => [each.tool_call_id, each.content]),
  );
  const nodes = [];
  for (const message of messages) {
    if (message.role === "tool") continue; // shown with its call
    const waits = message === messages.at(-1) && message.finish === "tool_calls";
    const shape = `${waits} ${message.tool_calls?.filter(({ id }) => results.has(id)).length}`;
    let known = views.get(message);
    if (known?.shape !== shape) views.set(message, (known = { shape, view: viewOf(message, results, waits) }));
    known.view.update?.();
    nodes.push(known.view.node);
  }
  const list = byId("messages");
  for (const [place, node] of nodes.entries())
    if (list.children[place] !== node) list.insertBefore(node, list.children[place] ?? null);
  while (list.children.length > nodes.length) list.lastChild.remove();
  byId("welcome").hidden = messages.length > 0;
  byId("save").disabled = messages.length === 0;
  meters.show(lastNumbers(), !running);
}

function viewOf(message, results, waits) {
  if (message.role === "user")
    return questionView(message, { edit: (text) => ask(text, conversation.messages.indexOf(message)) });
  return answerView(message, results, { again, reply: waits ? reply : null });
}

function lastNumbers() {
  return conversation.messages.findLast(({ role }) => role === "assistant")?.numbers;
}

function store() {
  const stored = keep(conversation);
  if (stored !== toldKept && stored === "messages")
    notice("The files are too large for the browser to keep: after a reload, add them again.");
  if (stored !== toldKept && stored === "nothing")
    notice("This conversation is too large for the browser to keep: download it before you leave.");
  toldKept = stored;
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
function ask(text, place = Infinity) {
  stop();
  conversation.messages.splice(place);
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
  let body;
  try {
    body = requestOf(conversation, model);
  } catch (error) {
    show();
    store();
    trouble(error, again);
    return;
  }
  const abort = new AbortController();
  const answer = new Answer(modeOf(conversation, model), tokensBefore());
  const mine = { answer, abort };
  running = mine;
  conversation.messages.push(answer.message);
  show();
  if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) byId("question").focus();
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
  if (running !== mine) return; // `stop` has seen to it
  if (problem) answer.message.finish = "failed";
  finish(problem);
}

/** End the running answer; what it has said stays. */
function stop() {
  if (!running) return;
  running.abort.abort();
  running.answer.message.finish = "stopped";
  finish(null);
}

/** What is left to do when an answer has ended. */
function finish(problem) {
  const { message } = running.answer;
  const follows = atEnd();
  running = null;
  busy(false);
  message.tool_calls = message.tool_calls.filter(Boolean);
  const isEmpty = !message.content && !message.reasoning_content && !message.tool_calls.length;
  if (isEmpty && ["stopped", "failed"].includes(message.finish)) conversation.messages.pop();
  show();
  byId("status").textContent = message.finish === "stopped" ? "Stopped" : problem ? "" : "The answer is complete";
  if (problem) trouble(problem, again);
  else offerAnswer();
  if (follows) scrollToEnd();
  store();
}

/** A question that nothing answers, because its answer was stopped before it began, can be asked once more. */
function offerAnswer() {
  const last = conversation.messages.at(-1);
  if (last && last.role !== "assistant") trouble(new Error("This has no answer yet."), again);
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
  const known =
    place >= 0 ? messages[place].numbers.context : (attachments.tokens ?? 0) + conversation.settings.system.length / 4;
  return Math.round(known + characters / 4);
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
/** Tell something for a while. undo: takes it back. */
function notice(text, undo = null) {
  const hide = () => (byId("notice").hidden = true);
  clearTimeout(noticeTimer);
  byId("notice-text").textContent = text;
  byId("undo").hidden = !undo;
  byId("undo").onclick = () => {
    hide();
    undo();
  };
  byId("notice").hidden = false;
  noticeTimer = setTimeout(hide, NOTICE_MS);
}

function filesChanged(files) {
  conversation.files = files;
  store();
}

// -- modes and settings ------------------------------------------------------------------------------------------

function showModes() {
  const chosen = modeOf(conversation, model);
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
  offerAnswer();
  meters.limit = attachments.limit = model.max_model_len;
  byId("model").textContent = model.id;
  document.title = `${model.id} · leadline`;
  byId("welcome-model").textContent = `${model.id} reads up to ${inTokens(model.max_model_len)}.`;
  showModes();
  attachments.count();
  meters.show(lastNumbers());
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
    change(read(await file.text()), `${file.name} is loaded.`);
  } catch (error) {
    notice(`${file.name} was not loaded: ${error.message}.`);
  }
}

/** Put another conversation in the place of this one, which can be brought back. */
function change(other, text) {
  stop();
  const before = conversation;
  use(other);
  if (before.messages.length || before.files.length) notice(text, () => use(before));
}

function use(other) {
  stop();
  conversation = other;
  trouble(null);
  offerAnswer();
  show();
  showModes();
  showSettings();
  attachments.use(conversation.files);
  store();
  scrollToEnd();
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
    change(empty(conversation.settings), "A new conversation.");
    byId("question").focus();
  });
  on("save", "click", download);
  on("load", "click", () => byId("pick-conversation").click());
  on("pick-conversation", "change", ({ target }) => {
    if (target.files.length) load(target.files[0]);
    target.value = "";
  });
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
  on("messages", "click", ({ target }) => {
    if (target.matches(".copy")) copy(target.closest("figure").querySelector("code").textContent, target);
  });
  document.addEventListener("keydown", keys);
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

listen();
switchColours(byId("theme"));
use(conversation);
connect();
byId("question").focus();
