// The page: which view is shown, and the API key where one is needed.

import { get, key, unauthenticated } from "./api.js";
import { alertBox, field, fill, h } from "./dom.js";
import { jobView } from "./job.js";
import { jobList } from "./jobs.js";
import { submitForm } from "./submit.js";

const main = document.querySelector("main");
const keyState = document.getElementById("key");
let service = null;
let leave = new AbortController();

/** Show what the address says. */
async function route({ focus = true } = {}) {
  leave.abort();
  leave = new AbortController();
  const { signal } = leave;
  try {
    service ??= await get("/v1/service", signal);
  } catch (error) {
    if (!signal.aborted) fill(main, alertBox(error), h("button", { type: "button", onclick: () => route() }, "Try again"));
    return;
  }
  drawKey();
  const job = /^#\/jobs\/(\w+)$/.exec(location.hash);
  if (service.keys_required && !key.get()) show(keyView(), "API key");
  else if (job) show(jobView(job[1], service, signal), "Job");
  else show(homeView(signal), "Adapt a model");
  if (focus) main.querySelector("h1")?.focus();
}

function show(view, title) {
  document.title = `${title} · Compress to Impress`;
  fill(main, view);
  window.scrollTo(0, 0);
}

function homeView(signal) {
  return h(
    "div",
    {},
    h("h1", { tabindex: -1 }, "Adapt a model to your task"),
    h(
      "p",
      { class: "intro" },
      "Send a hundred examples of a task, or as many as you have from eight up. Components of the model's weights that stand in the task's way are removed; nothing is trained, nothing added. The report says what that gained on examples that were held back; with fewer than 60 it is an estimate by cross-validation.",
    ),
    h("div", { class: "home" }, submitForm(service, signal), jobList(signal)),
  );
}

function keyView(error) {
  const input = h("input", { id: "api-key", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const submit = (event) => {
    event.preventDefault();
    if (!input.value.trim()) return input.focus();
    key.set(input.value.trim());
    route();
  };
  return h(
    "form",
    { class: "card narrow", onsubmit: submit },
    h("h1", { tabindex: -1 }, "API key"),
    error && alertBox(error),
    field("Key", input, "This service asks for one. Its operator makes it with: c2i keys create --name NAME. It is kept until this tab is closed."),
    h("button", { type: "submit", class: "primary" }, "Use this key"),
  );
}

function drawKey() {
  const forget = () => {
    key.forget();
    route();
  };
  fill(keyState, key.get() && h("button", { type: "button", class: "quiet", onclick: forget }, "Forget the key"));
}

unauthenticated.addEventListener("needed", (event) => {
  leave.abort();
  leave = new AbortController();
  drawKey();
  show(keyView(event.detail), "API key");
  document.getElementById("api-key").focus();
});
// Its address would be taken for a view's.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
window.addEventListener("hashchange", () => route());
route({ focus: false });
