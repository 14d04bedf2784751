// An answer as it grows: chunks are put into the message, and tokens and seconds are counted. A chunk is about a token;
// the exact numbers come with the usage at the end.

export class Answer {
  /** before: tokens of the conversation so far, as well as they are known. */
  constructor(mode, before) {
    this.message = {
      role: "assistant",
      content: "",
      reasoning_content: "",
      tool_calls: [],
      finish: null,
      numbers: { mode },
    };
    this.numbers = this.message.numbers;
    this.before = before;
    this.start = performance.now();
    this.first = null;
    this.thought = null;
    this.tokens = 0;
    this.thinkingTokens = 0;
    this.#count();
  }

  /** Put a chunk into the message. */
  add(chunk) {
    if (chunk.usage) this.#settle(chunk.usage);
    const [choice] = chunk.choices ?? [];
    if (!choice) return;
    const { delta } = choice;
    const said = delta.reasoning_content || delta.content || delta.tool_calls;
    if (said) this.#tick(Boolean(delta.reasoning_content));
    this.message.reasoning_content += delta.reasoning_content ?? "";
    this.message.content += delta.content ?? "";
    for (const call of delta.tool_calls ?? []) this.#call(call);
    if (choice.finish_reason) this.message.finish = choice.finish_reason;
  }

  /** Whether it thinks and has said nothing else yet. */
  get thinks() {
    return this.message.finish === null && !this.message.content && !this.message.tool_calls.length;
  }

  #call({ index, id, function: part }) {
    const calls = this.message.tool_calls;
    calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
    calls[index].function.name += part?.name ?? "";
    calls[index].function.arguments += part?.arguments ?? "";
  }

  #tick(thinking) {
    const now = performance.now();
    this.first ??= now;
    this.tokens += 1;
    if (thinking) {
      this.thinkingTokens += 1;
      this.thought = now;
    } else if (this.thinkingTokens) {
      this.thinkingEnd ??= now;
    }
    this.last = now;
    this.#count();
  }

  #count() {
    const seconds = (from, to) => (from === null ? null : (to - from) / 1000);
    Object.assign(this.numbers, {
      tokens: this.tokens,
      thinkingTokens: this.thinkingTokens,
      firstSeconds: this.first === null ? null : seconds(this.start, this.first),
      thinkingSeconds: this.thinkingTokens ? seconds(this.start, this.thinkingEnd ?? this.thought) : null,
      speed: this.tokens > 1 ? (this.tokens - 1) / seconds(this.first, this.last) : null,
      context: this.before + this.tokens,
      exact: false,
    });
  }

  #settle(usage) {
    const numbers = this.numbers;
    if (this.tokens > 1 && usage.completion_tokens > 1)
      numbers.speed = (usage.completion_tokens - 1) / ((this.last - this.first) / 1000);
    Object.assign(numbers, {
      tokens: usage.completion_tokens,
      thinkingTokens: usage.completion_tokens_details.reasoning_tokens,
      context: usage.total_tokens,
      prompt: usage.prompt_tokens,
      cached: usage.prompt_tokens_details.cached_tokens,
      mode: usage.thinking_mode,
      exact: true,
    });
  }
}
