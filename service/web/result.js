// The result of a job, drawn from its report.json: on the page and, inlined, in report.html.
import {
  chart, dumbbells, intervals, map, modelLegend, MOST_LABELS, passLegend, predictions, shade, sizeCurve, speedCurve, stageBars,
} from "./result-charts.js";
import { bytes, count, element, fold, number, plural, pValue, range, seconds, signed, table } from "./result-elements.js";

/**
 * Draw a report into an element, in place of what it holds. What the report lacks is left out.
 * @param {HTMLElement} root
 * @param {object} report report.json
 * @param {{links?: Record<string, string>}} [options] `links`: what can be downloaded, its address by its name
 */
export function renderResult(root, report, { links = {} } = {}) {
  const drawn = [verdict, curve, gains, removed, structures, candidates, labels, sizes, price, changed, details];
  const parts = drawn.map((part) => part(report, links)).filter(Boolean);
  const halves = parts.filter((part) => !part.classList.contains("wide"));
  if (halves.length % 2) halves.at(-1).classList.add("wide");
  root.replaceChildren(element("div", { class: "result" }, ...parts));
}

/** A part of the result under its heading. */
function section(title, ...children) {
  return element("section", {}, element("h2", {}, title), ...children);
}

/** One over the whole width. */
function wideSection(title, ...children) {
  return element("section", { class: "wide" }, element("h2", {}, title), ...children);
}

const sentence = (text, kind = null) => element("p", { class: kind }, text);

function verdict(report, links) {
  const { model, removed: gone, improved } = report;
  const [state, word] = compresses(report)
    ? [improved ? "good" : "none", improved ? "Smaller and better" : "Smaller"]
    : improved
    ? ["good", "Improved"]
    : report.verdict.startsWith("Worse") ? ["bad", "Worse: base returned"] : ["none", "No significant improvement"];
  const what = compresses(report)
    ? `${removedWords(report)} are removed from ${model.id}. Nothing was trained, nothing added.`
    : hasLess(report)
    ? `${removedWords(report)} are removed, in ${count(gone.modules)} of ` +
      `${plural(model.target_modules, "weight")} of ${model.id}. Nothing was trained, nothing added.`
    : `Nothing is removed from ${model.id}: what you get is the base model.`;
  const downloads = Object.entries(links).map(([name, href]) => element("a", { href, download: true }, name));
  return element(
    "section",
    { class: `wide verdict ${state}` },
    element("h2", {}, word),
    sentence(report.verdict, "lead"),
    sentence(what),
    downloads.length ? element("p", { class: "links" }, ...downloads) : null,
  );
}

// --- how far it was compressed ------------------------------------------------------------------------------------

const compresses = (report) => report.goal === "compress";

function curve(report) {
  if (!report.curve?.length) return null;
  const metric = report.base.accuracy === null ? ["exact_match", "exact match"] : ["accuracy", "accuracy"];
  const [key, name] = metric;
  const base = { name: "base", parameters: 1, bytes: 1, ...scoresOf(report.base), speed: report.speed?.base };
  const points = [base, ...report.curve.map((point) => ({ ...point, name: `${point.number}` }))];
  const marks = points.map((point) => ({
    name: point.name, size: point.parameters, speed: point.speed?.decode_tokens_per_second ?? null, value: point[key],
  }));
  const timed = marks.every((mark) => mark.speed);
  const columns = ["model", "parameters", "bytes", "accuracy", "exact match", "loss", ...(timed ? ["tokens a second"] : []), "removed"];
  const rows = points.map((point, k) => [
    k ? `point ${point.name}` : "base", percent(point.parameters), percent(point.bytes), number(point.accuracy), number(point.exact_match),
    number(point.loss), ...(timed ? [number(marks[k].speed, 1)] : []), point.removed ?? "",
  ]);
  const charts = [chart(`${name} against the part of the parameters that is left; the numbers are in the table below`, sizeCurve(marks, name))];
  if (timed) charts.push(chart(`${name} against tokens decoded a second; the numbers are in the table below`, speedCurve(marks, name)));
  return wideSection(
    "Size against quality",
    sentence("Each point is a model that can be downloaded: the base, then what each round left. The last point is the model of this job.", "note"),
    element("div", { class: timed ? "columns" : null }, ...charts),
    table("Base and points", columns, rows, { hideCaption: true }),
  );
}

