// A model's Markdown as elements. Every character of it ends in a text node: no markup, no link, no picture comes of a text.

const MOST_DEPTH = 8; // of quotes, lists and emphasis in each other
const MOST_INLINE = 20000; // characters of one paragraph that are looked at for emphasis
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+)(?=\S)/;
const COLUMNS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const LETTER = /[\p{L}\p{N}]/u;

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const isBlank = (line) => line.trim() === "";
const isTable = (lines, at) => lines[at].includes("|") && lines[at + 1]?.includes("-") && lines[at + 1].includes("|") && COLUMNS.test(lines[at + 1]);
const begins = (lines, at) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(lines[at])) || isTable(lines, at);

// Where the block that begins at a line ends, and what makes its element.
function blockAt(lines, at, depth) {
  const line = lines[at];
  const isDeep = depth >= MOST_DEPTH;
  let end = at + 1;
  const fence = FENCE.exec(line);
  if (fence) {
    const closer = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}[ \\t]*$`);
    while (end < lines.length && !closer.test(lines[end])) end++;
    const inside = lines.slice(at + 1, end);
    return [Math.min(end + 1, lines.length), () => codeBlock(fence[2].trim(), inside.join("\n"))];
  }
  const heading = HEADING.exec(line);
  if (heading) {
    const level = Math.min(heading[1].length + 2, 6); // below the page's own
    return [end, () => make(`h${level}`, {}, ...inline(heading[2].trimEnd(), 0))];
  }
  if (RULE.test(line)) return [end, () => make("hr")];
  if (QUOTE.test(line) && !isDeep) {
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    const inside = lines.slice(at, end).map((each) => each.replace(QUOTE, ""));
    return [end, () => make("blockquote", {}, ...elements(inside, depth + 1))];
  }
  if (ITEM.test(line) && !isDeep) return listAt(lines, at, depth);
  if (isTable(lines, at)) {
    end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end++;
    return [end, () => table(lines[at], lines.slice(at + 2, end))];
  }
  while (end < lines.length && !isBlank(lines[end]) && (isDeep || !begins(lines, end))) end++;
  return [end, () => make("p", {}, ...inline(lines.slice(at, end).join("\n"), 0))];
}

const indentOf = (line) => /^[ \t]*/.exec(line)[0].replace(/\t/g, "    ").length;

function listAt(lines, at, depth) {
  const isOrdered = (mark) => /\d/.test(mark[2]);
  const first = ITEM.exec(lines[at]);
  const base = indentOf(lines[at]);
  const items = [];
  let end = at;
  for (; end < lines.length; end++) {
    const mark = ITEM.exec(lines[end]);
    const indent = indentOf(lines[end]);
    if (isBlank(lines[end])) {
      const next = lines[end + 1];
      const goesOn = next !== undefined && !isBlank(next) && (indentOf(next) > base || (ITEM.test(next) && indentOf(next) === base));
      if (!goesOn) break;
      items.at(-1).push("");
    } else if (mark && indent <= base) {
      if (indent < base || isOrdered(mark) !== isOrdered(first) || RULE.test(lines[end])) break;
      items.push([lines[end].slice(mark[0].length)]);
    } else if (indent > base) {
      items.at(-1).push(lines[end].replace(/^[ \t]*/, " ".repeat(Math.max(0, indent - base - first[2].length - 1))));
    } else if (begins(lines, end)) break;
    else items.at(-1).push(lines[end]); // a paragraph that goes on without its indent
  }
  const build = () => {
    const list = make(isOrdered(first) ? "ol" : "ul");
    if (isOrdered(first)) list.start = Number.parseInt(first[2], 10);
    for (const item of items) {
      const parts = elements(item, depth + 1);
      // Of an item that is one line, or one line and a list, the paragraph is no element of its own.
      if (parts[0]?.tagName === "P" && !item.includes("")) parts.splice(0, 1, ...parts[0].childNodes);
      list.append(make("li", {}, ...parts));
    }
    return list;
  };
  return [end, build];
}

function table(head, rows) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((each) => each.trim());
  const row = (tag, line) => make("tr", {}, ...cells(line).map((cell) => make(tag, {}, ...inline(cell, 0))));
  const body = make("table", {}, make("thead", {}, row("th", head)), make("tbody", {}, ...rows.map((line) => row("td", line))));
  return make("div", { className: "wide", tabIndex: 0, role: "group", ariaLabel: "Table" }, body);
}

function codeBlock(language, text) {
  const copy = make("button", { type: "button", className: "plain copy-code", textContent: "Copy", ariaLabel: "Copy the code" });
  const bar = make("div", { className: "bar" }, make("span", { textContent: language || "code" }), copy);
  const label = language ? `Code, ${language.slice(0, 40)}` : "Code";
  const code = make("pre", { tabIndex: 0, role: "group", ariaLabel: label }, make("code", { textContent: text }));
  return make("div", { className: "code" }, bar, code);
}

// Where a run of ``size`` marks closes what one opened before ``from``; -1 for nowhere.
function closing(text, mark, size, from) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at)) {
    let end = at;
    while (text[end] === mark) end++;
    const isFree = mark === "`" || (!/\s/.test(text[at - 1]) && text[at - 1] !== "\\" && !(mark === "_" && LETTER.test(text[end] ?? " ")));
    if (end - at === size && at > from && isFree) return at;
    at = end;
  }
  return -1;
}

