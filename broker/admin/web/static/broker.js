// A client of the request broker for browsers and node: asks, tells, publishes, listens and serves.
//
//     import { connect } from "/static/broker.js";            // node: from "request-broker-client"
//     const client = await connect("http://127.0.0.1:8765", { token });
//     const text = await client.call("data", "read", { path: "a.txt" }, { timeout: 5 });
//
// Every call ends once: with a result, or with a `BrokerError` that says how. Times are in seconds.

const GUARD_S = 1; // how long after its deadline a call waits for the broker's word; the broker promises 0.25
const DEFAULT_TIMEOUT_S = 30;
const OPEN_TIMEOUT_S = 10;
const SILENCE_S = 30; // a page cannot see the broker's pings, so after this long without a word it asks
const STEADY_S = 5; // a connection that held this long was a success: the next waits begin short again
const BACKOFF_FIRST_S = 0.25;
const BACKOFF_MOST_S = 15;
const SENT_MAX = 2; // how often a repeatable call is put on the wire over all connections
const MESSAGE_MAX_BYTES = 16 * 2 ** 20;
const ENVELOPE_BYTES = 4096;
const TIMER_MAX_MS = 2 ** 31 - 1; // setTimeout fires at once for more

const NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}";
const IS_NAME = new RegExp(`^${NAME}$`);
const IN_NODE = Boolean(globalThis.process?.versions?.node);
const FINAL_CLOSES = new Set([1000, 1002, 1007, 4400, 4403, 4404, 4409]); // coming back makes no sense

// ------------------------------------------------------------ how calls end

/** Whatever this module raises about a request or a connection; the message is one line. */
export class BrokerError extends Error {
  static outcome = "";

  constructor(detail = "", facts = {}) {
    super(detail);
    this.name = new.target.name;
    this.outcome = new.target.outcome;
    this.detail = detail;
    this.endpoint = "";
    this.method = "";
    this.code = 0;
    this.data = undefined;
    this.retryable = false;
    this.dispatched = false;
    this.worker = null;
    this.attempts = 0;
    Object.assign(this, facts);
    const where = this.endpoint ? `${this.endpoint}/${this.method}` : this.method;
    this.message = [where, this.outcome, detail].filter(Boolean).join(": ");
  }
}

/** The worker answered with an error of its own; `type` is the name of the exception there, if it said one. */
export class RemoteError extends BrokerError {
  static outcome = "worker_error";
  get type() {
    return typeof this.data?.type === "string" ? this.data.type : "";
  }
}
export class NoEndpoint extends BrokerError { static outcome = "no_endpoint"; }
export class NoMethod extends BrokerError { static outcome = "no_method"; }
export class InvalidRequest extends BrokerError { static outcome = "invalid"; }
export class NoWorker extends BrokerError { static outcome = "no_worker"; }
export class WorkerLost extends BrokerError { static outcome = "worker_lost"; }
/** `phase` is `queued` or `executing`; empty if the broker said nothing. */
export class DeadlineExceeded extends BrokerError {
  static outcome = "deadline";
  get phase() {
    return this.data?.phase ?? "";
  }
}
/** `bound` names what was reached; wait `retryAfterMs`. */
export class Overloaded extends BrokerError {
  static outcome = "overloaded";
  get bound() {
    return this.data?.bound ?? "";
  }
  get retryAfterMs() {
    return this.data?.retry_after_ms ?? 0;
  }
}
/** By an AbortSignal, whose reason is in `reason`, or by others: `data.cause` says by whom. */
export class Cancelled extends BrokerError { static outcome = "cancelled"; }
export class Denied extends BrokerError { static outcome = "denied"; }
export class ShuttingDown extends BrokerError { static outcome = "shutting_down"; }
export class TooLarge extends BrokerError { static outcome = "too_large"; }
export class SlowConsumer extends BrokerError { static outcome = "slow_consumer"; }
export class DuplicateId extends BrokerError { static outcome = "duplicate_id"; }
export class BadReply extends BrokerError { static outcome = "bad_reply"; }
export class KeyConflict extends BrokerError { static outcome = "key_conflict"; }
/** The connection broke before the answer came; `mayHaveExecuted` is false only if nothing of the request was sent. */
export class ConnectionLost extends BrokerError {
  static outcome = "connection_lost";
  constructor(detail, facts = {}) {
    super(detail, { mayHaveExecuted: false, retryable: !facts.mayHaveExecuted, ...facts });
  }
}
/** There is no broker at the URL. */
export class CannotConnect extends BrokerError { static outcome = "cannot_connect"; }
/** The broker does not let us in: `status` is 401 for a bad credential, 403 for a foreign page. */
export class Refused extends BrokerError { static outcome = "refused"; }

