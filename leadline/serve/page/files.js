// Files to one text. The layout is the one of `leadline pack`: a tree of the names first, then each file under its
// path, sorted, so that a prompt whose last file has changed still begins with the same tokens and the prefix cache has
// them. No file can break out of its fence, which is longer than any run of backticks in it.

const FILE_BYTES = 2 ** 20;
const TOTAL_BYTES = 24 * 2 ** 20;
const MOST_FAULTS = 0.1;
const SKIPPED_FOLDERS = new Set([".git", ".hg", ".svn", ".venv", "node_modules", "__pycache__"]);
const MOST_FILES = 10000;

/** What a drop holds, folders opened: `{name, file}`. Call it in the event itself: afterwards the drop is empty. */
export async function dropped(transfer) {
  const items = [...transfer.items].filter(({ kind }) => kind === "file");
  const parts = items.map((item) => ({ entry: item.webkitGetAsEntry(), file: item.getAsFile() }));
  const found = await walk(parts.map(({ entry }) => entry).filter(Boolean));
  // What a program drops is not on the disk and has no entry there.
  const loose = parts.filter(({ entry, file }) => !entry && file);
  return [...found, ...loose.map(({ file }) => ({ name: file.name, file }))];
}

async function walk(entries) {
  const found = [];
  const open = [...entries];
  while (open.length && found.length < MOST_FILES) {
    const entry = open.pop();
    const name = entry.fullPath.replace(/^\//, "");
    if (entry.isFile) {
      found.push({ name, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    } else if (!SKIPPED_FOLDERS.has(entry.name)) {
      const reader = entry.createReader();
      for (;;) {
        const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (!some.length) break;
        open.push(...some);
      }
    }
  }
  return found;
}

/** What a file picker holds. */
export function picked(list) {
  const found = [...list].map((file) => ({ name: file.webkitRelativePath || file.name, file }));
  return found.filter(
    ({ name }) =>
      !name
        .split("/")
        .slice(0, -1)
        .some((folder) => SKIPPED_FOLDERS.has(folder)),
  );
}

/** Files with their text: `{name, text, note}`, where text is null for a file that is named only, and note says why. */
export async function read(found, already) {
  const byName = new Map(already.map((each) => [each.name, each]));
  for (const { name, file } of found) byName.set(name, { name, ...(await extract(file)) });
  const files = [...byName.values()].sort((a, b) => compare(a.name.split("/"), b.name.split("/")));
  let room = TOTAL_BYTES;
  return files.map((each) => {
    room -= each.text?.length ?? 0;
    return room < 0 && each.text !== null ? { ...each, text: null, note: "too much text together" } : each;
  });
}

async function extract(file) {
  if (file.size > FILE_BYTES) return { text: null, note: "too large" };
  const bytes = new Uint8Array(await file.arrayBuffer());
  const encoding = { "255,254": "utf-16le", "254,255": "utf-16be" }[bytes.slice(0, 2)] ?? "utf-8";
  if (encoding === "utf-8" && bytes.includes(0)) return { text: null, note: "binary" };
  const text = new TextDecoder(encoding).decode(bytes);
  const faults = text.split("\ufffd").length - 1;
  if (faults > MOST_FAULTS * text.length) return { text: null, note: "not UTF-8" };
  return { text, note: faults ? `${faults} faults of encoding replaced by \ufffd` : null };
}

/** One text of all files, or an empty one. A folder that holds all of them is not named: wherever it lies, and whatever
 *  it is called, the text is the same. */
export function pack(files) {
  if (!files.some(({ text }) => text !== null)) return "";
  const named = withoutTop(files);
  const sections = named.filter(({ text }) => text !== null).map(section);
  return `The files below are given, each under its path.\n\n${fenced(tree(named).join("\n"))}\n${sections.join("")}`;
}

function withoutTop(files) {
  const top = files[0].name.slice(0, files[0].name.indexOf("/") + 1);
  const isShared = top && files.every(({ name }) => name.startsWith(top));
  return isShared ? files.map((file) => ({ ...file, name: file.name.slice(top.length) })) : files;
}

function section({ name, text, note }) {
  return `## ${spelled(name)}\n\n${note ? `(${note})\n\n` : ""}${fenced(text)}\n`;
}

function fenced(text) {
  const longest = (text.match(/`+/g) ?? []).reduce((most, run) => Math.max(most, run.length), 0);
  const fence = "`".repeat(Math.max(3, longest + 1));
  return `${fence}\n${text}${text.endsWith("\n") || !text ? "" : "\n"}${fence}\n`;
}

/** Lines of the tree; a folder stands once, in front of what it holds. */
function tree(files) {
  const lines = [];
  let open = [];
  for (const [name, reason] of folded(files)) {
    const folders = name.replace(/\/$/, "").split("/");
    const last = folders.pop();
    let shared = 0;
    while (shared < Math.min(folders.length, open.length) && folders[shared] === open[shared]) shared += 1;
    for (let depth = shared; depth < folders.length; depth += 1)
      lines.push(`${"  ".repeat(depth)}${spelled(folders[depth])}/`);
    open = folders;
    const remark = reason === null ? "" : ` (left out: ${reason})`;
    lines.push(`${"  ".repeat(folders.length)}${spelled(last)}${name.endsWith("/") ? "/" : ""}${remark}`);
  }
  return lines;
}

/** Names and why they are left out. A folder of which nothing is read, for one reason, stands for all that it holds. */
function folded(files) {
  const reasons = new Map(files.map(({ name, text, note }) => [name, text === null ? note : null]));
  const common = new Map(); // of a folder: the reasons of its files
  for (const [name, reason] of reasons) {
    for (const folder of foldersOf(name)) common.set(folder, (common.get(folder) ?? new Set()).add(reason));
  }
  const lines = new Map();
  for (const [name, reason] of reasons) {
    const closed = reason === null ? undefined : foldersOf(name).find((folder) => common.get(folder).size === 1);
    lines.set(closed ?? name, reason);
  }
  return lines;
}

/** The folders that a file lies in, the outermost first, with a slash behind each. */
function foldersOf(name) {
  const parts = name.split("/").slice(0, -1);
  return parts.map((_, depth) => `${parts.slice(0, depth + 1).join("/")}/`);
}

/** A name on one line: itself, or in JSON where it has characters that do not print. */
function spelled(name) {
  if (!name.startsWith('"') && !/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u.test(name)) return name;
  return JSON.stringify(name).replace(/[^ -~]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** By code points, part by part: the order does not depend on the language of the browser. */
function compare(a, b) {
  for (let part = 0; part < Math.min(a.length, b.length); part += 1) {
    const [left, right] = [[...a[part]], [...b[part]]];
    for (let at = 0; at < Math.min(left.length, right.length); at += 1) {
      const difference = left[at].codePointAt(0) - right[at].codePointAt(0);
      if (difference) return difference;
    }
    if (left.length !== right.length) return left.length - right.length;
  }
  return a.length - b.length;
}
