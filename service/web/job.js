// One job: where it is, and what came out.

import { get, post, request } from "./api.js";
import { alertBox, confirmed, fill, h, setText } from "./dom.js";
import { downloads } from "./downloads.js";
import { ended, follow } from "./events.js";
import { STAGES, ago, duration, progressLine } from "./format.js";
import { setStatus, statusBadge } from "./jobs.js";
import { tryPanel } from "./try.js";

const QUEUE_SECONDS = 3;
// A screen reader is told the percent no more often than in these steps.
const TOLD_PERCENT = 25;

/**
 * @param {string} id @param {any} service what `/v1/service` says
 * @param {AbortSignal} signal the view's end
 */
export function jobView(id, service, signal) {
  const badge = statusBadge();
  const title = h("h1", { tabindex: -1 }, "Job");
  const facts = h("p", { class: "sent" });
  const line = h("p", { class: "line" });
  const told = h("p", { class: "hidden", role: "status" });
  const bar = h("progress", { max: 100, "aria-label": "Progress" });
  const stages = stageList();
  const history = h("ol", { class: "history" });
  const trouble = h("p", { class: "trouble", role: "status" });
  const actions = h("div", { class: "row" });
  const outcome = h("div", { class: "outcome" });
  const happened = h("details", { hidden: true }, h("summary", {}, "What happened, step by step"), history);
  const state = h("section", { class: "card", "aria-label": "State" }, line, bar, stages.element, told, trouble, actions);
  const view = h(
    "div",
    { class: "job" },
    h("p", {}, h("a", { href: "#/" }, "All jobs")),
    h("div", { class: "title" }, title, badge),
    facts,
    state,
    outcome,
    happened,
  );
  const seen = new Set();
  let job = null;
  let waiting = false;

  const cancel = confirmed("Cancel the job", "Stop this job? Nothing of it is kept.", "Yes, stop it", async () => {
    try {
      onJob(await post(`/v1/jobs/${id}/cancel`));
    } catch (error) {
      fill(actions, alertBox(error));
    }
  });
  const remove = confirmed("Delete the job", "Delete the job, its examples and its files?", "Yes, delete", async () => {
    try {
      await request(`/v1/jobs/${id}`, { method: "DELETE" });
      location.hash = "#/";
    } catch (error) {
      fill(actions, alertBox(error));
    }
  });

  function onJob(now) {
    const changed = job?.status !== now.status;
    job = now;
    setText(title, now.model);
    draw();
    if (!changed) return;
    setText(told, `${badge.textContent}. ${progressLine(now)}`);
    if (now.status === "queued") watchQueue();
    fill(actions, ended(now) ? remove : now.status === "cancelling" ? null : cancel);
    if (now.status !== "succeeded") return;
    // Its verdict is the result's first line, and deleting it the last thing to think of.
    state.hidden = true;
    view.append(actions);
    finish();
  }

  function onEvent(event) {
    if (seen.has(event.id)) return;
    seen.add(event.id);
    happened.hidden = false;
    history.append(h("li", {}, h("time", { datetime: event.created_at }, clock(event.created_at)), " ", event.message));
    if (!job || ended(job)) return;
    const before = job.progress;
    const changed = job.status !== event.status;
    job = { ...job, progress: event.progress };
    draw();
    // A change of status brings more than the event says: the record is asked for.
    if (changed && !ended(event)) get(`/v1/jobs/${id}`, signal).then(onJob, () => {});
    const step = (progress) => Math.floor(progress.percent / TOLD_PERCENT);
    if (step(before) !== step(event.progress) || before.stage !== event.progress.stage) setText(told, progressLine(job));
  }

  function draw() {
    setStatus(badge, job.status);
    document.title = `${job.model}, ${job.status === "running" ? `${Math.round(job.progress.percent)} %` : badge.textContent}`;
    const took = job.started_at && job.finished_at && (Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000;
    fill(
      facts,
      h("code", {}, id),
      ` sent ${ago(job.created_at)}, strategy ${job.strategy}`,
      job.attempt > 1 && `, attempt ${job.attempt}`,
      took && `, took ${duration(took)}`,
    );
    setText(line, progressLine(job));
    line.classList.toggle("bad", job.status === "failed");
    bar.hidden = job.status !== "running" && job.status !== "cancelling";
    bar.value = job.progress.percent;
    stages.update(job);
  }

  /** Only the record says how many are before it. */
  async function watchQueue() {
    if (waiting) return;
    waiting = true;
    while (job.status === "queued" && !signal.aborted) {
      await new Promise((resolve) => setTimeout(resolve, QUEUE_SECONDS * 1000));
      if (job.status === "queued" && !signal.aborted) await get(`/v1/jobs/${id}`, signal).then(onJob, () => {});
    }
    waiting = false;
  }

  async function finish() {
    try {
      const [report, files, { renderResult }] = await Promise.all([
        get(`/v1/jobs/${id}/report`, signal),
        get(`/v1/jobs/${id}/files`, signal),
        import("./result.js"),
      ]);
      const result = h("section", { class: "drawn", "aria-label": "Result" });
      renderResult(result, report);
      fill(outcome, result, service.tries && tryPanel(id, report, signal), downloads(id, files.data));
    } catch (error) {
      if (!signal.aborted) fill(outcome, alertBox(error));
    }
  }

  const listener = { onJob, onEvent, onTrouble: (text) => setText(trouble, text) };
  follow(id, listener, signal).catch((error) => {
    if (signal.aborted) return;
    setText(title, error.status === 404 ? "No such job" : "This job cannot be shown");
    fill(state, alertBox(error));
  });
  return view;
}

function stageList() {
  const items = Object.entries(STAGES).map(([stage, label]) => [stage, h("li", {}, label)]);
  const element = h("ol", { class: "stages", "aria-label": "Stages" }, items.map(([, item]) => item));
  const order = items.map(([stage]) => stage);
  return {
    element,
    update(job) {
      element.hidden = ended(job) || job.status === "queued";
      const at = order.indexOf(job.progress.stage);
      items.forEach(([, item], i) => {
        item.dataset.state = i < at ? "done" : i === at ? "now" : "next";
        if (i === at) item.setAttribute("aria-current", "step");
        else item.removeAttribute("aria-current");
      });
    },
  };
}

const clock = (iso) => new Date(iso).toLocaleTimeString("en-GB");
