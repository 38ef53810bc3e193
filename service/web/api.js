// Requests to the API: the key, errors in words, streams.

const KEY = "c2i-key";
const GET_TRIES = 3;
const LONGEST_RETRY_SECONDS = 5;

/** An error that can be shown as it is. */
export class ApiError extends Error {
  /** @param {number} status @param {{code: string, message: string, param: string|null}} body @param {number} [after] */
  constructor(status, body, after) {
    super(body.message);
    this.status = status;
    this.code = body.code;
    this.param = body.param;
    /** Seconds after which another try may do. */
    this.retryAfter = after;
  }
}

/** The key lives as long as this tab, and is sent to this origin alone. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Told when the server wants a key, or another one. */
export const unauthenticated = new EventTarget();

/**
 * A response that is all right.
 * @param {string} path @param {RequestInit & {headers?: Record<string, string>}} [options]
 * @throws {ApiError} also where the server does not answer: status 0
 */
export async function request(path, options = {}) {
  const headers = { Accept: "application/json", ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-cache", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { code: "unreachable", message: "The service does not answer.", param: null });
  }
  if (response.ok) return response;
  const error = await toError(response);
  if (response.status === 401) {
    key.forget();
    unauthenticated.dispatchEvent(new CustomEvent("needed", { detail: error }));
  }
  throw error;
}

async function toError(response) {
  const after = Number(response.headers.get("Retry-After")) || undefined;
  let body;
  try {
    body = (await response.json()).error;
    if (typeof body.message !== "string") throw new TypeError("not ours");
  } catch {
    body = { code: "unknown", message: `The service answered with status ${response.status}.`, param: null };
  }
  // Our messages begin in lower case behind the command line's `error:`.
  let message = body.message.charAt(0).toUpperCase() + body.message.slice(1);
  if (response.status === 403) message = `This key may not do that: ${body.message}`;
  if (response.status === 429 && after) message += ` Try again in ${after} s.`;
  return new ApiError(response.status, { ...body, message }, after);
}

/** The JSON behind a path. Where the service says when to come again, and that is soon, it is asked again. */
export async function get(path, signal) {
  for (let tried = 1; ; tried++) {
    try {
      return await (await request(path, { signal })).json();
    } catch (error) {
      if (!(error.retryAfter <= LONGEST_RETRY_SECONDS) || tried >= GET_TRIES) throw error;
      await pause(error.retryAfter, signal);
    }
  }
}

/** POST JSON, get JSON. */
export async function post(path, body, { signal, headers = {} } = {}) {
  const options = { method: "POST", signal, headers: { ...headers } };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  return (await request(path, options)).json();
}

/** A name for a request that may have to be repeated. (`crypto.randomUUID` is not there without TLS.) */
export function unique() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Wait, or until `signal`. */
export function pause(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