const targetOf = ({ target }) => Object.entries(target ?? {}).filter(([, value]) => value !== null).map((pair) => pair.join("="))[0];
const scoresOf = ({ accuracy, exact_match, loss }) => ({ accuracy, exact_match, loss });
const percent = (fraction) => element("span", { class: "nowrap" }, `${number(100 * fraction, 1)} %`);

// --- what it brought ----------------------------------------------------------------------------------------------

const METRICS = [["accuracy", "Accuracy over the choices"], ["exact_match", "Exact match"]];

function gains(report) {
  const first = report.passes.length > 1 ? report.after_first_pass : null;
  const models = [["base", report.base], [compresses(report) ? "after round 1" : "after pass 1", first], ["adapted", report.adapted]];
  const rates = METRICS.flatMap(([key, metric]) =>
    models
      .filter(([, scores]) => scores && scores[key] !== null && scores[key] !== undefined)
      .map(([model, scores]) => {
        const [low, high] = scores[`${key}_interval`] ?? [scores[key], scores[key]];
        return { metric, model, value: scores[key], low, high };
      }),
  );
  const closed = report.base.accuracy !== null;
  const floor = closed ? { metric: METRICS[0][1], value: report.base.majority_rate } : null;
  const examples = `${plural(report.splits.test, "example")}`;
  const seen = report.splits.cross_validated
    ? `Cross-validated on ${examples}: each was judged by a search that had not seen it.`
    : `Measured on ${examples} that the search had not seen.`;
  const always = floor ? ` The dashed line is what answering always the commonest label gives, ${number(floor.value)}.` : "";
  return section(
    "What it brought",
    sentence(`${seen} Bars are 95 % intervals.${always}`, "note"),
    chart(`Rates of base and adapted model: the numbers are in the table below`, intervals(rates, floor)),
    figures(report),
  );
}

function figures(report) {
  const of = Object.fromEntries((report.differences ?? []).map((found) => [found.metric, found]));
  const row = (key, name) => {
    const found = of[key];
    const change = found ? rate(found.value, [found.low, found.high], signed) : "–";
    const p = element("span", { class: "nowrap" }, found && (report.improved || compresses(report)) ? pValue(found.p) : "–");
    const before = report.base[`${key}_interval`], after = report.adapted[`${key}_interval`];
    return [name, rate(report.base[key], before), rate(report.adapted[key], after), change, p];
  };
  const rows = [...METRICS, ["loss", "Loss, nats"], ["balanced_accuracy", "Balanced accuracy"]]
    .filter(([key]) => typeof report.base[key] === "number")
    .map(([key, name]) => row(key, name));
  return table("Base and adapted model", ["", "base", "adapted", "difference", "p"], rows);
}

/** A number with its 95 % interval. */
function rate(value, interval, format = number) {
  if (!interval) return format(value);
  return element("span", {}, format(value), " ", element("small", {}, range(interval[0], interval[1], format)));
}

// --- what was removed ---------------------------------------------------------------------------------------------

const hasLess = ({ removed: gone }) => gone.components > 0 || gone.structures > 0;

function removedWords({ model, removed: gone }) {
  const structures = gone.structures
    ? `${plural(gone.structures, "structure")} (${plural(gone.parameters, "parameter")})`
    : null;
  const components = gone.components || !structures ? `${count(gone.components)} of ${count(model.components)} components` : null;
  return [components, structures].filter(Boolean).join(" and ");
}

