// How calls end: one class of error for each outcome, made of what the broker said.

const MAY_HAVE_RUN = "It may have run; look before you repeat it.";
const CAUSES = {
  caller: "by its caller",
  superseded: "superseded by a newer request",
  admin: "by an administrator",
};

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
  const line = `${text}${facts.length ? ` (${facts.join(", ")})` : ""}`;
  return advice ? `${line.replace(/\.$/, "")}. ${advice}` : line;
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
        ? MAY_HAVE_RUN
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

export function errorOf(error, meta, where, elapsedS) {
  const code = Number.isInteger(error?.code) ? error.code : -32603;
  const told = typeof error?.data === "object" && error.data ? error.data : {};
  const worker = meta?.worker ?? null;
  // The broker wraps its own codes when a worker uses them; of the specification's, its own name no worker.
  const own = (code < -32000 && code > -32020) || (worker === null && BY_CODE.has(code));
  const kind = own ? (BY_OUTCOME.get(told.outcome) ?? BY_CODE.get(code) ?? RemoteError) : RemoteError;
  const message = typeof error?.message === "string" ? error.message : "";
  const detail = typeof told.detail === "string" ? told.detail : (kind === Cancelled && CAUSES[told.cause]) || "";
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
  if (kind === RemoteError && told.traceback?.length) {
    facts.advice = ""; // as a kernel's: the log would say no more
  } else if (kind === DeadlineExceeded && told.phase === "queued") {
    facts.advice = "No worker was free for it: start more workers, or give it a longer timeout.";
  } else if (kind === ShuttingDown && facts.dispatched && !facts.retryable) {
    facts.advice = MAY_HAVE_RUN;
  } else if (kind === Denied && !where.endpoint && where.method?.startsWith("broker.admin.")) {
    facts.advice = "Ask whoever runs the broker for a token with the role admin.";
  }
  return new kind((kind !== RemoteError && detail) || message, facts);
}

/** What a caller is told of an exception: its type and its text, never a stack. */
export function failure(error) {
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

