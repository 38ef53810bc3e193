// A job followed to its end: a stream that goes on where it was cut off, and questions where streams do not get through.
// https://html.spec.whatwg.org/multipage/server-sent-events.html, read by fetch: EventSource sends no API key.

import { ApiError, get, pause, request } from "./api.js";

const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const LONGEST_PAUSE_SECONDS = 10;
// After so many streams in a row that brought nothing, ask instead.
const STREAMS_TRIED = 3;
const POLL_SECONDS = 20;

export const ended = (job) => ENDED.has(job.status);

/**
 * Follow a job until it has ended or `signal`.
 * @param {string} id
 * @param {{onJob: (job: any) => void, onEvent: (event: any) => void, onTrouble: (text: string) => void}} listener
 * @param {AbortSignal} signal
 * @throws {ApiError} where the job is gone or may not be seen
 */
export async function follow(id, listener, signal) {
  let last = null;
  let failures = 0;
  while (!signal.aborted) {
    try {
      const job = await get(`/v1/jobs/${id}`, signal);
      listener.onJob(job);
      const before = last;
      const read = failures >= STREAMS_TRIED ? poll : stream;
      last = await read(id, last, listener, signal);
      if (ended(job)) return; // and now all its events were read, too
      if (read === stream) failures = last === before ? failures + 1 : 0;
      listener.onTrouble("");
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiError)) error = new ApiError(0, { code: "cut", message: "The connection was cut.", param: null });
      if (error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
      failures++;
      const seconds = error.retryAfter ?? Math.min(2 ** failures / 2, LONGEST_PAUSE_SECONDS);
      listener.onTrouble(`${error.message} Trying again; the job is not affected.`);
      await pause(seconds, signal);
    }
  }
}

/** Ask for what is new, then wait a while for the end; returns the ID of the last event. */
async function poll(id, last, listener, signal) {
  const { data } = await get(`/v1/jobs/${id}/events${last ? `?after=${last}` : ""}`, signal);
  data.forEach(listener.onEvent);
  listener.onTrouble("");
  listener.onJob(await get(`/v1/jobs/${id}?wait=${POLL_SECONDS}`, signal));
  return data.at(-1)?.id ?? last;
}

/** Read one stream to its end; returns the ID of the last event. */
async function stream(id, last, listener, signal) {
  const headers = { Accept: "text/event-stream" };
  if (last) headers["Last-Event-ID"] = last;
  const response = await request(`/v1/jobs/${id}/events`, { headers, signal });
  if (response.status === 204 || !response.body) return last;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return last;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop() ?? "";
    for (const block of blocks) {
      const event = parse(block);
      if (!event) continue;
      last = event.id;
      listener.onEvent(event);
    }
  }
}

/** One event's JSON; null for a comment. */
function parse(block) {
  const data = block
    .split(/\r?\n/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart());
  return data.length ? JSON.parse(data.join("\n")) : null;
}
