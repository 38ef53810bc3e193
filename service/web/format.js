// Numbers and times as people say them.

/** `45 s`, `3 min`, `1 h 20 min`. */
export function duration(seconds) {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const rest = minutes % 60;
  return `${Math.floor(minutes / 60)} h${rest ? ` ${rest} min` : ""}`;
}

/** `2.4 MB`. */
export function bytes(count) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit++;
  }
  return `${unit === 0 || count >= 100 ? Math.round(count) : count.toPrecision(2)} ${units[unit]}`;
}

/** `135 million`. */
export function large(count) {
  if (count >= 1e9) return `${(count / 1e9).toPrecision(2)} billion`;
  if (count >= 1e6) return `${Math.round(count / 1e6)} million`;
  return count.toLocaleString("en");
}

/** `1 example`, `1,200 examples`. */
export function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/** `12 s ago`, or the date of what is a day old. */
export function ago(iso) {
  const seconds = (Date.now() - Date.parse(iso)) / 1000;
  if (seconds < 5) return "just now";
  if (seconds < 86_400) return `${duration(seconds)} ago`;
  return new Date(iso).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** A job's status and stage as one line: `Searching, 62 %, about 12 s left`. */
export function progressLine(job) {
  const { stage, percent, eta_seconds: eta, queue_position: position } = job.progress;
  switch (job.status) {
    case "queued":
      if (!position) return "Waiting for a worker";
      return position === 1 ? "Next in the queue" : `Number ${position} in the queue`;
    case "running": {
      const name = stage ? STAGES[stage] ?? stage : "Starting";
      return `${name}, ${Math.round(percent)} %${eta ? `, about ${duration(eta)} left` : ""}`;
    }
    case "cancelling":
      return "Being stopped";
    case "failed":
      return job.error ? [job.error.param, job.error.message].filter(Boolean).join(": ") : "Failed";
    case "cancelled":
      return "Stopped on request; nothing was published";
    default:
      return job.result?.verdict ?? "Done";
  }
}

/** A job's stages in order, in words. */
export const STAGES = {
  loading: "Loading the model",
  decomposing: "Decomposing its weights",
  backward: "Backward pass",
  ranking: "Ranking components",
  searching: "Trying removals",
  verifying: "Verifying",
  publishing: "Publishing",
};
