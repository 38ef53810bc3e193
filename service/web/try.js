// Try it: one prompt, answered by the base model and by the adapted one.

import { get, post } from "./api.js";
import { alertBox, field, fill, h, setText } from "./dom.js";

const WAIT_SECONDS = 20;

/**
 * @param {string} id of a job that has succeeded
 * @param {any} report its report; its examples are offered as prompts
 * @param {AbortSignal} signal the view's end
 */
export function tryPanel(id, report, signal) {
  const prompt = h("textarea", { id: "try-prompt", rows: 3, spellcheck: "false", required: true });
  const changed = report.changed ?? [];
  prompt.value = (changed.find((example) => example.adapted_correct) ?? changed[0])?.prompt ?? "";
  const ask = h("button", { type: "submit", class: "primary" }, "Ask both");
  const told = h("p", { role: "status", class: "hint" });
  const trouble = h("div");
  const answers = h("div", { class: "answers" });
  const form = h(
    "form",
    { onsubmit: submit },
    field("Prompt", prompt, "The models continue it to the letter; end it where an answer begins."),
    h("div", { class: "send" }, ask, told),
  );

  async function submit(event) {
    event.preventDefault();
    if (!prompt.value.trim()) return prompt.focus();
    ask.disabled = true;
    fill(trouble);
    fill(answers);
    setText(told, "Sent");
    try {
      let attempt = await post(`/v1/jobs/${id}/tries`, { prompt: prompt.value }, { signal });
      while (attempt.status === "queued" || attempt.status === "running") {
        show(attempt);
        attempt = await get(`/v1/jobs/${id}/tries/${attempt.id}?wait=${WAIT_SECONDS}`, signal);
      }
      show(attempt);
    } catch (error) {
      if (!signal.aborted) fill(trouble, alertBox(error));
    } finally {
      ask.disabled = false;
      setText(told, "");
    }
  }

  /** The answers that are there; the base model's comes first. */
  function show({ status, base, adapted, error }) {
    setText(told, status === "queued" ? "Waiting to be answered …" : "The models are answering …");
    if (status === "failed") fill(trouble, alertBox(error.message));
    if (!base && !adapted) return;
    fill(
      answers,
      answer("Base model", base),
      answer("Adapted model", adapted),
      base && adapted && base.text === adapted.text && h("p", { class: "hint" }, "Both answer the same."),
    );
  }

  return h("section", { class: "card", "aria-labelledby": "try" }, h("h2", { id: "try" }, "Try it"), form, trouble, h("div", { "aria-live": "polite" }, answers));
}

function answer(name, said) {
  const text = said === null ? "…" : said.text || h("span", { class: "muted" }, "nothing");
  return h("div", { class: "answer" }, h("h3", {}, name), h("p", { class: "said" }, text));
}
