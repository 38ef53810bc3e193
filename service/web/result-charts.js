// The charts of the result, by Observable Plot (https://observablehq.com/plot). Each is a function of the width that
// is there, colours are the theme's variables, and what colour tells a shape or a word tells too.
import "./vendor/d3-7.9.2.min.js";
import "./vendor/plot-0.6.17.umd.min.js";
import { element, number, plural, signed } from "./result-elements.js";

const { Plot } = globalThis;
export const MOST_LABELS = 24;
const PASS_SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross", "wye", "times"];

/**
 * A chart that is drawn anew where its width changes.
 * @param {string} name what a screen reader calls it; the numbers stand in a table beside it
 * @param {(width: number) => Element} draw
 */
export function chart(name, draw, { role = "img" } = {}) {
  const frame = element("div", { class: "chart" });
  let drawn = 0;
  const show = () => {
    const width = Math.floor(frame.clientWidth) || 640;
    if (width === drawn) return;
    drawn = width;
    const svg = draw(width);
    svg.setAttribute("role", role);
    svg.setAttribute("aria-label", name);
    // Plot names its groups after their marks (`rule`); a name without a role says nothing to anybody.
    svg.querySelectorAll("g[aria-label]").forEach((group) => group.removeAttribute("aria-label"));
    frame.replaceChildren(svg);
  };
  show();
  new ResizeObserver(show).observe(frame);
  return frame;
}

const style = { fontFamily: "inherit", fontSize: "13px", overflow: "visible", background: "none" };

/**
 * Rates with their 95 % intervals, one row a model and one panel a metric.
 * @param {{metric: string, model: string, value: number, low: number, high: number}[]} rates
 * @param {{metric: string, value: number} | null} floor what one gets by answering always alike
 */
export function intervals(rates, floor) {
  const models = [...new Set(rates.map((rate) => rate.model))];
  const panels = new Set(rates.map((rate) => rate.metric)).size;
  return (width) =>
    Plot.plot({
      width,
      height: 44 + panels * (models.length * 26 + 26),
      marginLeft: 104,
      marginRight: 56,
      marginTop: 24,
      marginBottom: 32,
      style,
      x: { domain: [0, 1], label: null, ticks: width < 480 ? 3 : 6, grid: true },
      y: { domain: models, label: null, tickSize: 0, padding: 0.4 },
      fy: { label: null, axis: null, padding: 0.25 },
      marks: [
        floor &&
          Plot.ruleX([floor], { fy: "metric", x: "value", stroke: "var(--muted)", strokeDasharray: "3,3", insetTop: -4 }),
        Plot.ruleY(rates, {
          fy: "metric",
          x1: "low",
          x2: "high",
          y: "model",
          stroke: (rate) => (rate.model === "base" ? "var(--muted)" : "var(--accent)"),
          strokeWidth: 3,
        }),
        Plot.dot(rates, {
          fy: "metric",
          x: "value",
          y: "model",
          r: width < 480 ? 4 : 6,
          fill: (rate) => (rate.model === "base" ? "var(--surface)" : "var(--accent)"),
          stroke: (rate) => (rate.model === "base" ? "var(--muted)" : "var(--accent)"),
          strokeWidth: 2.5,
        }),
        Plot.text(rates, { fy: "metric", x: 1, y: "model", text: (r) => number(r.value), dx: 12, textAnchor: "start" }),
        Plot.text(rates, Plot.groupZ({ text: "first" }, {
          fy: "metric",
          z: "metric",
          text: "metric",
          frameAnchor: "top-left",
          dx: -104,
          dy: -16,
          fontWeight: 600,
        })),
      ],
    });
}

/**
 * The map: blocks of the model across, kinds of weights down, one cell a weight.
 * @param {{module: string, layer: number, kind: string, components: number, removed: number, norm: number}[]} cells
 * @param {(text: string) => void} tell shows what the cell under the pointer or the focus says
 */
