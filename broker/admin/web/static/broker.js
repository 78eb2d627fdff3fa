// A client of the request broker for browsers and node: asks, tells, streams, publishes, listens and serves.
//
//     import { connect } from "/static/broker.js"; // node: from "request-broker-client"
//     const client = await connect("http://127.0.0.1:8787", { token });
//     const text = await client.call("data/read", { path: "a.txt" }, { timeout: 5 });
//
// The names and arguments are those of the Python package, in JavaScript's spelling. Every call ends once: with a
// result, or with a `BrokerError` that says how. Times are in seconds. What this file only uses stands beside it:
//
//     errors        how calls end              calls    one call, on this side       sockets    opening a connection
//     values        what travels, in pieces    serving  one request, on this side    sessions   going on after a break
//     subscriptions broadcasts for a reader    streams  parts in and out, credit     moments    time

import { Call, checkOptions, encodeParams, whereOf } from "./calls.js";
import {
  BadReply, BrokerError, CannotConnect, Cancelled, ConnectionLost, DeadlineExceeded, Fault, InvalidRequest, TooLarge,
  errorOf, failure,
} from "./errors.js";
import { TIMER_MAX_MS, guarded, now, within } from "./moments.js";
import { Serving } from "./serving.js";
import { Session } from "./sessions.js";
import { OPEN_TIMEOUT_S, abandon, baseOf, openSocket } from "./sockets.js";
import { Stream, isIterable, iteratorOf } from "./streams.js";
import { ASKED, END, PUT, Subscription, TOLD } from "./subscriptions.js";
import { MESSAGE_MAX_BYTES, decode, isLarge, pack, unpack } from "./values.js";

export {
  BadReply, BrokerError, CannotConnect, Cancelled, ConnectionLost, DeadlineExceeded, Denied, DuplicateId, Fault,
  InvalidRequest, KeyConflict, NoEndpoint, NoMethod, NoWorker, OUTCOMES, Overloaded, Refused, RemoteError, ShuttingDown,
  SlowConsumer, TooLarge, WorkerLost,
} from "./errors.js";
export { NdArray } from "./values.js";
export { Stream } from "./streams.js";
export { Subscription } from "./subscriptions.js";

const GUARD_S = 1; // how long after its deadline a call waits for the broker's word; the broker promises 0.25
const DEFAULT_TIMEOUT_S = 30;
const DEFAULT_GRACE_S = 30;
const SILENCE_S = 30; // a page cannot see the broker's pings, so after this long without a word it asks
const CAPACITY = 64;
const DRAIN_S = 25;
const STEADY_S = 5; // a connection that held this long was a success: the next waits begin short again
const BACKOFF_FIRST_S = 0.25;
const BACKOFF_MOST_S = 15;
const REFUSALS_MAX = 3; // attempts to go on with a session that fail though the broker is there; then a new one is made
const REQUEST_OPTIONS = "timeout idle idempotent retries group priority wait trace onProgress parts signal";
const FINAL_CLOSES = new Set([1000, 1002, 1007, 4400, 4403, 4404, 4409]); // coming back makes no sense

/** What serves an endpoint, made by `serve`. `peer` is what the broker calls it. */
export class Worker {
  #publish;
  #stop;
  #running;

  constructor(facts, publish, stop, running) {
    Object.assign(this, facts);
    this.#publish = publish;
    this.#stop = stop;
    this.#running = running;
  }

