// Each exported function is one test; `play.mjs` runs one. What only the test beside it can do (end the broker, start
// it again) it asks for by a line, and is answered by one.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { WebSocketServer } from "ws";
import * as broker from "request-broker-client";

const { connect } = broker;
const url = process.argv[3];
const token = process.env.TOKEN;

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
async function please(what) {
  console.log(`please ${what}`);
  await lines.next();
}

async function until(condition, what) {
  const deadline = performance.now() + 20_000;
  while (!(await condition())) {
    assert.ok(performance.now() < deadline, `never came true: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

async function fails(promise, kind, members = {}) {
  const error = await promise.then(
    (value) => assert.fail(`it gave ${JSON.stringify(value)}`),
    (error) => error,
  );
  assert.ok(error instanceof kind, `${error.stack ?? error} is no ${kind.name}`);
  assert.ok(error instanceof broker.BrokerError);
  for (const [key, value] of Object.entries(members)) assert.deepEqual(error[key], value, `${key} of ${error}`);
  return error;
}

/** A worker and a caller, each with a connection of its own. */
async function pair(endpoint, methods, options = {}) {
  const worker = await connect(url, { token });
  const caller = await connect(url, { token });
  const stop = await worker.serve(endpoint, methods, options);
  const close = () => [worker, caller].forEach((client) => client.close());
  return { worker, caller, stop, close };
}

/** What speaks WebSocket and says only what it is told; `said` are the messages it got. */
async function stub(answer = () => {}) {
  const said = [];
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1" });
  await new Promise((resolve) => server.on("listening", resolve));
  server.on("connection", (socket) => {
    socket.on("message", (data, binary) => {
      const message = binary ? data : JSON.parse(data);
      said.push(message);
      answer(socket, message);
    });
  });
  const close = () => {
    for (const socket of server.clients) socket.terminate();
    server.close();
  };
  return { url: `http://127.0.0.1:${server.address().port}`, said, server, close };
}

function bytes(length) {
  return new Uint8Array(length).map((_, index) => (index * 31 + (index >> 8)) & 255);
}

function same(buffer, expected) {
  assert.ok(buffer instanceof ArrayBuffer);
  assert.equal(Buffer.compare(Buffer.from(buffer), expected), 0);
}

// ------------------------------------------------------------ calls

export async function values_come_back_as_they_went() {
  const { caller, close } = await pair("echo", { echo: (params) => params, nothing: () => undefined });
  for (const value of [[], {}, [null, true, 0.5, -1e300, "ü€😀\u0000"], { "": [[[]]], ["__proto__"]: 1 }]) {
    assert.deepEqual(await caller.call("echo", "echo", value), value);
  }
  assert.equal(await caller.call("echo", "nothing"), null);
  close();
}

export async function attachments_travel_byte_for_byte() {
  const { caller, close } = await pair("echo", { echo: (params) => params });
  for (const length of [0, 1, 7, 8, 4095, 1_000_003]) {
    const given = bytes(length);
    const { one, two, text } = await caller.call("echo", "echo", { one: given, two: [given, { deep: given }], text: "ü" });
    same(one, given);
    same(two[0], given);
    same(two[1].deep, given);
    assert.equal(text, "ü");
  }
  close();
}

export async function every_view_of_bytes_is_an_attachment() {
  const { caller, close } = await pair("echo", { echo: (params) => params });
  const whole = bytes(64);
  const views = [
    [whole.buffer, whole],
    [whole.subarray(5, 13), whole.subarray(5, 13)],
    [new DataView(whole.buffer, 8, 16), whole.subarray(8, 24)],
    [new Float32Array(whole.buffer, 4, 3), whole.subarray(4, 16)],
    [Buffer.from(whole), whole],
  ];
  for (const [view, expected] of views) same((await caller.call("echo", "echo", [view]))[0], expected);
  close();
}

export async function the_first_attachment_is_aligned() {
  const { url: there, said, close } = await stub();
  const client = await connect(there, { token });
  for (const pad of ["", "x", "xx", "xxxxx"]) client.notify("lab", "note", [pad, bytes(3), bytes(5)]);
  await until(() => said.length === 4, "all have come");
  for (const frame of said) {
    assert.equal(frame.readUInt32BE(0), 3);
    assert.equal(frame.readUInt32BE(8) % 8, 0);
    assert.equal(Buffer.compare(frame.subarray(frame.readUInt32BE(8), frame.readUInt32BE(12)), bytes(3)), 0);
    assert.equal(Buffer.compare(frame.subarray(frame.readUInt32BE(12)), bytes(5)), 0);
  }
  client.close();
  close();
}

export async function a_key_named_proto_beside_attachments_stays_data() {
  const { caller, close } = await pair("echo", { echo: (params) => params });
  const evil = JSON.parse('{"__proto__": {"polluted": true}, "constructor": 1}');
  const back = await caller.call("echo", "echo", { evil, data: bytes(3) });
  assert.deepEqual(Object.keys(back.evil), ["__proto__", "constructor"]);
  assert.equal({}.polluted, undefined);
  assert.equal(back.evil.polluted, undefined);
  close();
}

export async function a_thousand_calls_at_once_find_their_answers() {
  const { caller, close } = await pair("echo", { twice: ([n]) => 2 * n });
  const calls = Array.from({ length: 1000 }, (_, n) => caller.call("echo", "twice", [n]));
  assert.deepEqual(await Promise.all(calls), Array.from({ length: 1000 }, (_, n) => 2 * n));
  close();
}

export async function what_a_worker_throws_is_a_remote_error() {
  const { caller, close } = await pair("lab", {
    throws() {
      throw new TypeError("no light");
    },
    rejects: async () => Promise.reject("just text"),
    faults() {
      throw new broker.Fault("too warm", { code: 17, data: { celsius: 40 }, retryable: true });
    },
    big: () => 10n,
    nan: () => [NaN],
    around() {
      const value = {};
      return Object.assign(value, { value });
    },
    large: () => new Uint8Array(17 << 20),
  });
  const error = await fails(caller.call("lab", "throws"), broker.RemoteError, {
    outcome: "worker_error", code: -32000, type: "TypeError", endpoint: "lab", method: "throws",
    data: { type: "TypeError", message: "no light" }, retryable: false, dispatched: true, attempts: 1,
  });
  assert.match(error.message, /^lab\/throws: .*no light$/);
  assert.ok(error.worker);
  await fails(caller.call("lab", "rejects"), broker.RemoteError, { detail: "just text" });
  await fails(caller.call("lab", "faults"), broker.RemoteError, { code: 17, data: { celsius: 40 }, retryable: true });
  for (const method of ["big", "nan", "around", "large"]) await fails(caller.call("lab", method), broker.RemoteError);
  close();
}

export async function outcomes_of_the_broker_are_classes() {
  const { caller, stop, close } = await pair("lab", { hang: () => new Promise(() => {}) }, { capacity: 1 });
  await fails(caller.call("nowhere", "read"), broker.NoEndpoint, { code: -32601, outcome: "no_endpoint" });
  await fails(caller.call("lab", "nothing"), broker.NoMethod, { code: -32601, outcome: "no_method" });
  const [executing, queued] = [0.2, 0.2].map((timeout) => caller.call("lab", "hang", {}, { timeout }));
  await Promise.all([
    fails(executing, broker.DeadlineExceeded, { code: -32003, phase: "executing", dispatched: true }),
    fails(queued, broker.DeadlineExceeded, { phase: "queued", dispatched: false, retryable: true }),
  ]);
  await fails(caller.call(null, "broker.describe", { endpont: "lab" }), broker.InvalidRequest, { code: -32602 });
  await stop();
  await fails(caller.call("lab", "hang"), broker.NoWorker, { code: -32001, retryable: true });
  close();
}

export async function a_worker_that_dies_is_told() {
  const { caller, worker, close } = await pair("lab", { die: () => new Promise(() => worker.close()) });
  await fails(caller.call("lab", "die"), broker.WorkerLost, { outcome: "worker_lost", dispatched: true });
  close();
}

export async function what_cannot_be_sent_is_refused_here() {
  const { caller, close } = await pair("lab", { read: () => 1 });
  for (const [endpoint, method] of [["lab", ""], ["a/b", "read"], ["lab\n", "read"], ["lab", "../x"], [null, "read"]]) {
    await fails(caller.call(endpoint, method), broker.InvalidRequest);
  }
  for (const params of ["text", 5, { a: NaN }, { a: 5n }]) await fails(caller.call("lab", "read", params), broker.InvalidRequest);
  for (const timeout of [0, -1, NaN, Infinity, "x"]) {
    await fails(caller.call("lab", "read", {}, { timeout }), broker.InvalidRequest);
  }
  await fails(caller.call("lab", "read", {}, { retries: 2 }), broker.InvalidRequest);
  await fails(caller.call("lab", "read", { data: new Uint8Array(16 << 20) }), broker.TooLarge);
  await fails(caller.call("lab", "read", { text: "€".repeat(6 << 20) }), broker.TooLarge);
  assert.equal(await caller.call("lab", "read"), 1);
  close();
}

export async function an_abort_signal_cancels_at_the_worker() {
  const seen = [];
  const { caller, close } = await pair("lab", {
    hang: (params, { signal }) =>
      new Promise((resolve) => {
        seen.push("begun");
        signal.addEventListener("abort", () => resolve(seen.push("aborted")));
      }),
  });
  const controller = new AbortController();
  const call = caller.call("lab", "hang", {}, { signal: controller.signal });
  await until(() => seen.length === 1, "the worker has begun");
  controller.abort("not needed");
  await fails(call, broker.Cancelled, { reason: "not needed", outcome: "cancelled" });
  await until(() => seen.length === 2, "the worker was told");
  await fails(caller.call("lab", "hang", {}, { signal: controller.signal }), broker.Cancelled);
  assert.equal(seen.length, 2);
  close();
}

export async function cancel_takes_a_call_back() {
  let aborted = false;
  const { caller, close } = await pair("lab", {
    hang: (params, { signal }) => new Promise(() => signal.addEventListener("abort", () => (aborted = true))),
    quick: () => 1,
  });
  const call = caller.call("lab", "hang");
  const ended = fails(call, broker.Cancelled);
  await caller.ping();
  assert.equal(caller.cancel(call), true);
  await ended;
  await until(() => aborted, "the worker was told");
  assert.equal(caller.cancel(call), false);
  const quick = caller.call("lab", "quick");
  assert.equal(await quick, 1);
  assert.equal(caller.cancel(quick), false);
  close();
}

export async function a_deadline_reaches_the_worker() {
  let told;
  const { caller, close } = await pair("lab", { read: (params, request) => (told = request.timeout) });
  await caller.call("lab", "read", {}, { timeout: 5 });
  assert.ok(told > 4 && told <= 5, `${told}`);
  close();
}

export async function a_request_may_wait_for_its_worker() {
  const caller = await connect(url, { token });
  const worker = await connect(url, { token });
  const stop = await worker.serve("late", { read: () => "old" });
  await stop();
  const call = caller.call("late", "read", {}, { wait: true, timeout: 10 });
  await caller.ping();
  await worker.serve("late", { read: () => "here" });
  assert.equal(await call, "here");
  caller.close();
  worker.close();
}

// ------------------------------------------------------------ broadcasts, notifications, listings

export async function broadcasts_reach_who_subscribed() {
  const [speaker, listener] = [await connect(url, { token }), await connect(url, { token })];
  const heard = { all: [], topic: [], everybody: [] };
  const stop = await listener.subscribe("news", (message) => heard.all.push(message));
  await listener.subscribe("news", "weather", (message) => heard.topic.push(message));
  await listener.subscribe(null, (message) => heard.everybody.push(message.data));
  assert.equal((await speaker.publish("news", { n: 1 })).listeners, 1);
  await speaker.publish("news", { data: bytes(9) }, { topic: "weather" });
  await speaker.publish(null, "to all");
  await until(() => heard.all.length && heard.topic.length && heard.everybody.length, "all are heard");
  assert.deepEqual(heard.all[0], { endpoint: "news", topic: null, seq: 1, data: { n: 1 }, missed: 0 });
  assert.equal(heard.topic[0].topic, "weather");
  same(heard.topic[0].data.data, bytes(9));
  assert.deepEqual(heard.everybody, ["to all"]);
  await stop();
  assert.equal((await speaker.publish("news", { n: 2 })).listeners, 0);
  await listener.ping();
  assert.equal(heard.all.length, 1);
  speaker.close();
  listener.close();
}

export async function two_callbacks_of_one_topic_are_independent() {
  const client = await connect(url, { token });
  const heard = [];
  console.error = () => heard.push("complaint");
  const first = await client.subscribe("twin", () => {
    throw new Error("mine alone");
  });
  const second = await client.subscribe("twin", ({ data }) => heard.push(data));
  await client.publish("twin", 1);
  await until(() => heard.includes(1), "the second hears it");
  assert.deepEqual(heard, ["complaint", 1]);
  await first();
  await client.publish("twin", 2);
  await until(() => heard.includes(2), "it hears on");
  await second();
  assert.equal((await client.publish("twin", 3)).listeners, 0);
  client.close();
}

export async function missed_broadcasts_are_counted() {
  const { url: there, close } = await stub((socket, { id, method }) => {
    if (method !== "broker.subscribe") return;
    socket.send(JSON.stringify({ jsonrpc: "2.0", id, result: { seq: 4 } }));
    for (const seq of [5, 8]) {
      const params = { endpoint: "lab", seq, data: seq };
      socket.send(JSON.stringify({ jsonrpc: "2.0", method: "broker.message", params }));
    }
  });
  const client = await connect(there, { token });
  const missed = [];
  await client.subscribe("lab", (message) => missed.push(message.missed));
  await until(() => missed.length === 2, "both are heard");
  assert.deepEqual(missed, [0, 2]);
  client.close();
  close();
}

export async function a_notification_reaches_a_worker() {
  const got = [];
  const { caller, close } = await pair("lab", { note: (params) => got.push(params) });
  caller.notify("lab", "note", { n: 1 });
  caller.notify("lab", "note", [bytes(3)]);
  await until(() => got.length === 2, "both have come");
  assert.deepEqual(got[0], { n: 1 });
  same(got[1][0], bytes(3));
  caller.close();
  assert.throws(() => caller.notify("lab", "note"), broker.ConnectionLost);
  close();
}

export async function endpoints_and_methods_are_listed() {
  const { caller, close } = await pair("lab", { read: () => 1, list: () => 2 }, { info: { doc: "A laboratory." } });
  const listed = (await caller.endpoints()).find(({ endpoint }) => endpoint === "lab");
  assert.equal(listed.workers, 1);
  const { workers } = await caller.describe("lab");
  assert.deepEqual(workers[0].methods, ["list", "read"]);
  assert.equal(workers[0].info.doc, "A laboratory.");
  assert.equal(workers[0].capacity, 64);
  close();
}

export async function an_endpoint_is_served_once_per_client() {
  const { worker, caller, stop, close } = await pair("lab", { read: () => 1 });
  await fails(worker.serve("lab", { read: () => 2 }), broker.InvalidRequest);
  assert.equal(await caller.call("lab", "read"), 1);
  await stop();
  await worker.serve("lab", { read: () => 3 });
  assert.equal(await caller.call("lab", "read"), 3);
  close();
}

export async function methods_of_objects_prototype_are_not_served() {
  const { caller, close } = await pair("lab", { read: () => 1 });
  for (const method of ["constructor", "toString", "__proto__", "hasOwnProperty"]) {
    await fails(caller.call("lab", method), broker.NoMethod);
  }
  close();
}

// ------------------------------------------------------------ losing the connection

export async function after_a_crash_everything_comes_back() {
  const states = [];
  const worker = await connect(url, { token });
  const caller = await connect(url, { token, onState: (state) => states.push(state) });
  let aborted = 0;
  let runs = 0;
  await worker.serve("lab", {
    read: () => "here",
    hang: (params, { signal }) => new Promise(() => signal.addEventListener("abort", () => (aborted += 1))),
    second: () => ((runs += 1) === 1 ? new Promise(() => {}) : runs),
  });
  const heard = [];
  await caller.subscribe("lab", "t", ({ data }) => heard.push(data));
  const hanging = fails(caller.call("lab", "hang"), broker.ConnectionLost, { mayHaveExecuted: true, retryable: false });
  const again = caller.call("lab", "second", {}, { idempotent: true, wait: true });
  await until(() => runs === 1, "the worker has it");
  await please("kill");
  await hanging;
  await until(() => aborted === 1, "what ran for nobody is told");
  await until(() => caller.state === "connecting", "the caller noticed");
  const waiting = caller.call("lab", "read", {}, { timeout: 25, wait: true });
  await please("start");
  assert.equal(await again, 2);
  assert.equal(await waiting, "here");
  await caller.publish("lab", "after", { topic: "t" });
  await until(() => heard.length === 1, "the subscription is renewed");
  assert.deepEqual(states, ["connected", "connecting", ...states.slice(2, -1), "connected"]);
  worker.close();
  caller.close();
  assert.equal(states.at(-1), "closed");
}

export async function bytes_of_a_waiting_call_are_those_it_was_asked_with() {
  const { worker, caller, close } = await pair("lab", { echo: (params) => params });
  await please("kill");
  await until(() => caller.state === "connecting", "the caller noticed");
  const data = bytes(100);
  const call = caller.call("lab", "echo", [data], { wait: true });
  data.fill(0);
  await please("start");
  await until(() => worker.state === "connected", "the worker is back");
  same((await call)[0], bytes(100));
  close();
}

export async function without_a_broker_a_call_ends_by_its_deadline() {
  const caller = await connect(url, { token });
  await please("kill");
  await until(() => caller.state === "connecting", "the caller noticed");
  const begun = performance.now();
  await fails(caller.call("lab", "read", {}, { timeout: 0.3 }), broker.ConnectionLost, { mayHaveExecuted: false });
  assert.ok(performance.now() - begun < 10_000);
  caller.close();
  await please("start");
}

export async function a_broker_that_never_answers_does_not_hold_a_call() {
  const { url: there, said, close } = await stub();
  const client = await connect(there, { token });
  await fails(client.call("lab", "read", {}, { timeout: 0.2 }), broker.DeadlineExceeded, { outcome: "deadline", phase: "" });
  await until(() => said.length === 2, "it is told that nobody waits");
  assert.deepEqual([said[1].method, said[1].params.id], ["$/cancelRequest", said[0].id]);
  client.close();
  close();
}

export async function a_silent_connection_is_opened_anew() {
  let skipped = 0;
  const beats = [];
  const { setTimeout: later } = globalThis;
  const now = performance.now.bind(performance);
  performance.now = () => now() + skipped;
  globalThis.setInterval = (beat) => beats.push(beat);
  globalThis.setTimeout = (action, ms) => later(action, Math.min(ms, 50));
  let opened = 0;
  const { url: there, server, close } = await stub();
  server.on("connection", () => (opened += 1));
  const client = await connect(there, { token });
  beats[0]();
  await until(() => opened === 1, "it is open");
  skipped += 31_000;
  beats[0]();
  await until(() => opened === 2, "it is opened again");
  client.close();
  close();
}

export async function without_reconnect_the_first_loss_is_the_end() {
  const client = await connect(url, { token, reconnect: false });
  await please("kill");
  await until(() => client.state === "closed", "it ended");
  await fails(client.call("lab", "read"), broker.ConnectionLost);
  await please("start");
}

export async function close_ends_what_is_under_way() {
  const { caller, worker, close } = await pair("lab", { hang: () => new Promise(() => {}) });
  const call = fails(caller.call("lab", "hang"), broker.ConnectionLost, { mayHaveExecuted: true });
  await worker.ping();
  caller.close();
  await call;
  await fails(caller.call("lab", "hang"), broker.ConnectionLost, { mayHaveExecuted: false });
  caller.close();
  close();
}

export async function a_close_that_means_stay_away_is_final() {
  const { url: there, server, close } = await stub((socket) => socket.close(4403, "not allowed"));
  let opened = 0;
  server.on("connection", () => (opened += 1));
  const client = await connect(there, { token });
  const error = await fails(client.call("lab", "read"), broker.ConnectionLost);
  assert.match(error.message, /4403 not allowed/);
  assert.equal(client.state, "closed");
  assert.equal(opened, 1);
  close();
}

// ------------------------------------------------------------ credentials and addresses

export async function a_wrong_token_is_refused_with_the_reason() {
  const error = await fails(connect(url, { token: "wrong" }), broker.Refused, { status: 401, retryable: false });
  assert.match(error.message, /not valid/);
  assert.ok(!error.message.includes("wrong"));
  await fails(connect(url), broker.Refused, { status: 401 });
  await fails(connect(url, { token: "wrong", patient: true }), broker.Refused);
}

export async function a_ticket_is_enough() {
  const response = await fetch(`${url}/ticket`, { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  const { ticket } = await response.json();
  const client = await connect(url, { ticket });
  assert.ok((await client.ping()).node);
  client.close();
  await fails(connect(url, { ticket }), broker.BrokerError); // it was good once
}

export async function a_token_is_asked_for_anew_on_every_connection() {
  let asked = 0;
  const client = await connect(url, { token: async () => ((asked += 1), token) });
  assert.equal(asked, 1);
  await please("kill");
  await please("start");
  await client.ping({ timeout: 25 });
  assert.ok(asked >= 2);
  client.close();
}

export async function where_there_is_no_broker_it_says_so() {
  const server = createServer((request, response) => response.writeHead(404).end("nothing here"));
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address();
  await fails(connect(`http://127.0.0.1:${port}`, { token }), broker.CannotConnect);
  await new Promise((resolve) => server.close(resolve));
  const error = await fails(connect(`http://127.0.0.1:${port}`, { token }), broker.CannotConnect, { retryable: true });
  assert.match(error.message, new RegExp(`no broker at http://127.0.0.1:${port}`));
  for (const wrong of ["", "nonsense", "ftp://host", "http://user@host", "http://host?x=1"]) {
    await assert.rejects(async () => connect(wrong, { token }), broker.InvalidRequest);
  }
}

export async function a_patient_client_waits_for_its_broker() {
  await please("kill");
  const connecting = connect(url, { token, patient: true });
  await please("start");
  const client = await connecting;
  assert.ok((await client.ping()).node);
  client.close();
}

export async function addresses_with_ws_and_paths_are_understood() {
  for (const address of [`${url}/`, `${url}/ws`, url.replace("http", "ws"), `${url.replace("http", "ws")}/ws/`]) {
    const client = await connect(address, { token });
    assert.equal(client.url, url);
    client.close();
  }
}

// ------------------------------------------------------------ bad words of the other side

export async function a_damaged_reply_ends_its_call() {
  const { url: there, close } = await stub((socket, { id }) => {
    const text = Buffer.from(JSON.stringify({ jsonrpc: "2.0", id, result: { $buffer: 7 } }));
    const head = Buffer.alloc(12);
    [2, 12, 12 + text.length].forEach((value, at) => head.writeUInt32BE(value, 4 * at));
    socket.send(Buffer.concat([head, text, Buffer.from("x")]));
  });
  const client = await connect(there, { token });
  await fails(client.call("lab", "read"), broker.BadReply);
  client.close();
  close();
}

export async function frames_that_cannot_be_read_cost_only_the_connection() {
  const frames = ["{", "null", "5", Buffer.alloc(0), Buffer.alloc(3), Buffer.from([255, 255, 255, 255]), Buffer.from([0, 0, 0, 1, 0, 0, 0, 99])];
  for (const frame of frames) {
    const { url: there, close } = await stub((socket) => socket.send(frame));
    const client = await connect(there, { token, reconnect: false });
    await fails(client.call("lab", "read"), broker.ConnectionLost, { mayHaveExecuted: true });
    client.close();
    close();
  }
}

export async function answers_to_nobody_are_ignored() {
  const { url: there, close } = await stub((socket, { id }) => {
    for (const message of [{ id: 99, result: 1 }, { id: null, error: { code: 1, message: "" } }, { id, result: "mine" }, { id, result: "twice" }]) {
      socket.send(JSON.stringify({ jsonrpc: "2.0", ...message }));
    }
  });
  const client = await connect(there, { token });
  assert.equal(await client.call("lab", "read"), "mine");
  client.close();
  close();
}

// ------------------------------------------------------------ beside Python

export async function calls_a_python_worker() {
  const client = await connect(url, { token });
  const given = bytes(50_000);
  const { data, length } = await client.call("python", "echo", { data: given, text: "ü" });
  same(data, given);
  assert.equal(length, 50_000);
  await fails(client.call("python", "fail"), broker.RemoteError, { type: "ValueError", detail: "no such thing" });
  client.close();
}

export async function serves_python_callers() {
  const client = await connect(url, { token });
  await client.serve("javascript", { echo: ({ data, text }) => ({ data, text, length: data.byteLength }) });
  await please("call");
  client.close();
}

export async function outcomes_have_their_classes() {
  console.log(`outcomes ${Object.keys(broker.OUTCOMES).sort().join(" ")}`);
}