const EMPHASIS = { "*1": ["em"], "*2": ["strong"], "*3": ["strong", "em"], "_1": ["em"], "_2": ["strong"], "_3": ["strong", "em"], "~2": ["del"] };

// Nodes of a paragraph's text.
function inline(text, depth) {
  if (depth >= MOST_DEPTH || text.length > MOST_INLINE) return [text];
  const nodes = [];
  let plain = "";
  const unclosed = new Set(); // kinds that nothing closes from here on: looked for once, not once for each mark
  for (let at = 0; at < text.length; ) {
    const mark = text[at];
    if (mark === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    let size = 0;
    if ("*_~`".includes(mark)) while (text[at + size] === mark) size++;
    const tags = mark === "`" ? ["code"] : EMPHASIS[mark + size];
    const isInWord = size > 0 && mark !== "`" && size < 2 && LETTER.test(text[at - 1] ?? " ");
    const opens = size > 0 && tags && !isInWord && (mark === "`" || !/\s|^$/.test(text[at + size] ?? ""));
    const close = opens && !unclosed.has(mark + size) ? closing(text, mark, size, at + size) : -1;
    if (close < 0) {
      if (opens) unclosed.add(mark + size);
      plain += text.slice(at, at + (size || 1));
      at += size || 1;
      continue;
    }
    const inside = text.slice(at + size, close);
    const children = mark === "`" ? [inside.replace(/^ (.*\S.*) $/s, "$1")] : inline(inside, depth + 1);
    const whole = tags.reduceRight((content, tag) => [make(tag, {}, ...content)], children);
    nodes.push(plain, ...whole);
    plain = "";
    at = close + size;
  }
  return [...nodes, plain].filter((node) => node !== "");
}

// Each block as [its text, what makes its element].
function* blocks(lines, depth) {
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const [end, build] = blockAt(lines, at, depth);
    yield [lines.slice(at, end).join("\n"), build];
    at = end;
  }
}

function elements(lines, depth) {
  return Array.from(blocks(lines, depth), ([, build]) => build());
}

const drawn = new WeakMap(); // containers to the texts of their blocks

// Show a text in a container. A longer text later leaves the blocks that did not change alone, and what is selected in them.
export function render(container, text) {
  const known = drawn.get(container) ?? [];
  const sources = [];
  for (const [source, build] of blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0)) {
    const place = sources.push(source) - 1;
    if (known[place] === source) continue;
    const element = build();
    if (container.children[place]) container.children[place].replaceWith(element);
    else container.append(element);
  }
  while (container.children.length > sources.length) container.lastElementChild.remove();
  drawn.set(container, sources);
}
