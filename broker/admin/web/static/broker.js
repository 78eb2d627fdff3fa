// A client of the request broker for browsers and node: asks, tells, publishes, listens and serves.
//
//     import { connect } from "/static/broker.js"; // node: from "request-broker-client"
//     const client = await connect("http://127.0.0.1:8787", { token });
//     const text = await client.call("data/read", { path: "a.txt" }, { timeout: 5 });
//
// The names and arguments are those of the Python package, in JavaScript's spelling. Every call ends once: with a
// result, or with a `BrokerError` that says how. Times are in seconds.

const GUARD_S = 1; // how long after its deadline a call waits for the broker's word; the broker promises 0.25
const DEFAULT_TIMEOUT_S = 30;
const OPEN_TIMEOUT_S = 10;
const SILENCE_S = 30; // a page cannot see the broker's pings, so after this long without a word it asks
const CAPACITY = 64;
const DRAIN_S = 25;
const INBOX_MAX = 1000; // broadcasts a subscription keeps for its reader; then the oldest is dropped and counted
const STEADY_S = 5; // a connection that held this long was a success: the next waits begin short again
const BACKOFF_FIRST_S = 0.25;
const BACKOFF_MOST_S = 15;
const SENT_MAX = 2; // how often a repeatable call is put on the wire over all connections
const MESSAGE_MAX_BYTES = 16 * 2 ** 20;
const ENVELOPE_BYTES = 4096;
const TIMER_MAX_MS = 2 ** 31 - 1; // setTimeout fires at once for more

const NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}";
const IS_METHOD = new RegExp(`^(?:(${NAME})/)?(${NAME})$`);
const IN_NODE = Boolean(globalThis.process?.versions?.node);
const FINAL_CLOSES = new Set([1000, 1002, 1007, 4400, 4403, 4404, 4409]); // coming back makes no sense

// ------------------------------------------------------------ how calls end

/** Whatever this module raises about a request or a connection; the message is one line that says what to do. */
export class BrokerError extends Error {
  static outcome = "";
  static advice = "";

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
    this.elapsedS = 0;
    this.advice = new.target.advice;
    Object.assign(this, facts);
    this.message = sentence(this);
  }
}

/** Which request, how it ended, why, how far it came, what to do. */
function sentence(error) {
  const { outcome, endpoint, method, worker, attempts, elapsedS, advice } = error;
  const name = endpoint ? `${endpoint}/${method}` : method;
  const said = error instanceof RemoteError ? `${error.type || error.code}: ${error.detail}` : error.detail;
  const text = (name ? [name, outcome, said].filter(Boolean).join(": ") : said) || outcome;
  const facts = [];
  if (worker) facts.push(`worker ${worker}`);
  if (attempts > 1) facts.push(`${attempts} attempts`);
  const [time, unit] = elapsedS >= 1 ? [elapsedS, "s"] : [elapsedS * 1e3, "ms"];
  if (elapsedS) facts.push(`after ${Number(time.toPrecision(3))} ${unit}`);
  return `${text}${facts.length ? ` (${facts.join(", ")})` : ""}${advice ? `. ${advice}` : ""}`;
}

