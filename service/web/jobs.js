// The list of jobs, as it is now.

import { get, pause } from "./api.js";
import { alertBox, fill, h, setText } from "./dom.js";
import { ended } from "./events.js";
import { ago, progressLine } from "./format.js";

const PAGE = 20;
const BUSY_SECONDS = 2;
const IDLE_SECONDS = 4;

export const STATUSES = {
  queued: "queued",
  running: "running",
  cancelling: "stopping",
  succeeded: "done",
  failed: "failed",
  cancelled: "cancelled",
};

/** @param {AbortSignal} signal the view's end */
export function jobList(signal) {
  const list = h("ul", { class: "jobs" });
  const empty = h("p", { class: "muted", hidden: true }, "None yet. A job that you send appears here.");
  const trouble = h("div");
  const told = h("p", { class: "hidden", role: "status" });
  const more = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => ((pages += 1), load().catch(fail)) }, "Show older jobs");
  /** What is on the screen, by ID. */
  const items = new Map();
  let pages = 1;

  async function load() {
    const jobs = [];
    let after = null;
    for (let page = 0; page < pages && (page === 0 || after); page++) {
      const found = await get(`/v1/jobs?limit=${PAGE}${after ? `&after=${after}` : ""}`, signal);
      jobs.push(...found.data);
      after = found.next;
    }
    more.hidden = !after;
    empty.hidden = jobs.length > 0;
    fill(trouble);
    draw(jobs);
    return jobs.some((job) => !ended(job));
  }

  function draw(jobs) {
    const kept = new Set(jobs.map((job) => job.id));
    for (const [id, item] of items) {
      if (!kept.has(id)) {
        item.element.remove();
        items.delete(id);
      }
    }
    jobs.forEach((job, i) => {
      const item = items.get(job.id) ?? makeItem(job);
      items.set(job.id, item);
      if (item.status && item.status !== job.status && ended(job)) setText(told, `A job is ${STATUSES[job.status]}: ${progressLine(job)}`);
      item.update(job);
      // Moved only where it is not there already: the focus stays.
      if (list.children[i] !== item.element) list.insertBefore(item.element, list.children[i] ?? null);
    });
  }

  function fail(error) {
    if (!signal.aborted) fill(trouble, alertBox(error));
  }

  async function run() {
    while (!signal.aborted) {
      let busy = true;
      try {
        if (document.visibilityState === "visible") busy = await load();
      } catch (error) {
        fail(error);
        if (error.status === 401 || error.status === 403) return;
      }
      await pause(busy ? BUSY_SECONDS : IDLE_SECONDS, signal);
    }
  }

  run();
  return h("section", { class: "card", "aria-labelledby": "jobs" }, h("h2", { id: "jobs" }, "Jobs"), trouble, told, empty, list, more);
}

function makeItem(job) {
  const badge = statusBadge();
  const when = h("span", { class: "muted" });
  const line = h("p", { class: "line" });
  const bar = h("progress", { max: 100, "aria-label": `Progress of ${job.id}` });
  const link = h("a", { href: `#/jobs/${job.id}` }, job.model);
  const element = h(
    "li",
    {},
    h("div", { class: "head" }, link, badge),
    h("p", { class: "ids" }, h("code", {}, shortId(job.id)), " ", when),
    line,
    bar,
  );
  const item = {
    element,
    status: "",
    update(now) {
      item.status = now.status;
      setStatus(badge, now.status);
      setText(when, ago(now.created_at));
      setText(line, progressLine(now));
      bar.hidden = now.status !== "running";
      bar.value = now.progress.percent;
    },
  };
  return item;
}

/** Enough of an ID to tell jobs apart; all of it is in the link. */
export const shortId = (id) => `${id.slice(0, 10)}…`;

export const statusBadge = () => h("span", { class: "badge" });

export function setStatus(badge, status) {
  badge.dataset.status = status;
  setText(badge, STATUSES[status] ?? status);
}
