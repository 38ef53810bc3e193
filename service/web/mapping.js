// Which columns of a CSV file are prompt, completion and choices.

import { isFew } from "./examples.js";
import { field, h } from "./dom.js";

const LONGEST_NAME = 30;

/**
 * @param {import("./examples.js").Record[]} records
 * @param {import("./examples.js").Mapping} mapping changed in place
 * @param {() => void} changed
 */
export function mappingPanel(records, mapping, changed) {
  const width = Math.max(...records.slice(0, 100).map((record) => record.cells.length));
  const names = Array.from({ length: width }, (_, i) => columnName(records, mapping, i));
  const columns = names.map((name, i) => [i, name]);
  const wording = h("textarea", { id: "wording", rows: 2, spellcheck: "false", oninput: (event) => set("wording", event.target.value) });
  wording.value = mapping.wording;
  function set(name, value) {
    mapping[name] = value;
    changed();
  }
  return h(
    "fieldset",
    { class: "mapping" },
    h("legend", {}, "Columns"),
    check("header", "The first line names the columns", mapping.header, (on) => set("header", on)),
    h(
      "div",
      { class: "mapped" },
      field("Prompt", select("column-prompt", columns, mapping.prompt, (i) => set("prompt", Number(i)))),
      field("Completion", select("column-completion", columns, mapping.completion, (i) => set("completion", Number(i)))),
      field("Choices", select("column-choices", choiceOptions(records, mapping, columns), mapping.choices, (value) => {
        set("choices", value === "none" || value === "distinct" ? value : Number(value));
      })),
    ),
    field("Wording of a prompt", wording, "{} is the column's text. A question around it helps: Review: {} Sentiment:"),
    check("blank", "Put a blank before each completion (most models expect one)", mapping.blank, (on) => set("blank", on)),
  );
}

function columnName(records, mapping, i) {
  const name = mapping.header ? (records[0].cells[i] ?? "").trim() : "";
  return (name || `column ${i + 1}`).slice(0, LONGEST_NAME);
}

function choiceOptions(records, mapping, columns) {
  const answers = records.slice(mapping.header ? 1 : 0).map((record) => record.cells[mapping.completion] ?? "");
  const options = [["none", "None: answers are open"]];
  if (isFew(answers) || mapping.choices === "distinct") {
    options.push(["distinct", `The ${new Set(answers).size} distinct completions`]);
  }
  return [...options, ...columns.map(([i, name]) => [i, `${name}, separated by |`])];
}

/** A select of `[value, label]` pairs. */
export function select(id, options, value, changed) {
  const control = h(
    "select",
    { id, onchange: () => changed(control.value) },
    options.map(([key, label, disabled]) => h("option", { value: key, disabled: Boolean(disabled) }, label)),
  );
  control.value = String(value);
  return control;
}

function check(id, label, on, changed) {
  const box = h("input", { type: "checkbox", id, checked: on, onchange: () => changed(box.checked) });
  return h("div", { class: "check" }, box, h("label", { for: id }, label));
}
