// The page at `/`: sign in, see who serves what, call it, listen. All that comes from outside is set as text.

import { BrokerError, NdArray, Refused, connect } from "./broker.js";

const REFRESH_MS = 2000;
const TEXT_MAX = 100_000; // characters of a reply that are shown
const BROADCASTS_MAX = 200;
const BROADCAST_TEXT_MAX = 2000;
const IMAGE_TYPES = [
  ["image/png", [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]],
  ["image/jpeg", [0xff, 0xd8, 0xff]],
  ["image/gif", [0x47, 0x49, 0x46, 0x38]],
];
const BASE64_IMAGE = /^(iVBORw0KGgo|\/9j\/|R0lGOD)[A-Za-z0-9+/\s]*={0,2}\s*$/;

const $ = (id) => document.getElementById(id);
const base = new URL(".", location.href).href.replace(/\/$/, "");
const STATES = { connecting: "Connecting…", connected: "Connected", closed: "Not connected" };

let client = null;
let chosen = null; // the endpoint whose methods are shown
let described = ""; // what is shown of it, so that nothing is drawn anew without need
let asking = null; // AbortController of the call under way
let urls = []; // of blobs, to be let go with the next reply
const listening = new Map(); // "endpoint topic" → its subscription

/** An element with attributes and children; texts become text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

// ------------------------------------------------------------ signing in

async function post(path, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  return fetch(`${base}/${path}`, { method: "POST", headers, body: body && JSON.stringify(body) });
}

async function reasonOf(response) {
  const told = await response.json().catch(() => ({}));
  return typeof told.error === "string" ? told.error : `the broker answered with HTTP ${response.status}`;
}

async function begin() {
  const response = await fetch(`${base}/whoami`).catch(() => null);
  if (!response?.ok) {
    showSignIn(!response ? "The broker does not answer." : response.status === 401 ? "" : await reasonOf(response));
    return;
  }
  const who = await response.json();
  const roles = (who.roles ?? []).join(", ");
  $("who").textContent = roles ? `${who.principal} (${roles})` : who.principal;
  try {
    client = await connect(base, { wait: true, onState: showState });
  } catch (error) {
    showSignIn(error.message);
    return;
  }
  showUse(who.kind === "login");
}

function showSignIn(reason) {
  client?.close();
  client = null;
  for (const id of ["using", "state", "who", "sign-out"]) $(id).hidden = true;
  $("signing-in").hidden = false;
  $("sign-in-error").textContent = reason;
  $("token").focus();
}

/** Who came in by the login of the program around the broker signs out there. */
function showUse(canSignOut) {
  $("signing-in").hidden = true;
  for (const id of ["using", "state", "who"]) $(id).hidden = false;
  $("sign-out").hidden = !canSignOut;
  refresh();
}

function showState(state, error) {
  $("state").textContent = STATES[state];
  $("state").dataset.state = state;
  $("state").title = error?.message ?? "";
  if (state === "connected") refresh();
  if (state === "closed" && client) {
    forget();
    showSignIn(error instanceof Refused ? "You have been signed out." : error.message);
  }
}

/** Nothing of what somebody saw is left for whoever signs in next. */
function forget() {
  chosen = null;
  described = "";
  listening.clear();
  clearReply();
  $("outcome").textContent = "None yet.";
  delete $("outcome").dataset.outcome;
  for (const id of ["endpoints", "workers", "method-names", "listening", "broadcasts"]) $(id).replaceChildren();
  for (const id of ["ask", "listen"]) $(id).reset();
  $("methods-title").textContent = "Methods";
  $("methods-hint").hidden = false;
}

$("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [name, secret] = [$("name").value.trim(), $("token").value];
  const credential = name ? { name, password: secret } : { token: secret.trim() };
  const response = await post("login", credential).catch(() => null);
  if (!response?.ok) {
    $("sign-in-error").textContent = response ? await reasonOf(response) : "The broker does not answer.";
    $("token").select();
    return;
  }
  $("token").value = "";
  $("sign-in-error").textContent = "";
  await begin();
});

