// Examples out of JSONL or CSV, and what is wrong with them, by line: the rules of the API (`service/jobs.py`), told
// before anything is sent. What only the server can know (too long for the model, say) it tells by index.

/**
 * @typedef {{prompt: string, completion: string, choices?: string[]|null, turns?: Turn[]|null}} Example
 * @typedef {{role: string, content: string}} Turn
 * @typedef {{line: number, example: Example|null, problem: {field: string, message: string}|null}} Row
 * @typedef {{kind: "jsonl"|"csv", rows: Row[], problem: string|null, columns?: string[], records?: Record[]}} Parsed
 * @typedef {{line: number, cells: string[]}} Record
 * @typedef {{header: boolean, prompt: number, completion: number, wording: string, blank: boolean,
 *            choices: "none"|"distinct"|number}} Mapping
 */

const MAX_CHOICES = 1_000;
const MAX_CHARACTERS = 1_000_000;
const MAX_TURNS = 100;
const FIELDS = new Set(["prompt", "completion", "choices", "turns"]);
const ROLES = ["system", "user", "assistant"];
/** So many different answers are likely to be all there are. */
export const FEW_CHOICES = 20;

/** @returns {"jsonl"|"csv"} by the first character that is no blank. */
export function kindOf(text) {
  return /^\s*[{[]/.test(text) ? "jsonl" : "csv";
}

/** @param {string} text @returns {Row[]} a row for each line that is not blank. */
export function readJsonl(text) {
  const rows = [];
  text.split(/\r?\n/).forEach((source, i) => {
    if (source.trim()) rows.push({ line: i + 1, ...readLine(source) });
  });
  return rows;
}

function readLine(source) {
  let value;
  try {
    value = JSON.parse(source);
  } catch (error) {
    const hint = source.trim().startsWith("[") ? "; a line is one example, without a list around them" : "";
    return { example: null, problem: { field: "line", message: `not JSON${hint}: ${error.message}` } };
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    const message = 'an object is wanted: {"prompt": "...", "completion": "..."}';
    return { example: null, problem: { field: "line", message } };
  }
  return { example: value, problem: null };
}

/**
 * The records of a CSV file, each with the line that it begins on; a quoted cell may hold line breaks.
 * @param {string} text @returns {{records: Record[], problem: string|null}}
 */
export function readCsv(text) {
  const records = [];
  let [line, read] = [1, 0];
  let problem = null;
  window.Papa.parse(text, {
    skipEmptyLines: false,
    step({ data, errors, meta }) {
      if (errors.length && !problem) problem = `Line ${line}: ${errors[0].message}`;
      if (data.some((cell) => cell.trim())) records.push({ line, cells: data });
      line += text.slice(read, meta.cursor).split("\n").length - 1;
      read = meta.cursor;
    },
  });
  return { records, problem };
}

const NAMES = {
  prompt: /^(prompt|question|input|text|sentence|review|message|source|query)s?$/i,
  completion: /^(completion|answer|output|label|target|category|class|response|sentiment|country)s?$/i,
  choices: /^(choices|options|labels)$/i,
};

/** A first guess at which column is what. @param {Record[]} records @returns {Mapping} */
export function guess(records) {
  const first = records[0].cells;
  const find = (name) => first.findIndex((cell) => NAMES[name].test(cell.trim()));
  const [prompt, completion, choices] = [find("prompt"), find("completion"), find("choices")];
  const mapping = {
    header: prompt >= 0 || completion >= 0,
    prompt: prompt >= 0 ? prompt : completion === 0 ? 1 : 0,
    completion: completion >= 0 ? completion : prompt === 1 ? 0 : 1,
    wording: "{}",
    blank: true,
    choices: choices >= 0 ? choices : "none",
  };
  const cells = records.slice(mapping.header ? 1 : 0).map((record) => record.cells);
  mapping.blank = !cells.some((row) => /^\s/.test(row[mapping.completion] ?? "") || /\s$/.test(row[mapping.prompt] ?? ""));
  if (choices < 0 && isFew(cells.map((row) => row[mapping.completion] ?? ""))) mapping.choices = "distinct";
  return mapping;
}

/** Whether so few different answers stand here that they can be all there are. @param {string[]} answers */
export function isFew(answers) {
  const count = new Set(answers).size;
  return count >= 2 && count <= FEW_CHOICES && count <= answers.length / 2;
}

/** @param {Record[]} records @param {Mapping} mapping @returns {Row[]} */
export function mapColumns(records, mapping) {
  const rows = records.slice(mapping.header ? 1 : 0).map(({ line, cells }) => {
    const filled = (cells[mapping.prompt] ?? "").trim() ? mapping.wording.replaceAll("{}", () => cells[mapping.prompt]) : "";
    const example = { prompt: filled, completion: withBlank(cells[mapping.completion] ?? "", mapping.blank) };
    if (typeof mapping.choices === "number") {
      example.choices = (cells[mapping.choices] ?? "").split("|").map((choice) => withBlank(choice, mapping.blank));
    }
    return { line, example, problem: null };
  });
  return mapping.choices === "distinct" ? withChoices(rows) : rows;
}

/** The distinct completions as every example's choices. @param {Row[]} rows @returns {Row[]} */
export function withChoices(rows) {
  const answers = rows.map((row) => row.example?.completion).filter((text) => typeof text === "string" && text.trim());
  const choices = [...new Set(answers)].sort();
  return rows.map((row) => (row.example ? { ...row, example: { ...row.example, choices } } : row));
}

const withBlank = (text, blank) => (blank && text.trim() ? ` ${text.trim()}` : text);

/**
 * The rows with their first problem each, and what is wrong with all of them together.
 * @param {Row[]} rows @param {{min_examples: number, max_examples: number}} limits
 * @returns {{rows: Row[], problem: string|null}}
 */
export function check(rows, limits) {
  const seen = new Map();
  const checked = rows.map((row) => {
    if (row.problem || !row.example) return row;
    return { ...row, problem: checkExample(row.example) ?? checkRepeated(row, seen) };
  });
  const count = rows.length.toLocaleString("en");
  let problem = null;
  if (rows.length > limits.max_examples) {
    problem = `At most ${limits.max_examples.toLocaleString("en")} examples a job; there are ${count}.`;
  } else if (rows.length < limits.min_examples) {
    problem = `At least ${limits.min_examples} examples are needed; there ${rows.length === 1 ? "is" : "are"} ${count}.`;
  }
  return { rows: checked, problem };
}

const wrong = (field, message) => ({ field, message });

function checkExample(example) {
  for (const field of ["prompt", "completion"]) {
    const text = example[field];
    if (text === undefined) return wrong(field, "missing");
    if (typeof text !== "string") return wrong(field, "a text is wanted");
    if (!text.trim()) return wrong(field, "empty");
    if (text.length > MAX_CHARACTERS) return wrong(field, "over a million characters");
  }
  const extra = Object.keys(example).find((name) => !FIELDS.has(name));
  if (extra !== undefined) return wrong(extra, "no such field; an example has prompt, completion, choices and, in a chat, turns");
  return (example.choices ?? null) === null ? checkTurns(example) : checkChoices(example) ?? checkTurns(example);
}

function checkTurns({ turns }) {
  if ((turns ?? null) === null) return null;
  if (!Array.isArray(turns)) return wrong("turns", "a list is wanted");
  if (turns.length > MAX_TURNS) return wrong("turns", `at most ${MAX_TURNS} turns`);
  const isTurn = (turn) => ROLES.includes(turn?.role) && typeof turn.content === "string" && Object.keys(turn).length === 2;
  return turns.every(isTurn) ? null : wrong("turns", `each has a role (${ROLES.join(", ")}) and a content`);
}

function checkChoices({ completion, choices }) {
  if (!Array.isArray(choices) || choices.some((choice) => typeof choice !== "string")) {
    return wrong("choices", "a list of texts is wanted");
  }
  if (choices.length > MAX_CHOICES) return wrong("choices", `at most ${MAX_CHOICES.toLocaleString("en")} choices`);
  if (choices.length < 2) return wrong("choices", "at least two are needed; leave the field out for an open answer");
  if (choices.some((choice) => !choice.trim())) return wrong("choices", "an empty choice");
  if (new Set(choices).size < choices.length) return wrong("choices", "the same choice twice");
  if (choices.includes(completion)) return null;
  const near = choices.some((choice) => choice.trim() === completion.trim());
  return wrong("completion", near ? "as a choice it is written with other blanks" : "not one of the choices");
}

function checkRepeated(row, seen) {
  const { prompt, completion, choices, turns } = row.example;
  const known = JSON.stringify([prompt, [...(choices ?? [])].sort(), (turns ?? []).map(({ role, content }) => [role, content])]);
  const first = seen.get(known);
  if (first === undefined) seen.set(known, { line: row.line, completion });
  else if (first.completion !== completion) {
    return wrong("completion", `line ${first.line} has the same prompt and another answer; a prompt has one right answer`);
  }
  return null;
}

/** `examples[3].completion` as the row's index and field; null for another field. @param {string|null} param */
export function whichExample(param) {
  const found = /^examples\[(\d+)\](?:\.(\w+))?/.exec(param ?? "");
  return found ? { index: Number(found[1]), field: found[2] ?? "line" } : null;
}
