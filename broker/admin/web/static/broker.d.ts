/** A client of the request broker for browsers and node. Times are in seconds unless their name says otherwise. */

/** What a callback gets of a broadcast. `missed` is how many before it never came; `seq` null where none is counted. */
export interface Message<T = any> {
  endpoint: string | null;
  topic: string | null;
  seq: number | null;
  data: T;
  missed: number;
}

/** What a served function is told of a request beside its params. */
export interface ServedRequest {
  readonly endpoint: string;
  readonly method: string;
  /** The caller's trace id; never to be trusted for access. */
  readonly trace: string | null;
  /** Aborts when nobody waits for the answer any more. */
  readonly signal: AbortSignal;
  readonly cancelled: boolean;
  /** Seconds until the answer is due, at least 0; null for a notification. A stream may go on while something flows. */
  readonly leftS: number | null;
  /** Whether the caller sends parts. */
  readonly hasParts: boolean;
  /** What the caller sends, item by item; it is held back while nobody takes them. Every item is given once. */
  parts<T = any>(): AsyncIterable<T>;
  /**
   * Tell the caller how far this is: `done`, of `total` if that is known, in whatever unit. Nothing happens if it did not
   * ask. Passed on at most 20 times a second; the last one always comes, before the answer.
   */
  progress(done: number, total?: number | null, text?: string | null): void;
}

/**
 * Bytes in `params` come as ArrayBuffer, arrays as NdArray; in what it returns they travel as attachments. A generator,
 * or an async one, streams what it yields, as fast as its caller takes it. A text `doc` of the function is shown to who
 * asks `describe`.
 */
export type Served = ((params: any, request: ServedRequest) => unknown) & { doc?: string };

export type TypedArray =
  | Float32Array | Float64Array | Int8Array | Int16Array | Int32Array | BigInt64Array
  | Uint8Array | Uint16Array | Uint32Array | BigUint64Array;

/**
 * An array of numbers with a shape, as numpy has them: `data` is a typed array in C order, `dtype` as numpy writes it
 * (`<f4`). Where JavaScript has no such numbers (complex, text, dates, the other byte order) `data` is their bytes, an
 * ArrayBuffer. Booleans are a Uint8Array of 0 and 1 with the dtype `|b1`.
 */
export class NdArray<T extends TypedArray | ArrayBuffer = any> {
  /** Throws RangeError or TypeError where data, shape and dtype do not fit. */
  constructor(data: T, shape?: number[], dtype?: string);
  readonly data: T;
  readonly shape: number[];
  readonly dtype: string;
}

export interface ConnectOptions {
  /** Or a function, asked anew for every connection. */
  token?: string | null | (() => string | null | Promise<string | null>);
  /** A ticket of `POST /ticket`. It is good once: give a function if the client is to reconnect. */
  ticket?: string | null | (() => string | null | Promise<string | null>);
  /** The deadline of every call that names none, in seconds; null leaves it to the broker. Default 30. */
  timeout?: number | null;
  /** Open a broken connection again, with full jitter. Default true. */
  reconnect?: boolean;
  /** Go on trying while there is no broker yet. Default false. */
  wait?: boolean;
  /**
   * For how many seconds the broker is to keep the session when the connection breaks: who is back by then goes on with
   * its calls, streams and subscriptions as if nothing had been. With 0 a break ends what was under way. Default 30.
   */
  grace?: number;
  onState?: (state: State, error?: BrokerError) => void;
  /** A subscription or what is served could not be renewed on a new connection. */
  onError?: (error: BrokerError) => void;
}

export interface RequestOptions {
  /**
   * The deadline in seconds; null leaves it to the broker. Default: that of `connect`; for a stream, and a call with
   * `parts`, none while something flows.
   */
  timeout?: number | null;
  /** How many seconds a stream may stand still. */
  idle?: number | null;
  /** It may run twice: it is tried again if a worker or the connection is lost. */
  idempotent?: boolean;
  retries?: number;
  /** Those of one group go to one worker where the endpoint is sticky, and displace each other where the newest wins. */
  group?: string | null;
  /** From -9 to 9: higher goes first. */
  priority?: number;
  /** Queue it where no worker is there yet. */
  wait?: boolean;
  trace?: string;
  /** Called with what the worker tells of its progress; what is not known is null. */
  onProgress?: (done: number, total: number | null, text: string | null) => void;
  /**
   * Sent one by one as the worker takes them, each of any size. What it throws cancels the request and is what the call
   * rejects with.
   */
  parts?: Iterable<unknown> | AsyncIterable<unknown> | null;
  /** Aborting it cancels the call. */
  signal?: AbortSignal;
}

