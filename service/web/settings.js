// How a model is adapted: strategy, passes and the rest, each explained in a sentence.

import { field, h } from "./dom.js";
import { select } from "./mapping.js";

const STRATEGIES = [
  [
    "components",
    "Components",
    "Ranks all singular components of all weights by a backward pass over your examples, and removes the few that stand in the task's way. The usual choice.",
  ],
  ["laser", "LASER", "Tries every weight matrix at lower rank, one after the other. Takes far longer; there to compare."],
  [
    "c2i",
    "Compress to Impress, the paper's search",
    "Tries lower ranks, block by block, on the few matrices that a gradient points to. There to compare.",
  ],
  ["heads", "Heads", "Removes attention heads."],
  ["neurons", "Neurons", "Removes neurons of the MLPs."],
  ["layers", "Layers", "Removes whole layers, or the attention or the MLP of a layer."],
  ["blocks", "Blocks", "Sets square tiles of the weights to zero."],
  ["mixed", "Mixed", "Components, attention heads, neurons, attentions and MLPs in one list: whatever stands most in the way goes."],
];

const OBJECTIVES = [
  ["both", "The answer's likelihood, and the choice among the options"],
  ["choice", "The choice among the options alone"],
  ["completion", "The answer's likelihood alone"],
];

const QUANTIZED = [
  ["", "no"],
  ["int8", "int8: a third of the bytes of a 32-bit model, 60 % of a 16-bit one; hardly another model"],
  ["int4", "int4: a fifth, or 40 %; it may lose some"],
];

/** What a new draft begins with. */
export const DEFAULTS = { goal: "improve", measure: "parameters", size: 80, strategy: "components", passes: 3, objective: "both", prompt_format: "text", seed: 0, max_drift: "", quantize: "", gguf: "" };

/**
 * The controls; each writes into `draft` and calls `changed`.
 * @param {any} draft @param {() => void} changed
 */
export function settingsPanel(draft, changed) {
  const set = (name) => (value) => {
    draft[name] = value;
    changed();
  };
  const strategies = STRATEGIES.map(([value, label, text]) =>
    h(
      "label",
      { class: "option" },
      h("input", {
        type: "radio",
        name: "strategy",
        value,
        checked: draft.strategy === value,
        onchange: () => set("strategy")(value),
      }),
      h("span", {}, h("strong", {}, label), " ", h("span", { class: "hint" }, text)),
    ),
  );
  return [
    ...goalFields(draft, changed),
    h("fieldset", { class: "options", id: "strategy" }, h("legend", {}, "Strategy"), strategies),
    field(
      "Passes, at most",
      number("passes", { min: 1, max: 8, step: 1 }, draft.passes, set("passes")),
      "A pass ranks, tries removals and keeps what helps beyond doubt. The next one starts from the better model; when nothing more is gained, the job ends early.",
    ),
    h(
      "details",
      {},
      h("summary", {}, "More settings"),
      field("What is made likelier", select("objective", OBJECTIVES, draft.objective, set("objective"))),
      field(
        "Prompts are sent",
        select("prompt_format", [["text", "as they are"], ["chat", "as a chat turn, in the model's template"]], draft.prompt_format, set("prompt_format")),
      ),
      field(
        "Drift, at most",
        number("max_drift", { min: 0, step: "any", placeholder: "no limit" }, draft.max_drift, set("max_drift")),
        "How far predictions on unrelated text may move, in nats a token. 0.1 is little, 1 is much.",
      ),
      field(
        "Also in fewer bits",
        select("quantize", QUANTIZED, draft.quantize, set("quantize")),
        "Beside the whole model; tested again, so that you see what it costs.",
      ),
      field(
        "Also for llama.cpp",
        select("gguf", [["", "no"], ["q8_0", "a GGUF file in 8 bits"], ["f16", "a GGUF file in 16 bits"]], draft.gguf, set("gguf")),
        "One file that phones and laptops run. Of Llama's, Qwen's and GPT-2's kind.",
      ),
      field("Seed", number("seed", { min: 0, step: 1 }, draft.seed, set("seed")), "The same seed and examples give the same result."),
    ),
  ];
}

const GOALS = [
  ["improve", "A better model", "Removes what stands in the task's way. Where nothing is gained, you get the base model."],
  [
    "compress",
    "A smaller model",
    "Removes whole structures until the model is as small as you say, in as many rounds as there are passes, and gives you every round's model. Takes layers, neurons, heads, blocks or mixed; layers also make it faster.",
  ],
];

/** The strategies that a model gets smaller by. */
const SMALLER = ["layers", "neurons", "heads", "mixed", "blocks"];

const MEASURES = [
  ["parameters", "parameters"],
  ["bytes", "bytes on the disk"],
  ["decode_latency", "time that a token takes, as measured on the worker"],
];

/** What the job is for; of a smaller model also how small. */
function goalFields(draft, changed) {
  const size = h(
    "div",
    { hidden: draft.goal !== "compress" },
    field(
      "What is to be left, in % of the base",
      number("target", { min: 1, max: 99, step: "any" }, draft.size, (value) => {
        draft.size = value;
        changed();
      }),
    ),
    field(
      "Of what",
      select("measure", MEASURES, draft.measure, (value) => {
        draft.measure = value;
        changed();
      }),
    ),
  );
  const goals = GOALS.map(([value, label, text]) =>
    h(
      "label",
      { class: "option" },
      h("input", {
        type: "radio",
        name: "goal",
        value,
        checked: draft.goal === value,
        onchange: () => {
          draft.goal = value;
          size.hidden = value !== "compress";
          if (value === "compress" && !SMALLER.includes(draft.strategy)) document.querySelector("input[name=strategy][value=layers]").click();
          changed();
        },
      }),
      h("span", {}, h("strong", {}, label), " ", h("span", { class: "hint" }, text)),
    ),
  );
  return [h("fieldset", { class: "options", id: "goal" }, h("legend", {}, "Goal"), goals), size];
}

function number(id, limits, value, changed) {
  const control = h("input", { type: "number", id, ...limits, oninput: () => changed(control.value) });
  control.value = String(value);
  return control;
}

/** The fields of `POST /v1/jobs` that the controls stand for. A number that is none is sent as it is, and refused. */
export function settingsOf(draft) {
  const whole = (text) => (String(text).trim() === "" || Number.isNaN(Number(text)) ? text : Number(text));
  const size = whole(draft.size);
  return {
    goal: draft.goal,
    target: draft.goal === "compress" ? { [draft.measure]: typeof size === "number" ? size / 100 : size } : null,
    strategy: draft.strategy,
    passes: whole(draft.passes),
    objective: draft.objective,
    prompt_format: draft.prompt_format,
    seed: whole(draft.seed),
    max_drift: draft.max_drift === "" ? null : whole(draft.max_drift),
    quantize: draft.quantize || null,
    gguf: draft.gguf || null,
  };
}