const BY_CODE = new Map([
  [-32700, InvalidRequest], [-32600, InvalidRequest], [-32602, InvalidRequest], [-32601, NoMethod],
  [-32001, NoWorker], [-32002, WorkerLost], [-32003, DeadlineExceeded], [-32004, Overloaded], [-32005, Cancelled],
  [-32006, Denied], [-32007, ShuttingDown], [-32008, TooLarge], [-32009, SlowConsumer], [-32010, DuplicateId],
  [-32011, BadReply], [-32012, KeyConflict],
]);
const BY_OUTCOME = new Map([NoEndpoint, RemoteError, ...BY_CODE.values()].map((kind) => [kind.outcome, kind]));

/** The outcomes a broker can report, each with its class. */
export const OUTCOMES = Object.freeze(Object.fromEntries(BY_OUTCOME));

/** What a served function throws to end its request with an error of its own making. */
export class Fault extends Error {
  constructor(message, { code = -32000, data, retryable = false } = {}) {
    super(message);
    this.name = "Fault";
    Object.assign(this, { code, data, retryable });
  }
}

function errorOf(error, meta, where) {
  const code = Number.isInteger(error?.code) ? error.code : -32603;
  const told = typeof error?.data === "object" && error.data ? error.data : {};
  const worker = meta?.worker ?? null;
  // The broker wraps its own codes when a worker uses them; of the specification's, its own name no worker.
  const own = (code < -32000 && code > -32020) || (worker === null && BY_CODE.has(code));
  const kind = own ? (BY_OUTCOME.get(told.outcome) ?? BY_CODE.get(code) ?? RemoteError) : RemoteError;
  const message = typeof error?.message === "string" ? error.message : "";
  return new kind((kind !== RemoteError && told.detail) || message, {
    ...where,
    code,
    data: error?.data,
    worker,
    attempts: told.attempts ?? meta?.attempts ?? 0,
    dispatched: kind === RemoteError || told.dispatched === true,
    retryable: meta?.retryable === true || (own && told.retryable === true),
  });
}

// ------------------------------------------------------------ values and attachments

/** A value as JSON text; the bytes in it are put into `attachments`, `{"$buffer": 0}` in their places. */
function encode(value, attachments) {
  const text = JSON.stringify(value, function replace(key, given) {
    const raw = this[key]; // as it was before a toJSON, which node's Buffer has
    if (raw instanceof ArrayBuffer) return { $buffer: attachments.push(new Uint8Array(raw)) - 1 };
    if (ArrayBuffer.isView(raw)) {
      return { $buffer: attachments.push(new Uint8Array(raw.buffer, raw.byteOffset, raw.byteLength)) - 1 };
    }
    if (typeof given === "number" && !Number.isFinite(given)) throw new TypeError(`${given} is no JSON; send null`);
    return given;
  });
  return text ?? "null";
}

function tooLarge(text, attachments) {
  let size = text.length;
  if (size * 3 > MESSAGE_MAX_BYTES - ENVELOPE_BYTES) size = new TextEncoder().encode(text).length;
  for (const attachment of attachments) size += attachment.length;
  return size > MESSAGE_MAX_BYTES - ENVELOPE_BYTES
    ? `a message of ${size} bytes is above the bound of ${MESSAGE_MAX_BYTES} bytes`
    : "";
}

/** Values whose attachments stand where they are referred to, as ArrayBuffers. */
function decode(value, attachments) {
  if (typeof value !== "object" || value === null) return value;
  if (Array.isArray(value)) return value.map((item) => decode(item, attachments));
  const keys = Object.keys(value);
  if (keys.length === 1 && keys[0] === "$buffer") {
    const attachment = attachments[value.$buffer];
    if (!attachment) throw new TypeError(`"$buffer": ${value.$buffer} names none of ${attachments.length} attachments`);
    return attachment;
  }
  for (const key of keys) value[key] = decode(value[key], attachments); // its own members all, "__proto__" too
  return value;
}

