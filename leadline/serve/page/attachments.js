// The files that go with the conversation: how they get in, the list above the question, and what they cost.

import { dropped, pack, picked, read } from "/page/files.js";
import { element, iconButton } from "/page/view.js";
import { inTokens, whole } from "/page/words.js";

const byId = (id) => document.getElementById(id);

export class Attachments {
  /** changed(files): called with the new list. notice(text): tells what went wrong. */
  constructor(api, { changed, notice }) {
    this.api = api;
    this.changed = changed;
    this.notice = notice;
    this.files = [];
    /** Tokens of all files; null while they are counted. */
    this.tokens = null;
    /** Most tokens of a conversation. */
    this.limit = Infinity;
    this.#listen();
  }

  /** Show other files. */
  use(files) {
    this.files = files;
    this.#show();
    this.count();
  }

  /** Have the server count the tokens. */
  async count() {
    const { files } = this;
    const text = pack(files);
    this.tokens = text ? null : 0;
    if (!text) return;
    let tokens;
    try {
      tokens = await this.api.count(text);
    } catch (error) {
      byId("files-summary").title = error.message; // without a count they can still be asked about
      return;
    }
    if (files !== this.files) return;
    this.tokens = tokens;
    this.#show();
  }

  async #add(found) {
    let files;
    try {
      files = await read(await found, this.files);
    } catch (error) {
      this.notice(`The files could not be read: ${error.message}`);
      return;
    }
    this.#replace(files);
  }

  #replace(files) {
    this.use(files);
    this.changed(files);
  }

  #show() {
    const { files, tokens } = this;
    const title = byId("files-summary");
    byId("files").hidden = !files.length;
    byId("files").classList.toggle("over", tokens >= this.limit);
    const size = tokens === null ? "" : ` · ${inTokens(tokens)}`;
    title.textContent = `${whole(files.length)} ${files.length === 1 ? "file" : "files"}${size}`;
    title.title = tokens >= this.limit ? `More than fits: the model reads ${inTokens(this.limit)}.` : "";
    byId("files-list").replaceChildren(...files.map((file) => this.#row(file)));
  }

  #row(file) {
    const remove = iconButton("close", `Remove ${file.name}`, () =>
      this.#replace(this.files.filter((each) => each !== file)),
    );
    const name = element("span", { className: "path", title: file.name }, file.name);
    const note = element("span", { className: "facts" }, file.note ?? "");
    return element("li", { className: file.text === null ? "left-out" : "" }, name, note, remove);
  }

  #listen() {
    const pairs = [
      ["attach", "pick-files"],
      ["attach-folder", "pick-folder"],
    ];
    for (const [button, picker] of pairs) {
      byId(button).addEventListener("click", () => byId(picker).click());
      byId(picker).addEventListener("change", ({ target }) => {
        this.#add(picked(target.files));
        target.value = "";
      });
    }
    byId("files-clear").addEventListener("click", (event) => {
      event.preventDefault(); // inside a summary it would also open the list
      this.#replace([]);
      byId("question").focus();
    });
    this.#listenToDrops();
  }

  #listenToDrops() {
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
      this.#add(dropped(event.dataTransfer));
    });
  }
}
