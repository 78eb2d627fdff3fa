// One request given to this side: what its function may ask and tell, and what becomes of the answer.

import { Cancelled, Fault, failure } from "./errors.js";
import { now } from "./moments.js";
import { Inflow, Outflow, yieldedBy } from "./streams.js";
import { decode, encode, isLarge, isMark } from "./values.js";

const PROGRESS_EVERY_S = 0.05; // at most one message in this time, however often a function tells

/**
 * A request until it is answered. `say(text, attachments)` tells the broker something, `isHeard()` whether that goes
 * out at once; `id` undefined is a notification, which nobody waits for.
 */
export class Serving {
  #message;
  #say; // null when it is answered, or nobody waits any more
  #send;
  #out = null;
  #in = null;
  #progress = null;
  #controller = new AbortController();

  constructor(message, say, isHeard) {
    const { id, meta = {} } = message;
    const [endpoint, method] = String(message.method).split("/");
    Object.assign(this, { id, endpoint, method, meta, done: null });
    this.#message = message;
    this.#say = this.#send = say;
    if (id === undefined) return;
    if (meta.stream === "out" || meta.stream === "both") this.#in = new Inflow(id, say);
    if (meta.progress !== undefined) this.#progress = new Progress(id, (text) => isHeard() && say(text));
  }

  /** Run the function, if there is one, and answer. Never throws. */
  async perform(served, attachments) {
    const request = new ServedRequest(this, this.#controller.signal, this.#in, this.#progress);
    let answer;
    try {
      const nothing = { code: -32601, data: { detail: `no method ${this.method}` } };
      if (!served) throw new Fault("Method not found", nothing);
      const params = await this.#params(attachments);
      answer = await this.#result(await served(params, request));
    } catch (error) {
      answer = [failure(error), []];
    }
    this.answer(...answer);
  }

  async #params(attachments) {
    const { params } = this.#message;
    try {
      if (this.#in && isMark(params)) return (await this.#in.next()).value;
      return attachments.length ? decode(params, attachments) : params;
    } catch (error) {
      throw new Fault("Invalid params", { code: -32602, data: { detail: error.message } });
    }
  }

  /** The answer's member as text, and its attachments; whatever the function yields goes before it. */
  async #result(returned) {
    const iterator = yieldedBy(returned);
    if (iterator) returned = await (this.id === undefined ? runOut(iterator) : this.#outflow().all(iterator));
    const attachments = [];
    const text = encode(returned, attachments);
    if (this.id === undefined || !isLarge(text, attachments)) return [`"result":${text}`, attachments];
    return [`"result":${await this.#outflow().onlyPieces(text, attachments)}`, []];
  }

  /** Most answers need none. */
  #outflow() {
    if (!this.#out) {
      this.#out = new Outflow(this.id, this.#send);
      if (this.#controller.signal.aborted) this.#out.stop(this.#controller.signal.reason);
    }
    return this.#out;
  }

  /** It is answered, once; what its function still does is told to nobody. */
  answer(text, attachments = []) {
    if (!this.#say) return;
    this.#progress?.finish();
    const say = this.#say;
    this.#say = null;
    if (this.id !== undefined) say(`{"jsonrpc":"2.0","id":${JSON.stringify(this.id)},${text}}`, attachments, true);
  }

  /** Nobody waits for the answer any more. */
  abort(error = new Cancelled("nobody waits for the answer any more")) {
    this.#say = null;
    this.#progress?.drop();
    this.#out?.stop(error);
    this.#in?.leave(error);
    this.#controller.abort(error);
  }

  /** The caller takes parts below `upto`. */
  grant(upto) {
    this.#outflow().grant(upto);
  }

  /** A part of what the caller sends. */
  part(params, attachments, size) {
    try {
      this.#in?.part(params, attachments, size);
    } catch (error) {
      this.#in.end(new Fault("Invalid params", { code: -32602, data: { detail: error.message } }));
    }
  }
}

/** What a served function is told of a request beside its params. */
class ServedRequest {
  #deadline;
  #in;
  #progress;

  constructor({ endpoint, method, meta }, signal, inflow, progress) {
    const { timeout = null, trace = null } = meta;
    Object.assign(this, { endpoint, method, trace, signal });
    this.#deadline = timeout === null ? null : now() + timeout;
    this.#in = inflow;
    this.#progress = progress;
  }

  /** Whether nobody waits for the answer any more; `signal` tells when. */
  get cancelled() {
    return this.signal.aborted;
  }

  /** Seconds until the answer is due, at least 0; null for a notification. A stream may go on while something flows. */
  get leftS() {
    return this.#deadline === null ? null : Math.max(0, this.#deadline - now());
  }

  /** Whether the caller sends parts. */
  get hasParts() {
    return this.#in !== null;
  }

  /** What the caller sends, item by item; it is held back while nobody takes them. Every item is given once. */
  parts() {
    const inflow = this.#in;
    const next = async () => (inflow ? inflow.next() : { value: undefined, done: true });
    return { next, [Symbol.asyncIterator]: () => ({ next }) };
  }

  /** Tell the caller how far this is; nothing happens if it did not ask. */
  progress(done, total = null, text = null) {
    for (const number of [done, total ?? 0]) {
      if (!Number.isFinite(number)) throw new TypeError(`progress is told in numbers, not ${number}`);
    }
    if (text !== null && typeof text !== "string") throw new TypeError("the text of progress is a string, or null");
    this.#progress?.tell({ done, total: total ?? undefined, text: text ?? undefined });
  }
}

/** What a function tells of its progress: the first at once, then the latest now and then, and the last always. */
class Progress {
  #head;
  #send;
  #latest = null;
  #timer = null;

  constructor(id, send) {
    this.#head = `{"jsonrpc":"2.0","method":"$/progress","params":{"id":${JSON.stringify(id)},"value":`;
    this.#send = send;
  }

  tell(value) {
    this.#latest = value;
    if (this.#timer === null) this.#passOn();
  }

  finish() {
    this.#passOn();
    this.drop();
  }

  drop() {
    clearTimeout(this.#timer);
    this.#latest = this.#timer = null;
    this.#send = () => {};
  }

  #passOn() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#latest === null) return;
    this.#send(`${this.#head}${JSON.stringify(this.#latest)}}}`);
    this.#latest = null;
    this.#timer = setTimeout(() => this.#passOn(), PROGRESS_EVERY_S * 1000);
  }
}

async function runOut(iterator) {
  for (;;) {
    const { value, done } = await iterator.next();
    if (done) return value;
  }
}
