// Broadcasts on their way to who subscribed, and the handle of what is served.

import { guarded, now, within } from "./moments.js";

const INBOX_MAX = 1000; // broadcasts a subscription keeps for its reader; then the oldest is dropped and counted

export const PUT = Symbol("put");
export const END = Symbol("end");
export const ASKED = Symbol("asked");
export const TOLD = Symbol("told");

/**
 * Broadcasts of one endpoint or topic: `for await (const message of subscription)`, unless they go to a callback. Made
 * by `subscribe`. Ends with `close()`, or by throwing ConnectionLost when there will be no connection any more. It
 * survives reconnecting; what came meanwhile is counted in `message.missed`, or, with `since`, comes as far as the
 * broker keeps it. At most 1,000 unread messages are kept; `dropped` counts those that had to go. `epoch` names the
 * life of the topic at the broker, within which `seq` counts.
 */
export class Subscription {
  #callback;
  #close;
  #inbox = [];
  #waiting = null; // the promise of those who wait for a message
  #wake = () => {}; // resolves it
  #last; // number of the last message that came
  #keeps; // whether it asks for what came meanwhile
  #isFresh = true; // no message has come since it was asked for
  #ended = false;
  #error = null;

  constructor(endpoint, topic, callback, close, since, epoch) {
    Object.assign(this, { endpoint, topic, epoch, dropped: 0 });
    this.#last = since;
    this.#keeps = since !== null;
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

  /** What it asks the broker for, beside its place, in this session. */
  [ASKED]() {
    this.#isFresh = true;
    return this.#keeps ? { since: this.#last ?? 0, epoch: this.epoch || undefined } : {};
  }

  /** What the broker says of the topic then. */
  [TOLD]({ seq = null, epoch = "" }) {
    const isOtherLife = (this.epoch !== "" && this.epoch !== epoch) || this.#last > seq;
    if (this.#keeps && isOtherLife && this.#isFresh) this.#last = null;
    this.epoch = epoch;
    this.#last ??= this.#keeps ? 0 : seq;
  }

  [PUT]({ endpoint, topic, seq, data }) {
    if (this.#ended) return;
    const missed = seq !== null && this.#last !== null && seq > this.#last ? seq - this.#last - 1 : 0;
    if (seq !== null) this.#last = seq;
    this.#isFresh = false;
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