export function map(cells, tell) {
  const kinds = [...new Set(cells.map((cell) => cell.kind))];
  const layers = [...new Set(cells.map((cell) => cell.layer))].sort((a, b) => a - b);
  const most = Math.max(1, ...cells.map((cell) => cell.removed));
  const marginLeft = 12 + 7 * Math.max(...kinds.map((kind) => kind.length));
  return (width) => {
    // Small cells can still be hit; a model of many blocks is scrolled.
    const wide = Math.max(width, marginLeft + 12 + layers.length * 11);
    const svg = Plot.plot({
      width: wide,
      height: 44 + kinds.length * 24,
      marginLeft,
      marginRight: 4,
      marginBottom: 40,
      style: { ...style, maxWidth: "none" },
      x: {
        domain: layers,
        label: "layer",
        tickSize: 0,
        padding: 0.08,
        ticks: layers.filter((_, k) => k % Math.ceil(layers.length / (wide / 34)) === 0),
      },
      y: { domain: kinds, label: null, tickSize: 0, padding: 0.08 },
      marks: [
        Plot.cell(cells, { x: "layer", y: "kind", fill: "var(--surface)", stroke: "var(--line)", inset: 0.5, rx: 2 }),
        Plot.cell(cells, {
          x: "layer",
          y: "kind",
          fill: "var(--accent)",
          fillOpacity: (cell) => shade(cell.removed, most),
          inset: 0.5,
          rx: 2,
          ariaLabel: describe,
        }),
      ],
    });
    return steer(svg, cells, tell);
  };
}

/** How strong a cell's colour is: by the root of the count, so that one of many is still seen. */
export function shade(removed, most) {
  return removed ? 0.18 + 0.82 * Math.sqrt(removed / most) : 0;
}

function describe(cell) {
  const removed = cell.removed
    ? `${cell.removed} of ${plural(cell.components, "component")} removed, ` +
      `${number(100 * cell.norm, 1)} % of the weight's norm`
    : `nothing removed of ${plural(cell.components, "component")}`;
  return `Layer ${cell.layer}, ${cell.kind}: ${removed}`;
}

/** The cells of the map under pointer and keyboard: one tab stop, arrows go from cell to cell. */
function steer(svg, cells, tell) {
  const marks = [...svg.querySelectorAll('[aria-label="cell"]')].at(-1).children;
  const at = new Map(cells.map((cell, k) => [`${cell.layer} ${cell.kind}`, marks[k]]));
  const kinds = [...new Set(cells.map((cell) => cell.kind))];
  const first = Math.max(0, cells.findIndex((cell) => cell.removed));
  cells.forEach((cell, k) => {
    const mark = marks[k];
    mark.setAttribute("role", "img");
    mark.setAttribute("tabindex", k === first ? 0 : -1);
    for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => tell(describe(cell)));
    mark.addEventListener("keydown", (event) => {
      const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
      if (across === undefined) return;
      event.preventDefault();
      const next = at.get(`${cell.layer + across} ${kinds[kinds.indexOf(cell.kind) + down]}`);
      if (!next) return;
      mark.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    });
  });
  return svg;
}

/**
 * What first order predicted of each candidate and what came out, as changes of the loss.
 * @param {{pass: number, predicted: number, actual: number, chosen: boolean, description: string}[]} points
 */