$("sign-out").addEventListener("click", async () => {
  const response = await post("logout").catch(() => null);
  const leaving = client;
  client = null; // so that its end is not told as news
  leaving?.close();
  forget();
  showSignIn(response?.ok || response?.status === 401 ? "" : "The broker did not hear of it: sign out again later.");
});

// ------------------------------------------------------------ endpoints and methods

let refreshing = false;

async function refresh() {
  if (refreshing || !client || client.state !== "connected" || document.hidden) return;
  refreshing = true;
  try {
    showEndpoints(await client.call("broker.endpoints", null, { timeout: 5 }));
    if (chosen) showMethods(await client.call("broker.describe", { endpoint: chosen }, { timeout: 5 }));
  } catch (error) {
    if (!(error instanceof BrokerError)) throw error;
    if (chosen && error.outcome !== "connection_lost") showMethods({ workers: [], error: error.detail });
  } finally {
    refreshing = false;
  }
}

function showEndpoints(endpoints) {
  endpoints.sort((a, b) => a.endpoint.localeCompare(b.endpoint));
  const list = $("endpoints");
  const known = new Map([...list.children].map((item) => [item.dataset.endpoint, item]));
  const items = endpoints.map((endpoint) => {
    const item = known.get(endpoint.endpoint) ?? endpointItem(endpoint.endpoint);
    const [button] = item.children;
    const load = [count(endpoint.workers, "worker")];
    if (endpoint.executing) load.push(`${endpoint.executing} executing`);
    if (endpoint.queued) load.push(`${endpoint.queued} queued`);
    if (endpoint.closed) load.push("closed");
    const said = button.lastChild;
    if (said.textContent !== load.join(", ")) said.textContent = load.join(", ");
    said.className = endpoint.workers ? "" : "idle";
    button.setAttribute("aria-current", String(endpoint.endpoint === chosen));
    return item;
  });
  // Only where something changed: moving a button would take the focus from it.
  if (items.length !== list.children.length || items.some((item, at) => item !== list.children[at])) {
    list.replaceChildren(...items);
  }
  $("no-endpoints").hidden = endpoints.length > 0;
}

function endpointItem(name) {
  const item = make("li", {}, make("button", { type: "button", onclick: () => choose(name) }, name, make("small")));
  item.dataset.endpoint = name;
  return item;
}

function choose(endpoint) {
  chosen = endpoint;
  described = "";
  $("endpoint").value = endpoint;
  $("listen-endpoint").value = endpoint;
  $("method").value = "";
  for (const item of $("endpoints").children) {
    item.firstChild.setAttribute("aria-current", String(item.dataset.endpoint === endpoint));
  }
  refresh();
}

function showMethods(view) {
  const workers = view.workers.map(({ peer, methods, capacity, info }) => ({ peer, methods, capacity, info }));
  const now = JSON.stringify([chosen, workers, view.error]);
  if (now === described) return;
  described = now;
  $("methods-title").textContent = `Methods of ${chosen}`;
  $("methods-hint").hidden = workers.length > 0;
  $("methods-hint").textContent = view.error ?? "Nobody serves this endpoint now.";
  $("workers").replaceChildren(...alike(workers).map(workerItem));
  const names = new Set(workers.flatMap((worker) => worker.methods ?? []));
  $("method-names").replaceChildren(...[...names].sort().map((name) => make("option", { value: name })));
  if (!$("method").value && names.size) choosePlain([...names].sort()[0]);
}

/** Workers that say the same of themselves are shown once. */
function alike(workers) {
  const groups = new Map();
  for (const worker of workers) {
    const { name, ...rest } = Object(worker.info);
    const key = JSON.stringify([worker.methods, rest]);
    const group = groups.get(key) ?? { ...worker, names: [] };
    group.names.push(typeof name === "string" && name ? `${name} (${worker.peer})` : worker.peer);
    groups.set(key, group);
  }
  return [...groups.values()];
}