function structures(report) {
  if (!report.structures?.length) return null;
  const rows = report.structures.map((entry) => [
    entry.unit, `${entry.layer}`, entry.kind, count(entry.indices.length), count(entry.count), count(entry.parameters),
  ]);
  const shown = table(
    "Structures removed", ["where", "layer", "what", "removed", "of", "parameters"], rows, { hideCaption: true },
  );
  return section(
    "Structures that were removed",
    sentence("Heads, neurons, layers or blocks of weights, as wholes.", "note"),
    ...shippedWords(report).map((words) => sentence(words)),
    rows.length > 12 ? fold("All of them", shown) : shown,
  );
}

/** What the downloaded model is: what is really gone from it, and what stands as zeros. */
function shippedWords({ model, shipped }) {
  const words = [];
  if (shipped?.gone.length) {
    words.push(
      `The downloaded model has ${plural(shipped.parameters, "parameter")}, ` +
      `${number((100 * shipped.parameters) / model.parameters, 1)} % of the base's: without ${shipped.gone.join("; ")}.`,
    );
  }
  for (const { what, why } of shipped?.zeros ?? []) words.push(`Standing as zeros: ${what} (${why}).`);
  return words;
}

/** What the weights of low rank save as two factors each. */
function factoredWords({ shipped, factored }) {
  if (!factored || !shipped) return null;
  const part = number((100 * factored.bytes) / shipped.bytes, 1);
  return `Under factored/ are ${plural(factored.weights, "weight")} as two factors each: ${part} % of the bytes of ` +
    "model/, loaded by the file beside them.";
}

function removed(report) {
  const gone = new Map();
  for (const entry of report.plan) {
    const before = gone.get(entry.module) ?? { removed: 0, norm: 0 };
    gone.set(entry.module, {
      removed: before.removed + entry.components.length,
      norm: Math.hypot(before.norm, entry.relative_norm),  // row blocks have no entry of the weight in common
    });
  }
  const cells = (report.modules ?? []).map((module) => ({ removed: 0, norm: 0, ...module, ...gone.get(module.module) }));
  if (!cells.length) return null;
  const most = Math.max(...cells.map((cell) => cell.removed));
  if (!most && hasLess(report)) return null;
  if (!most) {
    return section("What was removed", sentence(`Nothing: all ${plural(cells.length, "weight")} are the base's.`));
  }
  const hint = "Point at a cell, or go from cell to cell with the arrow keys.";
  const readout = element("p", { class: "readout", "aria-live": "polite" }, hint);
  const tell = (text) => { readout.textContent = text; };
  const name = `Map of removed components: ${report.removed.components} in ${report.removed.modules} weights`;
  const smaller = factoredWords(report);
  const touched = cells.filter((cell) => cell.removed).sort((a, b) => b.removed - a.removed);
  const rows = touched.map((cell) => [
    cell.module, `${cell.layer}`, count(cell.removed), count(cell.components), `${number(100 * cell.norm, 1)} %`,
  ]);
  return section(
    "What was removed",
    sentence("One cell is one weight of the model; the stronger its colour, the more components it lost.", "note"),
    smaller ? sentence(smaller) : null,
    chart(name, map(cells, tell), { role: "group" }),
    shades(most),
    readout,
    fold(
      "The map as a table",
      table("Components removed from each weight", ["weight", "layer", "removed", "of", "part of its norm"], rows, { hideCaption: true }),
    ),
  );
}

function shades(most) {
  const steps = [...new Set([0, 1, Math.round(most / 16), Math.round(most / 4), most])].filter((n) => n >= 0 && n <= most);
  const keys = steps.sort((a, b) => a - b).map((step) => {
    const swatch = element("span", { class: "swatch" }, element("span", {}));
    swatch.firstChild.style.opacity = shade(step, most);
    return element("span", { class: "key" }, swatch, count(step));
  });
  return element("p", { class: "legend" }, ...keys, element("span", { class: "key" }, "components removed"));
}

// --- what the search tried ----------------------------------------------------------------------------------------

function isChosen(pass, candidate) {
  return pass.accepted && candidate.loss !== null && Math.abs(candidate.loss - pass.loss) <= 1e-6 * (1 + Math.abs(pass.loss));
}

