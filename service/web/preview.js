// The parsed examples as a table, each problem on its line.

import { h } from "./dom.js";
import { plural } from "./format.js";

const SHOWN = 8;
const PROBLEMS_SHOWN = 50;

/**
 * @param {import("./examples.js").Row[]} rows checked
 * @param {boolean} all show every row
 * @param {() => void} showAll
 */
export function preview(rows, all, showAll) {
  const shown = all ? rows : choose(rows);
  const table = h(
    "table",
    { class: "examples" },
    h("caption", { class: "hidden" }, "The examples as they were read"),
    h("thead", {}, h("tr", {}, ["Line", "Prompt", "Completion", "Choices"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, shown.flatMap(rowOf)),
  );
  const left = rows.length - shown.length;
  return h(
    "div",
    { class: "preview" },
    h("div", { class: "rows", tabindex: 0, role: "region", "aria-label": "The examples as they were read" }, table),
    left > 0 && h("button", { type: "button", class: "quiet", onclick: showAll }, `Show ${plural(left, "more line")}`),
  );
}

/** The first rows, and those with a problem. */
function choose(rows) {
  const bad = rows.filter((row) => row.problem).slice(0, PROBLEMS_SHOWN);
  return rows.filter((row, i) => i < SHOWN || bad.includes(row));
}

function rowOf(row) {
  const { example, problem, line } = row;
  const cells = example
    ? [text(example.prompt), text(example.completion, true), choices(example.choices)].map((cell) => h("td", {}, cell))
    : [h("td", { colspan: 3, class: "muted" }, "could not be read")];
  const marked = problem ? { class: "wrong", "data-line": line } : { "data-line": line };
  const drawn = [h("tr", marked, h("th", { scope: "row" }, line), cells)];
  if (problem) {
    const where = problem.field === "line" ? "" : `${problem.field}: `;
    drawn.push(h("tr", { class: "problem" }, h("td", { colspan: 4 }, `Line ${line}, ${where}${problem.message}`)));
  }
  return drawn;
}

function choices(list) {
  if (!Array.isArray(list)) return h("span", { class: "muted" }, "open answer");
  const shown = list.slice(0, 6).map((choice) => h("span", { class: "chip" }, text(choice, true)));
  return h("span", { class: "chips" }, shown, list.length > 6 && h("span", { class: "muted" }, `and ${list.length - 6} more`));
}

/** A text as it is; a blank at its start, which counts, is made visible. */
function text(value, blanks = false) {
  if (typeof value !== "string") return h("code", {}, value === undefined ? "missing" : JSON.stringify(value));
  const lead = blanks ? /^\s*/.exec(value)[0] : "";
  const mark = lead && h("span", { class: "blank", title: "begins with a blank" }, "␣".repeat(lead.length));
  return h("span", { class: "text" }, mark, value.slice(lead.length));
}

/** What was read, in one sentence. */
export function summary(rows) {
  const bad = rows.filter((row) => row.problem);
  if (bad.length) {
    return `${bad.length.toLocaleString("en")} of ${plural(rows.length, "line")} cannot be sent; the first is line ${bad[0].line}.`;
  }
  const lists = new Set(rows.map((row) => JSON.stringify(row.example?.choices ?? null)));
  const [only] = lists;
  let kind = "with choices of their own";
  if (lists.size === 1) kind = only === "null" ? "with open answers" : `with ${JSON.parse(only).length} choices`;
  return `${plural(rows.length, "example")} ${kind}.`;
}
