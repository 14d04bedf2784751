// Markdown to nodes. What a model writes is never markup: every character of it ends in a text node, and the only
// attribute that it reaches is the address of a link, which has to be http, https or mailto. Pictures become links,
// because loading one would tell its server that it was read.
//
// A long answer is drawn again many times a second while it grows. So the text is cut into blocks first, and only
// blocks whose source has changed are built again: `update` below. Every search that fails is remembered, and nesting
// has a limit, so that no text, however odd, takes more than a few passes.

const DEEPEST = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(?=\S)|[ \t]*$)/;
const TABLE_LINE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const BLANK = /^[ \t]*$/;

/** Show `text` in `parent`, which holds nothing else; blocks that stay the same keep their nodes. */
export function update(parent, text) {
  const found = blocks(text.split("\n"), 0);
  const shown = parent.markdownSources ?? [];
  let same = 0;
  while (same < shown.length && same < found.length && shown[same] === found[same].source) same += 1;
  while (parent.childNodes.length > same) parent.lastChild.remove();
  for (const block of found.slice(same)) parent.append(block.build());
  parent.markdownSources = found.map((block) => block.source);
}

// -- blocks ------------------------------------------------------------------------------------------------------

/** Blocks of some lines: `{source, build}`, in their order. */
function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (BLANK.test(lines[at])) {
      at += 1;
      continue;
    }
    const [end, build] = block(lines, at, depth);
    // What follows can turn a paragraph's last line into something else, so the end belongs to the source.
    found.push({ source: `${end === lines.length}\n${lines.slice(at, end).join("\n")}`, build });
    at = end;
  }
  return found;
}

/** The block that begins at a line: the line after it, and how it is built. */
function block(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  const heading = HEADING.exec(line);
  // The page has its own first and second level.
  if (heading) return [at + 1, () => make(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2] ?? ""))];
  if (RULE.test(line)) return [at + 1, () => make("hr")];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && at + 1 < lines.length && TABLE_LINE.test(lines[at + 1])) {
    if (cells(line).length === cells(lines[at + 1]).length) return table(lines, at);
  }
  return paragraph(lines, at, depth);
}

function fenced(lines, at, [, marks, info]) {
  const close = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return [Math.min(end + 1, lines.length), () => codeBlock(code, info.trim().split(/\s/)[0])];
}

function codeBlock(code, language) {
  const copy = make("button", ["Copy"]);
  copy.type = "button";
  copy.className = "copy plain";
  copy.setAttribute("aria-label", "Copy code");
  const pre = make("pre", [make("code", [code])]);
  pre.tabIndex = 0; // it scrolls sideways, also without a mouse
  const figure = make("figure", [make("figcaption", [make("span", [language]), copy]), pre]);
  figure.className = "code";
  return figure;
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end, () => make("blockquote", build(inner, depth))];
}

function list(lines, at, depth) {
  const [, , first] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first);
  const kind = first.at(-1);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[2].at(-1) !== kind || RULE.test(lines[end])) break;
    const indent = item[0].length + (item[3] ? 0 : 1);
    const inner = [lines[end].slice(item[0].length)];
    end += 1;
    while (end < lines.length) {
      const line = lines[end];
      const spaces = line.search(/[^ ]/);
      if (BLANK.test(line)) {
        const next = lines.slice(end).findIndex((each) => !BLANK.test(each));
        if (next < 0 || lines[end + next].search(/[^ ]/) < indent) break;
        inner.push("");
      } else if (spaces >= Math.min(indent, 2) && !(spaces < indent && ITEM.test(line))) {
        inner.push(line.slice(Math.min(spaces, indent)));
      } else if (ITEM.test(line) || starts(line)) {
        break;
      } else {
        inner.push(line);
      }
      end += 1;
    }
    items.push(inner);
    let next = end;
    while (next < lines.length && BLANK.test(lines[next])) next += 1;
    if (next < lines.length && ITEM.test(lines[next]) && ITEM.exec(lines[next])[2].at(-1) === kind) end = next;
    else break;
  }
  return [
    end,
    () => {
      const node = make(
        ordered ? "ol" : "ul",
        items.map((inner) => make("li", build(inner, depth))),
      );
      if (ordered && Number.parseInt(first, 10) !== 1) node.start = Number.parseInt(first, 10);
      return node;
    },
  ];
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !BLANK.test(lines[end])) end += 1;
  const sides = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "",
  );
  const row = (line, kind) => {
    const texts = cells(line);
    return make(
      "tr",
      sides.map((side, column) => {
        const cell = make(kind, inline(texts[column] ?? ""));
        if (side) cell.classList.add(side);
        return cell;
      }),
    );
  };
  return [
    end,
    () => {
      const head = make("thead", [row(lines[at], "th")]);
      const body = make(
        "tbody",
        lines.slice(at + 2, end).map((line) => row(line, "td")),
      );
      const frame = make("div", [make("table", [head, body])]);
      frame.className = "table";
      frame.tabIndex = 0;
      return frame;
    },
  ];
}

