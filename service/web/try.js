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
  prompt.value = report.changed?.[0]?.prompt ?? "";
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
      show(await settled(await post(`/v1/jobs/${id}/tries`, { prompt: prompt.value }, { signal })));
    } catch (error) {
      if (!signal.aborted) fill(trouble, alertBox(error));
    } finally {
      ask.disabled = false;
      setText(told, "");
    }
  }

  /** Wait for both answers. */
  async function settled(attempt) {
    while (attempt.status === "queued" || attempt.status === "running") {
      setText(told, attempt.status === "queued" ? "Waiting for a worker …" : "The models are answering …");
      attempt = await get(`/v1/jobs/${id}/tries/${attempt.id}?wait=${WAIT_SECONDS}`, signal);
    }
    return attempt;
  }

  function show(attempt) {
    if (attempt.status === "failed") {
      fill(trouble, alertBox(attempt.error.message));
      return;
    }
    const same = attempt.base.text === attempt.adapted.text;
    fill(
      answers,
      answer("Base model", attempt.base.text),
      answer("Adapted model", attempt.adapted.text),
      same && h("p", { class: "hint" }, "Both answer the same."),
    );
  }

  return h("section", { class: "card", "aria-labelledby": "try" }, h("h2", { id: "try" }, "Try it"), form, trouble, h("div", { "aria-live": "polite" }, answers));
}

function answer(name, text) {
  return h("div", { class: "answer" }, h("h3", {}, name), h("p", { class: "said" }, text || h("span", { class: "muted" }, "nothing")));
}