/** The worker answered with an error of its own; `type` is the name of the exception there, if it said one. */
export class RemoteError extends BrokerError {
  static outcome = "worker_error";
  static advice = "The worker's log says more.";
  get type() {
    return typeof this.data?.type === "string" ? this.data.type : "";
  }
}
export class NoEndpoint extends BrokerError {
  static outcome = "no_endpoint";
  static advice = "Check the name, or start its worker.";
}
export class NoMethod extends BrokerError {
  static outcome = "no_method";
  static advice = "Check the name; `broker describe` lists the methods.";
}
/** The request, one of its options or its params are wrong; many such are found before anything is sent. */
export class InvalidRequest extends BrokerError {
  static outcome = "invalid";
}
export class NoWorker extends BrokerError {
  static outcome = "no_worker";
  static advice = "Start a worker, or ask with wait to queue until one comes.";
}
export class WorkerLost extends BrokerError {
  static outcome = "worker_lost";
  static advice = "The request may have run. Mark it idempotent to have it tried elsewhere.";
}
/** `phase` is `queued` (no worker had it) or `executing`; empty if the broker said nothing. */
export class DeadlineExceeded extends BrokerError {
  static outcome = "deadline";
  static advice = "Give it a longer timeout, or look whether the worker hangs.";
  get phase() {
    return this.data?.phase ?? "";
  }
}
/** `bound` names what was reached; wait `retryAfterS`. */
export class Overloaded extends BrokerError {
  static outcome = "overloaded";
  static advice = "Wait a moment and repeat, or raise the bound in the broker's configuration.";
  get bound() {
    return this.data?.bound ?? "";
  }
  get retryAfterS() {
    return (this.data?.retry_after_ms ?? 0) / 1000;
  }
}
/** By an AbortSignal, whose reason is in `reason`, or by others: `cause` says by whom. */
export class Cancelled extends BrokerError {
  static outcome = "cancelled";
  get cause() {
    return this.data?.cause ?? "";
  }
}
export class Denied extends BrokerError {
  static outcome = "denied";
  static advice = "Ask whoever runs the broker for a token with the role at this endpoint.";
}
export class ShuttingDown extends BrokerError {
  static outcome = "shutting_down";
  static advice = "Connect again in a moment and repeat.";
}
export class TooLarge extends BrokerError {
  static outcome = "too_large";
  static advice = "Send less at once, or raise the bound.";
}
export class SlowConsumer extends BrokerError {
  static outcome = "slow_consumer";
  static advice = "Read faster, or ask for less at once.";
}
export class DuplicateId extends BrokerError {
  static outcome = "duplicate_id";
  static advice = "Give every request an id of its own.";
}
export class BadReply extends BrokerError {
  static outcome = "bad_reply";
  static advice = "Look at the worker.";
}
export class KeyConflict extends BrokerError {
  static outcome = "key_conflict";
  static advice = "Make a new key for a new request.";
}
/** The connection broke before the answer came; `mayHaveExecuted` is false only if nothing of the request was sent. */
export class ConnectionLost extends BrokerError {
  static outcome = "connection_lost";
  constructor(detail, { mayHaveExecuted = false, ...facts } = {}) {
    let advice = "";
    if (facts.method) {
      advice = mayHaveExecuted
        ? "It may have run; look before you repeat it."
        : "It did not reach the broker; repeating it is safe.";
    }
    super(detail, { mayHaveExecuted, retryable: !mayHaveExecuted, advice, ...facts });
  }
}
/** There is no broker at `url`, or it does not speak as one. */
export class CannotConnect extends BrokerError {
  static outcome = "cannot_connect";
}
/** The broker does not let us in: `status` is 401 for a bad credential, 403 for a foreign page or a role. */
export class Refused extends BrokerError {
  static outcome = "refused";
}

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

function errorOf(error, meta, where, elapsedS) {
  const code = Number.isInteger(error?.code) ? error.code : -32603;
  const told = typeof error?.data === "object" && error.data ? error.data : {};
  const worker = meta?.worker ?? null;
  // The broker wraps its own codes when a worker uses them; of the specification's, its own name no worker.
  const own = (code < -32000 && code > -32020) || (worker === null && BY_CODE.has(code));
  const kind = own ? (BY_OUTCOME.get(told.outcome) ?? BY_CODE.get(code) ?? RemoteError) : RemoteError;
  const message = typeof error?.message === "string" ? error.message : "";
  const detail = typeof told.detail === "string" ? told.detail : "";
  const facts = {
    ...where,
    elapsedS,
    code,
    data: error?.data,
    worker,
    attempts: told.attempts ?? meta?.attempts ?? 0,
    dispatched: kind === RemoteError || told.dispatched === true,
    retryable: meta?.retryable === true || (own && told.retryable === true),
  };
  if (kind === RemoteError && (code === -32601 || code === -32602)) {
    return new kind(detail ? `${message}: ${detail}` : message, { ...facts, advice: "" });
  }
  if (kind === DeadlineExceeded && told.phase === "queued") {
    facts.advice = "No worker was free for it: start more workers, or give it a longer timeout.";
  }
  return new kind((kind !== RemoteError && detail) || message, facts);
}

// ------------------------------------------------------------ values and attachments

/** This machine's byte order, as numpy writes it. */
const ENDIAN = new Uint8Array(new Uint16Array([1]).buffer)[0] ? "<" : ">";
const TYPED = new Map([
  [`${ENDIAN}f4`, Float32Array], [`${ENDIAN}f8`, Float64Array],
  ["|i1", Int8Array], [`${ENDIAN}i2`, Int16Array], [`${ENDIAN}i4`, Int32Array], [`${ENDIAN}i8`, BigInt64Array],
  ["|u1", Uint8Array], [`${ENDIAN}u2`, Uint16Array], [`${ENDIAN}u4`, Uint32Array], [`${ENDIAN}u8`, BigUint64Array],
  ["|b1", Uint8Array],
]);