export interface StreamOptions extends RequestOptions {
  /** Tell in the stream's `timing` where the time went. */
  timing?: boolean;
}

export interface CallOptions extends RequestOptions {
  /** A second request with the same key and content joins the first one, or gets its reply again. Without parts. */
  key?: string | null;
}

export interface MapOptions extends CallOptions {
  /** How many requests are in flight at most. Default 16. */
  concurrency?: number;
  /** An error takes the place of its result. Default false: the first one is thrown. */
  returnExceptions?: boolean;
}

export interface PublishOptions {
  topic?: string | null;
  /** One peer. */
  to?: string | null;
}

export interface SubscribeOptions {
  topic?: string | null;
  /**
   * Bring, before what comes then, all that the broker has kept with a higher `seq` (0: all it has), and what comes while
   * there is no connection.
   */
  since?: number | null;
  /** That of the subscription the number `since` is from: if the broker was started anew, all it keeps comes. */
  epoch?: string | null;
}

export interface ServeOptions {
  /** Shown to who asks `describe`. */
  name?: string;
  /** What the endpoint is, shown to who asks `describe`. */
  doc?: string;
  /** How many requests it is given at a time. Default 64. */
  capacity?: number;
  /** Seconds it gives requests to finish when it is told to stop. Default 25. */
  drain?: number;
  /** Seconds that requests have whose callers name no timeout. Default: the endpoint's, 30 unless configured. */
  deadline?: number;
  /** Seconds that their streams may stand still. Default: the endpoint's, 30 unless configured. */
  idle?: number;
}

export interface EndpointView {
  endpoint: string;
  workers: number;
  free: number;
  queued: number;
  executing: number;
  listeners: number;
  policy: string;
  closed: string;
}

export interface WorkerView {
  peer: string;
  methods: string[] | null;
  capacity: number;
  executing: number;
  info: any;
}

export type State = "connecting" | "connected" | "closed";

/** Broadcasts of one endpoint or topic: `for await (const message of subscription)`, unless they go to a callback. */
export class Subscription<T = any> implements AsyncIterable<Message<T>> {
  private constructor();
  readonly endpoint: string | null;
  readonly topic: string | null;
  /** The life of the topic at the broker, within which `seq` counts; empty before the broker has told. */
  readonly epoch: string;
  /** Messages that were never read because too many were waiting. */
  readonly dropped: number;
  /** The next message; null after `close`. Rejects with a TimeoutError after `timeout` seconds. */
  get(timeout?: number | null): Promise<Message<T> | null>;
  /** Listen no more. */
  close(): Promise<void>;
  [Symbol.asyncIterator](): AsyncIterator<Message<T>>;
}

/** In milliseconds since the request was accepted; null, or absent, for what never was. */
export interface Timing {
  /** How long it waited for a worker in all. */
  queued_ms: number;
  dispatched_ms?: number | null;
  first_part_ms?: number | null;
  ended_ms: number;
}

/**
 * The items of a reply: `for await (const item of stream)`. What its reader does not take stops the worker. An error is
 * thrown after the items that came before it; leaving the loop early cancels the request, as `close` does.
 */
export class Stream<T = any, R = any> implements AsyncIterableIterator<T> {
  private constructor();
  /** What the method returned after its last item. Throws before the end, and after a bad one. */
  readonly result: R;
  /** What the broker told of its times, in milliseconds, if `timing` was asked for; null before the end. */
  readonly timing: Timing | null;
  next(): Promise<IteratorResult<T, undefined>>;
  return(value?: any): Promise<IteratorResult<T, any>>;
  /** Read no more: the request is cancelled unless it has ended. */
  close(): Promise<void>;
  [Symbol.asyncIterator](): this;
}

/** What serves an endpoint, made by `serve`. */
export class Worker {
  private constructor();
  readonly endpoint: string;
  readonly name: string;
  readonly capacity: number;
  /** What the broker calls it. */
  readonly peer: string;
  /** Requests under way here. */
  readonly executing: number;
  /** Broadcast to the endpoint's listeners, or to one topic's subscribers, without an answer. */
  publish(data: unknown, options?: { topic?: string | null }): void;
  /** Take no more requests, finish those under way (at most `drain` seconds; with `now` none), and end. */
  stop(options?: { now?: boolean }): Promise<void>;
}