function workerItem({ names, methods, info }) {
  const about = typeof info?.doc === "string" ? [make("p", {}, info.doc)] : [];
  const named = `${count(names.length, "worker")}: ${names.slice(0, 5).join(", ")}${names.length > 5 ? ", …" : ""}`;
  const list = (methods ?? []).map((name) => methodItem(name, Object(Object(info?.methods)[name])));
  const any = methods === null ? [make("p", { class: "hint" }, "It did not say which methods it has.")] : [];
  return make("div", { class: "worker" }, ...about, make("p", { class: "hint" }, named), ...any, make("ul", { class: "methods" }, ...list));
}

function methodItem(name, { doc, signature, params }) {
  const text = typeof signature === "string" ? name + signature : name;
  const said = typeof doc === "string" ? [make("small", {}, doc)] : [];
  const fill = () => {
    $("endpoint").value = chosen;
    $("method").value = name;
    $("params").value = template(params);
    $("params").focus();
  };
  return make("li", {}, make("button", { type: "button", onclick: fill }, make("code", {}, text), ...said));
}

function choosePlain(name) {
  $("method").value = name;
}

/** Params to begin with: what is required, empty, after its declared type. */
function template(params) {
  const empty = { str: "", int: 0, float: 0, bool: false, list: [], dict: {} };
  const wanted = Array.isArray(params) ? params.filter((param) => param?.required) : [];
  const members = wanted.map(({ name, type }) => [String(name), empty[String(type).split("[")[0]] ?? null]);
  return members.length ? JSON.stringify(Object.fromEntries(members), null, 2) : "{}";
}

// ------------------------------------------------------------ calling

function readParams() {
  const text = $("params").value.trim();
  $("params-error").textContent = "";
  $("params").removeAttribute("aria-invalid");
  if (!text) return undefined;
  try {
    const params = JSON.parse(text);
    if (typeof params === "object" && params !== null) return params;
    throw new SyntaxError("params is an object {…} or an array […]");
  } catch (error) {
    $("params-error").textContent = `Not sent: ${error.message}`;
    $("params").setAttribute("aria-invalid", "true");
    $("params").focus();
    return null;
  }
}

async function call() {
  const params = readParams();
  if (params === null || asking || !client) return;
  asking = new AbortController();
  setAsking(true);
  clearReply();
  $("outcome").textContent = "Waiting for the reply…";
  delete $("outcome").dataset.outcome;
  const begun = performance.now();
  const took = () => `${Math.round(performance.now() - begun).toLocaleString("en")} ms`;
  const onProgress = (done, total, text) => {
    const share = total === null ? done.toLocaleString("en") : `${done.toLocaleString("en")} of ${total.toLocaleString("en")}`;
    $("outcome").textContent = `Waiting for the reply: ${share}${text ? `, ${text}` : ""}…`;
  };
  const options = { timeout: Number($("timeout").value), signal: asking.signal, onProgress };
  try {
    const result = await client.call(`${$("endpoint").value}/${$("method").value}`, params, options);
    $("outcome").dataset.outcome = "ok";
    $("outcome").textContent = `ok, ${took()}`;
    showValue(result);
  } catch (error) {
    if (!(error instanceof BrokerError)) throw error;
    $("outcome").dataset.outcome = "bad";
    $("outcome").textContent = `${error.message}${error.retryable ? " It may be repeated." : ""}`;
    if (error.data !== undefined) showValue(error.data);
  } finally {
    asking = null;
    setAsking(false);
  }
}

function setAsking(busy) {
  $("call").disabled = busy;
  $("cancel").disabled = !busy;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  call();
});
$("params").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("cancel").addEventListener("click", () => asking?.abort());

// ------------------------------------------------------------ replies

function clearReply() {
  for (const url of urls) URL.revokeObjectURL(url);
  urls = [];
  $("images").replaceChildren();
  $("attachments").replaceChildren();
  $("reply").hidden = true;
  $("reply").textContent = "";
}