function dtypeOf(data) {
  for (const [dtype, kind] of TYPED) if (data instanceof kind) return dtype;
  return "";
}

/**
 * An array of numbers with a shape, as numpy has them: `data` is a typed array in C order, `dtype` as numpy writes it.
 * Where JavaScript has no such numbers (complex, text, dates, the other byte order) `data` is their bytes, an
 * ArrayBuffer. Booleans are a Uint8Array of 0 and 1 with the dtype `|b1`.
 */
export class NdArray {
  constructor(data, shape = [data?.length], dtype = dtypeOf(data)) {
    const lengths = Array.isArray(shape) && shape.length <= 32 && shape.every((n) => Number.isSafeInteger(n) && n >= 0);
    if (!lengths) throw new RangeError("the shape of an array is a list of at most 32 lengths");
    if (typeof dtype !== "string" || !dtype) throw new TypeError("an array has typed numbers, or bytes and a dtype");
    const kind = TYPED.get(dtype);
    if (kind && data instanceof ArrayBuffer && data.byteLength % kind.BYTES_PER_ELEMENT === 0) data = new kind(data);
    const items = shape.reduce((product, n) => product * n, 1);
    if (kind ? !(data instanceof kind) || data.length !== items : !(data instanceof ArrayBuffer)) {
      const has = data?.byteLength ?? 0;
      throw new RangeError(`an array of dtype ${dtype.slice(0, 40)} and shape [${shape}] is not made of ${has} bytes`);
    }
    Object.assign(this, { data, shape, dtype });
  }
}