export class Client {
  private constructor();
  readonly url: string;
  readonly state: State;
  readonly isConnected: boolean;
  /**
   * Ask `endpoint/method`, or one of the broker's own, `broker.…`. Bytes and arrays in `params` are attachments; those of
   * params above 16 MiB, which travel in pieces, must not be changed before the call has ended. The result of a method
   * that yields is the list of its items.
   */
  call<T = any>(method: string, params?: object | null, options?: CallOptions): Promise<T>;
  /** Ask, and get the items that the method yields as they come. How it ends, badly too, the iteration tells. */
  stream<T = any, R = any>(method: string, params?: object | null, options?: StreamOptions): Stream<T, R>;
  /** Take a call back by the promise that `call` gave; false if it had ended. */
  cancel(promise: Promise<unknown>): boolean;
  /** The results for many params, in their order. */
  map<T = any>(
    method: string,
    many: Iterable<object | null> | AsyncIterable<object | null>,
    options?: MapOptions,
  ): AsyncGenerator<T, void, void>;
  /** Throws ConnectionLost if there is no connection now. */
  notify(method: string, params?: object | null): void;
  publish(
    endpoint: string | null,
    data?: unknown,
    options?: PublishOptions,
  ): Promise<{ seq: number | null; listeners: number }>;
  subscribe<T = any>(endpoint: string | null, options?: SubscribeOptions): Promise<Subscription<T>>;
  subscribe<T = any>(
    endpoint: string | null,
    callback: (message: Message<T>) => void,
    options?: SubscribeOptions,
  ): Promise<Subscription<T>>;
  serve(endpoint: string, methods: Record<string, Served>, options?: ServeOptions): Promise<Worker>;
  endpoints(): Promise<EndpointView[]>;
  describe(endpoint: string): Promise<Omit<EndpointView, "workers"> & { workers: WorkerView[] }>;
  ping(): Promise<{ node: string; peer: string; uptime_s: number; version: string }>;
  close(): void;
}

export function connect(url?: string, options?: ConnectOptions): Promise<Client>;

export class BrokerError extends Error {
  readonly outcome: string;
  readonly detail: string;
  readonly code: number;
  readonly data: any;
  /** Repeating it may help and cannot run it twice. */
  readonly retryable: boolean;
  /** A worker was given it. */
  readonly dispatched: boolean;
  readonly endpoint: string;
  readonly method: string;
  readonly worker: string | null;
  readonly attempts: number;
  /** Seconds from asking to the end, on this side's clock. */
  readonly elapsedS: number;
  /** What to do. */
  readonly advice: string;
}
export class RemoteError extends BrokerError {
  readonly type: string;
}
export class NoEndpoint extends BrokerError {}
export class NoMethod extends BrokerError {}
export class InvalidRequest extends BrokerError {}
export class NoWorker extends BrokerError {}
export class WorkerLost extends BrokerError {}
export class DeadlineExceeded extends BrokerError {
  readonly phase: "queued" | "executing" | "";
}
export class Overloaded extends BrokerError {
  readonly bound: string;
  /** Seconds. */
  readonly retryAfterS: number;
}
export class Cancelled extends BrokerError {
  /** `caller`, `superseded` or `admin`; empty where it was taken back here, for the `reason` of the AbortSignal. */
  readonly cause: string;
  readonly reason?: unknown;
}
export class Denied extends BrokerError {}
export class ShuttingDown extends BrokerError {}
export class TooLarge extends BrokerError {}
export class SlowConsumer extends BrokerError {}
export class DuplicateId extends BrokerError {}
export class BadReply extends BrokerError {}
export class KeyConflict extends BrokerError {}
export class ConnectionLost extends BrokerError {
  readonly mayHaveExecuted: boolean;
}
export class CannotConnect extends BrokerError {
  readonly url: string;
}
export class Refused extends BrokerError {
  /** That of HTTP. */
  readonly status: number;
  /** Whether the same may work later. */
  readonly comeBack: boolean;
}

/** The outcomes a broker can report, each with its class. */
export const OUTCOMES: Readonly<Record<string, new (detail?: string, facts?: object) => BrokerError>>;

/** What a served function throws to end its request with an error of its own making. */
export class Fault extends Error {
  constructor(message: string, options?: { code?: number; data?: unknown; retryable?: boolean });
  readonly code: number;
  readonly data: unknown;
  readonly retryable: boolean;
}
