// The conversation: what is kept in the browser, downloaded and loaded again.

const PLACE = "leadline.conversation";
const KIND = "leadline-conversation";

/** A conversation without messages. settings: as typed, so that nothing typed is lost. */
export function empty(settings) {
  return {
    kind: KIND,
    version: 1,
    messages: [],
    files: [],
    settings: { system: "", tools: "", mode: "", budget: "", temperature: "", topP: "", maxTokens: "", ...settings },
  };
}

/** The conversation that was kept. */
export function kept() {
  try {
    return read(localStorage.getItem(PLACE));
  } catch {
    return empty();
  }
}

/** Keep a conversation as far as the browser has room: "all" of it, its "messages", or "nothing". */
export function keep(conversation) {
  if (put(conversation)) return "all";
  return put({ ...conversation, files: [] }) ? "messages" : "nothing";
}

function put(conversation) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

/** A conversation from its JSON. Throws an error with one line when it is none. */
export function read(text) {
  const refuse = () => {
    throw new Error("it is no conversation that was downloaded from this page");
  };
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    refuse();
  }
  if (found?.kind !== KIND || found.version !== 1 || !Array.isArray(found.messages) || !Array.isArray(found.files))
    refuse();
  const words = (value) => (typeof value === "string" ? value : refuse());
  const conversation = empty();
  for (const name of Object.keys(conversation.settings))
    conversation.settings[name] = words(found.settings?.[name] ?? "");
  conversation.files = found.files.map(({ name, text, note }) => ({
    name: words(name),
    text: text === null ? null : words(text),
    note: note === null ? null : words(note),
  }));
  conversation.messages = found.messages.map((message) => {
    if (message?.role === "user") return { role: "user", content: words(message.content) };
    if (message?.role === "tool")
      return { role: "tool", tool_call_id: words(message.tool_call_id), content: words(message.content) };
    if (message?.role !== "assistant" || !Array.isArray(message.tool_calls)) refuse();
    return {
      role: "assistant",
      content: words(message.content),
      reasoning_content: words(message.reasoning_content),
      tool_calls: message.tool_calls.map((call) => ({
        id: words(call?.id),
        type: "function",
        function: { name: words(call?.function?.name), arguments: words(call?.function?.arguments) },
      })),
      finish: typeof message.finish === "string" ? message.finish : "stopped",
      numbers: numbersOf(message.numbers),
    };
  });
  return conversation;
}

function numbersOf(found) {
  const numbers = {};
  for (const [name, value] of Object.entries(found ?? {})) {
    if (
      value === null ||
      Number.isFinite(value) ||
      typeof value === "boolean" ||
      (name === "mode" && typeof value === "string")
    )
      numbers[name] = value;
  }
  return numbers;
}

/** The messages as the server wants them. system: text before them all. */
export function forServer(messages, system) {
  const sent = messages.map(({ role, content, reasoning_content, tool_calls, tool_call_id }) => {
    if (role === "user") return { role, content };
    if (role === "tool") return { role, tool_call_id, content };
    const message = { role, content };
    if (reasoning_content) message.reasoning_content = reasoning_content;
    if (tool_calls.length) message.tool_calls = tool_calls;
    return message;
  });
  return system ? [{ role: "system", content: system }, ...sent] : sent;
}