function cells(line) {
  const inner = line
    .trim()
    .replace(/^\|/, "")
    .replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !BLANK.test(lines[end]) && !(depth < DEEPEST && starts(lines[end]))) end += 1;
  const text = lines
    .slice(at, end)
    .map((line) => line.trim())
    .join("\n");
  return [end, () => make("p", inline(text))];
}

/** Whether a line ends the paragraph above it. */
function starts(line) {
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
    /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/.test(line)
  );
}

/** Nodes of the blocks inside a block; a single paragraph needs no frame of its own. */
function build(lines, depth) {
  const nodes = blocks(lines, depth + 1).map((each) => each.build());
  return nodes[0]?.nodeName === "P" && !nodes.slice(1).some((node) => node.nodeName === "P")
    ? [...nodes[0].childNodes, ...nodes.slice(1)]
    : nodes;
}

// -- inside a line -----------------------------------------------------------------------------------------------

const SPECIAL = new RegExp(
  [
    /`+/,
    /\\[!-/:-@[-`{-~]/, // an escaped sign
    /\*\*\*|\*\*|__|~~|[*_\n]/,
    /!?\[[^[\]\n]{0,999}\]\([^\s()<>]{1,1999}(?:[ \t]+"[^"\n]{0,999}")?\)/, // [text](address "title")
    /https?:\/\/[^\s<>"`]{1,1999}/,
  ]
    .map((part) => part.source)
    .join("|"),
  "g",
);
const LINK = /^(!?)\[([^\]]*)\]\(([^\s)]+)/;
const TAGS = { "***": ["strong", "em"], "**": ["strong"], __: ["strong"], "~~": ["s"], "*": ["em"], _: ["em"] };
const WORD = /[\p{L}\p{N}_]/u;

/** Nodes of text without blocks. */
function inline(text, depth = 0) {
  const nodes = [];
  const failed = new Set();
  let plain = 0;
  const put = (from, to, ...made) => {
    if (from > plain) nodes.push(text.slice(plain, from));
    nodes.push(...made);
    plain = to;
  };
  const special = new RegExp(SPECIAL);
  for (let match = special.exec(text); match; match = special.exec(text)) {
    const [mark] = match;
    const at = match.index;
    const after = at + mark.length;
    if (mark === "\n") {
      put(at, after, make("br"));
    } else if (mark[0] === "\\") {
      put(at, after, mark[1]);
    } else if (mark[0] === "`") {
      const end = failed.has(mark) ? -1 : codeEnd(text, after, mark);
      if (end < 0) failed.add(mark);
      else put(at, end + mark.length, make("code", [text.slice(after, end).replace(/^ (.*[^ ].*) $/, "$1")]));
    } else if (mark in TAGS) {
      const opens = /\S/.test(text[after] ?? " ") && (mark[0] !== "_" || !WORD.test(text[at - 1] ?? ""));
      const end = !opens || failed.has(mark) || depth >= DEEPEST ? -1 : markEnd(text, after, mark);
      if (end < 0 && opens) failed.add(mark);
      if (end >= 0) {
        const inner = inline(text.slice(after, end), depth + 1);
        put(at, end + mark.length, ...TAGS[mark].reduceRight((nodes, tag) => [make(tag, nodes)], inner));
      }
    } else {
      const found = LINK.exec(mark);
      const address = found ? found[3] : mark.replace(/[.,:;!?'")\]*_~]+$/, "");
      const node = link(address, found ? inline(found[2] || address, DEEPEST) : [address]);
      if (node) put(at, found ? after : at + address.length, node);
      else if (found) put(at, after, mark);
    }
    special.lastIndex = Math.max(plain, after);
  }
  put(text.length, text.length);
  return nodes;
}

/** Where a code span ends: at a run of as many backticks. */
function codeEnd(text, from, marks) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run = runs.exec(text); run; run = runs.exec(text)) if (run[0] === marks) return run.index;
  return -1;
}

/** Where emphasis ends: at the same mark, after a character that is no space. */
function markEnd(text, from, mark) {
  let at = text.indexOf(mark, from + 1);
  while (at >= 0) {
    const doubled = mark.length === 1 && text[at + 1] === mark;
    const inWord = mark[0] === "_" && WORD.test(text[at + mark.length] ?? "");
    if (!doubled && !inWord && /[^\s\\]/.test(text[at - 1])) return at;
    at = text.indexOf(mark, at + (doubled ? 2 : 1));
  }
  return -1;
}

/** A link, if its address is one that may be followed. */
function link(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  const node = make("a", children);
  node.href = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}

function make(tag, children = []) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}
