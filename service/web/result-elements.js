// Elements and number formats of the result. Text is set as text, never as markup: examples are strangers' words.

/**
 * An element. `properties` are attributes, but for `class`; children are elements or texts, and null is left out.
 * @param {string} tag
 * @param {Record<string, string | number | boolean | null | undefined>} [properties]
 * @param {...(Node | string | null | undefined)} children
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/**
 * A table with a caption; the first cell of a row heads it. Numbers are right-aligned where `numeric` says so.
 * @param {string} caption
 * @param {string[]} columns
 * @param {(string | Node)[][]} rows
 * @param {{hideCaption?: boolean}} [options]
 */
export function table(caption, columns, rows, { hideCaption = false } = {}) {
  const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
  const body = rows.map(([first, ...rest]) =>
    element("tr", {}, element("th", { scope: "row" }, first), ...rest.map((cell) => element("td", {}, cell))),
  );
  return element(
    "div",
    // Wider than a phone, it is scrolled: by the keyboard too.
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    element(
      "table",
      {},
      element("caption", { class: hideCaption ? "hidden" : null }, caption),
      element("thead", {}, head),
      element("tbody", {}, ...body),
    ),
  );
}

/** A part that is folded until it is asked for; printed, it is open. */
export function fold(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), ...children);
}

const MINUS = "\u2212";
const known = (value) => typeof value === "number" && Number.isFinite(value);

/** `0.797`; a dash for what is not known. Halves go to the even digit, as in the verdict. */
export function number(value, digits = 3) {
  if (!known(value)) return "–";
  const format = { minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: false, roundingMode: "halfEven" };
  return value.toLocaleString("en-US", format).replace("-", MINUS);
}

/** `+0.557`, `−0.557`. */
export function signed(value, digits = 3) {
  return known(value) && value >= 0 ? `+${number(value, digits)}` : number(value, digits);
}

/** `0.712 to 0.861`. */
export function range(low, high, format = number) {
  return known(low) && known(high) ? `${format(low)} to ${format(high)}` : "–";
}

/** `p < .001`, as the verdict writes it. */
export function pValue(p) {
  if (!known(p)) return "–";
  return p < 0.001 ? "p < .001" : `p = ${p.toFixed(3)}`;
}

/** `65,280`. */
export function count(value) {
  return known(value) ? value.toLocaleString("en-US") : "–";
}

/** `1 example`, `3 examples`. */
export function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** `41 s`, `2 min 5 s`. */
export function seconds(value) {
  if (!known(value)) return "–";
  if (value < 10) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  return whole < 120 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** `2.1 MB`. */
export function bytes(value) {
  if (!known(value)) return "–";
  if (value < 1000) return `${value} bytes`;
  const power = Math.min(3, Math.floor(Math.log10(value) / 3));
  return `${(value / 1000 ** power).toPrecision(3)} ${["", "kB", "MB", "GB"][power]}`;
}