export function predictions(points) {
  const passes = [...new Set(points.map((point) => point.pass))];
  const actual = points.map((point) => point.actual);
  // Far from the base first order predicts falls below any loss there is: such marks stand at the edge.
  const least = 2.5 * Math.min(...actual, -1e-3);
  const low = Math.max(least, Math.min(0, ...points.map((point) => point.predicted)));
  const high = Math.max(0, ...points.map((point) => point.predicted));
  const x = (point) => Math.max(point.predicted, low);
  const beyond = points.filter((point) => point.predicted < low);
  const room = 0.06 * (Math.max(0, ...actual) - Math.min(0, ...actual));
  const [down, up] = [Math.min(0, ...actual) - room, Math.max(0, ...actual) + room];
  const title = (point) =>
    `Pass ${point.pass}: ${point.description}\npredicted ${signed(point.predicted)}, came out ${signed(point.actual)}` +
    (point.chosen ? "\nthe one that was kept" : "");
  return (width) =>
    Plot.plot({
      width,
      height: Math.min(380, Math.max(260, width * 0.62)),
      marginLeft: 60,
      marginBottom: 42,
      style,
      x: { domain: [low, high], insetLeft: 22, insetRight: 8, label: "predicted change of the loss", grid: true, ticks: width < 480 ? 4 : 8 },
      y: { domain: [down, up], nice: true, label: "change that came out", grid: true },
      symbol: { domain: passes, range: PASS_SYMBOLS },
      marks: [
        Plot.line([Math.max(low, down), Math.min(high, up)], { x: (d) => d, y: (d) => d, stroke: "var(--muted)", strokeDasharray: "4,4" }),
        Plot.ruleX([0], { stroke: "var(--muted)" }),
        Plot.ruleY([0], { stroke: "var(--muted)" }),
        Plot.dot(points, { x, y: "actual", symbol: "pass", r: 5, stroke: "var(--accent)", strokeWidth: 1.8, fill: "var(--surface)" }),
        Plot.dot(points.filter((p) => p.chosen), { x, y: "actual", symbol: "pass", r: 5, fill: "var(--accent)", stroke: "var(--accent)" }),
        Plot.dot(points.filter((p) => p.chosen), { x, y: "actual", r: 10, stroke: "var(--text)", strokeWidth: 1.5 }),
        Plot.text(points.filter((p) => p.chosen), {
          x,
          y: "actual",
          text: () => (passes.length > 1 ? "" : "kept"),
          dy: -17,
          fontWeight: 600,
          stroke: "var(--surface)",
          strokeWidth: 4,
          fill: "var(--text)",
        }),
        Plot.text(beyond, { x, y: "actual", text: () => "\u2190", dx: -12, fill: "var(--accent)" }),
        Plot.tip(points, Plot.pointer({ x, y: "actual", title, fill: "var(--surface)", stroke: "var(--line)" })),
      ],
    });
}

/**
 * Quality of the base and of each point against what is left of the parameters, the base on the right.
 * @param {{name: string, size: number, speed: number | null, value: number | null}[]} points
 * @param {string} name of the quality
 */
export function sizeCurve(points, name) {
  const least = Math.min(...points.map((point) => point.size));
  const x = { domain: [least - 0.06 * (1 - least), 1 + 0.04 * (1 - least)], label: "parameters left", tickFormat: "%" };
  return curveOf(points, "size", x, name, (point) => `${number(100 * point.size, 1)} % of the parameters`);
}

/** The same against how many tokens are decoded a second. */
export function speedCurve(points, name) {
  const x = { label: "tokens decoded a second", insetLeft: 24 };
  return curveOf(points, "speed", x, name, (point) => `${number(point.speed, 1)} tokens a second`);
}

function curveOf(points, key, x, name, at) {
  const known = points.filter((point) => typeof point.value === "number");
  const high = Math.max(...known.map((point) => point.value));
  const title = (point) => `${point.name === "base" ? "base" : `point ${point.name}`}\n${at(point)}\n${name} ${number(point.value)}`;
  const isBase = (point) => point.name === "base";
  return (width) =>
    Plot.plot({
      width,
      height: Math.min(320, Math.max(220, width * 0.5)),
      marginLeft: 48,
      marginRight: 28,
      marginTop: 28,
      marginBottom: 42,
      style,
      x: { ...x, grid: true, ticks: width < 480 ? 4 : 8 },
      y: { domain: [0, Math.min(1, 1.15 * high) || 1], nice: true, label: name, grid: true, ticks: 5 },
      marks: [
        Plot.line(known, { x: key, y: "value", stroke: "var(--accent)", strokeWidth: 2 }),
        Plot.dot(known.filter(isBase), { x: key, y: "value", r: 6, fill: "var(--surface)", stroke: "var(--muted)", strokeWidth: 2.5 }),
        Plot.dot(known.filter((point) => !isBase(point)), { x: key, y: "value", r: 6, fill: "var(--accent)", stroke: "var(--accent)" }),
        Plot.text(known, { x: key, y: "value", text: "name", dy: -16, fontWeight: 600, stroke: "var(--surface)", strokeWidth: 4, fill: "var(--text)" }),
        Plot.tip(known, Plot.pointer({ x: key, y: "value", title, fill: "var(--surface)", stroke: "var(--line)" })),
      ],
    });
}

