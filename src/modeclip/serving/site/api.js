// How the page asks the service: errors in words, a key where one is needed, and patience while the service restarts.
import { h, openDialog } from "./parts.js";

const PING_SECONDS = 4, GONE_SECONDS = 1, PATIENCE = 6;
const banner = document.getElementById("banner");
let gone = false, uptime = null, trouble = "", waiters = [], keyAsked = null, wasGiven = false;

/** What hears "restarted" when the service has come back as another process. */
export const life = new EventTarget();

export class ServiceError extends Error {
  constructor(message, status, requestId = "") {
    super(message);
    this.status = status;
    this.requestId = requestId;
  }
}

/** Ask for a path. While the service is away, the question waits and is put again when it is back. */
export async function ask(path, { body, method, signal, as = "json" } = {}) {
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(path, {
        method: method ?? (body === undefined ? "GET" : "POST"), signal,
        headers: body === undefined ? {} : { "Content-Type": "application/json" },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      await untilBack(signal);
      continue;
    }
    if (response.ok) return as === "json" ? response.json() : as === "text" ? response.text() : response;
    const problem = await problemOf(response);
    if (response.status === 401) {
      if (await askForKey()) continue;
      problem.message = "The service answers only with its key.";
    }
    if ((response.status === 429 || response.status === 503) && attempt < PATIENCE) {
      await pause(Math.min(10, Number(response.headers.get("Retry-After")) || 1), signal);
      continue;
    }
    throw problem;
  }
}

async function problemOf(response) {
  const requestId = response.headers.get("X-Request-ID") ?? "";
  try {
    const content = await response.json();
    const found = content.error?.message ?? content.detail ?? content.message;
    const message = typeof found === "string" ? found : Array.isArray(found) ? found.map(part => part.msg ?? part).join("; ") : JSON.stringify(content);
    return new ServiceError(message, response.status, content.error?.request_id ?? requestId);
  } catch {
    return new ServiceError(`The service answered ${response.status} ${response.statusText}.`, response.status, requestId);
  }
}

const pause = (seconds, signal) => new Promise((done, fail) => {
  const timer = setTimeout(done, 1000 * seconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); fail(signal.reason); }, { once: true });
});

/** Show a picture; small ones (icons) are marked, so that they are shown whole. */
export function picture(address, attributes = {}) {
  const image = h("img", { alt: "", loading: "lazy", decoding: "async", ...attributes });
  image.addEventListener("load", () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 64));
  image.addEventListener("error", () => image.classList.add("missing"));
  image.src = address;
  return image;
}

/** Ask for the API key, which goes along as a cookie of this session, since img elements send no header. */
function askForKey() {
  keyAsked ??= new Promise(done => {
    const field = h("input", { type: "password", id: "key", autocomplete: "off", required: true, autofocus: true });
    let answer = false;
    const dialog = openDialog("API key", h("h2", {}, "This service asks for a key"), h("p", {}, wasGiven ? "This key is not the right one." : "Whoever has started the service has it: it is in the file that --api-key-file names."),
      h("form", { method: "dialog", onsubmit: () => { wasGiven = true; document.cookie = `modeclip-key=${field.value.trim()}; path=/; SameSite=Strict`; answer = true; } },
        h("label", { for: "key" }, "API key"), field, h("button", { class: "main" }, "Go on")));
    dialog.classList.add("locked");
    dialog.addEventListener("close", () => { keyAsked = null; done(answer); });
  });
  return keyAsked;
}

// ---------------------------------------------------------------- whether the service is there

function untilBack(signal) {
  if (!gone) {
    gone = true;
    say("The service does not answer. This page goes on by itself when it is back.", "gone");
    setTimeout(ping, 1000 * GONE_SECONDS);
  }
  return new Promise((done, fail) => {
    waiters.push(done);
    signal?.addEventListener("abort", () => fail(signal.reason), { once: true });
  });
}

async function ping() {
  try {
    const health = await (await fetch("/health", { cache: "no-store" })).json();
    const another = uptime !== null && health.uptime_seconds < uptime;
    uptime = health.uptime_seconds;
    if (gone) {
      gone = false;
      say("The service is back.", "back");
      setTimeout(() => { if (!gone && !trouble) banner.hidden = true; }, 4000);
      waiters.splice(0).forEach(done => done());
    }
    if (health.trouble !== trouble) {
      trouble = health.trouble;
      if (trouble) say(`The service goes on with what it has in memory: ${trouble}`, "gone");
      else banner.hidden = true;
    }
    if (another) life.dispatchEvent(new Event("restarted"));
  } catch {
    if (!gone) untilBack().catch(() => {});
    else setTimeout(ping, 1000 * GONE_SECONDS);
  }
}

function say(text, kind) {
  banner.textContent = text;
  banner.className = kind;
  banner.hidden = false;
}

export function watch() {
  ping();
  setInterval(() => { if (!gone && !document.hidden) ping(); }, 1000 * PING_SECONDS);
}