/** uint32 n | n offsets | part 0, the text | part 1 …; the first attachment begins at a multiple of 8. */
function pack(text, attachments) {
  const head = 4 * (attachments.length + 2);
  const encoded = new TextEncoder().encode(text);
  const padding = -(head + encoded.length) & 7;
  const offsets = [head];
  let size = head + encoded.length + padding;
  for (const attachment of attachments) {
    offsets.push(size);
    size += attachment.length;
  }
  const frame = new Uint8Array(size);
  const table = new DataView(frame.buffer);
  table.setUint32(0, offsets.length);
  offsets.forEach((offset, index) => table.setUint32(4 * (index + 1), offset));
  frame.set(encoded, head);
  frame.fill(0x20, head + encoded.length, head + encoded.length + padding);
  attachments.forEach((attachment, index) => frame.set(attachment, offsets[index + 1]));
  return frame;
}

function unpack(frame) {
  const table = new DataView(frame);
  const count = table.getUint32(0);
  if (count < 1 || 4 * (count + 1) > frame.byteLength) throw new RangeError("a binary message of no parts");
  const offsets = Array.from({ length: count }, (_, index) => table.getUint32(4 * (index + 1)));
  offsets.push(frame.byteLength);
  const parts = offsets.slice(0, -1).map((offset, index) => {
    if (offset < 4 * (count + 1) || offset > offsets[index + 1]) throw new RangeError("offsets out of order");
    return frame.slice(offset, offsets[index + 1]);
  });
  return [new TextDecoder("utf-8", { fatal: true }).decode(parts[0]), parts.slice(1)];
}

// ------------------------------------------------------------ opening a WebSocket

async function webSocketClass() {
  if (globalThis.WebSocket) return globalThis.WebSocket;
  try {
    return (await import("ws")).WebSocket;
  } catch {
    // npm links a folder it installs: then "ws" lies beside the program, not beside this file
    const { createRequire } = await import("node:module");
    try {
      return createRequire(`${process.cwd()}/`)("ws").WebSocket;
    } catch {
      throw new CannotConnect("this node has no WebSocket: `npm install ws`, or use node 22 or newer");
    }
  }
}

function baseOf(url) {
  let base;
  try {
    base = new URL(url);
  } catch {
    throw new InvalidRequest(`${url} is no URL of a broker, such as http://127.0.0.1:8765`);
  }
  const scheme = { "http:": "http:", "ws:": "http:", "https:": "https:", "wss:": "https:" }[base.protocol];
  if (!scheme || base.username || base.search) {
    throw new InvalidRequest("the URL of a broker is http(s) or ws(s), with neither a user name nor a query");
  }
  return `${scheme}//${base.host}${base.pathname.replace(/\/(ws\/?)?$/, "")}`;
}

/** Exchange the token, or the page's cookie, for a ticket. Unlike a WebSocket this says why we are not let in. */
async function ticketFor(base, token) {
  let response, told;
  try {
    response = await fetch(`${base}/ticket`, {
      method: "POST",
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: AbortSignal.timeout(OPEN_TIMEOUT_S * 1000),
    });
    told = await response.json().catch(() => ({}));
  } catch (error) {
    const reason = error.cause?.message ?? error.message;
    throw new CannotConnect(`no broker at ${base}: ${reason}`, { retryable: true });
  }
  if (response.ok && told.ticket) return told.ticket;
  const { status } = response;
  if (status === 404 || response.ok) throw new CannotConnect(`what answers at ${base} is no broker (HTTP ${status})`);
  const reason = typeof told.error === "string" ? told.error.slice(0, 500) : `HTTP ${status}`;
  const comeBack = status === 429 || status >= 500;
  throw new Refused(`the broker at ${base} does not let us in: ${reason}`, { status, code: status, retryable: comeBack });
}

