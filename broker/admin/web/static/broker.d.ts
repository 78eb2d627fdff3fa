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
  endpoint: string;
  method: string;
  /** Aborts when nobody waits for the answer any more. */
  signal: AbortSignal;
  /** What is left of the deadline when the request came. */
  timeout: number | null;
  trace: string | null;
  idempotent: boolean;
}

/** Bytes in what it returns travel as attachments; bytes in `params` come as ArrayBuffer. */
export type Served = (params: any, request: ServedRequest) => unknown;

export interface ConnectOptions {
  /** Or a function, asked anew for every connection. */
  token?: string | null | (() => string | null | Promise<string | null>);
  /** A ticket of `POST /ticket`. It is good once: give a function if the client is to reconnect. */
  ticket?: string | null | (() => string | null | Promise<string | null>);
  /** Open a broken connection again, with full jitter. Default true. */
  reconnect?: boolean;
  /** Go on trying to connect for the first time, too. Default false. */
  patient?: boolean;
  onState?: (state: State, error?: BrokerError) => void;
  /** A subscription or what is served could not be renewed on a new connection. */
  onError?: (error: BrokerError) => void;
}

export interface CallOptions {
  /** The deadline; null leaves it to the broker. Default 30. */
  timeout?: number | null;
  signal?: AbortSignal;
  /** It may run twice: it is tried again if a worker or the connection is lost. */
  idempotent?: boolean;
  retries?: number;
  /** Queue it where no worker is there yet. */
  wait?: boolean;
  trace?: string;
}

export interface PublishOptions extends CallOptions {
  topic?: string;
  to?: string;
}

export interface ServeOptions {
  /** How many requests it is given at a time. Default 64. */
  capacity?: number;
  /** Shown to who asks `describe`. */
  info?: Record<string, unknown>;
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

export class Client {
  private constructor();
  readonly url: string;
  readonly state: State;
  /** Ask; `endpoint` null for the broker's own methods. Bytes in `params` travel as attachments. */
  call<T = any>(endpoint: string | null, method: string, params?: object | null, options?: CallOptions): Promise<T>;
  /** Take a call back by the promise that `call` gave; false if it had ended. */
  cancel(promise: Promise<unknown>): boolean;
  /** Throws ConnectionLost if there is no connection now. */
  notify(endpoint: string, method: string, params?: object | null): void;
  publish(
    endpoint: string | null,
    data?: unknown,
    options?: PublishOptions,
  ): Promise<{ seq: number | null; listeners: number }>;
  subscribe<T = any>(endpoint: string | null, callback: (message: Message<T>) => void): Promise<() => Promise<void>>;
  subscribe<T = any>(
    endpoint: string,
    topic: string | null,
    callback: (message: Message<T>) => void,
  ): Promise<() => Promise<void>>;
  serve(endpoint: string, methods: Record<string, Served>, options?: ServeOptions): Promise<() => Promise<void>>;
  endpoints(options?: CallOptions): Promise<EndpointView[]>;
  describe(endpoint: string, options?: CallOptions): Promise<Omit<EndpointView, "workers"> & { workers: WorkerView[] }>;
  ping(options?: CallOptions): Promise<{ node: string; peer: string; uptime_s: number }>;
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
  readonly retryAfterMs: number;
}
export class Cancelled extends BrokerError {
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
export class CannotConnect extends BrokerError {}
export class Refused extends BrokerError {
  readonly status: number;
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
