// One call from this side: what was asked with it, what it is on the wire, and whether it may go there again.

import { InvalidRequest, TooLarge } from "./errors.js";
import { now } from "./moments.js";
import { Inflow, Outflow, isIterable, iteratorOf } from "./streams.js";
import { PARAMS_FOLLOW, decode, encode, isLarge } from "./values.js";

const SENT_MAX = 2; // how often a repeatable call is put on the wire over all sessions

const NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}";
const IS_METHOD = new RegExp(`^(?:(${NAME})/)?(${NAME})$`);

/**
 * One call that has not ended. `how` says of this module's own requests whether to `repeat` them in the next session,
 * or to put them into this one only (`once`); `stream` says that its items are read one by one. Throws InvalidRequest
 * and TooLarge for what the broker would refuse.
 */
export class Call {
  session = null; // the one it was put on the wire in
  sent = 0;
  out = null; // Outflow of what goes out in parts
  in = null; // Inflow of what comes in parts
  timer = null;
  onAbort = null;
  #moved = false; // whether something was taken of what can be taken only once

  constructor(id, name, params, options, { how = {}, stream = false, timeoutS } = {}) {
    Object.assign(this, { id, name, options, how, isStream: stream, where: whereOf(name), begunAt: now() });
    const { timeout, key = null, parts = null, onProgress = null } = options;
    // The default of a client would cut a stream that flows; only a timeout of its own does.
    this.isOpenEnded = timeout === undefined && (stream || parts !== null);
    this.timeout = timeout === undefined ? timeoutS : timeout;
    this.deadline = this.timeout === null || this.isOpenEnded ? null : this.begunAt + this.timeout;
    this.#check();
    [this.text, this.attachments] = encodeParams(this.where, params);
    this.isLarge = isLarge(this.text, this.attachments);
    if (key !== null) {
      // A repeat is answered with the reply that was kept, so such a request is one message, and its reply another.
      if (parts !== null) throw new InvalidRequest("a request with a key sends no parts", this.where);
      if (this.isLarge) throw new TooLarge("params of a request with a key fit into one message", this.#tooLarge());
    }
    if (onProgress !== null && typeof onProgress !== "function") {
      throw new InvalidRequest("onProgress is a function of (done, total, text)", this.where);
    }
    if (stream) this.#openInflow();
  }

  #check() {
    const { parts = null, idle = null, retries, idempotent } = this.options;
    for (const [name, value] of [["timeout", this.timeout], ["idle", idle]]) {
      if (value !== null && !(value > 0 && value < Infinity)) {
        throw new InvalidRequest(`${name} ${value} is not a positive number of seconds`, this.where);
      }
    }
    if (retries && !idempotent) {
      throw new InvalidRequest("retries needs idempotent: true; what is not idempotent runs at most once", this.where);
    }
    if (parts !== null && !isIterable(parts)) {
      throw new InvalidRequest("parts is something to iterate over, such as a list or an async generator", this.where);
    }
  }

  #tooLarge() {
    return { ...this.where, code: -32008 };
  }

  /** What is known of it, for its error. */
  get facts() {
    return { ...this.where, elapsedS: now() - this.begunAt };
  }

  /** Theirs may change until it is sent; what goes in pieces is too much to copy. */
  keepAttachments() {
    if (!this.isLarge) this.attachments = this.attachments.map((attachment) => attachment.slice());
  }

  // ---------------------------------------------------------- on the wire

  /** Its message; null if its time is up before it could be sent. `say` is for what follows within this session. */
  put(session, say) {
    const left = this.deadline === null ? undefined : this.deadline - now();
    if (left <= 0) return null;
    this.session = session;
    this.sent += 1;
    const { idle, idempotent, retries, key, group, priority, wait, trace, timing, parts, onProgress } = this.options;
    const streams = this.isLarge || (parts ?? null) !== null;
    this.out = streams ? new Outflow(this.id, say) : null;
    this.say = say;
    const meta = JSON.stringify({
      timeout: left && Math.max(left, 0.001), idle, idempotent, retries, key, group, priority, wait, trace, timing,
      stream: streams ? "both" : undefined, progress: onProgress ? true : undefined,
    });
    const params = this.isLarge ? PARAMS_FOLLOW : this.text;
    return `{"jsonrpc":"2.0","id":${this.id},"method":"${this.name}"${params && `,"params":${params}`},"meta":${meta}}`;
  }

  /** Send what goes in parts, until all of it is gone. Throws what `parts` throws, or `Outflow.stop` was given. */
  async sendParts() {
    const { out, options, text, attachments } = this;
    const { parts = null } = options;
    if (this.isLarge) await out.pieces(text, attachments, { last: parts === null });
    if (parts === null) return;
    this.#moved = true;
    await out.all(iteratorOf(parts));
    await out.end();
  }

  /** The session is gone that it was put into: whether it may be put into the next. */
  mayGoAgain() {
    const { sent, how, options } = this;
    if (how.once) return false;
    if (sent === 0) return true;
    if (!(options.idempotent || how.repeat) || sent >= SENT_MAX || this.#moved || this.in?.begun) return false;
    this.session = null;
    if (this.isStream) this.in.beginAnew();
    else this.in = null;
    return true;
  }

  // ---------------------------------------------------------- what comes

  /** A part of its reply. Throws if it does not fit. */
  part(params, attachments, size) {
    if (!this.in) this.#openInflow();
    this.in.part(params, attachments, size);
  }

  /** What it resolves to. Throws if it cannot be read. */
  result(data = null, attachments = []) {
    if (!this.in) return attachments.length ? decode(data, attachments) : data;
    const result = this.in.last(data, attachments);
    return this.isStream ? result : this.in.all(result);
  }

  /** It has ended; who reads its items is told so where they end. */
  resolve(result) {
    this.in.finish(result);
  }

  reject(error) {
    this.in.end(error);
  }

  #openInflow() {
    this.in = new Inflow(this.id, (text) => this.say(text), { eager: !this.isStream });
  }
}

/** Endpoint ("" for the broker's own methods) and method of a name. Throws InvalidRequest. */
export function whereOf(name) {
  const [, endpoint = "", method] = IS_METHOD.exec(name) ?? [];
  if (method === undefined || typeof name !== "string" || (!endpoint && !name.startsWith("broker."))) {
    const rule = "names are 1 to 128 of A-Z a-z 0-9 _ . - and begin with none of . -";
    const shown = JSON.stringify(String(name).slice(0, 140));
    throw new InvalidRequest(`${shown} is not of the form endpoint/method; ${rule}`);
  }
  return { endpoint, method };
}

/** Params as text, "" for none, and attachments. Throws InvalidRequest. */
export function encodeParams(where, params) {
  if (params === undefined || params === null) return ["", []];
  const attachments = [];
  let text;
  try {
    text = encode(params, attachments);
  } catch (error) {
    throw new InvalidRequest(`params cannot be sent: ${error.message}`, where);
  }
  if (!/^[[{]/.test(text)) throw new InvalidRequest("params is an object (by name) or an array (by position)", where);
  return [text, attachments];
}

/** A typo in an option must not be silence. */
export function checkOptions(what, options, known) {
  const names = known.split(" ");
  for (const name of Object.keys(options)) {
    if (!names.includes(name)) throw new InvalidRequest(`${what} has no option ${name}, but ${names.join(", ")}`);
  }
}
