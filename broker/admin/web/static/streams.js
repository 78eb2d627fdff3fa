// Streams of one request: parts that go out as far as the other side has granted, and parts that come in.

import { Cancelled, InvalidRequest } from "./errors.js";
import { JOINED_MAX_BYTES, PART_MAX_BYTES, cut, decode, encode, isAbove, join } from "./values.js";

const FIRST_CREDIT = 4; // parts each side may send before it has been granted any
// Parts that may come before their reader has taken them. AHEAD_MAX of 256 KiB are less than what the broker keeps of a
// session (8 MiB): what was granted for small ones may be used for large ones.
const [AHEAD, AHEAD_MAX, AHEAD_BYTES] = [8, 24, 2 << 20];

/** One direction of a request's stream, towards the broker. `send(text, attachments)` says something to it. */
export class Outflow {
  #head;
  #send;
  #seq = 0;
  #upto = FIRST_CREDIT;
  #stopped = null;
  #wake = () => {};

  constructor(id, send) {
    this.#head = `{"jsonrpc":"2.0","method":"$/part","params":{"id":${JSON.stringify(id)}`;
    this.#send = send;
  }

  /** Whether anything has been sent. */
  get begun() {
    return this.#seq > 0;
  }

  /** Parts below `upto` may be sent. */
  grant(upto) {
    if (!Number.isSafeInteger(upto) || upto <= this.#upto) return;
    this.#upto = upto;
    this.#wake();
  }

  /** Nobody takes any more: who waits to send, or tries to, gets this error. */
  stop(error) {
    this.#stopped ??= error;
    this.#wake();
  }

  /** Send an item; resolves when the last of it is on its way. Throws InvalidRequest, or what `stop` was given. */
  async item(value) {
    const attachments = [];
    let text;
    try {
      text = encode(value, attachments);
    } catch (error) {
      throw new InvalidRequest(`an item cannot be sent: ${error.message}`);
    }
    if (isAbove(PART_MAX_BYTES, text, attachments)) await this.pieces(text, attachments);
    else await this.#part(`,"data":${text}`, attachments);
  }

  /** Send a value in pieces, and what closes them. */
  async pieces(text, attachments, { last = false } = {}) {
    const mark = await this.onlyPieces(text, attachments);
    await this.#part(`${last ? ',"last":true' : ""},"data":${mark}`, []);
  }

  /** Send a value in pieces; resolves to the mark that stands for it. */
  async onlyPieces(text, attachments) {
    for (const { data, attachments: piece, more } of cut(text, attachments)) {
      if (!more) return data;
      await this.#part(`,"more":true,"data":${data}`, piece);
    }
    return "null";
  }

  /** Send all there is to iterate over; resolves to what the iterator returned. Throws what it throws, too. */
  async all(iterator) {
    for (;;) {
      const { value, done } = await iterator.next();
      if (done) return value;
      try {
        await this.item(value);
      } catch (error) {
        await iterator.return?.();
        throw error;
      }
    }
  }

  /** There are no more items. */
  async end() {
    await this.#part(',"last":true', []);
  }

  async #part(text, attachments) {
    while (this.#seq >= this.#upto && !this.#stopped) await new Promise((resolve) => (this.#wake = resolve));
    if (this.#stopped) throw this.#stopped;
    this.#send(`${this.#head},"seq":${this.#seq}${text}}}`, attachments);
    this.#seq += 1;
  }
}

/**
 * One direction of a request's stream, from the broker: its items, to be taken by `next` one by one, or all at the end
 * by `all` if it is `eager`. At most AHEAD parts come that nobody has taken, and more of small ones, up to AHEAD_MAX,
 * while they stay within AHEAD_BYTES; only a single item of more parts than that is put together as it comes.
 */
export class Inflow {
  #id;
  #send;
  #eager;
  #expected = 0; // number of the next part
  #taken = 0; // parts
  #bytes = 0; // of all parts
  #granted = FIRST_CREDIT;
  #pieces = []; // of an item of which more is to come
  #cost = 0; // parts of it that are not taken
  #size = 0; // bytes of these pieces, or of all that is gathered
  #queue = []; // [item, its parts that are not taken]
  #given = 0;
  #ended = false;
  #error = null;
  #news = null; // the promise of those who wait for an item
  #wake = () => {}; // resolves it

  constructor(id, send, { eager = false } = {}) {
    this.#id = JSON.stringify(id);
    this.#send = send;
    this.#eager = eager;
    this.result = undefined;
    this.timing = null;
    this.isWell = false;
  }

  /** Whether an item has been given out: then the request must not be made again. */
  get begun() {
    return this.#given > 0;
  }

  /** A part has come. Throws if it does not fit to what came before. */
  part({ seq, data = null, more = false, last = false }, attachments, size) {
    if (this.#ended || seq < this.#expected) return;
    if (seq !== this.#expected) throw new RangeError(`part ${seq} came where part ${this.#expected} was due`);
    if (seq >= this.#granted) throw new RangeError(`part ${seq} is beyond the credit of ${this.#granted} parts`);
    this.#expected += 1;
    this.#cost += 1;
    this.#bytes += size;
    this.#size += size;
    if (this.#size > JOINED_MAX_BYTES) throw new RangeError(`what came in parts is above ${JOINED_MAX_BYTES} bytes`);
    if (more) {
      if (attachments.length !== 1) throw new RangeError(`a piece has ${attachments.length} attachments, not one`);
      this.#pieces.push(attachments[0]);
    } else if (last && data === null && !this.#pieces.length) {
      this.#cost = 0; // the end alone is no item
    } else {
      this.#queue.push([this.#whole(data, attachments), this.#cost]);
      this.#cost = 0;
      if (!this.#eager) this.#size = 0;
    }
    if (last) this.end();
    else this.#takeWhatIsRead();
    this.#tell();
  }

  /** The value of a reply, whose pieces may have come before it. Throws if it is damaged. */
  last(data, attachments) {
    return this.#whole(data ?? null, attachments);
  }

  /** There will be no more items, but this result. */
  finish(result) {
    this.result = result;
    this.isWell = true;
    this.end();
  }

  /** There will be no more items; who waits for one gets the error, if there is one. */
  end(error = null) {
    if (this.#ended) return;
    this.#ended = true;
    this.#error = error;
    this.#tell();
  }

  /** Nobody reads any more: what has come is dropped, and who reads on all the same gets the error. */
  leave(error) {
    this.#queue = [];
    this.isWell = false;
    this.#ended = true;
    this.#error ??= error;
    this.#tell();
  }

  /** The request is made again: what has come was for nothing. */
  beginAnew() {
    this.#expected = this.#taken = this.#bytes = this.#cost = this.#size = 0;
    this.#granted = FIRST_CREDIT;
    this.#queue = [];
    this.#pieces = [];
  }

  /** Whether all has come and all was taken. */
  get isOver() {
    return this.#ended && !this.#queue.length;
  }

  /** The items there are; with a result other than null, that as well. Without any item, the result alone. */
  all(result) {
    const items = this.#queue.map(([item]) => item);
    if (!items.length) return result;
    return result === null ? items : [...items, result];
  }

  /** As iterators have it. */
  async next() {
    for (;;) {
      const item = this.#queue.shift();
      if (item) {
        this.#given += 1;
        this.#take(item[1]);
        this.#takeWhatIsRead();
        return { value: item[0], done: false };
      }
      if (this.#error) throw this.#error;
      if (this.#ended) return { value: undefined, done: true };
      this.#news ??= new Promise((resolve) => (this.#wake = resolve));
      await this.#news;
    }
  }

  #whole(data, attachments) {
    if (!this.#pieces.length) return attachments.length ? decode(data, attachments) : data;
    const pieces = this.#pieces;
    this.#pieces = [];
    return join(pieces, data);
  }

  /** Pieces count as taken when their reader has nothing else to take; to who gathers all, everything does. */
  #takeWhatIsRead() {
    if (this.#eager) {
      for (const item of this.#queue.slice(-1)) {
        this.#take(item[1]);
        item[1] = 0;
      }
    }
    if (this.#eager || !this.#queue.length) {
      this.#take(this.#cost);
      this.#cost = 0;
    }
  }

  #take(parts) {
    this.#taken += parts;
    const fitting = Math.floor((AHEAD_BYTES * this.#expected) / this.#bytes); // parts as large as these were
    const ahead = Math.max(AHEAD, Math.min(AHEAD_MAX, fitting, 2 * this.#expected)); // a few say little of the next
    const upto = this.#taken + ahead;
    if (this.#ended || (upto - this.#granted) * 2 < ahead) return;
    this.#granted = upto;
    this.#send(`{"jsonrpc":"2.0","method":"$/credit","params":{"id":${this.#id},"upto":${upto}}}`);
  }

  #tell() {
    this.#news = null;
    this.#wake();
  }
}

/**
 * The items of a reply: `for await (const item of stream)`. Made by `Client.stream`. What its reader does not take
 * stops the worker. An error is thrown after the items that came before it; leaving the loop early cancels the request,
 * as `close` does.
 */
export class Stream {
  #inflow;
  #cancel;

  constructor(inflow, cancel) {
    this.#inflow = inflow;
    this.#cancel = cancel;
  }

  /** What the method returned after its last item. Throws before the end, and after a bad one. */
  get result() {
    const { isOver, isWell, result } = this.#inflow;
    if (!isOver || !isWell) throw new Error("a stream has its result after its last item");
    return result;
  }

  /** What the broker told of its times, in milliseconds, if `timing` was asked for; null before the end. */
  get timing() {
    return this.#inflow.timing;
  }

  /** Read no more: the request is cancelled unless it has ended. */
  async close() {
    if (this.#inflow.isOver) return;
    this.#inflow.leave(new Cancelled("the stream was left before its end; that cancels the request"));
    this.#cancel();
  }

  async next() {
    return this.#inflow.next();
  }

  async return(value) {
    await this.close();
    return { value, done: true };
  }

  [Symbol.asyncIterator]() {
    return this;
  }
}

/** Whether it is something to iterate over whose items are meant as such. */
export function isIterable(parts) {
  if (typeof parts !== "object" || parts === null || ArrayBuffer.isView(parts)) return false;
  return Symbol.asyncIterator in parts || Symbol.iterator in parts;
}

export function iteratorOf(iterable) {
  return (iterable[Symbol.asyncIterator] ?? iterable[Symbol.iterator]).call(iterable);
}

/** The iterator of what a served function yields; null if it has simply returned something. */
export function yieldedBy(result) {
  if (typeof result !== "object" || result === null) return null;
  const yields = Symbol.asyncIterator in result || (Symbol.iterator in result && typeof result.next === "function");
  return yields ? iteratorOf(result) : null;
}
