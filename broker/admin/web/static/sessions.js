// What a client remembers of its session with the broker, so that it can go on over another connection.

const ACK_MESSAGES = 32;
const ACK_BYTES = 2 ** 20;
const STALLS_MAX = 5; // connections in a row that took none of what is kept: then its first message breaks them

/**
 * One session, as the broker told it by `broker.session`; `told` null is one without grace, which ends with its
 * connection. What the broker says is numbered, and told to have come now and then; what is said to the broker is
 * counted on both sides, and kept until the broker has it.
 */
export class Session {
  #secret;
  #kept = []; // messages said, from number #had + 1 on
  #had = 0; // so many of them the broker has
  #received = 0; // number of the last message that came
  #untold = 0; // messages that have come since the broker was told
  #untoldBytes = 0;
  #stalls = 0;

  constructor(told) {
    this.id = told?.id ?? "";
    this.#secret = told?.secret ?? "";
    this.graceS = told?.grace ?? 0;
    this.refusals = 0; // attempts to come back that were not let in
  }

  /** What the next connection has to show to go on with this session; null if it cannot go on. */
  get resuming() {
    const goesOn = this.graceS && this.#stalls < STALLS_MAX;
    return goesOn ? { protocol: `resume.${this.id}.${this.#secret}`, received: this.#received } : null;
  }

  /** A message is said now, or as soon as there is a connection. */
  keep(message) {
    if (this.graceS) this.#kept.push(message);
  }

  /** The broker has so many messages. More than there are is not believed. */
  had(count) {
    if (!(count > this.#had && count <= this.#had + this.#kept.length)) return;
    this.#kept.splice(0, count - this.#had);
    this.#had = count;
  }

  /** What the broker, which has so many messages, has to be told again. */
  missing(received) {
    this.#stalls = this.#kept.length && received <= this.#had ? this.#stalls + 1 : 0;
    this.had(received);
    this.#untold = this.#untoldBytes = 0; // coming back told it
    return [...this.#kept];
  }

  /** Message `n` has come; false if it had come before. */
  came(n, size) {
    if (n === undefined) return true;
    if (n <= this.#received) return false;
    this.#received = n;
    this.#untold += 1;
    this.#untoldBytes += size;
    return true;
  }

  /** The number to acknowledge, if it is time to. */
  takeAck() {
    if (this.#untold < ACK_MESSAGES && this.#untoldBytes < ACK_BYTES) return null;
    this.#untold = this.#untoldBytes = 0;
    return this.#received;
  }
}
