// Messages as nodes. A view shows one message and can be brought up to date while the message grows.

import { update as showMarkdown } from "/page/markdown.js";
import { inTokens, inSeconds, inSpeed, inModes } from "/page/words.js";

/** A question. handlers: edit(text), copy(text). */
export function question(message, handlers) {
  const node = element("li", { className: "message user" });
  const show = () => {
    const text = element("div", { className: "bubble" }, message.content);
    const edit = iconButton("edit", "Edit the question", () => change());
    node.replaceChildren(
      label("You"),
      text,
      element(
        "div",
        { className: "row" },
        edit,
        copyButton("Copy the question", () => message.content),
      ),
    );
    return edit;
  };
  const change = () => {
    const area = element("textarea", { className: "rewrite", value: message.content, rows: 1 });
    area.setAttribute("aria-label", "Edit the question");
    const back = () => show().focus();
    const save = element("button", { type: "button", className: "plain strong" }, "Ask again");
    const cancel = element("button", { type: "button", className: "plain" }, "Cancel");
    const done = () => area.value.trim() && handlers.edit(area.value);
    save.addEventListener("click", done);
    cancel.addEventListener("click", back);
    area.addEventListener("input", () => fit(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        done();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        back();
      }
    });
    node.replaceChildren(label("You"), area, element("div", { className: "row shown" }, save, cancel));
    fit(area);
    area.focus();
  };
  show();
  return { node };
}

/** An answer. results: of its calls, by id. handlers: again(), reply(results) while calls wait. */
export function answer(message, results, handlers) {
  const node = element("li", { className: "message assistant" });
  const thinking = thinkingView(message);
  const text = element("div", { className: "text" });
  const calls = element("div", { className: "calls" });
  const row = element("div", { className: "row" });
  node.append(label("Model"), thinking.node, text, calls, row);
  const cards = [];
  const sendAll = element("button", { type: "button", className: "plain strong" });
  sendAll.textContent = message.tool_calls.length > 1 ? "Send results" : "Send result";
  sendAll.addEventListener("click", () => send());
  let shownText = null;

  const update = () => {
    const running = message.finish === null;
    node.classList.toggle("running", running);
    node.setAttribute("aria-busy", String(running));
    thinking.update();
    if (shownText !== message.content) showMarkdown(text, (shownText = message.content));
    text.hidden = !message.content;
    for (const [place, call] of message.tool_calls.entries()) {
      if (!call) continue; // a later one has begun first
      if (!cards[place]) {
        cards[place] = callView(call, results.get(call.id), handlers.reply ? send : null);
        calls.append(cards[place].node);
      }
      cards[place].update(running);
    }
    if (handlers.reply && !running) calls.append(sendAll);
    if (!running) row.replaceChildren(...rowOf(message, handlers));
  };
  const send = () => {
    const missing = cards.find((card) => !card.result());
    if (missing) missing.focus();
    else handlers.reply(message.tool_calls.map((call, place) => ({ id: call.id, content: cards[place].result() })));
  };
  update();
  return { node, update };
}

function rowOf(message, handlers) {
  const { numbers, finish } = message;
  const facts = [];
  if (finish === "length") facts.push("cut at the most tokens");
  if (finish === "stopped") facts.push("stopped");
  if (finish === "failed") facts.push("incomplete");
  if (numbers.mode) facts.push(inModes(numbers.mode));
  if (numbers.tokens) facts.push(inTokens(numbers.tokens));
  if (numbers.speed) facts.push(inSpeed(numbers.speed));
  const again = iconButton("again", "Answer again", handlers.again);
  again.classList.add("again"); // seen on the last answer only
  return [
    again,
    copyButton("Copy the answer", () => message.content),
    element("span", { className: "facts" }, facts.join(" · ")),
  ];
}

function thinkingView(message) {
  const facts = element("span", { className: "facts" });
  const title = element("span", { className: "title" });
  const body = element("div", { className: "thought" });
  const summary = element("summary", {}, title, facts);
  const node = element("details", { className: "thinking" }, summary, body);
  let chosen = false;
  summary.addEventListener("click", () => (chosen = true));
  const update = () => {
    const { numbers, reasoning_content: thought } = message;
    const busy = message.finish === null && !message.content && !message.tool_calls.length;
    node.hidden = !thought && !(busy && numbers.mode !== "non-think");
    node.classList.toggle("busy", busy);
    title.textContent = busy ? (thought ? "Thinking" : "Reading") : "Thought";
    const known = thought ? [inTokens(numbers.thinkingTokens ?? 0)] : [];
    if (thought && numbers.thinkingSeconds !== null && numbers.thinkingSeconds !== undefined)
      known.push(inSeconds(numbers.thinkingSeconds));
    facts.textContent = known.join(" · ");
    // Only what is new is added: a long thought stays cheap to show, and text that is marked stays marked.
    const shown = body.textContent;
    if (shown !== thought) {
      if (thought.startsWith(shown)) body.append(thought.slice(shown.length));
      else body.textContent = thought;
    }
    if (!chosen) node.open = busy && Boolean(thought);
    if (node.open && busy) body.scrollTop = body.scrollHeight;
  };
  return { node, update };
}

/** A call, with its result, or with a box to give it. send: gives the results of all calls; null if none is wanted. */
function callView(call, result, send) {
  const name = element("span", { className: "name" });
  const code = element("code");
  const pre = element("pre", { tabIndex: 0 }, code);
  pre.setAttribute("aria-label", "Arguments");
  const state = element("span", { className: "facts" });
  const node = element("section", { className: "call" }, element("header", {}, icon("tool"), name, state), pre);
  const box = element("textarea", { rows: 2, placeholder: "Result of this call" });
  if (result !== undefined) {
    const shown = element("pre", { tabIndex: 0, className: "result" }, result);
    shown.setAttribute("aria-label", "Result");
    node.append(shown);
  } else if (send) {
    box.setAttribute("aria-label", `Result of ${call.function.name}`);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    });
    node.append(element("div", { className: "give" }, box));
  }
  const update = (running) => {
    name.textContent = call.function.name;
    code.textContent = pretty(call.function.arguments);
    state.textContent = running
      ? "is being written"
      : result !== undefined
        ? "answered"
        : send
          ? "waits for its result"
          : "";
  };
  return { node, update, result: () => box.value.trim() && box.value, focus: () => box.focus() };
}

/** Arguments with line breaks, once they are complete. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

// -- small parts -------------------------------------------------------------------------------------------------

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function iconButton(name, title, act) {
  const button = element("button", { type: "button", className: "ghost small", title }, icon(name));
  button.setAttribute("aria-label", title);
  button.addEventListener("click", act);
  return button;
}

function copyButton(title, text) {
  const button = iconButton("copy", title, () => copy(text(), button));
  return button;
}

/** Put a text on the clipboard, and say so on the button. */
export async function copy(text, button) {
  const done = await navigator.clipboard.writeText(text).then(
    () => true,
    () => false,
  );
  button.classList.add(done ? "done" : "undone");
  button.dataset.said = done ? "Copied" : "Not allowed";
  setTimeout(() => {
    button.classList.remove("done", "undone");
    delete button.dataset.said;
  }, 1500);
}

/** Make a text area as high as its text. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

function label(text) {
  return element("h2", { className: "unseen" }, text);
}
