// An answer as it grows: chunks are put into the message, and seconds are counted. Tokens are counted by the server, since
// a chunk may bring any number of them: guesses that were right come together, and some text waits for what follows it.

// A speed over less time than this says nothing.
const SHORTEST_S = 0.05;

export class Answer {
  /** before: about how many tokens the conversation has so far. */
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
    // When it was asked for, when its first and its last token came, and when its thinking ended.
    this.asked = performance.now();
    this.first = null;
    this.last = null;
    this.thought = null;
    // Tokens that had come with the first and the last of them.
    this.tokensAtFirst = 0;
    this.tokensAtLast = 0;
    Object.assign(this.numbers, {
      tokens: 0,
      thinkingTokens: 0,
      firstSeconds: null,
      thinkingSeconds: null,
      speed: null,
      context: before,
      exact: false,
    });
  }

  /** Put a chunk into the message. */
  add(chunk) {
    const [choice] = chunk.choices ?? [];
    const delta = choice?.delta ?? {};
    if (delta.reasoning_content || delta.content || delta.tool_calls)
      this.#tick(Boolean(delta.reasoning_content), chunk.usage.completion_tokens);
    this.#count(chunk.usage);
    if (!choice) return;
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

  #tick(thinks, tokens) {
    this.last = performance.now();
    this.tokensAtLast = tokens;
    if (this.first === null) {
      this.first = this.last;
      this.tokensAtFirst = tokens;
    }
    if (thinks) this.thought = this.last;
  }

  /** Take over what the server has counted; the last chunk tells more than the others. */
  #count(usage) {
    Object.assign(this.numbers, {
      tokens: usage.completion_tokens,
      thinkingTokens: usage.completion_tokens_details.reasoning_tokens,
      firstSeconds: this.#seconds(this.asked, this.first),
      thinkingSeconds: this.#seconds(this.first, this.thought),
      speed: this.#speed(),
      context: usage.total_tokens,
      exact: true,
    });
    if (usage.prompt_tokens_details) {
      this.numbers.prompt = usage.prompt_tokens;
      this.numbers.cached = usage.prompt_tokens_details.cached_tokens;
      this.numbers.mode = usage.thinking_mode;
    }
  }

  /** Tokens a second, without the first ones, whose time is the prompt's. */
  #speed() {
    const seconds = this.#seconds(this.first, this.last);
    return seconds >= SHORTEST_S ? (this.tokensAtLast - this.tokensAtFirst) / seconds : null;
  }

  #seconds(from, to) {
    return from === null || to === null ? null : (to - from) / 1000;
  }
}
