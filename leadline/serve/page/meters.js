// The meters below the question: how fast it goes, how much context is used, and what that costs.

import { inBytes, inPercent, inSeconds, inSpeed, whole } from "/page/words.js";

const EVERY_MS = 1000;
const byId = (id) => document.getElementById(id);

/** A meter without a figure takes no room. */
function set(id, text) {
  byId(id).textContent = text;
  byId(id).closest("dl > div").hidden = !text;
}

export class Meters {
  /** limit: most tokens of a conversation. */
  constructor(api) {
    this.api = api;
    this.limit = 0;
    this.asked = { tokens: -1, at: -Infinity };
  }

  /** Show the numbers of an answer; without any, of an empty conversation. ended: they will not change any more. */
  show(numbers = {}, ended = true) {
    set("m-speed", numbers.speed ? inSpeed(numbers.speed) : "");
    set("m-first", numbers.firstSeconds != null ? inSeconds(numbers.firstSeconds) : "");
    set("m-cached", numbers.prompt ? inPercent(numbers.cached / numbers.prompt) : "");
    byId("m-cached").title = numbers.prompt
      ? `${whole(numbers.cached)} of ${whole(numbers.prompt)} tokens of the prompt came from the prefix cache`
      : "";
    const used = numbers.context ?? 0;
    const about = numbers.exact === false ? "≈ " : "";
    set("m-context", this.limit ? `${about}${whole(used)} / ${whole(this.limit)}` : "");
    const bar = byId("m-bar");
    bar.value = this.limit ? used / this.limit : 0;
    bar.title = this.limit ? `${inPercent(used / this.limit)} of the context is used` : "";
    this.#cache(used, ended);
  }

  /** Bytes at a length. The server knows them; while an answer grows it is asked once a second. */
  async #cache(tokens, ended) {
    const time = performance.now();
    if (!this.limit || tokens === this.asked.tokens || (!ended && time - this.asked.at < EVERY_MS)) return;
    if (!tokens) {
      this.asked = { tokens, at: -Infinity };
      set("m-cache", "");
      return;
    }
    this.asked = { tokens, at: time };
    let found;
    try {
      found = await this.api.meter(tokens);
    } catch {
      return; // the answer itself tells what is wrong with the server
    }
    if (found.tokens !== this.asked.tokens) return;
    const part = found.cache_bytes / found.v32_cache_bytes;
    set("m-cache", `${inBytes(found.cache_bytes)}, V3.2 ${inBytes(found.v32_cache_bytes)}`);
    byId("cache-meter").title =
      `At ${whole(tokens)} tokens this model needs ${inPercent(part)} of the cache of DeepSeek-V3.2, both in their ` +
      `published formats. This server sets ${inBytes(found.held_bytes)} aside.`;
  }
}