/** The value as JSON; images in it are shown as such, other attachments can be saved. */
function showValue(value) {
  const found = [];
  let text = JSON.stringify(value, (_, item) => lift(item, found), 2) ?? "null";
  if (text.length > TEXT_MAX) {
    text = `${text.slice(0, TEXT_MAX)}\n… ${(text.length - TEXT_MAX).toLocaleString("en")} more characters`;
  }
  found.forEach(({ bytes, type }, at) => showAttachment(bytes, type, at));
  $("reply").textContent = text;
  $("reply").hidden = false;
}

/** What stands in the text for bytes, which go to `found`. */
function lift(item, found) {
  let bytes = null;
  let said = "";
  if (item instanceof NdArray) {
    bytes = new Uint8Array(item.data.buffer ?? item.data);
    said = `array of ${item.dtype} (${item.shape.join(" × ")}), `;
  } else if (item instanceof ArrayBuffer) bytes = new Uint8Array(item);
  else if (typeof item === "string" && BASE64_IMAGE.test(item)) bytes = fromBase64(item);
  if (bytes === null) return item;
  const type = said ? "" : imageType(bytes);
  found.push({ bytes, type });
  return `⟨attachment ${found.length - 1}: ${said}${size(bytes)}${type && `, ${type}`}⟩`;
}

function showAttachment(bytes, type, at) {
  const url = URL.createObjectURL(new Blob([bytes], { type: type || "application/octet-stream" }));
  urls.push(url);
  if (type) {
    const image = make("img", { alt: `attachment ${at}, ${type}` });
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 128));
    image.addEventListener("error", () => image.replaceWith(make("p", { class: "error" }, "The image is damaged.")));
    image.src = url;
    $("images").append(image);
  }
  const name = `attachment-${at}${type ? `.${type.slice(6)}` : ".bin"}`;
  $("attachments").append(make("li", {}, make("a", { href: url, download: name }, `Save ${name}`), ` ${size(bytes)}`));
}

function size(bytes) {
  return `${bytes.length.toLocaleString("en")} bytes`;
}

function imageType(bytes) {
  const found = IMAGE_TYPES.find(([, magic]) => magic.every((byte, at) => bytes[at] === byte));
  return found ? found[0] : "";
}

function fromBase64(text) {
  try {
    return Uint8Array.from(atob(text.replace(/\s/g, "")), (letter) => letter.charCodeAt(0));
  } catch {
    return null; // it only looked like it
  }
}

// ------------------------------------------------------------ broadcasts

$("listen").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("listen-error").textContent = "";
  const endpoint = $("listen-endpoint").value;
  const topic = $("listen-topic").value || null;
  const name = topic ? `${endpoint} · ${topic}` : endpoint;
  if (listening.has(name) || !client) return;
  listening.set(name, null); // under way
  try {
    listening.set(name, await client.subscribe(endpoint, showBroadcast, { topic }));
  } catch (error) {
    listening.delete(name);
    if (!(error instanceof BrokerError)) throw error;
    $("listen-error").textContent = error.message;
    return;
  }
  const stop = make("button", { type: "button", "aria-label": `Stop listening to ${name}` }, "×");
  const item = make("li", {}, name, stop);
  stop.addEventListener("click", async () => {
    item.remove();
    const subscription = listening.get(name);
    listening.delete(name);
    await subscription?.close().catch(() => {}); // without a connection nothing is heard either
  });
  $("listening").append(item);
});

function showBroadcast({ endpoint, topic, data, missed }) {
  let text = JSON.stringify(data, (_, item) => lift(item, [])) ?? "null";
  if (text.length > BROADCAST_TEXT_MAX) text = `${text.slice(0, BROADCAST_TEXT_MAX)}…`;
  const time = make("time", {}, new Date().toLocaleTimeString("en-GB"));
  const lost = missed ? `(${missed} missed before) ` : "";
  const list = $("broadcasts");
  list.prepend(make("li", {}, time, " ", make("b", {}, topic ? `${endpoint} · ${topic}` : `${endpoint}`), ` ${lost}${text}`));
  while (list.children.length > BROADCASTS_MAX) list.lastChild.remove();
}

// ------------------------------------------------------------ begin

setInterval(refresh, REFRESH_MS);
document.addEventListener("visibilitychange", refresh);
begin();