function candidates(report) {
  const tried = report.passes.flatMap((pass) => pass.candidates.map((candidate) => ({ pass, candidate })));
  const points = tried
    .filter(({ candidate: c }) => typeof c.predicted_loss === "number" && typeof c.loss === "number")
    .map(({ pass, candidate }) => ({
      pass: pass.number,
      description: candidate.description,
      predicted: candidate.predicted_loss - candidate.base_loss,
      actual: candidate.loss - candidate.base_loss,
      chosen: isChosen(pass, candidate),
    }));
  if (!tried.length) return null;
  const passes = [...new Set(points.map((point) => point.pass))];
  const left = tried.length - points.length;
  const without = left ? ` ${plural(left, "candidate")} without a prediction or a finite loss ${left === 1 ? "is" : "are"} left out.` : "";
  const arrows = points.some((point) => point.predicted < 2.5 * Math.min(...points.map((other) => other.actual)))
    ? " A mark with an arrow lies further left: so far from the base the prediction means little." : "";
  const rows = tried.map(({ pass, candidate: c }) => [
    c.description, `${pass.number}`, count(c.size), count(c.examples), number(c.predicted_loss), number(c.loss),
    number(c.accuracy), isChosen(pass, c) ? "kept" : "",
  ]);
  const columns = ["without", "pass", "components", "judged on", "predicted loss", "loss", "accuracy", ""];
  return section(
    "What the search tried",
    points.length
      ? sentence(
          "Each mark is a set of components that was removed on trial. On the dashed line the loss came out as the " +
            `gradient predicted; below zero it fell.${arrows}${without}`, "note")
      : sentence("First order predicts nothing here; the losses are in the table.", "note"),
    points.length ? chart("Predicted against actual change of the loss; the numbers are in the table", predictions(points)) : null,
    points.length ? passLegend(passes) : null,
    fold(`All ${plural(tried.length, "candidate")}`, table("Candidates", columns, rows, { hideCaption: true })),
  );
}

// --- label by label -----------------------------------------------------------------------------------------------

function byLabel(report) {
  const before = report.base.confusion, after = report.adapted.confusion;
  if (!before || !after) return [];
  const hits = (confusion, label) => {
    const row = confusion[label] ?? {};
    const n = Object.values(row).reduce((sum, k) => sum + k, 0);
    return { n, rate: n ? (row[label] ?? 0) / n : 0 };
  };
  return Object.keys(before).map((label) => {
    const base = hits(before, label), adapted = hits(after, label);
    return { label, n: base.n, base: base.rate, adapted: adapted.rate };
  });
}

function labels(report) {
  const all = byLabel(report);
  // Where each example has choices of its own, a label says nothing.
  const found = all.filter((label) => label.n > 1);
  if (found.length < 2 || found.length * 3 < all.length) return null;
  found.sort((a, b) => b.n * Math.abs(b.adapted - b.base) - a.n * Math.abs(a.adapted - a.base) || b.n - a.n);
  const left = found.length - MOST_LABELS;
  const shown = left > 0 ? `The ${MOST_LABELS} of ${found.length} labels on which most changed. ` : "";
  const rows = found.map((label) => [label.label, count(label.n), number(label.base), number(label.adapted), signed(label.adapted - label.base)]);
  return section(
    "Label by label",
    sentence(`${shown}In brackets, how many examples have the label.`, "note"),
    chart("Accuracy of each label before and after; the numbers are in the table", dumbbells(found)),
    modelLegend(),
    fold("The labels as a table", table("Accuracy by label", ["label", "examples", "base", "adapted", "difference"], rows, { hideCaption: true })),
  );
}

// --- examples -----------------------------------------------------------------------------------------------------

