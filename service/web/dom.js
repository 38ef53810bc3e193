// Elements without templates: a text set here is text, never markup.

/**
 * An element. `props` are attributes; a function under `onclick` and the like is a listener; false, null and
 * undefined leave an attribute out.
 * @param {string} tag
 * @param {Record<string, any>} [props]
 * @param {...(Node|string|number|null|undefined|false|Array<any>)} children
 * @returns {any}
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Put `children` in the place of what `element` holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set a text where it differs: what a screen reader is reading is left alone. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A labelled control, with a hint below it that screen readers read with it. */
export function field(label, control, hint) {
  const id = control.id;
  const parts = [h("label", { for: id }, label), control];
  if (hint) {
    control.setAttribute("aria-describedby", `${id}-hint`);
    parts.push(h("p", { class: "hint", id: `${id}-hint` }, hint));
  }
  return h("div", { class: "field" }, parts);
}

/**
 * A button that asks, in its place, before it acts.
 * @param {string} label
 * @param {string} question
 * @param {string} yes the button that acts
 * @param {() => Promise<void>} act
 */
export function confirmed(label, question, yes, act) {
  const ask = h("button", { type: "button", class: "quiet danger", onclick: open }, label);
  const sure = h("button", { type: "button", class: "danger", onclick: run }, yes);
  const asked = h(
    "span",
    { class: "asked", role: "group", "aria-label": question, hidden: true, onkeydown: escape },
    h("span", {}, question),
    sure,
    h("button", { type: "button", class: "quiet", onclick: close }, "No"),
  );
  function open() {
    ask.hidden = true;
    asked.hidden = false;
    sure.focus();
  }
  function close() {
    ask.hidden = false;
    asked.hidden = true;
    ask.focus();
  }
  function escape(event) {
    if (event.key === "Escape") close();
  }
  async function run() {
    sure.disabled = true;
    try {
      await act();
    } finally {
      sure.disabled = false;
    }
  }
  return h("span", { class: "confirm" }, ask, asked);
}

/** What went wrong, said at once also to who does not see it. */
export function alertBox(error) {
  return h("p", { class: "alert", role: "alert" }, error instanceof Error ? error.message : String(error));
}