/** A value as JSON text; bytes and arrays in it are put into `attachments`, `{"$buffer": 0}` in their places. */
function encode(value, attachments) {
  const attach = (view) => ({ $buffer: attachments.push(view) - 1 });
  const lift = (raw) => {
    if (raw instanceof ArrayBuffer) return attach(new Uint8Array(raw));
    if (raw instanceof NdArray) {
      const { data, shape, dtype } = raw;
      const { buffer = data, byteOffset = 0, byteLength } = data;
      return { $array: attach(new Uint8Array(buffer, byteOffset, byteLength)), dtype, shape };
    }
    // Of the views, those of bytes are bytes; those of other numbers are arrays of one dimension.
    const isBytes = raw instanceof Uint8Array || raw instanceof Uint8ClampedArray || raw instanceof DataView;
    if (!isBytes && dtypeOf(raw)) return lift(new NdArray(raw));
    return attach(new Uint8Array(raw.buffer, raw.byteOffset, raw.byteLength));
  };
  const text = JSON.stringify(value, function replace(key, given) {
    const raw = this[key]; // as it was before a toJSON, which node's Buffer has
    if (raw instanceof ArrayBuffer || raw instanceof NdArray || ArrayBuffer.isView(raw)) return lift(raw);
    if (typeof given === "number" && !Number.isFinite(given)) {
      throw new TypeError(`${given} is no JSON; send null, or an array, which may hold it`);
    }
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

/** Values whose attachments stand where they are referred to, as ArrayBuffers and NdArrays. */
function decode(value, attachments) {
  if (typeof value !== "object" || value === null) return value;
  if (Array.isArray(value)) return value.map((item) => decode(item, attachments));
  const keys = Object.keys(value);
  if (keys.length === 1 && keys[0] === "$buffer") {
    const attachment = attachments[value.$buffer];
    if (!attachment) throw new TypeError(`"$buffer": ${value.$buffer} names none of ${attachments.length} attachments`);
    return attachment;
  }
  if (keys.length === 3 && keys.includes("$array")) {
    const data = decode(value.$array, attachments);
    if (!(data instanceof ArrayBuffer)) throw new TypeError('"$array" wants {"$buffer": n}');
    return new NdArray(data, value.shape ?? null, value.dtype ?? null);
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
    throw new InvalidRequest(`${url} is no URL of a broker, such as http://127.0.0.1:8787`);
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
    throw new CannotConnect(`no broker at ${base}: ${reason}`, { url: base, retryable: true });
  }
  if (response.ok && told.ticket) return told.ticket;
  const { status } = response;
  if (status === 404 || response.ok) {
    throw new CannotConnect(`what answers at ${base} is no broker (HTTP ${status})`, { url: base });
  }
  const reason = typeof told.error === "string" ? told.error.slice(0, 500) : `HTTP ${status}`;
  const comeBack = status === 429 || status >= 500;
  const facts = { status, code: status, comeBack, retryable: comeBack };
  throw new Refused(`the broker at ${base} does not let us in: ${reason}`, facts);
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
  throw new CannotConnect(`no connection to ${base}: ${why}`, { url: base, retryable: true });
}

async function valueOf(given) {
  return typeof given === "function" ? given() : given;
}

// ------------------------------------------------------------ subscriptions and workers

const PUT = Symbol("put");
const END = Symbol("end");
const BEGIN_AT = Symbol("begin at");

/**
 * Broadcasts of one endpoint or topic: `for await (const message of subscription)`, unless they go to a callback. Made
 * by `subscribe`. Ends with `close()`, or by throwing ConnectionLost when there will be no connection any more. It
 * survives reconnecting; what came meanwhile is counted in `message.missed`. At most 1,000 unread messages are kept;
 * `dropped` counts those that had to go.
 */
export class Subscription {
  #callback;
  #close;
  #inbox = [];
  #waiting = null; // the promise of those who wait for a message
  #wake = () => {}; // resolves it
  #last = null;
  #ended = false;
  #error = null;

  constructor(endpoint, topic, callback, close) {
    Object.assign(this, { endpoint, topic, dropped: 0 });
    this.#callback = callback;
    this.#close = close;
  }

  /** Listen no more. */
  async close() {
    this[END](null);
    await this.#close(this);
  }

  /** The next message; null after `close`. Rejects with a TimeoutError after `timeout` seconds. */
  async get(timeout = null) {
    const late = `no broadcast of ${this.endpoint ?? "everybody"} within ${timeout} s`;
    const deadline = timeout === null ? Infinity : now() + timeout;
    for (;;) {
      const message = this.#inbox.shift();
      if (message) return message;
      if (this.#error) throw this.#error;
      if (this.#ended) return null;
      await within(deadline - now(), this.#news(), late);
    }
  }

  async *[Symbol.asyncIterator]() {
    for (let message; (message = await this.get()) !== null; ) yield message;
  }

  /** Resolves when there is something to look at; one promise for all who wait. */
  #news() {
    this.#waiting ??= new Promise((resolve) => (this.#wake = resolve));
    return this.#waiting;
  }

  #tell() {
    this.#waiting = null;
    this.#wake();
  }

  [BEGIN_AT](seq) {
    this.#last ??= seq ?? null;
  }

  [PUT]({ endpoint, topic, seq, data }) {
    if (this.#ended) return;
    const missed = seq !== null && this.#last !== null && seq > this.#last ? seq - this.#last - 1 : 0;
    if (seq !== null) this.#last = seq;
    const message = { endpoint, topic, seq, data, missed };
    if (this.#callback) {
      guarded(this.#callback, message);
      return;
    }
    if (this.#inbox.length >= INBOX_MAX) {
      this.#inbox.shift();
      this.dropped += 1;
    }
    this.#inbox.push(message);
    this.#tell();
  }

  [END](error) {
    if (this.#ended) return;
    this.#ended = true;
    this.#error = error;
    this.#tell();
  }
}

/** What serves an endpoint, made by `serve`. `peer` is what the broker calls it. */
export class Worker {
  #publish;
  #stop;

  constructor(facts, publish, stop) {
    Object.assign(this, facts);
    this.#publish = publish;
    this.#stop = stop;
  }

  /** Broadcast to the endpoint's listeners, or to one topic's subscribers, without an answer. */
  publish(data, { topic = null } = {}) {
    this.#publish(data, topic);
  }

  /** Take no more requests, finish those under way (at most `drain` seconds; with `now` none), and end. */
  async stop({ now = false } = {}) {
    await this.#stop(now);
  }
}

// ------------------------------------------------------------ the client

/** One session with a broker, over one connection after the other. Made by `connect`. */
export class Client {
  #base;
  #options;
  #link = null; // { socket, heard, openedAt } while there is a connection
  #state = "connecting";
  #closing = false; // by our own will
  #ended = null; // why there will be no connection any more
  #calls = new Map(); // id → call, in the order they were asked
  #ids = new WeakMap(); // promise of a call → its id
  #lastId = 0;
  #failures = 0;
  #wake = null; // ends a wait between two attempts
  #timer = null;
  #standing = new Map(); // key → { method, params, renewed, refused }, asked again on every connection
  #subscriptions = new Map(); // key → Set of subscriptions
  #served = new Map(); // endpoint → { functions, drain }
  #running = new Map(); // id of a request given to us → { controller, endpoint, done }

  constructor(url, options) {
    checkOptions("connect", options, "token ticket timeout reconnect wait onState onError");
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

  /** Whether there is a connection now. */
  get isConnected() {
    return this.#isOpen();
  }

  // ---------------------------------------------------------- asking

  /** Ask `endpoint/method`, or one of the broker's own, `broker.…`. Rejects with a BrokerError. */
  call(method, params, options = {}) {
    let id;
    const promise = new Promise((resolve, reject) => {
      checkOptions("call", options, "timeout idempotent retries wait trace signal");
      id = this.#ask(method, params, options, {}, resolve, reject);
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

  /**
   * The results for many params, in their order; at most `concurrency` requests are in flight. With `returnExceptions`
   * an error takes the place of its result; else the first one is thrown, and the requests still in flight are
   * cancelled, as they are when the iteration is left early. Options as for `call`.
   */
  async *map(method, many, { concurrency = 16, returnExceptions = false, ...options } = {}) {
    if (!(concurrency >= 1)) throw new InvalidRequest(`concurrency ${concurrency} is not at least 1`);
    const flight = [];
    const first = () => {
      const call = flight.shift();
      return returnExceptions ? call.catch((error) => error) : call;
    };
    try {
      for await (const params of many) {
        if (flight.length >= concurrency) yield await first();
        const call = this.call(method, params, options);
        call.catch(() => {}); // it may fail before its turn has come
        flight.push(call);
      }
      while (flight.length) yield await first();
    } finally {
      for (const call of flight) this.cancel(call);
    }
  }

  /** Tell `endpoint/method`: no answer, and no promise that it arrives. Throws if there is no connection now. */
  notify(method, params) {
    const where = whereOf(method);
    const [text, attachments] = encodeFor(where, params);
    if (!this.#isOpen()) throw new ConnectionLost("there is no connection to the broker now", where);
    this.#send(`{"jsonrpc":"2.0","method":"${method}"${text && `,"params":${text}`}}`, attachments);
  }

  /** Broadcast to an endpoint's listeners, to a topic's, to one peer (`to`), or with null to everybody. */
  async publish(endpoint, data, options = {}) {
    checkOptions("publish", options, "topic to");
    const { topic, to } = options;
    return this.call("broker.publish", { ...placeOf({ endpoint, topic, to }), data: data ?? null });
  }

  // ---------------------------------------------------------- asking about the broker

  /** The endpoints this credential may know of, with their workers, queue and load. */
  endpoints() {
    return this.call("broker.endpoints");
  }

  /** One endpoint with its workers, their methods, and what they say of themselves. */
  describe(endpoint) {
    return this.call("broker.describe", { endpoint });
  }

  /** Whether the broker answers. */
  ping() {
    return this.call("broker.ping");
  }

  // ---------------------------------------------------------- listening

  /**
   * Listen to an endpoint's broadcasts, to one of its topics, or with null to what goes to everybody. Resolves to a
   * Subscription to iterate over, or calls `callback` with every message.
   */
  async subscribe(endpoint, callback, options) {
    if (options === undefined && typeof callback === "object") [callback, options] = [null, callback];
    if (callback != null && typeof callback !== "function") throw new InvalidRequest("a callback is a function");
    checkOptions("subscribe", (options ??= {}), "topic");
    const place = placeOf({ endpoint, topic: options.topic });
    const { topic = null } = place;
    const key = keyOf(endpoint, topic);
    const subscription = new Subscription(endpoint, topic, callback, () => this.#unsubscribe(key, subscription, place));
    const others = this.#subscriptions.get(key) ?? new Set();
    this.#subscriptions.set(key, others.add(subscription)); // before the reply: broadcasts may come right behind it
    if (endpoint == null) return subscription;
    try {
      const told = await this.#request("broker.subscribe", place, { repeat: true });
      subscription[BEGIN_AT](told.seq);
    } catch (error) {
      this.#drop(key, subscription);
      throw error;
    }
    if (!others.has(subscription)) return subscription; // it was closed meanwhile
    this.#standing.set(key, {
      method: "broker.subscribe",
      params: place,
      refused: (error) => {
        this.#subscriptions.delete(key);
        for (const each of others) each[END](error);
      },
    });
    return subscription;
  }

  async #unsubscribe(key, subscription, place) {
    if (!this.#drop(key, subscription) || place.endpoint === undefined || !this.#isOpen()) return;
    await this.#request("broker.unsubscribe", place).catch(unlessLost); // lost, it is subscribed to nothing
  }

  /** Whether it was the last one of its key. */
  #drop(key, subscription) {
    const others = this.#subscriptions.get(key);
    subscription[END](null);
    if (!others?.delete(subscription) || others.size) return false;
    this.#standing.delete(key);
    return this.#subscriptions.delete(key);
  }

  // ---------------------------------------------------------- serving

  /**
   * Be a worker of `endpoint`. `methods` are functions `(params, request) => result`, by their names; a text `doc` of a
   * function is shown to who asks `describe`, as are `name` and `doc`. At most `capacity` requests are given to it at
   * a time; `drain` is how many seconds it gives them to finish when it is told to stop.
   */
  async serve(endpoint, methods, options = {}) {
    checkOptions("serve", options, "name doc capacity drain");
    const { name = "", doc = "", capacity = CAPACITY, drain = DRAIN_S } = options;
    const functions = new Map(Object.entries(methods).filter(([, method]) => typeof method === "function"));
    if (!functions.size) throw new InvalidRequest(`there are no functions to serve ${endpoint} with`, { endpoint });
    if (this.#served.has(endpoint)) throw new InvalidRequest("this client serves it already", { endpoint });
    const about = [...functions].map(([method, { doc }]) => [method, typeof doc === "string" ? { doc } : {}]);
    const said = { name: name || undefined, doc: doc || undefined };
    const info = { ...said, sdk: "javascript", methods: Object.fromEntries(about) };
    const params = { endpoint, methods: [...functions.keys()], capacity, info };
    this.#served.set(endpoint, functions); // before the reply: requests may come right behind it
    let told;
    try {
      told = await this.#request("broker.serve", params, { repeat: true });
    } catch (error) {
      this.#served.delete(endpoint);
      throw error;
    }
    const worker = new Worker(
      { endpoint, name, capacity, peer: told.peer },
      (data, topic) => this.#tellAll(endpoint, data, topic),
      (now) => this.#stop(endpoint, functions, now ? 0 : drain),
    );
    this.#standing.set(`serve ${endpoint}`, {
      method: "broker.serve",
      params,
      renewed: ({ peer }) => (worker.peer = peer),
      refused: () => this.#served.delete(endpoint),
    });
    return worker;
  }

  #tellAll(endpoint, data, topic) {
    const params = { ...placeOf({ endpoint, topic }), data: data ?? null };
    try {
      this.notify("broker.publish", params);
    } catch (error) {
      unlessLost(error);
    }
  }

  async #stop(endpoint, functions, drain) {
    if (this.#served.get(endpoint) !== functions) return;
    this.#standing.delete(`serve ${endpoint}`);
    if (this.#isOpen()) await this.#request("broker.unserve", { endpoint }).catch(unlessLost);
    const left = () => [...this.#running.values()].filter((request) => request.endpoint === endpoint);
    let timer;
    const late = new Promise((resolve) => (timer = setTimeout(resolve, Math.min(drain * 1000, TIMER_MAX_MS))));
    await Promise.race([late, Promise.all(left().map(({ done }) => done))]);
    clearTimeout(timer);
    for (const { controller, answer } of left()) {
      answer(failure(new Fault("the worker stopped before it was done")));
      controller.abort(new Cancelled("the worker stops"));
    }
    if (this.#served.get(endpoint) === functions) this.#served.delete(endpoint);
  }

  /** End: calls in flight reject with ConnectionLost, what is served is given up. */
  close() {
    if (this.#ended) return;
    const link = this.#link;
    this.#closing = true;
    this.#finish(new ConnectionLost("the connection was closed on this side"));
    link?.socket.close(1000);
  }

  // ---------------------------------------------------------- calls

  /** A call of this module's own: `repeat` puts it on the next connection too, `once` never. */
  #request(method, params, how = {}, options = {}) {
    return new Promise((resolve, reject) => this.#ask(method, params, options, how, resolve, reject));
  }

  #ask(name, params, options, how, resolve, reject) {
    const { timeout: ours = DEFAULT_TIMEOUT_S } = this.#options;
    const { timeout = ours, signal } = options;
    const where = whereOf(name);
    if (timeout !== null && !(timeout > 0 && timeout < Infinity)) {
      throw new InvalidRequest(`timeout ${timeout} is not a positive number of seconds`, where);
    }
    if (options.retries && !options.idempotent) {
      throw new InvalidRequest("retries needs idempotent: true; what is not idempotent runs at most once", where);
    }
    const [text, attachments] = encodeFor(where, params);
    if (this.#ended) throw new ConnectionLost(this.#ended.detail, where);
    if (signal?.aborted) throw new Cancelled("taken back here", { ...where, reason: signal.reason });
    const begunAt = now();
    const deadline = timeout === null ? null : begunAt + timeout;
    const id = ++this.#lastId;
    const call = {
      id, name, where, text, attachments, options, how, signal, begunAt, deadline, resolve, reject, sent: 0, link: null,
    };
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
    call.reject(new Cancelled("taken back here", { ...factsOf(call), reason: call.signal?.reason }));
  }

  #tooLate(call) {
    this.#settle(call);
    if (call.link && call.link === this.#link) {
      this.#tellCancel(call);
      const detail = "the broker has not answered in time";
      call.reject(new DeadlineExceeded(detail, { ...factsOf(call), code: -32003, dispatched: true }));
    } else {
      const detail = "there was no connection to the broker until the deadline passed";
      call.reject(new ConnectionLost(detail, { ...factsOf(call), mayHaveExecuted: call.sent > 0 }));
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
    await (options.wait ? client.#keepTrying() : client.#open());
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
    if (socket.readyState !== 1) {
      throw new CannotConnect(`${this.#base} closed the connection at once`, { url: this.#base, retryable: true });
    }
    this.#link = link;
    this.#timer = setInterval(() => this.#listenForLife(link), (SILENCE_S * 1000) / 3);
    for (const [key, standing] of this.#standing) {
      this.#request(standing.method, standing.params, { once: true })
        .then((told) => standing.renewed?.(told))
        .catch((error) => this.#standingFailed(key, standing, error));
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
      const again = call.options.idempotent || call.how.repeat;
      if (!call.how.once && (call.sent === 0 || (again && call.sent < SENT_MAX))) continue;
      this.#settle(call);
      call.reject(new ConnectionLost(error.detail, { ...factsOf(call), mayHaveExecuted: call.sent > 0 }));
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
    const running = [...this.#running.values()];
    this.#running.clear();
    for (const { controller } of running) controller.abort(new ConnectionLost("nobody waits any more"));
  }

  #finish(error) {
    if (this.#ended) return;
    this.#ended = error;
    if (this.#link) this.#leave(this.#link);
    for (const call of [...this.#calls.values()]) {
      this.#settle(call);
      call.reject(new ConnectionLost(error.detail, { ...factsOf(call), mayHaveExecuted: call.sent > 0 }));
    }
    const isOurs = error instanceof ConnectionLost && this.#closing;
    for (const subscriptions of this.#subscriptions.values()) {
      for (const subscription of subscriptions) subscription[END](isOurs ? null : error);
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
    await this.#request("broker.ping", undefined, { once: true }, { timeout: OPEN_TIMEOUT_S }).catch(() => {});
    link.asked = false;
    if (now() - link.heard < SILENCE_S) return;
    this.#lost(link, 1006, "without a word");
    link.socket.close();
  }

  #tell(state, error) {
    this.#state = state;
    guarded(this.#options.onState, state, error);
  }

  #standingFailed(key, standing, error) {
    if (error instanceof ConnectionLost) return; // the next connection asks again
    if (this.#standing.get(key) === standing) this.#standing.delete(key);
    standing.refused(error);
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
      call.reject(new BadReply(`the reply cannot be read: ${error.message}`, factsOf(call)));
      return;
    }
    if (message.error === undefined) call.resolve(message.result);
    else call.reject(errorOf(message.error, message.meta, call.where, now() - call.begunAt));
  }

  #heard(params, attachments) {
    const { endpoint = null, topic = null, seq = null } = params ?? {};
    const subscriptions = this.#subscriptions.get(keyOf(endpoint, topic));
    if (!subscriptions) return;
    let data = params.data ?? null;
    try {
      if (attachments.length) data = decode(data, attachments);
    } catch {
      return; // somebody published what cannot be read; nobody waits for it
    }
    for (const subscription of [...subscriptions]) subscription[PUT]({ endpoint, topic, seq, data });
  }

  #cancelled(id) {
    const running = this.#running.get(id);
    this.#running.delete(id);
    running?.controller.abort(new Cancelled("nobody waits for the answer any more"));
  }

  #asked(message, attachments) {
    const { id } = message;
    const link = this.#link;
    const controller = new AbortController();
    const [endpoint, method] = String(message.method).split("/");
    const request = { controller, endpoint };
    // An answer counts only on the connection the request came by, and if somebody still waits for it.
    request.answer = (text, given = []) => {
      if (id === undefined || this.#running.get(id) !== request) return;
      this.#running.delete(id);
      if (this.#link !== link || !this.#isOpen()) return;
      this.#send(`{"jsonrpc":"2.0","id":${JSON.stringify(id)},${text}}`, given);
    };
    if (id !== undefined) this.#running.set(id, request);
    const about = new ServedRequest(endpoint, method, message.meta, controller.signal);
    const served = this.#served.get(endpoint)?.get(method);
    request.done = answerTo(served, message.params, attachments, about).then((answer) => request.answer(...answer));
  }
}

/** What a served function is told of a request beside its params. */
class ServedRequest {
  #deadline;

  constructor(endpoint, method, meta, signal) {
    const { timeout = null, trace = null } = meta ?? {};
    Object.assign(this, { endpoint, method, trace, signal });
    this.#deadline = timeout === null ? null : now() + timeout;
  }

  /** Whether nobody waits for the answer any more; `signal` tells when. */
  get cancelled() {
    return this.signal.aborted;
  }

  /** Seconds until the answer is due, at least 0; null for a notification. */
  get leftS() {
    return this.#deadline === null ? null : Math.max(0, this.#deadline - now());
  }
}

/** The answer's members as text, and its attachments. Never throws. */
async function answerTo(served, params, attachments, request) {
  try {
    const nothing = { code: -32601, data: { detail: `no method ${request.method}` } };
    if (!served) throw new Fault("Method not found", nothing);
    if (attachments.length) params = readParams(params, attachments);
    const result = await served(params, request);
    const given = [];
    const text = encode(result, given);
    const detail = tooLarge(text, given);
    if (detail) throw new RangeError(`the result cannot be sent: ${detail}`);
    return [`"result":${text}`, given];
  } catch (error) {
    return [failure(error)];
  }
}

function readParams(params, attachments) {
  try {
    return decode(params, attachments);
  } catch (error) {
    throw new Fault("Invalid params", { code: -32602, data: { detail: error.message } });
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

/** Endpoint ("" for the broker's own methods) and method of a name. Throws InvalidRequest. */
function whereOf(name) {
  const [, endpoint = "", method] = IS_METHOD.exec(name) ?? [];
  if (method === undefined || typeof name !== "string" || (!endpoint && !name.startsWith("broker."))) {
    const rule = "names are 1 to 128 of A-Z a-z 0-9 _ . - and begin with none of . -";
    const shown = JSON.stringify(String(name).slice(0, 140));
    throw new InvalidRequest(`${shown} is not of the form endpoint/method; ${rule}`);
  }
  return { endpoint, method };
}

function factsOf(call) {
  return { ...call.where, elapsedS: now() - call.begunAt };
}

/** A typo in an option must not be silence. */
function checkOptions(what, options, known) {
  const names = known.split(" ");
  for (const name of Object.keys(options)) {
    if (!names.includes(name)) throw new InvalidRequest(`${what} has no option ${name}, but ${names.join(", ")}`);
  }
}

/** Where a broadcast goes or comes from: what was given of it. */
function placeOf(given) {
  const place = Object.fromEntries(Object.entries(given).filter(([, value]) => value != null));
  if (place.topic !== undefined && place.endpoint === undefined) {
    throw new InvalidRequest("a topic belongs to an endpoint; name it");
  }
  return place;
}

function unlessLost(error) {
  if (!(error instanceof ConnectionLost)) throw error;
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

/** Wait for a promise, at most so many seconds; then a TimeoutError. */
async function within(seconds, promise, late) {
  if (seconds === Infinity) return promise;
  let timer;
  const overdue = new Promise((_, reject) => {
    const fail = () => reject(new DOMException(late, "TimeoutError"));
    timer = setTimeout(fail, Math.min(Math.max(0, seconds) * 1000, TIMER_MAX_MS));
  });
  return Promise.race([promise, overdue]).finally(() => clearTimeout(timer));
}

function now() {
  return performance.now() / 1000;
}

/**
 * Connect to a broker. In browsers `url` defaults to the page's own origin, and without a token the cookie counts.
 * Rejects with CannotConnect or Refused; with `wait` it goes on trying for as long as that makes sense.
 */
export function connect(url = globalThis.location?.origin, options = {}) {
  return Client.connect(url, options);
}