function changed(report) {
  if (!report.changed) return null;
  const gained = report.changed.filter((e) => e.adapted_correct && !e.base_correct);
  const lost = report.changed.filter((e) => e.base_correct && !e.adapted_correct);
  const other = report.changed.filter((e) => e.base_correct === e.adapted_correct);
  if (!report.changed.length) {
    const why = hasLess(report) ? "No answer changed." : "No answer changed: the base model is returned.";
    return wideSection("Examples that changed", sentence(why));
  }
  const groups = [
    [`Got right: ${count(report.gained)}`, gained, report.gained],
    [`Got wrong: ${count(report.lost)}`, lost, report.lost],
    ["Wrong before and after, in another way", other, other.length],
  ];
  return wideSection(
    "Examples that changed",
    sentence(report.base.confusion
      ? "Right is an answer that the model holds likelier than the other choices."
      : "Right is an answer that begins with the wanted text.", "note"),
    element("div", { class: "columns" }, ...groups.filter(([, some]) => some.length).map(([title, some, all]) =>
      element(
        "div",
        {},
        element("h3", {}, title),
        some.length < all ? sentence(`${some.length} of them, evenly over the test examples`, "note") : null,
        element("div", { class: "cards" }, ...some.map(card)),
      ))),
  );
}

const oneLine = (text) => text.trim().replace(/\s*\n\s*/g, " ↵ ");

function card(example) {
  const answer = (who, text, correct) =>
    element(
      "div",
      { class: correct ? "answer right" : "answer wrong" },
      element("dt", {}, who),
      element("dd", {}, element("span", { class: "sign", "aria-hidden": "true" }, correct ? "✓" : "✗"), element("q", {}, oneLine(text)), element("span", { class: "hidden" }, correct ? " right" : " wrong")),
    );
  return element(
    "article",
    { class: "card" },
    element("pre", {}, example.prompt),
    element(
      "dl",
      {},
      element("div", { class: "answer" }, element("dt", {}, "wanted"), element("dd", {}, element("span", { class: "sign" }), element("q", {}, oneLine(example.completion)))),
      answer("base", example.base_answer, example.base_correct),
      answer("adapted", example.adapted_answer, example.adapted_correct),
    ),
  );
}

// --- size and speed -----------------------------------------------------------------------------------------------

/** What base and result weigh and how fast they are, where that was measured. */
function sizes(report) {
  const { speed, quantized } = report;
  if (!speed) return null;
  const models = [["base", speed.base, report.base], ["adapted", speed.model, report.adapted]];
  if (speed.quantized && quantized) models.push([`adapted, ${quantized.bits}`, speed.quantized, report.splits.cross_validated ? {} : quantized]);
  const columns = [
    ["weights", (measured) => bytes(measured.bytes)],
    ["peak memory", (measured) => bytes(measured.peak_memory_bytes)],
    ["prompt, tokens/s", (measured) => number(measured.prefill_tokens_per_second, 0)],
    ["decoding, tokens/s", (measured) => number(measured.decode_tokens_per_second, 1)],
    ["joules a token", (measured) => number(measured.joules_per_token, 2)],
    ["accuracy", (_, scores) => number(scores.accuracy, 3)],
    ["exact match", (_, scores) => number(scores.exact_match, 3)],
    ["loss", (_, scores) => number(scores.loss, 3)],
  ];
  const told = ([title]) => ({ "decoding, tokens/s": speed.base.decode_tokens_per_second, "joules a token": speed.base.joules_per_token, accuracy: report.base.accuracy })[title] !== null;
  const shown = columns.filter(told);
  const rows = models.map(([name, measured, scores]) => [name, ...shown.map(([, cell]) => cell(measured, scores))]);
  const how = quantized ? ` ${quantized.bits}: ${quantized.method} (${quantized.library}); embeddings, head and norms in ${quantized.dtype}.` : "";
  return wideSection(
    "Size and speed",
    table("Size and speed", ["", ...shown.map(([title]) => title)], rows, { hideCaption: true }),
    sentence(`Measured on the machine of the job, base and results in turn. Memory is the most that a process took which only loads and runs the model, Python and torch too.${how}`, "note"),
  );
}

// --- side effect, cost, details -----------------------------------------------------------------------------------

/** Side effect and cost, short as they are, in one place. */
function price(report) {
  return element("div", { class: "stack" }, sideEffect(report), cost(report));
}

