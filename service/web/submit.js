// A new job: model, examples, settings; what it would take; send it.

import { ApiError, get, pause, post, unique } from "./api.js";
import { alertBox, field, fill, h, setText } from "./dom.js";
import * as examples from "./examples.js";
import { bytes, duration, large } from "./format.js";
import { mappingPanel, select } from "./mapping.js";
import { preview, summary } from "./preview.js";
import { sample } from "./sample.js";
import { DEFAULTS, settingsOf, settingsPanel } from "./settings.js";

const TYPING_SECONDS = 0.5;
// More is slow in a text field.
const LONGEST_SHOWN = 300_000;

/** What was filled in is still there when one comes back from a job. */
const draft = { ...DEFAULTS, model: "", text: "", name: "", mapping: null };

/**
 * The form.
 * @param {any} service what `/v1/service` says
 * @param {AbortSignal} signal the view's end
 */
export function submitForm(service, signal) {
  let rows = [];
  let all = false;
  let asked = new AbortController();
  // The same until something changes: a submission whose answer was lost is not a second job.
  let claim = unique();

  const models = h("div", { "aria-busy": "true" }, h("p", { class: "muted" }, "Looking for models …"));
  const text = h("textarea", {
    id: "examples",
    rows: 7,
    spellcheck: "false",
    placeholder: '{"prompt": "Review: A joy.\\nSentiment:", "completion": " positive", "choices": [" positive", " negative"]}',
    oninput: () => read(text.value, ""),
  });
  const file = h("input", { type: "file", id: "file", class: "hidden", accept: ".jsonl,.ndjson,.json,.csv,.tsv,.txt", onchange: () => load(file.files[0]) });
  const longer = h("p", { class: "file", hidden: true });
  const columns = h("div");
  const told = h("p", { class: "told", role: "status" });
  const table = h("div");
  const estimate = h("p", { class: "estimate", role: "status" });
  const trouble = h("div");
  const send = h("button", { type: "submit", class: "primary" }, "Adapt the model");
  const dropped = h(
    "div",
    { class: "drop", ondragover: over, ondragleave: over, ondrop: drop },
    field("Examples", text, "JSON lines or CSV: paste, drop a file here, or choose one. The task is learnt from them; from 60 on a part is held back to judge, with fewer the result is cross-validated."),
    longer,
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "quiet", onclick: () => file.click() }, "Choose a file"),
      h("button", { type: "button", class: "quiet", onclick: () => show(sample(), "") }, "Fill in an example task"),
      h("label", { for: "file", class: "hidden" }, "A file of examples"),
      file,
    ),
  );
  file.tabIndex = -1;
  const form = h(
    "form",
    { class: "card", novalidate: true, onsubmit: submit, "aria-labelledby": "new" },
    h("h2", { id: "new" }, "New job"),
    models,
    dropped,
    columns,
    told,
    table,
    settingsPanel(draft, settle),
    h("div", { class: "send" }, send, estimate),
    trouble,
  );

  function over(event) {
    event.preventDefault();
    dropped.classList.toggle("over", event.type === "dragover");
  }

  function drop(event) {
    over(event);
    const [first] = event.dataTransfer.files;
    if (first) load(first);
    else show(event.dataTransfer.getData("text"), "");
  }

  async function load(chosen) {
    if (!chosen) return;
    file.value = "";
    if (chosen.size > service.max_body_bytes) {
      fill(trouble, alertBox(`${chosen.name} has ${bytes(chosen.size)}; a job's examples may have ${bytes(service.max_body_bytes)}.`));
      return;
    }
    show(await chosen.text(), chosen.name);
  }

  /** Text from elsewhere, into the field where it is not too long for one. */
  function show(source, name, mapping = null) {
    const long = source.length > LONGEST_SHOWN;
    text.value = long ? "" : source;
    text.disabled = long;
    longer.hidden = !long && !name;
    const remove = h("button", { type: "button", class: "quiet", onclick: () => (show("", ""), text.focus()) }, "Remove");
    fill(longer, `${name || "Pasted text"}, ${bytes(new Blob([source]).size)} `, remove);
    read(source, name, mapping);
  }

  function read(source, name, mapping = null) {
    Object.assign(draft, { text: source, name, mapping });
    all = false;
    parse();
  }

  function parse() {
    fill(columns);
    let problem = null;
    rows = [];
    if (draft.text.trim() && examples.kindOf(draft.text) === "jsonl") rows = examples.readJsonl(draft.text);
    else if (draft.text.trim()) {
      const csv = examples.readCsv(draft.text);
      problem = csv.problem;
      if (csv.records.length) {
        draft.mapping ??= examples.guess(csv.records);
        rows = examples.mapColumns(csv.records, draft.mapping);
        fill(columns, mappingPanel(csv.records, draft.mapping, remap(csv.records)));
      }
    }
    judge(problem);
  }

  /** The columns mean something else now: the panel stays where the focus is, its options may have changed. */
  const remap = (records) => () => {
    rows = examples.mapColumns(records, draft.mapping);
    const focused = document.activeElement?.id;
    if (focused !== "wording") {
      fill(columns, mappingPanel(records, draft.mapping, remap(records)));
      if (focused) document.getElementById(focused)?.focus();
    }
    judge(null);
  };

  function judge(problem) {
    const checked = examples.check(rows, service);
    rows = checked.rows;
    draw(rows.length ? problem ?? checked.problem : problem);
    settle();
  }

  function draw(problem = null) {
    const bad = rows.some((row) => row.problem);
    told.classList.toggle("bad", bad || Boolean(problem));
    setText(told, rows.length ? [summary(rows), problem].filter(Boolean).join(" ") : problem ?? "");
    fill(table, rows.length ? preview(rows, all, () => ((all = true), draw(problem))) : null);
  }

  const body = () => ({ model: draft.model, examples: rows.map((row) => row.example), ...settingsOf(draft) });
  const sendable = () => draft.model && rows.length >= service.min_examples && rows.every((row) => row.example && !row.problem);

  /** Something changed: once it stays so for a moment, ask what the job would take. */
  async function settle() {
    asked.abort();
    asked = new AbortController();
    claim = unique();
    const { signal: mine } = asked;
    fill(trouble);
    form.querySelectorAll("[aria-invalid]").forEach((control) => control.removeAttribute("aria-invalid"));
    send.disabled = !sendable();
    setText(estimate, "");
    if (!sendable()) return;
    await pause(TYPING_SECONDS, mine);
    if (mine.aborted || signal.aborted) return;
    try {
      setText(estimate, inWords(await post("/v1/jobs?dry_run=true", body(), { signal: mine })));
    } catch (error) {
      if (!mine.aborted) refuse(error);
    }
  }

  async function submit(event) {
    event.preventDefault();
    if (!sendable()) return;
    asked.abort();
    send.disabled = true;
    fill(trouble);
    try {
      const job = await post("/v1/jobs", body(), { headers: { "Idempotency-Key": claim } });
      claim = unique();
      location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      refuse(error);
    } finally {
      send.disabled = false;
    }
  }

  /** Show a refusal where its cause is: on the example's line, at the field, or else below. */
  function refuse(error) {
    if (!(error instanceof ApiError)) throw error;
    const place = examples.whichExample(error.param);
    if (place && rows[place.index]) {
      rows[place.index] = { ...rows[place.index], problem: { field: place.field, message: error.message } };
      draw();
      send.disabled = true;
    }
    const control = document.getElementById(error.param ?? "");
    if (control && form.contains(control)) control.setAttribute("aria-invalid", "true");
    const at = place ? `Line ${rows[place.index]?.line}, ${place.field}: ` : error.param ? `${error.param}: ` : "";
    fill(trouble, alertBox(`${at}${error.message}`));
  }

  async function findModels() {
    const { data } = await get("/v1/models", signal);
    const usable = data.filter((model) => !model.error);
    models.removeAttribute("aria-busy");
    if (!usable.length) return void fill(models, noModel(data));
    if (!usable.some((model) => model.id === draft.model)) draft.model = usable[0].id;
    const choose = (id) => {
      draft.model = id;
      setText(chosen.querySelector(".hint"), describe(usable.find((model) => model.id === id)));
      settle();
    };
    const options = data.map((model) => [model.id, model.error ? `${model.id} (cannot be used)` : model.id, model.error]);
    const chosen = field("Model", select("model", options, draft.model, choose), " ");
    fill(models, chosen);
    choose(draft.model);
  }

  show(draft.text, draft.name, draft.mapping);
  findModels().catch((error) => signal.aborted || fill(models, alertBox(error)));
  return form;
}

function describe(model) {
  const mask = model.mask_token ? `; each prompt holds ${model.mask_token} once, where the answer belongs` : "";
  const context = model.context_length ? `, up to ${model.context_length.toLocaleString("en")} tokens` : "";
  return `${model.architecture}, ${large(model.parameters)} parameters${context}${mask}`;
}

function noModel(data) {
  return h(
    "div",
    { class: "warning" },
    h("p", {}, "No model is installed that can be used. This command installs a small one, on the machine of the service:"),
    h("pre", {}, h("code", {}, "c2i models add smollm2-135m-instruct")),
    data.map((model) => h("p", { class: "hint" }, `${model.id}: ${model.error.message}`)),
  );
}

/** `About 40 s of a worker's time, ...` @param {any} estimate */
function inWords({ seconds, memory_bytes: memory, disk_bytes: disk, tokens, measured_speed: measured }) {
  const speed = measured ? "" : " No worker has told its speed yet, so the time is a guess.";
  return (
    `About ${duration(seconds)} once a worker takes it; up to ${bytes(memory)} of memory, ${bytes(disk)} of disk. ` +
    `The examples have ${tokens.toLocaleString("en")} tokens.${speed}`
  );
}