/** The marks of the passes, in words: `● pass 1`. */
export function passLegend(passes) {
  const keys = passes.map((pass) => {
    const symbol = Plot.plot({
      width: 18,
      height: 18,
      margin: 0,
      style: { ...style, display: "inline" },
      axis: null,
      symbol: { type: "identity" },
      marks: [Plot.dot([pass], { frameAnchor: "middle", symbol: () => PASS_SYMBOLS[(pass - 1) % 8], r: 5, stroke: "var(--accent)", strokeWidth: 1.8 })],
    });
    symbol.setAttribute("aria-hidden", "true");
    return element("span", { class: "key" }, symbol, `pass ${pass}`);
  });
  return element("p", { class: "legend" }, ...keys, element("span", { class: "key" }, "ring: kept"));
}

/**
 * Accuracy of each label before and after.
 * @param {{label: string, n: number, base: number, adapted: number}[]} labels
 */
export function dumbbells(labels) {
  const shown = labels.slice(0, MOST_LABELS);
  const name = (label) => `${shorten(label.label.trim() || label.label, 22)} (${label.n})`;
  const names = shown.map(name);
  return (width) =>
    Plot.plot({
      width,
      height: 56 + shown.length * 22,
      marginLeft: Math.min(width * 0.42, 24 + 7 * Math.max(...names.map((text) => text.length))),
      marginRight: 24,
      marginBottom: 40,
      style,
      x: { domain: [0, 1], label: "accuracy", grid: true, ticks: width < 480 ? 3 : 6 },
      y: { domain: names, label: null, tickSize: 0 },
      marks: [
        Plot.link(shown, { x1: "base", x2: "adapted", y1: name, y2: name, stroke: "var(--muted)", strokeWidth: 2, markerEnd: null }),
        Plot.dot(shown, { x: "base", y: name, r: 5, fill: "var(--surface)", stroke: "var(--muted)", strokeWidth: 2 }),
        Plot.dot(shown, { x: "adapted", y: name, r: 5, fill: "var(--accent)", stroke: "var(--accent)" }),
        Plot.tip(shown, Plot.pointerY({ x: "adapted", y: name, title: (l) => `${l.label}\n${number(l.base)} to ${number(l.adapted)}, ${plural(l.n, "example")}`, fill: "var(--surface)", stroke: "var(--line)" })),
      ],
    });
}

/** A text of at most so many characters. */
export function shorten(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

/** What base and adapted marks look like. */
export function modelLegend() {
  return element(
    "p",
    { class: "legend" },
    element("span", { class: "key" }, element("span", { class: "mark hollow" }), "base"),
    element("span", { class: "key" }, element("span", { class: "mark filled" }), "adapted"),
  );
}

/** Where the seconds went. */
export function stageBars(stages) {
  const rows = Object.entries(stages).map(([stage, took]) => ({ stage, took }));
  return (width) =>
    Plot.plot({
      width,
      height: 24 + rows.length * 24,
      marginLeft: 104,
      marginRight: 72,
      marginTop: 4,
      marginBottom: 8,
      style,
      x: { axis: null },
      y: { domain: rows.map((row) => row.stage), label: null, tickSize: 0, padding: 0.35 },
      marks: [
        Plot.barX(rows, { x: "took", y: "stage", fill: "var(--accent)", rx: 2 }),
        Plot.text(rows, { x: "took", y: "stage", text: (row) => `${number(row.took, 1)} s`, dx: 6, textAnchor: "start" }),
      ],
    });
}

