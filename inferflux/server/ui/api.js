// Calls to the server. The key lives in this module's memory only: no storage, no cookie, no URL.

// Whatever is only read comes at once; a server that takes longer hangs, or is cut off without a word.
const PATIENCE_MS = 5000;

let key = "";

export const setKey = (value) => { key = value; };

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Sends a request and returns the raw response. `tag`: the request is to fail with 412 where the ETag is another by
 * now. Throws ApiError with the server's message and request id. */
export async function send(method, path, body, { signal, tag } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (tag) headers["If-Match"] = tag;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (method === "GET") signal ??= AbortSignal.timeout(PATIENCE_MS);
  let response;
  try {
    response = await fetch(path, {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not respond");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    const id = response.headers.get("x-request-id");
    throw new ApiError(response.status, `${answer?.error?.message ?? response.statusText}${id ? ` (${id})` : ""}`);
  }
  return response;
}

/** Returns the ETag of what was read. A proxy that compresses answers marks it as weak, which none of ours is. */
export const tagOf = (response) => response.headers.get("ETag").replace(/^W\//, "");

export const call = async (method, path, body) => (await send(method, path, body)).json();

/** Yields the parsed events of a streamed answer. */
export async function* events(path, body, signal) {
  const response = await send("POST", path, { ...body, stream: true }, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "the answer ended before it was complete");
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment by which a proxy keeps the connection
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(0, event.error.message);
      yield event;
    }
  }
}

/** Returns the metrics as [{name, labels, value}]. */
export async function metrics() {
  const text = await (await send("GET", "/metrics")).text();
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}