function sideEffect(report) {
  const { value, tokens } = report.drift;
  if (!hasLess(report)) return null;
  const text = typeof value === "number"
    ? `On ordinary text that has nothing to do with the task, the adapted model gives what the base would say next on average ${number(100 * Math.exp(-value), 0)} % of the probability that the base gives it. 100 % would be no side effect. The drift is ${number(value)} nats a token, over ${plural(tokens, "token")}.`
    : "On ordinary text the adapted model gives no finite probabilities: do not use it for anything else.";
  const bound = report.max_drift === null || report.max_drift === undefined ? "" : ` At most ${number(report.max_drift)} was allowed.`;
  return section("Side effect", sentence(text + bound));
}

function cost(report) {
  const { cost: spent } = report;
  const total = Object.values(spent.stages).reduce((sum, took) => sum + took, 0);
  const facts = [
    ["all stages", seconds(total)],
    ["adaptation", `${number(spent.adaptation_fb, 1)} FB`],
    ["one FB", seconds(spent.fb_seconds)],
    ["peak memory", bytes(spent.peak_memory_bytes)],
    ...(spent.adapter_bytes ? [["adapter", bytes(spent.adapter_bytes)]] : []),
    ["whole model", bytes(spent.model_bytes)],
  ];
  const list = element("dl", { class: "facts" }, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  const told = Object.entries(spent.stages).map(([stage, took]) => `${stage} ${seconds(took)}`).join(", ");
  return section(
    "Cost",
    list,
    Object.keys(spent.stages).length ? chart(`Seconds a stage: ${told}`, stageBars(spent.stages)) : null,
    sentence("FB is one forward and backward pass over the examples that components are ranked by.", "note"),
  );
}

function details(report) {
  const passes = report.passes.map((pass) => [
    `${pass.number}`, number(pass.base_loss), number(pass.loss), count(pass.chosen), element("span", { class: "nowrap" }, pValue(pass.p)),
    (pass.accepted ? (pass.withdrawn ? "accepted, not returned" : "accepted") : "not accepted") + `: ${pass.reason}`, element("span", { class: "nowrap" }, seconds(pass.seconds)),
  ]);
  const { splits, model } = report;
  const facts = (entries) => entries.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => [name, `${value}`]);
  const settings = facts([
    ["model", `${model.id}, ${model.architecture}, ${model.dtype}, ${count(model.parameters)} parameters`],
    ["revision", model.revision],
    ["goal", report.goal],
    ["target", targetOf(report)],
    ["strategy", report.strategy],
    ...Object.entries(report.strategy_options ?? {}).map(([name, value]) => [name, JSON.stringify(value)]),
    ["objective", report.objective],
    ["prompt format", report.prompt_format],
    ["passes asked for", report.passes_requested],
    ["seed", report.seed],
    ["examples for the gradient", splits.gradient],
    ["examples to select on", splits.selection],
    ["examples to test on", splits.test],
    ["folds", splits.folds],
    ["duplicates dropped", splits.duplicates_dropped],
    ["largest logit difference of the adapter as read back", report.verification.adapter?.toExponential(1)],
    ["the same of the whole model", report.verification.model.toExponential(1)],
    ["loss by rounding to 16 bits", typeof report.rounding_loss === "number" ? signed(report.rounding_loss, 4) : null],
  ]);
  const skipped = report.skipped_modules.map((skip) => [skip.module, skip.reason]);
  return wideSection(
    "Details",
    sentence(report.outlook.message),
    fold("Passes", table("Passes", ["pass", "loss before", "loss", "components", "p", "", "time"], passes, { hideCaption: true })),
    fold("Settings and splits", table("Settings and splits", ["", ""], settings, { hideCaption: true })),
    skipped.length ? fold(`Weights left alone: ${skipped.length}`, table("Weights left alone", ["weight", "why"], skipped, { hideCaption: true })) : null,
    fold("Versions", table("Versions", ["package", "version"], facts(Object.entries(report.versions)), { hideCaption: true })),
  );
}