function base64url(text) {
  const bytes = new TextEncoder().encode(text);
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

async function openSocket(base, options) {
  const [token, given] = await Promise.all([valueOf(options.token), valueOf(options.ticket)]);
  // A browser shows no reason where a WebSocket is refused, so there the ticket is asked for first.
  const ticket = given ?? (IN_NODE ? null : await ticketFor(base, token));
  const protocols = ticket || !token ? ["jsonrpc"] : ["jsonrpc", `bearer.${base64url(token)}`];
  const query = ticket ? `&ticket=${encodeURIComponent(ticket)}` : "";
  const WebSocket = await webSocketClass();
  const socket = new WebSocket(`${base.replace(/^http/, "ws")}/ws?binary=1&meta=1${query}`, protocols);
  socket.binaryType = "arraybuffer";
  const why = await new Promise((resolve) => {
    const timer = setTimeout(() => resolve(`no answer within ${OPEN_TIMEOUT_S} s`), OPEN_TIMEOUT_S * 1000);
    const done = (reason) => {
      clearTimeout(timer);
      resolve(reason);
    };
    socket.onopen = () => done("");
    socket.onerror = (event) => done(event.message || "its WebSocket did not open");
    socket.onclose = (event) => done(event.reason || "its WebSocket did not open");
  });
  if (!why) return socket;
  socket.onopen = socket.onclose = null;
  socket.onerror = () => {}; // without one, node would end the process
  socket.close();
  if (IN_NODE && !ticket) await ticketFor(base, token); // says whether it was the credential, or that nobody is there
  throw new CannotConnect(`no connection to ${base}: ${why}`, { retryable: true });
}

async function valueOf(given) {
  return typeof given === "function" ? given() : given;
}

// ------------------------------------------------------------ the client

/** One session with a broker, over one connection after the other. Made by `connect`. */
export class Client {
  #base;
  #options;
  #link = null; // { socket, heard, openedAt } while there is a connection
  #state = "connecting";
  #ended = null; // why there will be no connection any more
  #calls = new Map(); // id → call, in the order they were asked
  #ids = new WeakMap(); // promise of a call → its id
  #lastId = 0;
  #failures = 0;
  #wake = null; // ends a wait between two attempts
  #timer = null;
  #standing = new Map(); // key → [method, params], asked again on every connection
  #subscriptions = new Map(); // key → { callbacks, last }
  #served = new Map(); // endpoint → Map of functions
  #running = new Map(); // id of a request given to us → AbortController

  constructor(url, options) {
    this.#base = baseOf(url);
    this.#options = options;
  }

  /** Where the broker is. */
  get url() {
    return this.#base;
  }

  /** `connecting`, `connected` or `closed`. */
  get state() {
    return this.#state;
  }

  // ---------------------------------------------------------- asking

  /** Ask a method of an endpoint; `endpoint` null for the broker's own methods. Rejects with a BrokerError. */
  call(endpoint, method, params, options = {}) {
    let id;
    const promise = new Promise((resolve, reject) => {
      id = this.#ask(endpoint, method, params, options, resolve, reject);
    });
    if (id !== undefined) this.#ids.set(promise, id);
    return promise;
  }

  /** Take back a call, by the promise that `call` gave: it rejects with Cancelled, and the worker is told. */
  cancel(promise) {
    const call = this.#calls.get(this.#ids.get(promise));
    if (call) this.#takeBack(call);
    return call !== undefined;
  }

  /** Tell a method of an endpoint: no answer, and no promise that it arrives. Throws if there is no connection. */
  notify(endpoint, method, params) {
    const where = { endpoint: endpoint ?? "", method };
    const name = checkedName(endpoint, method);
    const [text, attachments] = encodeFor(where, params);
    if (!this.#isOpen()) throw new ConnectionLost("there is no connection to the broker now", where);
    this.#send(`{"jsonrpc":"2.0","method":"${name}"${text && `,"params":${text}`}}`, attachments);
  }

  /** Broadcast to an endpoint's listeners, a topic's, one peer (`to`), or with null to everybody. */
  publish(endpoint, data, { topic, to, ...options } = {}) {
    const place = Object.fromEntries(Object.entries({ endpoint, topic, to }).filter(([, value]) => value != null));
    return this.call(null, "broker.publish", { ...place, data: data ?? null }, options);
  }

  /** The endpoints this credential may know of. */
  endpoints(options) {
    return this.call(null, "broker.endpoints", undefined, options);
  }

  /** One endpoint with its workers, their methods, and what they say of themselves. */
  describe(endpoint, options) {
    return this.call(null, "broker.describe", { endpoint }, options);
  }

  /** Whether the broker answers. */
  ping(options) {
    return this.call(null, "broker.ping", undefined, options);
  }

  // ---------------------------------------------------------- listening

  /** `callback(message)` for every broadcast; resolves to a function that ends it. Survives reconnecting. */
  async subscribe(endpoint, topic, callback) {
    if (typeof topic === "function") [topic, callback] = [undefined, topic];
    if (typeof callback !== "function") throw new TypeError("subscribe wants a function to call");
    const place = topic == null ? { endpoint } : { endpoint, topic };
    const key = keyOf(endpoint, topic);
    const entry = { callback }; // its own object: one function may subscribe twice
    const subscription = this.#subscriptions.get(key) ?? { entries: new Set(), last: null };
    this.#subscriptions.set(key, subscription);
    subscription.entries.add(entry); // before the reply: broadcasts may come right behind it
    const drop = () => {
      if (!subscription.entries.delete(entry) || subscription.entries.size) return false;
      return this.#subscriptions.delete(key) && this.#standing.delete(key);
    };
    if (endpoint != null) {
      try {
        const told = await this.call(null, "broker.subscribe", place, { repeat: true });
        subscription.last ??= told.seq;
      } catch (error) {
        drop();
        throw error;
      }
      if (subscription.entries.has(entry)) this.#standing.set(key, ["broker.subscribe", place]);
    }
    return async () => {
      if (drop() && this.#isOpen()) await this.call(null, "broker.unsubscribe", place);
    };
  }

  // ---------------------------------------------------------- serving

  /** Be a worker: `methods` are functions `(params, request) => result`. Resolves to a function that ends it. */
  async serve(endpoint, methods, { capacity = 64, info = {} } = {}) {
    const functions = new Map(Object.entries(methods).filter(([, method]) => typeof method === "function"));
    if (this.#served.has(endpoint)) throw new InvalidRequest("this client serves it already", { endpoint });
    const names = [...functions.keys()];
    const params = { endpoint, methods: names, capacity, info: { sdk: "javascript", ...info } };
    this.#served.set(endpoint, functions); // before the reply: requests may come right behind it
    try {
      await this.call(null, "broker.serve", params, { repeat: true });
    } catch (error) {
      this.#served.delete(endpoint);
      throw error;
    }
    const key = `serve ${endpoint}`;
    this.#standing.set(key, ["broker.serve", params]);
    return async () => {
      if (!this.#standing.delete(key)) return;
      if (this.#isOpen()) await this.call(null, "broker.unserve", { endpoint });
      this.#served.delete(endpoint);
    };
  }

  /** End: calls in flight reject with ConnectionLost, what is served is given up. */
  close() {
    if (this.#ended) return;
    const link = this.#link;
    this.#finish(new ConnectionLost("the connection was closed on this side"));
    link?.socket.close(1000);
  }

  // ---------------------------------------------------------- calls

  #ask(endpoint, method, params, options, resolve, reject) {
    const { timeout = DEFAULT_TIMEOUT_S, signal } = options;
    const where = { endpoint: endpoint ?? "", method };
    const name = checkedName(endpoint, method);
    if (timeout !== null && !(timeout > 0 && timeout < Infinity)) {
      throw new InvalidRequest(`timeout ${timeout} is not a positive number of seconds`, where);
    }
    if (options.retries && !options.idempotent) {
      throw new InvalidRequest("retries needs idempotent: true; what is not idempotent runs at most once", where);
    }
    const [text, attachments] = encodeFor(where, params);
    if (this.#ended) throw new ConnectionLost(this.#ended.detail, where);
    if (signal?.aborted) throw new Cancelled("taken back here", { ...where, reason: signal.reason });
    const deadline = timeout === null ? null : now() + timeout;
    const id = ++this.#lastId;
    const call = { id, name, where, text, attachments, options, signal, deadline, resolve, reject, sent: 0, link: null };
    if (signal) {
      call.abort = () => this.#takeBack(call);
      signal.addEventListener("abort", call.abort, { once: true });
    }
    if (timeout !== null) {
      call.timer = setTimeout(() => this.#tooLate(call), Math.min((timeout + GUARD_S) * 1000, TIMER_MAX_MS));
    }
    this.#calls.set(id, call);
    if (this.#isOpen()) this.#sendCall(call);
    else call.attachments = attachments.map((attachment) => attachment.slice()); // theirs may change until it is sent
    return id;
  }

  #sendCall(call) {
    const { idempotent, retries, wait, trace } = call.options;
    const left = call.deadline === null ? undefined : call.deadline - now();
    if (left <= 0) return; // its guard ends it
    const meta = JSON.stringify({ timeout: left && Math.max(left, 0.001), idempotent, retries, wait, trace });
    const params = call.text && `,"params":${call.text}`;
    call.sent += 1;
    call.link = this.#link;
    this.#send(`{"jsonrpc":"2.0","id":${call.id},"method":"${call.name}"${params},"meta":${meta}}`, call.attachments);
  }

  #settle(call) {
    clearTimeout(call.timer);
    call.signal?.removeEventListener("abort", call.abort);
    return this.#calls.delete(call.id);
  }

  #takeBack(call) {
    if (!this.#settle(call)) return;
    this.#tellCancel(call);
    call.reject(new Cancelled("taken back here", { ...call.where, reason: call.signal?.reason }));
  }

  #tooLate(call) {
    this.#settle(call);
    if (call.link && call.link === this.#link) {
      this.#tellCancel(call);
      const detail = "the broker has not answered in time";
      call.reject(new DeadlineExceeded(detail, { ...call.where, code: -32003, dispatched: true }));
    } else {
      const detail = "there was no connection to the broker until the deadline passed";
      call.reject(new ConnectionLost(detail, { ...call.where, mayHaveExecuted: call.sent > 0 }));
    }
  }

  #tellCancel(call) {
    if (call.link && call.link === this.#link && this.#isOpen()) {
      this.#send(`{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":${call.id}}}`);
    }
  }

  // ---------------------------------------------------------- the connection

  #isOpen() {
    return this.#link?.socket.readyState === 1;
  }

  #send(text, attachments = []) {
    this.#link.socket.send(attachments.length ? pack(text, attachments) : text);
  }

  /** As the function `connect`. */
  static async connect(url, options) {
    const client = new Client(url, options);
    await (options.patient ? client.#keepTrying() : client.#open());
    return client;
  }

  /** One attempt. */
  async #open() {
    const socket = await openSocket(this.#base, this.#options);
    if (this.#ended) {
      socket.close(1000);
      throw this.#ended;
    }
    const link = { socket, openedAt: now(), heard: now() };
    socket.onmessage = (event) => this.#received(link, event.data);
    socket.onerror = () => {}; // its close follows; without a listener node would end the process
    socket.onclose = (event) => this.#lost(link, event.code, event.reason);
    if (socket.readyState !== 1) throw new CannotConnect(`${this.#base} closed the connection at once`, { retryable: true });
    this.#link = link;
    this.#timer = setInterval(() => this.#listenForLife(link), (SILENCE_S * 1000) / 3);
    for (const [method, params] of this.#standing.values()) {
      this.call(null, method, params, { once: true }).catch((error) => this.#standingFailed(error));
    }
    // What stands comes first, then what waited.
    const calls = [...this.#calls.values()].filter((call) => call.link !== link);
    for (const call of calls) this.#sendCall(call);
    this.#tell("connected");
  }

  /** Connect, however often it takes; throws what does not pass. */
  async #keepTrying() {
    while (!this.#ended) {
      try {
        return await this.#open();
      } catch (error) {
        if (!(error instanceof BrokerError) || !error.retryable) throw error;
        this.#tell("connecting", error);
      }
      await this.#pause();
    }
  }

  /** Full jitter, so that those lost together return apart. */
  #pause() {
    const bound = Math.min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** this.#failures);
    this.#failures += 1;
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, Math.random() * bound * 1000);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  #lost(link, code, reason) {
    if (this.#link !== link) return;
    this.#leave(link);
    if (now() - link.openedAt > STEADY_S) this.#failures = 0;
    const why = code === 1006 ? `the connection to ${this.#base} broke` : `the broker closed the connection: ${code}`;
    const error = new ConnectionLost(`${why} ${reason}`.trim());
    if (FINAL_CLOSES.has(code) || this.#options.reconnect === false) {
      this.#finish(error);
      return;
    }
    for (const call of [...this.#calls.values()]) {
      const { idempotent, repeat, once } = call.options;
      if (!once && (call.sent === 0 || ((idempotent || repeat) && call.sent < SENT_MAX))) continue;
      this.#settle(call);
      call.reject(new ConnectionLost(error.detail, { ...call.where, mayHaveExecuted: call.sent > 0 }));
    }
    this.#tell("connecting", error);
    this.#pause()
      .then(() => this.#keepTrying())
      .catch((final) => this.#finish(final));
  }

  #leave(link) {
    this.#link = null;
    clearInterval(this.#timer);
    link.socket.onmessage = link.socket.onclose = null;
    for (const controller of this.#running.values()) controller.abort(new ConnectionLost("nobody waits any more"));
    this.#running.clear();
  }

  #finish(error) {
    if (this.#ended) return;
    this.#ended = error;
    if (this.#link) this.#leave(this.#link);
    for (const call of [...this.#calls.values()]) {
      this.#settle(call);
      call.reject(new ConnectionLost(error.detail, { ...call.where, mayHaveExecuted: call.sent > 0 }));
    }
    this.#standing.clear();
    this.#subscriptions.clear();
    this.#served.clear();
    this.#wake?.();
    this.#tell("closed", error);
  }

  async #listenForLife(link) {
    if (now() - link.heard < SILENCE_S || link.asked) return;
    link.asked = true;
    await this.ping({ timeout: OPEN_TIMEOUT_S, once: true }).catch(() => {});
    link.asked = false;
    if (now() - link.heard < SILENCE_S) return;
    this.#lost(link, 1006, "without a word");
    link.socket.close();
  }

  #tell(state, error) {
    this.#state = state;
    guarded(this.#options.onState, state, error);
  }

  #standingFailed(error) {
    if (error instanceof ConnectionLost) return; // the next connection asks again
    if (this.#options.onError) guarded(this.#options.onError, error);
    else console.error(error.message);
  }

  // ---------------------------------------------------------- what the broker says

  #received(link, data) {
    link.heard = now();
    let message;
    let attachments = [];
    try {
      let text = data;
      if (typeof data !== "string") [text, attachments] = unpack(data);
      message = JSON.parse(text);
      if (typeof message !== "object" || message === null) throw new TypeError("no message");
    } catch {
      this.#lost(link, 1006, "with a message that is not to be read");
      link.socket.close(4400);
      return;
    }
    if (message.method === undefined) this.#replied(message, attachments);
    else if (message.method === "broker.message") this.#heard(message.params, attachments);
    else if (message.method === "$/cancelRequest") this.#cancelled(message.params?.id);
    else this.#asked(message, attachments);
  }

  #replied(message, attachments) {
    const call = this.#calls.get(message.id);
    if (!call) return; // it has ended here
    this.#settle(call);
    try {
      if (attachments.length) message = decode(message, attachments);
    } catch (error) {
      call.reject(new BadReply(`the reply cannot be read: ${error.message}`, call.where));
      return;
    }
    if (message.error === undefined) call.resolve(message.result);
    else call.reject(errorOf(message.error, message.meta, call.where));
  }

  #heard(params, attachments) {
    const { endpoint = null, topic = null, seq = null } = params ?? {};
    const subscription = this.#subscriptions.get(keyOf(endpoint, topic));
    if (!subscription) return;
    let data = params.data ?? null;
    try {
      if (attachments.length) data = decode(data, attachments);
    } catch {
      return; // somebody published what cannot be read; nobody waits for it
    }
    const missed = seq !== null && subscription.last < seq ? seq - (subscription.last ?? seq - 1) - 1 : 0;
    if (seq !== null) subscription.last = seq;
    for (const { callback } of [...subscription.entries]) guarded(callback, { endpoint, topic, seq, data, missed });
  }

  #cancelled(id) {
    this.#running.get(id)?.abort(new Cancelled("nobody waits for the answer any more"));
    this.#running.delete(id);
  }

  async #asked(message, attachments) {
    const { id } = message;
    const link = this.#link;
    const controller = new AbortController();
    if (id !== undefined) this.#running.set(id, controller);
    const answer = await this.#run(message, attachments, controller.signal);
    // An answer counts only on the connection the request came by, and if somebody still waits for it.
    if (id === undefined || this.#running.get(id) !== controller || this.#link !== link) return;
    this.#running.delete(id);
    if (this.#isOpen()) this.#send(`{"jsonrpc":"2.0","id":${JSON.stringify(id)},${answer.text}}`, answer.attachments);
  }

  /** The answer's members as text, and its attachments. Never throws. */
  async #run({ method: name, params, meta = {} }, attachments, signal) {
    const [endpoint, method] = String(name).split("/");
    const { timeout = null, trace = null, idempotent = false } = meta;
    try {
      const served = this.#served.get(endpoint)?.get(method);
      if (!served) throw new Fault("Method not found", { code: -32601, data: { detail: `no method ${method}` } });
      const request = { endpoint, method, signal, timeout, trace, idempotent };
      const result = await served(attachments.length ? decode(params, attachments) : params, request);
      const given = [];
      const text = encode(result, given);
      const detail = tooLarge(text, given);
      if (detail) throw new RangeError(`the result cannot be sent: ${detail}`);
      return { text: `"result":${text}`, attachments: given };
    } catch (error) {
      return { text: failure(error), attachments: [] };
    }
  }
}

/** What a caller is told of an exception: its type and its text, never a stack. */
function failure(error) {
  const message = String(error?.message ?? error).slice(0, 4000);
  let { code, data, retryable } = error instanceof Fault ? error : {};
  if (!Number.isInteger(code)) code = -32000;
  data ??= code === -32000 ? { type: error?.name ?? typeof error, message } : undefined;
  const meta = retryable ? ',"meta":{"retryable":true}' : "";
  try {
    return `"error":${JSON.stringify({ code, message, data })}${meta}`;
  } catch {
    return `"error":${JSON.stringify({ code, message })}${meta}`; // data that is no JSON
  }
}

function checkedName(endpoint, method) {
  const own = endpoint == null || endpoint === "";
  if (!IS_NAME.test(method) || (own ? !method.startsWith("broker.") : !IS_NAME.test(endpoint))) {
    const shown = `${own ? "" : `${endpoint}/`}${method}`.slice(0, 140);
    const rule = "names are 1 to 128 of A-Z a-z 0-9 _ . - and begin with none of . -";
    throw new InvalidRequest(`${shown} is no method of an endpoint; ${rule}`);
  }
  return own ? method : `${endpoint}/${method}`;
}

function encodeFor(where, params) {
  if (params === undefined || params === null) return ["", []];
  const attachments = [];
  let text;
  try {
    text = encode(params, attachments);
  } catch (error) {
    throw new InvalidRequest(`params cannot be sent: ${error.message}`, where);
  }
  if (!/^[[{]/.test(text)) throw new InvalidRequest("params is an object (by name) or an array (by position)", where);
  const detail = tooLarge(text, attachments);
  if (detail) throw new TooLarge(detail, { ...where, code: -32008 });
  return [text, attachments];
}

function keyOf(endpoint, topic) {
  return JSON.stringify([endpoint ?? null, topic ?? null]);
}

/** Call somebody's function; what it throws must not reach whoever comes next. */
function guarded(callback, ...given) {
  try {
    callback?.(...given);
  } catch (error) {
    console.error(error);
  }
}

function now() {
  return performance.now() / 1000;
}

/**
 * Connect to a broker. In browsers `url` defaults to the page's own origin, and without a token the cookie counts.
 * Rejects with CannotConnect or Refused; with `patient` it goes on trying for as long as that makes sense.
 */
export function connect(url = globalThis.location?.origin, options = {}) {
  return Client.connect(url, options);
}
