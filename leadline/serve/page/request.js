// From the conversation and its settings to the body of a request. Settings are kept as they were typed, so this is
// where a wrong one is found: an error then says in one line what to correct.

import { forServer } from "/page/conversation.js";
import { pack } from "/page/files.js";

/** The mode of the next answer: the chosen one, if the server offers it. */
export function modeOf({ settings }, model) {
  return model?.modes.includes(settings.mode) ? settings.mode : (model?.default_mode ?? "high");
}

export function requestOf(conversation, model) {
  const { settings, messages, files } = conversation;
  const mode = modeOf(conversation, model);
  const thinks = mode !== "non-think";
  const fields = {
    model: model?.id,
    messages: forServer(messages, [settings.system.trim(), pack(files)].filter(Boolean).join("\n\n")),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    thinking: given({
      type: thinks ? "enabled" : "disabled",
      budget_tokens: thinks ? number(settings.budget, "The thinking budget") : undefined,
    }),
    reasoning_effort: thinks ? mode : undefined,
    temperature: number(settings.temperature, "The temperature"),
    top_p: number(settings.topP, "Top-p"),
    max_tokens: number(settings.maxTokens, "Most tokens"),
    tools: tools(settings.tools),
  };
  return given(fields);
}

function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

function number(text, what) {
  if (!text.trim()) return undefined;
  const value = Number(text);
  if (Number.isFinite(value) && value >= 0) return value;
  throw new Error(`${what} is no number (${text.trim()}); correct it, or leave it empty.`);
}

function tools(text) {
  if (!text.trim()) return undefined;
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are no JSON (${error.message}); correct them in the settings.`);
  }
  if (Array.isArray(found)) return found;
  throw new Error("The tools are no list; put [ and ] around them in the settings.");
}