  /** Requests under way here. */
  get executing() {
    return this.#running().length;
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
  #graceS;
  #link = null; // { socket, heard, openedAt, … } while there is a connection
  #opening = null; // one that is open, but of which the broker has not yet said which session it is for
  #session = null; // what is known of the session; null before there is one, and when it is lost
  #loss = ""; // why the last connection ended
  #state = "connecting";
  #closing = false; // by our own will
  #ended = null; // why there will be no connection any more
  #calls = new Map(); // id → call, in the order they were asked
  #promised = new WeakMap(); // promise of a call → the call
  #lastId = 0;
  #failures = 0;
  #wake = null; // ends a wait between two attempts
  #beat = null; // timer that looks whether the broker is still there
  #graceTimer = null;
  #standing = new Map(); // key → { method, params, renewed, refused }, asked again in every session
  #subscriptions = new Map(); // key → Set of subscriptions
  #served = new Map(); // endpoint → its functions
  #running = new Map(); // id of a request given to us → its Serving

  constructor(url, options) {
    checkOptions("connect", options, "token ticket timeout reconnect wait grace onState onError");
    const { grace = DEFAULT_GRACE_S, reconnect = true } = options;
    if (!(grace >= 0 && grace < Infinity)) throw new InvalidRequest(`grace ${grace} is not a number of seconds, or 0`);
    this.#base = baseOf(url);
    this.#options = options;
    this.#graceS = reconnect ? grace : 0; // who does not come back needs none
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

  /**
   * Ask `endpoint/method`, or one of the broker's own, `broker.…`. Rejects with a BrokerError, or with what `parts`
   * throws. The result of a method that yields is the list of its items; `stream` gives them one by one.
   */
  call(method, params, options = {}) {
    let call;
    const promise = new Promise((resolve, reject) => {
      checkOptions("call", options, `key ${REQUEST_OPTIONS}`);
      call = this.#ask(method, params, options, {}, resolve, reject);
    });
    if (call) this.#promised.set(promise, call);
    return promise;
  }

  /** Take back a call, by the promise that `call` gave: it rejects with Cancelled, and the worker is told. */
  cancel(promise) {
    const call = this.#promised.get(promise);
    if (!call || !this.#calls.has(call.id)) return false;
    this.#takeBack(call);
    return true;
  }

  /**
   * Ask, and get the items that the method yields as they come: a Stream to iterate over. How it ends, badly too, the
   * iteration tells. Without `timeout` the broker's deadline holds until the first item, then the stream may go on for
   * as long as it flows. With `timing` the stream's `timing` tells where the time went.
   */
  stream(method, params, options = {}) {
    checkOptions("stream", options, `timing ${REQUEST_OPTIONS}`);
    const call = this.#ask(method, params, options, { stream: true });
    return new Stream(call.in, () => this.#takeBack(call));
  }

  /**
   * The results for many params, in their order; at most `concurrency` requests are in flight. With `returnExceptions`
   * an error takes the place of its result; else the first one is thrown, and the requests still in flight are
   * cancelled, as they are when the iteration is left early. Options as for `call`.
   */
  async *map(method, many, { concurrency = 16, returnExceptions = false, ...options } = {}) {
    if (isIterable(options.parts) && iteratorOf(options.parts) === options.parts) {
      throw new InvalidRequest("parts can be iterated over once only, and every request sends them: give a list");
    }
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
    const [text, attachments] = encodeParams(where, params);
    if (isLarge(text, attachments)) {
      const detail = `what nobody answers is one message, of at most ${MESSAGE_MAX_BYTES} bytes`;
      throw new TooLarge(detail, { ...where, code: -32008 });
    }
    if (!this.#isOpen()) throw new ConnectionLost("there is no connection to the broker now", where);
    this.#say(`{"jsonrpc":"2.0","method":"${method}"${text && `,"params":${text}`}}`, attachments);
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
   * Subscription to iterate over, or calls `callback` with every message. `since` brings, before what comes then, all
   * that the broker has kept with a higher `seq` (0: all it has), and what comes while there is no connection; `epoch`
   * is that of the subscription the number is from: if the broker was started anew since, all it keeps comes.
   */
  async subscribe(endpoint, callback, options) {
    if (options === undefined && typeof callback === "object") [callback, options] = [null, callback];
    if (callback != null && typeof callback !== "function") throw new InvalidRequest("a callback is a function");
    checkOptions("subscribe", (options ??= {}), "topic since epoch");
    const { since = null, epoch = null } = options;
    const place = placeOf({ endpoint, topic: options.topic });
    const { topic = null } = place;
    const key = keyOf(endpoint, topic);
    const others = this.#subscriptions.get(key) ?? new Set();
    if (since !== null && endpoint == null) throw new InvalidRequest("what is kept belongs to an endpoint; name it");
    if (since !== null && others.size) {
      throw new InvalidRequest("it is listened to already; what was before would come to all who listen", { endpoint });
    }
    const close = () => this.#unsubscribe(key, subscription, place);
    const subscription = new Subscription(endpoint, topic, callback, close, since, epoch ?? "");
    this.#subscriptions.set(key, others.add(subscription)); // before the reply: broadcasts may come right behind it
    if (endpoint == null) return subscription;
    try {
      const params = { ...place, ...subscription[ASKED]() };
      subscription[TOLD](await this.#request("broker.subscribe", params, { repeat: true }));
    } catch (error) {
      this.#drop(key, subscription);
      throw error;
    }
    if (!others.has(subscription)) return subscription; // it was closed meanwhile
    this.#standing.set(key, {
      method: "broker.subscribe",
      params: () => Object.assign({}, place, ...[...others].map((each) => each[ASKED]())),
      renewed: (told) => others.forEach((each) => each[TOLD](told)),
      refused: (error) => {
        this.#subscriptions.delete(key);
        for (const each of others) each[END](error);
      },
    });
    return subscription;
  }

  async #unsubscribe(key, subscription, place) {
    if (this.#drop(key, subscription) && place.endpoint !== undefined) await this.#giveUp("broker.unsubscribe", place);
  }

  /** End what stands in this session; without one there is nothing to end. */
  async #giveUp(method, params) {
    if (!this.#session) return;
    const given = this.#request(method, params, { once: true });
    if (this.#isOpen()) await given.catch(unlessLost);
    else given.catch(() => {}); // told when the session goes on, which may take a while
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
   * a time; `drain` is how many seconds it gives them to finish when it is told to stop. `deadline` is how many seconds
   * requests have whose callers name none, `idle` how long their streams may stand still; the broker may cut them.
   */
  async serve(endpoint, methods, options = {}) {
    checkOptions("serve", options, "name doc capacity drain deadline idle");
    const { name = "", doc = "", capacity = CAPACITY, drain = DRAIN_S, deadline, idle } = options;
    const functions = new Map(Object.entries(methods).filter(([, method]) => typeof method === "function"));
    if (!functions.size) throw new InvalidRequest(`there are no functions to serve ${endpoint} with`, { endpoint });
    if (this.#served.has(endpoint)) throw new InvalidRequest("this client serves it already", { endpoint });
    const about = [...functions].map(([method, { doc }]) => [method, typeof doc === "string" ? { doc } : {}]);
    const said = { name: name || undefined, doc: doc || undefined };
    const info = { ...said, sdk: "javascript", methods: Object.fromEntries(about) };
    const params = { endpoint, methods: [...functions.keys()], capacity, deadline, idle, info };
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
      () => (this.#served.get(endpoint) === functions ? this.#runningAt(endpoint) : []),
    );
    this.#standing.set(`serve ${endpoint}`, {
      method: "broker.serve",
      params: () => params,
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
    await this.#giveUp("broker.unserve", { endpoint });
    let timer;
    const late = new Promise((resolve) => (timer = setTimeout(resolve, Math.min(drain * 1000, TIMER_MAX_MS))));
    await Promise.race([late, Promise.all(this.#runningAt(endpoint).map(({ done }) => done))]);
    clearTimeout(timer);
    for (const serving of this.#runningAt(endpoint)) {
      serving.answer(failure(new Fault("the worker stopped before it was done")));
      serving.abort(new Cancelled("the worker stops"));
    }
    if (this.#served.get(endpoint) === functions) this.#served.delete(endpoint);
  }

  #runningAt(endpoint) {
    return [...this.#running.values()].filter((serving) => serving.endpoint === endpoint);
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

  /** A call of this module's own: `repeat` puts it into the next session too, `once` never. */
  #request(method, params, how = {}, options = {}) {
    return new Promise((resolve, reject) => this.#ask(method, params, options, { how }, resolve, reject));
  }

  #ask(name, params, options, about, resolve, reject) {
    const { timeout: timeoutS = DEFAULT_TIMEOUT_S } = this.#options;
    const { signal } = options;
    const call = new Call(++this.#lastId, name, params, options, { ...about, timeoutS });
    if (resolve) Object.assign(call, { resolve, reject }); // else it is its stream that ends
    if (this.#ended) {
      call.reject(new ConnectionLost(this.#ended.detail, call.where));
      return call;
    }
    if (signal?.aborted) {
      call.reject(new Cancelled("taken back here", { ...call.where, reason: signal.reason }));
      return call;
    }
    if (signal) {
      call.onAbort = () => this.#takeBack(call);
      signal.addEventListener("abort", call.onAbort, { once: true });
    }
    this.#guard(call);
    this.#calls.set(call.id, call);
    if (this.#isOpen()) this.#put(call);
    else call.keepAttachments();
    return call;
  }

  /** End it here if the broker does not, a little after its deadline. */
  #guard(call) {
    if (call.timeout === null) return;
    call.timer = setTimeout(() => this.#tooLate(call), Math.min((call.timeout + GUARD_S) * 1000, TIMER_MAX_MS));
  }

  /** Onto the wire, in this session; its guard ends what is too late for that. */
  #put(call) {
    const session = this.#session;
    const text = call.put(session, (text, attachments) => {
      if (this.#session === session && this.#calls.has(call.id)) this.#say(text, attachments);
    });
    if (text === null) return;
    this.#say(text, call.isLarge ? [] : call.attachments);
    if (call.out) this.#sendParts(call, call.out);
  }

  async #sendParts(call, out) {
    try {
      await call.sendParts();
    } catch (error) {
      if (call.out === out && error !== STOPPED) this.#takeBack(call, error);
    }
  }

  #settle(call) {
    clearTimeout(call.timer);
    call.options.signal?.removeEventListener("abort", call.onAbort);
    call.out?.stop(STOPPED);
    return this.#calls.delete(call.id);
  }

  #takeBack(call, error) {
    if (!this.#settle(call)) return;
    this.#tellCancel(call);
    call.reject(error ?? new Cancelled("taken back here", { ...call.facts, reason: call.options.signal?.reason }));
  }

  #tooLate(call) {
    const isOut = call.session !== null && call.session === this.#session && this.#isOpen();
    if (isOut && call.isOpenEnded) {
      this.#guard(call); // the broker looks after it
      return;
    }
    this.#settle(call);
    this.#tellCancel(call);
    if (isOut) {
      const detail = "the broker has not answered in time";
      call.reject(new DeadlineExceeded(detail, { ...call.facts, code: -32003, dispatched: true }));
    } else {
      const detail = "there was no connection to the broker until the deadline passed";
      call.reject(new ConnectionLost(detail, { ...call.facts, mayHaveExecuted: call.sent > 0 }));
    }
  }

  /** Without a connection it is told when the session goes on. */
  #tellCancel(call) {
    if (call.session !== null && call.session === this.#session) {
      this.#say(`{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":${call.id}}}`);
    }
  }

  // ---------------------------------------------------------- the connection

  #isOpen() {
    return this.#link?.socket.readyState === 1;
  }

  /** Within the session there is: at once, or when it goes on over another connection. */
  #say(text, attachments = []) {
    const message = attachments.length ? pack(text, attachments) : text;
    this.#session.keep(message);
    if (this.#isOpen()) this.#link.socket.send(message);
  }

  /** As the function `connect`. */
  static async connect(url, options) {
    const client = new Client(url, options);
    await (options.wait ? client.#keepTrying() : client.#open());
    return client;
  }

  /** One attempt: a connection, and on it the session there was, or a new one. */
  async #open() {
    const link = { socket: null, offered: this.#session, heard: now(), openedAt: now() };
    link.ready = new Promise((resolve, reject) => Object.assign(link, { resolve, reject }));
    link.ready.catch(() => {}); // it may fail before anybody looks
    let socket;
    try {
      socket = await openSocket(this.#base, this.#options, this.#graceS, link.offered, (socket, data) => {
        link.socket = socket;
        this.#received(link, data);
      });
    } catch (error) {
      if (link.offered?.refusals >= REFUSALS_MAX && link.offered === this.#session) this.#loseSession();
      throw error;
    }
    if (this.#ended) {
      abandon(socket, 1000);
      throw this.#ended;
    }
    link.socket = socket;
    this.#opening = link;
    socket.onerror = () => {}; // its close follows; without a listener node would end the process
    socket.onclose = (event) => this.#closed(link, event.code, event.reason);
    if (socket.readyState !== 1) this.#closed(link, 1006, "");
    else if (!this.#graceS) this.#begin(link, null);
    try {
      await within(OPEN_TIMEOUT_S, link.ready, "");
    } catch (error) {
      abandon(socket, this.#ended ? 1000 : undefined);
      if (error instanceof BrokerError) throw error;
      throw new CannotConnect(`${this.#base} names no session`, { url: this.#base, retryable: true });
    } finally {
      this.#opening = null;
    }
  }

  /** The session goes on over this link, if it does; `told` is what the broker says of it, null without grace. */
  #begin(link, told) {
    const goesOn = told?.resumed === true;
    if (goesOn && this.#session !== link.offered) {
      abandon(link.socket, 1000); // what is needed to go on has been given up meanwhile
      this.#closed(link, 1006, "");
      return;
    }
    clearTimeout(this.#graceTimer);
    if (!goesOn) {
      this.#loseSession();
      this.#session = new Session(told);
    }
    this.#link = link;
    link.openedAt = now();
    this.#beat = setInterval(() => this.#listenForLife(link), (SILENCE_S * 1000) / 3);
    if (goesOn) {
      this.#session.refusals = 0;
      for (const message of this.#session.missing(told.received)) link.socket.send(message);
    } else this.#renew();
    // What stands comes first, then what waited.
    for (const call of [...this.#calls.values()]) if (call.session !== this.#session) this.#put(call);
    this.#tell("connected");
    link.resolve();
  }

  /** Ask anew for what stands in every session. */
  #renew() {
    for (const [key, standing] of this.#standing) {
      this.#request(standing.method, standing.params(), { once: true })
        .then((told) => standing.renewed?.(told))
        .catch((error) => this.#standingFailed(key, standing, error));
    }
  }

  /** The session is lost: so is what ran in it, but for calls that may be put into the next. */
  #loseSession() {
    const session = this.#session;
    if (!session) return;
    this.#session = null;
    for (const serving of this.#running.values()) serving.abort(new ConnectionLost("nobody waits any more"));
    this.#running.clear();
    for (const call of [...this.#calls.values()]) {
      call.out?.stop(STOPPED);
      if (call.mayGoAgain()) continue;
      this.#settle(call);
      call.reject(new ConnectionLost(this.#loss, { ...call.facts, mayHaveExecuted: call.sent > 0 }));
    }
  }

  /** Connect, however often it takes; throws what does not pass. */
  async #keepTrying() {
    while (!this.#ended) {
      try {
        return await this.#open();
      } catch (error) {
        if (this.#ended) return;
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

  #closed(link, code, reason) {
    if (this.#link === link) {
      this.#lost(link, code, reason);
      return;
    }
    const detail = `${this.#base} closed the connection at once ${reason}`.trim();
    link.reject(new CannotConnect(detail, { url: this.#base, retryable: !FINAL_CLOSES.has(code) }));
  }

  /** A connection has ended; the session goes on if it has grace and is not `spoilt`. */
  #lost(link, code, reason, { spoilt = false } = {}) {
    if (this.#link !== link) return;
    this.#leave(link);
    if (now() - link.openedAt > STEADY_S) this.#failures = 0;
    const why = code === 1006 ? `the connection to ${this.#base} broke` : `the broker closed the connection: ${code}`;
    const error = new ConnectionLost(`${why} ${reason}`.trim());
    if (FINAL_CLOSES.has(code) || this.#options.reconnect === false) {
      this.#finish(error);
      return;
    }
    this.#loss = error.detail;
    const { graceS } = this.#session;
    if (!graceS || spoilt) this.#loseSession();
    else this.#graceTimer = setTimeout(() => this.#loseSession(), graceS * 1000);
    this.#tell("connecting", error);
    this.#pause()
      .then(() => this.#keepTrying())
      .catch((final) => this.#finish(final));
  }

  #leave(link) {
    this.#link = null;
    clearInterval(this.#beat);
    link.socket.onmessage = link.socket.onclose = null;
  }

  #finish(error) {
    if (this.#ended) return;
    this.#ended = error;
    this.#loss = error.detail;
    if (this.#link) this.#leave(this.#link);
    this.#opening?.reject(error);
    clearTimeout(this.#graceTimer);
    this.#standing.clear();
    this.#loseSession();
    for (const call of [...this.#calls.values()]) {
      this.#settle(call);
      call.reject(new ConnectionLost(error.detail, { ...call.facts, mayHaveExecuted: call.sent > 0 }));
    }
    const isOurs = error instanceof ConnectionLost && this.#closing;
    for (const subscriptions of this.#subscriptions.values()) {
      for (const subscription of subscriptions) subscription[END](isOurs ? null : error);
    }
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
    if (error instanceof ConnectionLost) return; // the next session asks again
    if (this.#standing.get(key) === standing) this.#standing.delete(key);
    standing.refused(error);
    if (this.#options.onError) guarded(this.#options.onError, error);
    else console.error(error.message);
  }

  // ---------------------------------------------------------- what the broker says

  #received(link, data) {
    if (this.#ended) return;
    link.heard = now();
    let message;
    let attachments = [];
    try {
      let text = data;
      if (typeof data !== "string") [text, attachments] = unpack(data);
      message = JSON.parse(text);
      if (typeof message !== "object" || message === null) throw new TypeError("no message");
    } catch {
      // What is kept would be sent again, and would not be readable then either.
      this.#lost(link, 1006, "with a message that is not to be read", { spoilt: true });
      link.socket.close(4400);
      return;
    }
    if (message.method === "broker.session" && this.#link !== link) this.#begin(link, message.params ?? {});
    if (this.#link !== link) return;
    const size = data.length ?? data.byteLength;
    if (!this.#session.came(message.meta?.n, size)) return;
    this.#heed(message, attachments, size);
    const n = this.#link === link ? this.#session.takeAck() : null;
    if (n !== null) this.#say(`{"jsonrpc":"2.0","method":"$/ack","params":{"n":${n}}}`);
  }

  #heed(message, attachments, size) {
    const { method, params } = message;
    if (method === undefined) this.#replied(message, attachments);
    else if (method === "broker.message") this.#heard(params, attachments);
    else if (method === "$/part") this.#partCame(params, attachments, size);
    else if (method === "$/credit") this.#granted(params);
    else if (method === "$/progress") this.#progressed(params);
    else if (method === "$/ack") this.#session.had(params?.n);
    else if (method === "$/cancelRequest") this.#cancelled(params?.id);
    else if (method !== "broker.session") this.#asked(message, attachments);
  }

  #replied(message, attachments) {
    const call = this.#calls.get(message.id);
    if (!call) return; // it has ended here
    this.#settle(call);
    if (call.in) call.in.timing = message.meta?.timing ?? null;
    const { elapsedS } = call.facts;
    let [result, error] = [null, null];
    try {
      if (message.error === undefined) result = call.result(message.result, attachments);
      else {
        if (attachments.length) decode(message.error, attachments); // in place
        error = errorOf(message.error, message.meta, call.where, elapsedS);
      }
    } catch (fault) {
      error = new BadReply(`the reply cannot be read: ${fault.message}`, { ...call.where, elapsedS });
    }
    if (error === null) call.resolve(result);
    else call.reject(error);
  }

  #granted(params) {
    const receiver = this.#calls.get(params?.id)?.out ?? this.#running.get(params?.id);
    receiver?.grant(params.upto);
  }

  #partCame(params, attachments, size) {
    const call = this.#calls.get(params?.id);
    if (!call) {
      this.#running.get(params?.id)?.part(params, attachments, size);
      return;
    }
    try {
      call.part(params, attachments, size);
    } catch (error) {
      this.#takeBack(call, new BadReply(`the reply cannot be read: ${error.message}`, call.facts));
    }
  }

  #progressed(params) {
    const told = params?.value ?? {};
    const text = told.text ?? told.message ?? null;
    const [done, total] = told.done === undefined ? [told.percentage, 100] : [told.done, told.total ?? null]; // LSP
    if (typeof done === "number") guarded(this.#calls.get(params?.id)?.options.onProgress, done, total, text);
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
    const serving = this.#running.get(id);
    this.#running.delete(id);
    serving?.abort();
  }

  #asked(message, attachments) {
    const { id } = message;
    const session = this.#session;
    // An answer counts only in the session the request came in, and if somebody still waits for it.
    const say = (text, attachments, isAnswer = false) => {
      if (id === undefined || this.#session !== session || this.#running.get(id) !== serving) return;
      if (isAnswer) this.#running.delete(id);
      this.#say(text, attachments);
    };
    const serving = new Serving(message, say, () => this.#isOpen());
    if (id !== undefined) this.#running.set(id, serving);
    serving.done = serving.perform(this.#served.get(serving.endpoint)?.get(serving.method), attachments);
  }
}

/** Why parts go out no more: their call has ended, or its session. */
const STOPPED = new ConnectionLost("nobody takes any more");

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

function keyOf(endpoint, topic) {
  return JSON.stringify([endpoint ?? null, topic ?? null]);
}

/**
 * Connect to a broker. In browsers `url` defaults to the page's own origin, and without a token the cookie counts.
 * Rejects with CannotConnect or Refused; with `wait` it goes on trying for as long as that makes sense.
 */
export function connect(url = globalThis.location?.origin, options = {}) {
  return Client.connect(url, options);
}
