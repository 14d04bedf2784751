// What the page asks of the server.

/** An answer that the server refused, or that did not arrive. status: of HTTP, 0 if nothing came back. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Api {
  /** key: a function that returns the API key, or an empty text. */
  constructor(key) {
    this.key = key;
  }

  /** The model that is served: id, max_model_len, modes, default_mode. */
  async model() {
    return (await (await this.#send("/v1/models")).json()).data[0];
  }

  /** How many tokens a text has. */
  async count(text) {
    const response = await this.#send("/tokenize", { prompt: text, add_special_tokens: false });
    return (await response.json()).count;
  }

  /** Bytes of cache at a length. */
  async meter(tokens) {
    return (await this.#send(`/meter?tokens=${tokens}`)).json();
  }

  /** The chunks of a streamed answer. Throws ServerError; ends early, without one, when the signal aborts. */
  async *answer(body, signal) {
    const response = await this.#send("/v1/chat/completions", body, signal);
    let ended = false;
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(500, chunk.error.message);
      yield chunk;
    }
    if (!ended) throw new ServerError(0, "The connection was lost before the answer was complete.");
  }

  async #send(path, body, signal) {
    const headers = this.key() ? { authorization: `Bearer ${this.key()}` } : {};
    const options = { headers, signal };
    if (body) {
      headers["content-type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    }
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "The server does not answer.");
    }
    if (response.ok) return response;
    const text = await response.text();
    throw new ServerError(response.status, messageOf(text) ?? `The server answered with status ${response.status}.`);
  }
}

function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return null;
  }
}

/** The data of server-sent events, one after the other. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError) throw new ServerError(0, "The connection was lost before the answer was complete.");
    throw error;
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already, and then there is nothing to cancel
  }
}
