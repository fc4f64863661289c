// Requests to the server. Whatever fails is a Problem whose message is a sentence for the user.

const KEY = "xl2jax.key";

/** Why a request failed. status: of HTTP, 0 where no answer came. */
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** What to tell the user about an error. Those that are no Problem are faults of the page. */
export function inSentence(error) {
  if (error instanceof Problem) return error.message;
  console.error(error);
  return "The page failed on what the server sent. Try again.";
}

/** The key is kept until the tab is closed. */
export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

const UNREACHABLE = "The server cannot be reached. Check that it is running, and try again.";
const LOST = "The connection to the server was lost before the end.";

function sentence(text) {
  const whole = text.trim().replace(/^./, (first) => first.toUpperCase());
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

function problem(status, body, retryAfter) {
  if (status === 401) return new Problem("The server does not accept this API key.", status);
  let error;
  try {
    error = JSON.parse(body).error;
  } catch {
    error = null;
  }
  const message = error?.message;
  if (status === 429 && error?.code !== "too_many_live_videos") {
    const wait = /^\d+$/.test(retryAfter ?? "") ? `in ${retryAfter} s` : "in a while";
    return new Problem(`The server is busy with other requests. Try again ${wait}.`, status);
  }
  return new Problem(
    typeof message === "string" && message ? sentence(message) : `The server answered with status ${status}.`,
    status,
  );
}

/** fetch with the key. Throws a Problem unless the status is 2xx, and AbortError where it was stopped. */
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(UNREACHABLE);
  }
  if (!response.ok) {
    const body = await response.text().catch(() => "");
    throw problem(response.status, body, response.headers.get("Retry-After"));
  }
  return response;
}

/** The name of the server's model. */
export async function modelName() {
  const models = await (await request("v1/models")).json();
  return models.data[0].id;
}

/** Uploads a file and returns its description. `onProgress` gets the bytes that were sent. */
export async function upload(file, { onProgress, signal }) {
  signal.throwIfAborted();
  const text = await new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest(); // fetch does not tell how much was sent
    sending.open("POST", "v1/files");
    for (const [name, value] of Object.entries(headers())) sending.setRequestHeader(name, value);
    sending.upload.onprogress = (event) => onProgress(event.loaded);
    sending.onload = () => {
      if (sending.status >= 200 && sending.status < 300) resolve(sending.responseText);
      else reject(problem(sending.status, sending.responseText, sending.getResponseHeader("Retry-After")));
    };
    sending.onerror = () => reject(new Problem(UNREACHABLE));
    sending.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => sending.abort(), { once: true });
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("expires_after[anchor]", "created_at"); // a closed tab deletes nothing
    form.append("expires_after[seconds]", "86400");
    form.append("file", file);
    sending.send(form);
  });
  return JSON.parse(text);
}

/** The description of an uploaded file. */
export async function describe(id) {
  return (await request(`v1/files/${encodeURIComponent(id)}`)).json();
}

/** Begins a live video, and returns its description. */
export async function startLive(settings) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(settings) };
  return (await request("v1/live", options)).json();
}

/** Ends a live video, if the server still has it. */
export function endLive(id) {
  request(`v1/live/${encodeURIComponent(id)}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

/** The connection over which the frames of a live video go to the server. */
export class LiveSocket {
  #socket;
  #problem = null;

  /** onProgress(what the server has seen). onEnd(problem, isLost): the connection has ended; another one may go on. */
  constructor(id, { onProgress, onEnd }) {
    const address = new URL(`v1/live/${encodeURIComponent(id)}/frames`, document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    this.#socket = new WebSocket(address, protocols());
    this.#socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "progress") onProgress(message);
      else this.#problem = new Problem(sentence(message.error.message), message.error.code === "live_ended" ? 404 : 0);
    };
    this.#socket.onclose = async () => {
      if (this.#problem) onEnd(this.#problem, false);
      else onEnd(...(await this.#reason(id)));
    };
  }

  /** Why a connection ended without a word: browsers do not say with which status one was refused. */
  async #reason(id) {
    try {
      await request(`v1/live/${encodeURIComponent(id)}`);
    } catch (error) {
      return [error, error.status === 0];
    }
    return [new Problem(LOST), true];
  }

  get isOpen() {
    return this.#socket.readyState === WebSocket.OPEN;
  }

  /** Bytes that wait to be sent. */
  get waiting() {
    return this.#socket.bufferedAmount;
  }

  /** Sends an image that was taken at `seconds`. */
  send(seconds, image) {
    if (!this.isOpen) return;
    this.#socket.send(JSON.stringify({ seconds }));
    this.#socket.send(image);
  }

  close() {
    this.#socket.onclose = this.#socket.onmessage = null;
    this.#socket.close();
  }
}

/** A WebSocket carries no header: the key goes into the names of its protocols. */
function protocols() {
  const key = sessionStorage.getItem(KEY);
  if (key === null) return ["xl2jax"];
  const encoded = btoa(key).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["xl2jax", `xl2jax.key.${encoded}`];
}

/** Deletes an uploaded file, if the server can. */
export function forget(id) {
  request(`v1/files/${encodeURIComponent(id)}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

const LARGEST_COPY = 1 << 29; // bytes

/**
 * An address from which a player reads an uploaded file. Null where that is not possible.
 * A player sends no key. Where one is needed, the address is that of a copy in the browser.
 */
export async function playable(file) {
  const path = `v1/files/${encodeURIComponent(file.id)}/content`;
  if (!hasKey()) return path;
  if (file.bytes > LARGEST_COPY) return null;
  return URL.createObjectURL(await (await request(path)).blob());
}

/**
 * Asks a question, and yields what happens:
 * {kind: "watched", frames, total} while the video is watched, {kind: "piece", text},
 * {kind: "end", reason, chunks}, and {kind: "usage", usage}.
 */
export async function* ask(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const block of blocks(response.body)) {
    for (const line of block.split("\n")) {
      const watched = /^: watched (\d+) of (\d+) frames$/.exec(line);
      if (watched) yield { kind: "watched", frames: Number(watched[1]), total: Number(watched[2]) };
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      yield* eventsOf(JSON.parse(data));
    }
  }
  throw new Problem(LOST);
}

function* eventsOf(value) {
  if (value.error) throw new Problem(sentence(value.error.message));
  const choice = value.choices[0];
  if (choice?.delta.content) yield { kind: "piece", text: choice.delta.content };
  if (choice?.finish_reason) yield { kind: "end", reason: choice.finish_reason, chunks: value.xl2jax?.chunks ?? [] };
  if (value.usage) yield { kind: "usage", usage: value.usage };
}

/** The blocks of a stream of server-sent events. */
async function* blocks(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
}
