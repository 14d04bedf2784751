// An answer as it grows: chunks are put into the message, and tokens and seconds are counted. A chunk is about a token;
// the exact numbers come with the usage at the end.

// A speed over less time than this says nothing.
const SHORTEST_S = 0.05;

export class Answer {
  /** before: tokens of the conversation so far, as well as they are known. */
  constructor(mode, before) {
    this.numbers = { mode };
    this.message = {
      role: "assistant",
      content: "",
      reasoning_content: "",
      tool_calls: [],
      finish: null, // as long as it grows
      numbers: this.numbers,
    };
    this.before = before;
    this.tokens = 0;
    this.thinkingTokens = 0;
    // When it was asked for, when its first and its last token came, and when its thinking ended.
    this.asked = performance.now();
    this.first = null;
    this.last = null;
    this.thought = null;
    this.#count();
  }

  /** Put a chunk into the message. */
  add(chunk) {
    if (chunk.usage) this.#settle(chunk.usage);
    const [choice] = chunk.choices ?? [];
    if (!choice) return;
    const { delta } = choice;
    if (delta.reasoning_content || delta.content || delta.tool_calls) this.#tick(Boolean(delta.reasoning_content));
    this.message.reasoning_content += delta.reasoning_content ?? "";
    this.message.content += delta.content ?? "";
    for (const call of delta.tool_calls ?? []) this.#call(call);
    if (choice.finish_reason) this.message.finish = choice.finish_reason;
  }

  #call({ index, id, function: part }) {
    const calls = this.message.tool_calls;
    calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
    calls[index].function.name += part?.name ?? "";
    calls[index].function.arguments += part?.arguments ?? "";
  }

  #tick(thinks) {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += 1;
    if (thinks) {
      this.thinkingTokens += 1;
      this.thought = this.last;
    }
    this.#count();
  }

  #count() {
    Object.assign(this.numbers, {
      tokens: this.tokens,
      thinkingTokens: this.thinkingTokens,
      firstSeconds: this.#seconds(this.asked, this.first),
      thinkingSeconds: this.#seconds(this.first, this.thought),
      speed: this.#speed(this.tokens),
      context: this.before + this.tokens,
      exact: false,
    });
  }

  #settle(usage) {
    Object.assign(this.numbers, {
      tokens: usage.completion_tokens,
      thinkingTokens: usage.completion_tokens_details.reasoning_tokens,
      speed: this.#speed(usage.completion_tokens),
      context: usage.total_tokens,
      prompt: usage.prompt_tokens,
      cached: usage.prompt_tokens_details.cached_tokens,
      mode: usage.thinking_mode,
      exact: true,
    });
  }

  /** Tokens a second, without the first, whose time is the prompt's. */
  #speed(tokens) {
    const seconds = this.#seconds(this.first, this.last);
    return seconds >= SHORTEST_S ? (tokens - 1) / seconds : null;
  }

  #seconds(from, to) {
    return from === null || to === null ? null : (to - from) / 1000;
  }
}
