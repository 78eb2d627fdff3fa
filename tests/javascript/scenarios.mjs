// Each exported function is one test; `play.mjs` runs one. What only the test beside it can do (end the broker, start
// it again) it asks for by a line, and is answered by one.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { createConnection as createTcpConnection, createServer as createTcpServer } from "node:net";
import { createInterface } from "node:readline";
import { crc32 } from "node:zlib";
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
  const served = await worker.serve(endpoint, methods, options);
  const stop = (how) => served.stop(how);
  const close = () => [worker, caller].forEach((client) => client.close());
  return { worker, caller, served, stop, close };
}

/** What speaks WebSocket and says only what it is told; `said` are the messages it got. */
async function stub(answer = () => {}) {
  const said = [];
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1" });
  await new Promise((resolve) => server.on("listening", resolve));
  server.on("connection", (socket, request) => {
    const query = new URL(request.url, "http://stub").searchParams;
    if (query.has("grace")) tell(socket, "broker.session", { ...SESSION, grace: Number(query.get("grace")) });
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

const SESSION = { id: "a-b", secret: "xyz", resumed: false, received: 0, cut: 0 };

function tell(socket, method, params, meta) {
  socket.send(JSON.stringify({ jsonrpc: "2.0", method, params, meta }));
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
    assert.deepEqual(await caller.call("echo/echo", value), value);
  }
  assert.equal(await caller.call("echo/nothing"), null);
  close();
}

export async function attachments_travel_byte_for_byte() {
  const { caller, close } = await pair("echo", { echo: (params) => params });
  for (const length of [0, 1, 7, 8, 4095, 1_000_003]) {
    const given = bytes(length);
    const { one, two, text } = await caller.call("echo/echo", { one: given, two: [given, { deep: given }], text: "ü" });
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
    [new Uint8ClampedArray(whole.buffer, 5, 8), whole.subarray(5, 13)],
    [new DataView(whole.buffer, 8, 16), whole.subarray(8, 24)],
    [Buffer.from(whole), whole],
  ];
  for (const [view, expected] of views) same((await caller.call("echo/echo", [view]))[0], expected);
  close();
}

export async function arrays_keep_their_numbers_and_shape() {
  const { NdArray } = broker;
  const { caller, close } = await pair("echo", { echo: (params) => params });
  const kinds = [
    Float32Array, Float64Array, Int8Array, Int16Array, Int32Array, BigInt64Array, Uint16Array, Uint32Array,
    BigUint64Array,
  ];
  for (const kind of kinds) {
    const one = kind.name.startsWith("Big") ? 1n : 1;
    const whole = kind.from([0, 1, 2, 3, 4, 5], (n) => one * (one === 1 ? n : BigInt(n)));
    const [plain, part, square] = await caller.call("echo/echo", [whole, whole.subarray(1, 3), new NdArray(whole, [3, 2])]);
    for (const [given, shape, data] of [[plain, [6], whole], [part, [2], whole.slice(1, 3)], [square, [3, 2], whole]]) {
      assert.ok(given instanceof NdArray && given.data instanceof kind, kind.name);
      assert.deepEqual([given.shape, given.data], [shape, data]);
    }
  }
  for (const given of [
    new NdArray(new Uint8Array([1, 2]), [2]),
    new NdArray(new Uint8Array([0, 1]), [1, 2], "|b1"),
    new NdArray(new Float64Array([NaN]), []),
    new NdArray(new Float32Array(0), [0, 7]),
    new NdArray(bytes(16).buffer, [1], "<c16"),
  ]) {
    assert.deepEqual((await caller.call("echo/echo", { deep: [given] })).deep[0], given);
  }
  assert.ok((await caller.call("echo/echo", [new NdArray(bytes(16).buffer, [1], "<c16")]))[0].data instanceof ArrayBuffer);
  close();
}

export async function arrays_that_are_none_are_refused() {
  const { NdArray } = broker;
  assert.throws(() => new NdArray([1, 2, 3]), TypeError);
  assert.throws(() => new NdArray(bytes(8).buffer, [8]), TypeError);
  for (const [data, shape, dtype] of [
    [new Float32Array(6), [5]], [new Float32Array(6), [-1, -6]], [new Float32Array(6), "6"], [new Float32Array(6), [6.5]],
    [new Float32Array(6), [6], "<f8"], [bytes(7).buffer, [7], "<f4"], [bytes(7), [7], "<c16"], [new Float32Array(1), Array(33).fill(1)],
  ]) {
    assert.throws(() => new NdArray(data, shape, dtype), RangeError);
  }
  const bad = [
    { $array: { $buffer: 0 }, dtype: "<f4", shape: [2] }, { $array: { $buffer: 5 }, dtype: "|u1", shape: [3] },
    { $array: [1, 2, 3], dtype: "|u1", shape: [3] }, { $array: { $buffer: 0 }, dtype: 5, shape: [3] },
    { $array: { $buffer: 0 }, dtype: "|u1", shape: null },
  ];
  const { url: there, close } = await stub((socket, { id, method }) => {
    const text = Buffer.from(JSON.stringify({ jsonrpc: "2.0", id, result: bad[Number(method.split("/n")[1])] }));
    const head = Buffer.alloc(12);
    [2, 12, 12 + text.length].forEach((value, at) => head.writeUInt32BE(value, 4 * at));
    socket.send(Buffer.concat([head, text, bytes(3)]));
  });
  const client = await connect(there, { token });
  for (const number of bad.keys()) await fails(client.call(`lab/n${number}`), broker.BadReply);
  client.close();
  close();
}

export async function bad_attachments_are_bad_params_of_the_caller() {
  const { caller, close } = await pair("lab", { read: () => 1 });
  await fails(caller.call("lab/read", { no: { $buffer: 7 }, data: bytes(3) }), broker.RemoteError, { code: -32602 });
  close();
}

export async function the_first_attachment_is_aligned() {
  const { url: there, said, close } = await stub();
  const client = await connect(there, { token });
  for (const pad of ["", "x", "xx", "xxxxx"]) client.notify("lab/note", [pad, bytes(3), bytes(5)]);
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
  const back = await caller.call("echo/echo", { evil, data: bytes(3) });
  assert.deepEqual(Object.keys(back.evil), ["__proto__", "constructor"]);
  assert.equal({}.polluted, undefined);
  assert.equal(back.evil.polluted, undefined);
  close();
}

export async function a_thousand_calls_at_once_find_their_answers() {
  const { caller, close } = await pair("echo", { twice: ([n]) => 2 * n });
  const calls = Array.from({ length: 1000 }, (_, n) => caller.call("echo/twice", [n]));
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
  });
  const error = await fails(caller.call("lab/throws"), broker.RemoteError, {
    outcome: "worker_error", code: -32000, type: "TypeError", endpoint: "lab", method: "throws",
    data: { type: "TypeError", message: "no light" }, retryable: false, dispatched: true, attempts: 1,
  });
  assert.ok(error.worker && error.elapsedS > 0);
  const facts = `(worker ${error.worker}, after ${Number((error.elapsedS * 1e3).toPrecision(3))} ms)`;
  assert.equal(error.message, `lab/throws: worker_error: TypeError: no light ${facts}. The worker's log says more.`);
  await fails(caller.call("lab/rejects"), broker.RemoteError, { detail: "just text" });
  await fails(caller.call("lab/faults"), broker.RemoteError, { code: 17, data: { celsius: 40 }, retryable: true });
  for (const method of ["big", "nan", "around"]) await fails(caller.call(`lab/${method}`), broker.RemoteError);
  close();
}

export async function outcomes_of_the_broker_are_classes() {
  const { caller, stop, close } = await pair("lab", { hang: () => new Promise(() => {}) }, { capacity: 1 });
  await fails(caller.call("nowhere/read"), broker.NoEndpoint, { code: -32601, outcome: "no_endpoint" });
  await fails(caller.call("lab/nothing"), broker.NoMethod, { code: -32601, outcome: "no_method" });
  const [executing, queued] = [0.2, 0.2].map((timeout) => caller.call("lab/hang", {}, { timeout }));
  await Promise.all([
    fails(executing, broker.DeadlineExceeded, { code: -32003, phase: "executing", dispatched: true }),
    fails(queued, broker.DeadlineExceeded, { phase: "queued", dispatched: false, retryable: true }),
  ]);
  await fails(caller.call("broker.describe", { endpont: "lab" }), broker.InvalidRequest, { code: -32602 });
  await stop();
  await fails(caller.call("lab/hang"), broker.NoWorker, { code: -32001, retryable: true });
  close();
}

export async function a_worker_that_dies_is_told() {
  const { caller, worker, close } = await pair("lab", { die: () => new Promise(() => worker.close()) });
  await fails(caller.call("lab/die"), broker.WorkerLost, { outcome: "worker_lost", dispatched: true });
  close();
}

export async function what_cannot_be_sent_is_refused_here() {
  const { caller, close } = await pair("lab", { read: () => 1 });
  for (const name of ["lab/", "a/b/read", "lab/read\n", "lab/../x", "read", "", null, undefined, 5, ["lab/read"]]) {
    await fails(caller.call(name), broker.InvalidRequest);
    assert.throws(() => caller.notify(name), broker.InvalidRequest);
  }
  for (const options of [{ timout: 5 }, { topic: "t" }]) await fails(caller.call("lab/read", {}, options), broker.InvalidRequest);
  await fails(caller.subscribe("lab", "topic"), broker.InvalidRequest);
  await fails(caller.subscribe(null, { topic: "t" }), broker.InvalidRequest);
  await fails(caller.publish(null, 1, { topic: "t" }), broker.InvalidRequest);
  await fails(caller.serve("other", {}), broker.InvalidRequest);
  await fails(caller.serve("other", { read: () => 1 }, { capcity: 2 }), broker.InvalidRequest);
  await fails(connect(url, { tokn: token }), broker.InvalidRequest);
  for (const params of ["text", 5, { a: NaN }, { a: 5n }]) await fails(caller.call("lab/read", params), broker.InvalidRequest);
  for (const timeout of [0, -1, NaN, Infinity, "x"]) {
    await fails(caller.call("lab/read", {}, { timeout }), broker.InvalidRequest);
  }
  for (const options of [
    { retries: 2 }, { idle: 0 }, { parts: 5 }, { parts: "text" }, { parts: bytes(3) }, { parts: {} }, { onProgress: 5 },
    { key: "k", parts: [] }, { stream: true }, { priority: 10 }, { key: "" },
  ]) {
    await fails(caller.call("lab/read", {}, options), broker.InvalidRequest);
  }
  for (const options of [{ key: "k" }, { timout: 5 }, { timeout: 0 }, { parts: 5 }]) {
    assert.throws(() => caller.stream("lab/read", {}, options), broker.InvalidRequest);
  }
  for (const grace of [-1, Infinity, "x"]) await fails(connect(url, { token, grace }), broker.InvalidRequest);
  for (const large of [{ data: new Uint8Array(16 << 20) }, { text: "€".repeat(6 << 20) }]) {
    await fails(caller.call("lab/read", large, { key: "k" }), broker.TooLarge);
    assert.throws(() => caller.notify("lab/read", large), broker.TooLarge);
  }
  assert.equal(await caller.call("lab/read"), 1);
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
  const call = caller.call("lab/hang", {}, { signal: controller.signal });
  await until(() => seen.length === 1, "the worker has begun");
  controller.abort("not needed");
  await fails(call, broker.Cancelled, { reason: "not needed", outcome: "cancelled" });
  await until(() => seen.length === 2, "the worker was told");
  await fails(caller.call("lab/hang", {}, { signal: controller.signal }), broker.Cancelled);
  assert.equal(seen.length, 2);
  close();
}

export async function cancel_takes_a_call_back() {
  let aborted = false;
  const { caller, close } = await pair("lab", {
    hang: (params, { signal }) => new Promise(() => signal.addEventListener("abort", () => (aborted = true))),
    quick: () => 1,
  });
  const call = caller.call("lab/hang");
  const ended = fails(call, broker.Cancelled);
  await caller.ping();
  assert.equal(caller.cancel(call), true);
  await ended;
  await until(() => aborted, "the worker was told");
  assert.equal(caller.cancel(call), false);
  const quick = caller.call("lab/quick");
  assert.equal(await quick, 1);
  assert.equal(caller.cancel(quick), false);
  close();
}

export async function a_deadline_reaches_the_worker() {
  let told;
  const { caller, close } = await pair("lab", { read: (params, { leftS }) => (told = leftS) });
  await caller.call("lab/read", {}, { timeout: 5 });
  assert.ok(told > 4 && told <= 5, `${told}`);
  close();
}

export async function a_request_may_wait_for_its_worker() {
  const caller = await connect(url, { token });
  const worker = await connect(url, { token });
  const served = await worker.serve("late", { read: () => "old" });
  await served.stop();
  const call = caller.call("late/read", {}, { wait: true, timeout: 10 });
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
  const all = await listener.subscribe("news", (message) => heard.all.push(message));
  await listener.subscribe("news", (message) => heard.topic.push(message), { topic: "weather" });
  await listener.subscribe(null, (message) => heard.everybody.push(message.data));
  assert.equal((await speaker.publish("news", { n: 1 })).listeners, 1);
  await speaker.publish("news", { data: bytes(9) }, { topic: "weather" });
  await speaker.publish(null, "to all");
  await until(() => heard.all.length && heard.topic.length && heard.everybody.length, "all are heard");
  assert.deepEqual(heard.all[0], { endpoint: "news", topic: null, seq: 1, data: { n: 1 }, missed: 0 });
  assert.equal(heard.topic[0].topic, "weather");
  same(heard.topic[0].data.data, bytes(9));
  assert.deepEqual(heard.everybody, ["to all"]);
  await all.close();
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
  await first.close();
  await client.publish("twin", 2);
  await until(() => heard.includes(2), "it hears on");
  await second.close();
  assert.equal((await client.publish("twin", 3)).listeners, 0);
  client.close();
}

export async function broadcasts_are_read_one_by_one() {
  const client = await connect(url, { token });
  const subscription = await client.subscribe("line", { topic: "t" });
  assert.deepEqual([subscription.endpoint, subscription.topic, subscription.dropped], ["line", "t", 0]);
  for (const n of [1, 2, 3]) await client.publish("line", n, { topic: "t" });
  const heard = [];
  for await (const { data, seq } of subscription) {
    heard.push([data, seq]);
    if (heard.length === 3) break;
  }
  assert.deepEqual(heard, [[1, 1], [2, 2], [3, 3]]);
  await assert.rejects(subscription.get(0.05), { name: "TimeoutError" });
  const next = subscription.get(20);
  await client.publish("line", bytes(3), { topic: "t" });
  same((await next).data, bytes(3));
  const [last, end] = [subscription.get(), (async () => { for await (const message of subscription) assert.fail(message); })()];
  await subscription.close();
  assert.equal(await last, null);
  await end;
  assert.equal(await subscription.get(), null);
  await subscription.close();
  assert.equal((await client.publish("line", 4, { topic: "t" })).listeners, 0);
  client.close();
}

export async function a_reader_that_does_not_read_loses_the_oldest() {
  const client = await connect(url, { token });
  const subscription = await client.subscribe("flood");
  await Promise.all(Array.from({ length: 1003 }, (_, n) => client.publish("flood", n)));
  await until(() => subscription.dropped === 3, "the oldest were dropped");
  assert.equal((await subscription.get()).data, 3);
  client.close();
}

export async function a_connection_that_ends_for_good_ends_the_reading() {
  const client = await connect(url, { token, reconnect: false });
  const subscription = await client.subscribe("gone");
  const reading = fails(subscription.get(), broker.ConnectionLost);
  await please("kill");
  await reading;
  await fails(subscription.get(), broker.ConnectionLost);
  await please("start");
  const other = await connect(url, { token });
  const closed = (await other.subscribe("gone")).get();
  other.close();
  assert.equal(await closed, null); // by our own will it is no error
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

export async function what_is_kept_is_asked_for_since_the_last() {
  let [socket, epoch, seq] = [null, "n1", 7];
  const { url: there, said, close } = await stub((from, { id, method }) => {
    socket = from;
    if (method === "broker.subscribe") from.send(JSON.stringify({ jsonrpc: "2.0", id, result: { seq, first: 1, epoch } }));
  });
  const client = await connect(there, { token });
  const heard = [];
  const news = await client.subscribe("lab", (message) => heard.push([message.seq, message.missed]), { topic: "t", since: 5 });
  assert.deepEqual([said[0].params, news.epoch], [{ endpoint: "lab", topic: "t", since: 5 }, "n1"]);
  const publish = (...numbers) => {
    for (const seq of numbers) tell(socket, "broker.message", { endpoint: "lab", topic: "t", seq, data: seq });
  };
  publish(7, 8); // the sixth was not kept
  await until(() => heard.length === 2, "both are heard");
  await fails(client.subscribe("lab", { topic: "t", since: 0 }), broker.InvalidRequest);
  await fails(client.subscribe(null, { since: 0 }), broker.InvalidRequest);
  socket.terminate();
  await until(() => said.length === 2, "it is renewed");
  assert.deepEqual(said[1].params, { endpoint: "lab", topic: "t", since: 8, epoch: "n1" });
  [epoch, seq] = ["n2", 11];
  socket.terminate();
  await until(() => said.length === 3, "it is renewed");
  await until(() => news.epoch === "n2", "it is told");
  publish(9, 10); // of another life, counted from its beginning
  await until(() => heard.length === 4, "they are heard");
  assert.deepEqual(heard, [[7, 1], [8, 0], [9, 8], [10, 0]]);
  client.close();
  close();
}

export async function a_notification_reaches_a_worker() {
  const got = [];
  const { caller, close } = await pair("lab", { note: (params) => got.push(params) });
  caller.notify("lab/note", { n: 1 });
  caller.notify("lab/note", [bytes(3)]);
  await until(() => got.length === 2, "both have come");
  assert.deepEqual(got[0], { n: 1 });
  same(got[1][0], bytes(3));
  caller.close();
  assert.throws(() => caller.notify("lab/note"), broker.ConnectionLost);
  close();
}

export async function endpoints_and_methods_are_listed() {
  const read = Object.assign(() => 1, { doc: "Read it." });
  const about = { name: "on the roof", doc: "A laboratory.", capacity: 7 };
  const { caller, served, close } = await pair("lab", { read, list: () => 2 }, about);
  const listed = (await caller.endpoints()).find(({ endpoint }) => endpoint === "lab");
  assert.equal(listed.workers, 1);
  const { workers } = await caller.describe("lab");
  assert.deepEqual(workers[0].methods, ["list", "read"]);
  const { doc, name, methods } = workers[0].info;
  assert.deepEqual([doc, name, methods], ["A laboratory.", "on the roof", { list: {}, read: { doc: "Read it." } }]);
  assert.deepEqual([workers[0].capacity, workers[0].peer], [7, served.peer]);
  assert.deepEqual([served.endpoint, served.name, served.capacity], ["lab", "on the roof", 7]);
  close();
}

export async function an_endpoint_is_served_once_per_client() {
  const { worker, caller, stop, close } = await pair("lab", { read: () => 1 });
  await fails(worker.serve("lab", { read: () => 2 }), broker.InvalidRequest);
  assert.equal(await caller.call("lab/read"), 1);
  await stop();
  await worker.serve("lab", { read: () => 3 });
  assert.equal(await caller.call("lab/read"), 3);
  close();
}

export async function a_worker_that_stops_finishes_what_it_has() {
  let finish;
  const { caller, served, stop, close } = await pair("lab", { slow: () => new Promise((resolve) => (finish = resolve)), quick: () => 1 });
  const call = caller.call("lab/slow");
  await until(() => finish, "it has begun");
  assert.equal(served.executing, 1);
  const stopping = stop();
  await until(async () => !(await caller.endpoints()).find(({ endpoint }) => endpoint === "lab")?.workers, "it takes no more");
  await fails(caller.call("lab/quick"), broker.NoWorker);
  finish("done");
  assert.equal(await call, "done");
  await stopping;
  assert.equal(served.executing, 0);
  await stop();
  close();
}

export async function a_worker_that_stops_now_says_so() {
  let aborted = 0;
  const hang = (params, { signal }) => new Promise(() => signal.addEventListener("abort", () => (aborted += 1)));
  for (const [options, how] of [[{}, { now: true }], [{ drain: 0.05 }, {}]]) {
    const { caller, stop, close } = await pair("lab", { hang }, options);
    const call = fails(caller.call("lab/hang"), broker.RemoteError);
    const before = aborted;
    await until(async () => (await caller.describe("lab")).executing === 1, "it has begun");
    await stop(how);
    await call;
    assert.equal(aborted, before + 1);
    close();
  }
}

export async function a_worker_publishes_without_an_answer() {
  const { caller, served, worker, close } = await pair("lab", { read: () => 1 });
  const heard = await caller.subscribe("lab", { topic: "new" });
  served.publish({ file: "a.dcm" }, { topic: "new" });
  assert.deepEqual((await heard.get(20)).data, { file: "a.dcm" });
  worker.close();
  served.publish("lost");
  close();
}

export async function many_calls_keep_their_order_and_their_bound() {
  let [running, most] = [0, 0];
  const { caller, close } = await pair("lab", {
    async twice([n]) {
      most = Math.max(most, (running += 1));
      await new Promise((resolve) => setTimeout(resolve, n % 3));
      running -= 1;
      if (n === 13) throw new RangeError("unlucky");
      return 2 * n;
    },
    hang: () => new Promise(() => {}),
  });
  const many = function* (length) {
    for (let n = 0; n < length; n += 1) yield [n];
  };
  const results = [];
  for await (const result of caller.map("lab/twice", many(10), { concurrency: 3 })) results.push(result);
  assert.deepEqual(results, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]);
  assert.ok(most <= 3 && most > 1, `${most}`);
  const mixed = [];
  for await (const result of caller.map("lab/twice", many(20), { returnExceptions: true })) mixed.push(result);
  assert.ok(mixed[13] instanceof broker.RemoteError && mixed[19] === 38);
  const seen = [];
  const failing = (async () => { for await (const result of caller.map("lab/twice", many(20))) seen.push(result); })();
  await fails(failing, broker.RemoteError, { type: "RangeError" });
  assert.equal(seen.length, 13);
  for await (const first of caller.map("lab/twice", (async function* () { yield [1]; yield [2]; })())) {
    assert.equal(first, 2);
    break; // the others are taken back
  }
  await fails(caller.map("lab/twice", [[1]], { concurrency: 0 }).next(), broker.InvalidRequest);
  await fails(caller.map("lab/hang", [[1]], { timeout: 0.2 }).next(), broker.DeadlineExceeded);
  await until(async () => (await caller.describe("lab")).executing === 0, "nothing is left");
  close();
}

export async function a_client_has_a_timeout_of_its_own() {
  const { worker, close } = await pair("lab", { hang: () => new Promise(() => {}), left: (params, { leftS }) => leftS });
  const caller = await connect(url, { token, timeout: 0.2 });
  await fails(caller.call("lab/hang"), broker.DeadlineExceeded);
  assert.ok((await caller.call("lab/left", {}, { timeout: 9 })) > 8);
  assert.ok(caller.isConnected && worker.isConnected);
  caller.close();
  assert.ok(!caller.isConnected);
  close();
}

export async function methods_of_objects_prototype_are_not_served() {
  const { caller, close } = await pair("lab", { read: () => 1 });
  for (const method of ["constructor", "toString", "__proto__", "hasOwnProperty"]) {
    await fails(caller.call(`lab/${method}`), broker.NoMethod);
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
  await caller.subscribe("lab", ({ data }) => heard.push(data), { topic: "t" });
  const hanging = fails(caller.call("lab/hang"), broker.ConnectionLost, { mayHaveExecuted: true, retryable: false });
  const again = caller.call("lab/second", {}, { idempotent: true, wait: true });
  await until(() => runs === 1, "the worker has it");
  await please("kill");
  await until(() => caller.state === "connecting", "the caller noticed");
  const waiting = caller.call("lab/read", {}, { timeout: 25, wait: true });
  await please("start");
  assert.equal(await again, 2);
  assert.equal(await waiting, "here");
  await hanging; // the broker knows nothing of the session any more
  await until(() => aborted === 1, "what ran for nobody is told");
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
  const call = caller.call("lab/echo", [data], { wait: true });
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
  await fails(caller.call("lab/read", {}, { timeout: 0.3 }), broker.ConnectionLost, { mayHaveExecuted: false });
  assert.ok(performance.now() - begun < 10_000);
  caller.close();
  await please("start");
}

export async function a_broker_that_never_answers_does_not_hold_a_call() {
  const { url: there, said, close } = await stub();
  const client = await connect(there, { token });
  await fails(client.call("lab/read", {}, { timeout: 0.2 }), broker.DeadlineExceeded, { outcome: "deadline", phase: "" });
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
  await fails(client.call("lab/read"), broker.ConnectionLost);
  await please("start");
}

export async function close_ends_what_is_under_way() {
  const { caller, worker, close } = await pair("lab", { hang: () => new Promise(() => {}) });
  const call = fails(caller.call("lab/hang"), broker.ConnectionLost, { mayHaveExecuted: true });
  await worker.ping();
  caller.close();
  await call;
  await fails(caller.call("lab/hang"), broker.ConnectionLost, { mayHaveExecuted: false });
  caller.close();
  close();
}

export async function a_close_that_means_stay_away_is_final() {
  const { url: there, server, close } = await stub((socket) => socket.close(4403, "not allowed"));
  let opened = 0;
  server.on("connection", () => (opened += 1));
  const client = await connect(there, { token });
  const error = await fails(client.call("lab/read"), broker.ConnectionLost);
  assert.match(error.message, /4403 not allowed/);
  assert.equal(client.state, "closed");
  assert.equal(opened, 1);
  close();
}

// ------------------------------------------------------------ streams, progress, values of any size

export async function a_method_that_yields_streams() {
  const { caller, close } = await pair("rows", {
    async *later({ count }) {
      for (let n = 0; n < count; n += 1) yield { n };
      return "all";
    },
    *now(params) {
      yield* params;
    },
    plain: () => [1, 2],
    *nothing() {},
  });
  const stream = caller.stream("rows/later", { count: 1000 }, { timing: true });
  assert.throws(() => stream.result, /after its last item/);
  assert.equal(stream.timing, null);
  const seen = [];
  for await (const { n } of stream) seen.push(n);
  assert.deepEqual(seen, Array.from({ length: 1000 }, (_, n) => n));
  assert.equal(stream.result, "all");
  assert.ok(stream.timing.first_part_ms <= stream.timing.ended_ms);
  assert.deepEqual(await stream.next(), { value: undefined, done: true });
  // A call gathers: what is returned beside the items is one more.
  assert.deepEqual(await caller.call("rows/now", [1, null, "x"]), [1, null, "x"]);
  assert.deepEqual(await caller.call("rows/later", { count: 2 }), [{ n: 0 }, { n: 1 }, "all"]);
  assert.deepEqual(await caller.call("rows/nothing"), null);
  const plain = caller.stream("rows/plain");
  assert.deepEqual(await plain.next(), { value: undefined, done: true });
  assert.deepEqual(plain.result, [1, 2]);
  const bits = [];
  for await (const bit of caller.stream("rows/now", [bytes(5), { deep: new Float32Array(3) }, "ü"])) bits.push(bit);
  same(bits[0], bytes(5));
  assert.deepEqual([bits[1].deep.data, bits[2]], [new Float32Array(3), "ü"]);
  close();
}

export async function a_reader_that_stalls_stops_the_worker() {
  let yielded = 0;
  const { caller, worker, close } = await pair("rows", {
    *many() {
      for (; yielded < 500; yielded += 1) yield yielded;
    },
  });
  const stream = caller.stream("rows/many");
  assert.equal((await stream.next()).value, 0);
  for (let turn = 0; turn < 5; turn += 1) await Promise.all([caller.ping(), worker.ping()]);
  const stood = yielded;
  assert.ok(stood > 4 && stood <= 30, `${stood}`);
  let read = 1;
  for await (const n of stream) assert.equal(n, read++);
  assert.equal(read, 500);
  close();
}

export async function leaving_a_stream_cancels_it_at_the_worker() {
  const seen = [];
  const { caller, close } = await pair("rows", {
    async *endless(params, { signal }) {
      signal.addEventListener("abort", () => seen.push("aborted"));
      try {
        for (let n = 0; ; n += 1) yield n;
      } finally {
        seen.push("closed");
      }
    },
  });
  const controller = new AbortController();
  for (const leave of [(stream) => stream.close(), (stream) => stream.return(), () => controller.abort("enough")]) {
    const stream = caller.stream("rows/endless", null, { signal: controller.signal });
    assert.equal((await stream.next()).value, 0);
    await leave(stream);
    await until(() => seen.length === 2, "the worker is told");
    assert.deepEqual(seen.splice(0).sort(), ["aborted", "closed"]);
    const drained = (async () => { for await (const n of stream) assert.ok(n < 20); })();
    await fails(drained, broker.Cancelled); // half a stream does not pass for a whole one
    assert.throws(() => stream.result);
  }
  for await (const n of caller.stream("rows/endless")) if (n === 3) break;
  await until(() => seen.length === 2, "the worker is told");
  const { executing } = await caller.describe("rows");
  assert.equal(executing, 0);
  close();
}

export async function an_error_comes_after_the_items_before_it() {
  const { caller, close } = await pair("rows", {
    async *fails() {
      yield 1;
      yield 2;
      throw new RangeError("no more");
    },
    *unfit() {
      yield 1;
      yield 10n;
    },
  });
  for (const [method, type, expected] of [["fails", "RangeError", [1, 2]], ["unfit", "InvalidRequest", [1]]]) {
    const seen = [];
    const reading = (async () => { for await (const n of caller.stream(`rows/${method}`)) seen.push(n); })();
    await fails(reading, broker.RemoteError, { type, method });
    assert.deepEqual(seen, expected);
    await fails(caller.call(`rows/${method}`), broker.RemoteError, { type });
  }
  await fails(caller.stream("rows/none").next(), broker.NoMethod);
  await fails(caller.stream("rows/fails", null, { signal: AbortSignal.abort() }).next(), broker.Cancelled);
  const gone = await connect(url, { token });
  gone.close();
  await fails(gone.stream("rows/fails").next(), broker.ConnectionLost);
  close();
}

export async function parts_are_sent_as_the_worker_takes_them() {
  const { caller, close } = await pair("sums", {
    async sum(params, request) {
      let sum = 0;
      for await (const n of request.parts()) sum += n;
      return { sum, has: request.hasParts };
    },
    async *doubles({ from }, request) {
      for await (const n of request.parts()) yield from + 2 * n;
    },
    async first(params, request) {
      for await (const n of request.parts()) return n;
      return "none";
    },
  });
  const numbers = async function* (length) {
    for (let n = 0; n < length; n += 1) yield n;
  };
  assert.deepEqual(await caller.call("sums/sum", null, { parts: numbers(500) }), { sum: 124750, has: true });
  assert.deepEqual(await caller.call("sums/sum", null, { parts: new Set([1, 2]) }), { sum: 3, has: true });
  assert.deepEqual(await caller.call("sums/sum", null, { parts: [] }), { sum: 0, has: true });
  assert.deepEqual(await caller.call("sums/sum", null), { sum: 0, has: false });
  const seen = [];
  for await (const n of caller.stream("sums/doubles", { from: 1 }, { parts: numbers(100) })) seen.push(n);
  assert.deepEqual(seen, Array.from({ length: 100 }, (_, n) => 1 + 2 * n));
  for await (const result of caller.map("sums/sum", [null, null], { parts: [4, 5] })) assert.equal(result.sum, 9);
  await fails(caller.map("sums/sum", [null, null], { parts: numbers(3) }).next(), broker.InvalidRequest);
  // What the worker does not take is not asked for, and who gives it is told the end.
  let [given, closed] = [0, false];
  const watched = async function* () {
    try {
      for (; given < 1000; given += 1) yield given;
    } finally {
      closed = true;
    }
  };
  assert.equal(await caller.call("sums/first", null, { parts: watched() }), 0);
  await until(() => closed, "the generator is closed");
  assert.ok(given < 20, `${given}`);
  close();
}

export async function parts_that_fail_take_the_call_back() {
  const seen = [];
  const { caller, close } = await pair("sums", {
    async count(params, request) {
      request.signal.addEventListener("abort", () => seen.push("aborted"));
      try {
        for await (const n of request.parts()) seen.push(n);
      } catch (error) {
        seen.push(error.name);
      }
    },
  });
  const failing = async function* () {
    yield 1;
    await until(() => seen.length, "the first is there");
    throw new SyntaxError("mine");
  };
  await assert.rejects(caller.call("sums/count", null, { parts: failing() }), SyntaxError);
  await until(() => seen.length === 3, "the worker is told");
  assert.deepEqual(seen.splice(0), [1, "aborted", "Cancelled"]);
  await fails(caller.call("sums/count", null, { parts: [10n] }), broker.InvalidRequest);
  await fails(caller.stream("sums/count", null, { parts: [NaN] }).next(), broker.InvalidRequest);
  close();
}

export async function values_of_any_size_arrive_whole() {
  const large = bytes(20 << 20);
  const text = "€".repeat(6 << 20);
  const { caller, close } = await pair("echo", {
    echo: (params) => params,
    async *items(params, request) {
      for await (const item of request.parts()) yield item;
      return params;
    },
    size: ({ data }, request) => [data.byteLength, request.hasParts],
    length: ({ text }) => text.length,
  });
  const back = await caller.call("echo/echo", { data: large, more: [new Float32Array(2), large.subarray(0, 9)], text: "ü" });
  same(back.data, large);
  assert.deepEqual([back.more[0].data, back.text], [new Float32Array(2), "ü"]);
  same(back.more[1], large.subarray(0, 9));
  assert.equal((await caller.call("echo/length", { text })), text.length);
  assert.deepEqual(await caller.call("echo/size", { data: large }), [20 << 20, true]);
  // Items and params of any size at once, in both directions.
  const given = [1, { large: bytes(3 << 20) }, null, bytes(300_000), "end"];
  const stream = caller.stream("echo/items", { data: large }, { parts: given });
  const items = [];
  for await (const item of stream) items.push(item);
  assert.deepEqual([items[0], items[2], items[4], items.length], [1, null, "end", 5]);
  same(items[1].large, given[1].large);
  same(items[3], given[3]);
  same(stream.result.data, large);
  const gathered = await caller.call("echo/items", { data: bytes(9) }, { parts: given });
  assert.equal(gathered.length, 6);
  same(gathered[3], given[3]);
  same(gathered[5].data, bytes(9));
  close();
}

export async function progress_is_told_as_it_comes() {
  let hold;
  const { caller, close } = await pair("scan", {
    async scan(params, request) {
      request.progress(1, 10, "first");
      for (let n = 2; n < 1000; n += 1) request.progress(n);
      await new Promise((resolve) => (hold = resolve));
      request.progress(1000, 1000);
      return "done";
    },
    wrong: (params, request) => request.progress("5"),
  });
  const told = [];
  const call = caller.call("scan/scan", null, { onProgress: (...given) => told.push(given) });
  await until(() => told.length === 2, "the first and the latest have come");
  assert.deepEqual(told, [[1, 10, "first"], [999, null, null]]);
  hold();
  assert.equal(await call, "done");
  assert.deepEqual(told.slice(2), [[1000, 1000, null]]); // the last always comes, before the answer
  const stream = caller.stream("scan/scan", null, { onProgress: () => { hold?.(); throw new Error("mine alone"); } });
  const complaints = [];
  console.error = (error) => complaints.push(error.message);
  await stream.next();
  assert.equal(stream.result, "done");
  assert.ok(complaints.length && complaints.every((text) => text === "mine alone"));
  await fails(caller.call("scan/wrong"), broker.RemoteError, { type: "TypeError" });
  close();
}

export async function a_stream_that_stands_still_ends() {
  const { caller, close } = await pair("rows", {
    async *stuck(params, { signal }) {
      yield 1;
      await new Promise((resolve) => signal.addEventListener("abort", resolve));
    },
  });
  const stream = caller.stream("rows/stuck", null, { idle: 0.3 });
  assert.equal((await stream.next()).value, 1);
  await fails(stream.next(), broker.DeadlineExceeded);
  await fails(caller.call("rows/stuck", null, { timeout: 0.3 }), broker.DeadlineExceeded);
  close();
}

export async function a_key_makes_repeats_one_request() {
  let runs = 0;
  const { caller, close } = await pair("lab", { expose: () => (runs += 1) });
  const key = `${Math.random()}`;
  const call = () => caller.call("lab/expose", { ms: 5 }, { key, priority: 9, group: "g" });
  assert.deepEqual(await Promise.all([call(), call()]), [1, 1]);
  assert.deepEqual([await call(), runs], [1, 1]);
  await fails(caller.call("lab/expose", { ms: 6 }, { key }), broker.KeyConflict);
  close();
}

// ------------------------------------------------------------ streams, word by word

/** Whoever has this answered has been heard, and all before it. */
function echo(socket, { id, method }) {
  if (method === "lab/echo") socket.send(JSON.stringify({ jsonrpc: "2.0", id, result: null }));
}

/** What was said to the stub, by method. */
function saidOf(said, method) {
  return said.filter((message) => message.method === method).map(({ params }) => params);
}

export async function credit_follows_the_reader() {
  let socket;
  const { url: there, said, close } = await stub((...given) => ([socket] = given) && echo(...given));
  const client = await connect(there, { token });
  const stream = client.stream("lab/rows");
  await until(() => said.length === 1, "it is asked");
  assert.equal(said[0].meta.timeout, undefined); // while something flows it may go on
  const part = (seq, data, more) => tell(socket, "$/part", { id: said[0].id, seq, data, more });
  const large = "x".repeat(250_000);
  for (let seq = 0; seq < 4; seq += 1) part(seq, [seq, large]);
  await client.call("lab/echo");
  assert.deepEqual(saidOf(said, "$/credit"), []); // nothing has been read
  for (const expected of [0, 1, 2, 3]) assert.equal((await stream.next()).value[0], expected);
  await until(() => saidOf(said, "$/credit").length === 1, "what was read is granted anew");
  assert.deepEqual(saidOf(said, "$/credit"), [{ id: said[0].id, upto: 9 }]);
  part(1, "again"); // came before
  part(4, ["new", large]);
  assert.equal((await stream.next()).value[0], "new");
  await until(() => saidOf(said, "$/credit").length === 2, "and again");
  assert.deepEqual(saidOf(said, "$/credit")[1].upto, 13);
  // Of small ones more may come.
  const small = client.stream("lab/rows");
  await until(() => said.at(-1).method === "lab/rows", "it is asked");
  const smallId = said.at(-1).id;
  for (let seq = 0; seq < 16; seq += 1) {
    tell(socket, "$/part", { id: smallId, seq, data: seq });
    assert.equal((await small.next()).value, seq);
  }
  await until(() => saidOf(said, "$/credit").at(-1).upto >= 16 + 12, "a wider window");
  assert.ok(saidOf(said, "$/credit").at(-1).upto <= 16 + 24);
  // Who gathers takes each at once, without reading.
  const call = client.call("lab/rows");
  await until(() => said.at(-1).method === "lab/rows", "it is asked");
  const { id } = said.at(-1);
  for (let seq = 0; seq < 4; seq += 1) tell(socket, "$/part", { id, seq, data: seq });
  await until(() => said.at(-1).params?.id === id, "credit comes");
  assert.deepEqual(said.at(-1).params, { id, upto: 9 });
  socket.send(JSON.stringify({ jsonrpc: "2.0", id, result: null }));
  assert.deepEqual(await call, [0, 1, 2, 3]);
  client.close();
  close();
}

export async function parts_go_as_far_as_there_is_credit() {
  let socket;
  const { url: there, said, close } = await stub((...given) => ([socket] = given) && echo(...given));
  const client = await connect(there, { token, timeout: 20 });
  const numbers = function* () {
    for (let n = 0; n < 7; n += 1) yield n;
  };
  const call = client.call("lab/sum", { from: 1 }, { parts: numbers() });
  await until(() => saidOf(said, "$/part").length === 4, "what needs no credit is sent");
  const [{ id, meta }] = said;
  assert.deepEqual(meta, { stream: "both" });
  const grant = (upto) => tell(socket, "$/credit", { id, upto });
  const steps = [[6, 6], [2, 6], ["9", 6], [undefined, 6], [8, 8]];
  for (const [upto, expected] of steps) {
    grant(upto);
    tell(socket, "$/credit", { id: 12345, upto: 99 });
    await until(() => saidOf(said, "$/part").length >= expected, `${expected} are sent`);
    await client.call("lab/echo");
    assert.equal(saidOf(said, "$/part").length, expected);
  }
  assert.deepEqual(saidOf(said, "$/part").at(-1), { id, seq: 7, last: true });
  assert.deepEqual(saidOf(said, "$/part").map(({ seq, data }) => [seq, data])[6], [6, 6]);
  socket.send(JSON.stringify({ jsonrpc: "2.0", id, result: 21 }));
  assert.equal(await call, 21);
  client.close();
  close();
}

export async function parts_that_do_not_fit_end_the_call() {
  const piece = (id, seq, data) => {
    const text = JSON.stringify({ jsonrpc: "2.0", method: "$/part", params: { id, seq, more: true, data: { $buffer: 0 } } });
    return framed(text, data);
  };
  const layout = framed('{"a":1}');
  const mark = (size, crc32) => ({ $joined: { bytes: size, crc32 } });
  const good = { bytes: layout.length, crc32: crc32(layout) };
  const cases = {
    gap: (id, part) => [part({ seq: 0 }), part({ seq: 2 })],
    beyond: (id, part) => [0, 1, 2, 3, 4].map((seq) => part({ seq })),
    bare: (id, part) => [part({ seq: 0, more: true, data: { $buffer: 0 } })],
    short: (id, part) => [piece(id, 0, layout), part({ seq: 1, data: mark(good.bytes + 1, good.crc32) })],
    damaged: (id, part) => [piece(id, 0, layout), part({ seq: 1, data: mark(good.bytes, good.crc32 ^ 1) })],
    open: (id, part) => [piece(id, 0, layout), part({ seq: 1, data: 5 })],
    reply: (id) => [piece(id, 0, layout), JSON.stringify({ jsonrpc: "2.0", id, result: mark(good.bytes, 1) })],
    layout: (id, part) => [piece(id, 0, bytes(12)), part({ seq: 1, data: mark(12, crc32(bytes(12))) })],
    whole: (id) => [piece(id, 0, layout), JSON.stringify({ jsonrpc: "2.0", id, result: { $joined: good } })],
  };
  const { url: there, said, close } = await stub((socket, { id, method }) => {
    const part = (params) => JSON.stringify({ jsonrpc: "2.0", method: "$/part", params: { id, data: 1, ...params } });
    for (const message of cases[method.split("/")[1]]?.(id, part) ?? []) socket.send(message);
  });
  const client = await connect(there, { token });
  assert.deepEqual(await client.call("lab/whole"), { a: 1 }); // so the others fail for what is wrong with them
  for (const name of Object.keys(cases).slice(0, -1)) {
    const read = name === "beyond" ? client.stream(`lab/${name}`) : client.call(`lab/${name}`);
    const ended = name === "beyond" ? (async () => { for await (const n of read) assert.equal(n, 1); })() : read;
    const { message } = await fails(ended, broker.BadReply, { method: name });
    assert.match(message, /the reply cannot be read: .+/);
    if (name === "reply") continue; // it had ended
    await until(() => said.at(-1).method === "$/cancelRequest", "the broker is told");
  }
  client.close();
  close();
}

function framed(text, ...attachments) {
  const head = Buffer.alloc(4 * (attachments.length + 2));
  const parts = [Buffer.from(text), ...attachments];
  head.writeUInt32BE(parts.length);
  let at = head.length;
  parts.forEach((part, index) => {
    head.writeUInt32BE(at, 4 * (index + 1));
    at += part.length;
  });
  return Buffer.concat([head, ...parts]);
}

// ------------------------------------------------------------ going on with a session

export async function what_came_is_acknowledged() {
  let socket;
  const { url: there, said, close } = await stub((...given) => ([socket] = given));
  const client = await connect(there, { token });
  const heard = [];
  await client.subscribe(null, ({ data }) => heard.push(data));
  client.notify("lab/note");
  await until(() => said.length === 1, "it is there");
  const publish = (n, data) => tell(socket, "broker.message", { data }, { n });
  for (let n = 1; n <= 31; n += 1) publish(n, n);
  publish(31, "again");
  await until(() => heard.length === 31, "all are heard once");
  assert.deepEqual(saidOf(said, "$/ack"), []);
  publish(32, 32);
  await until(() => saidOf(said, "$/ack").length === 1, "it is time to acknowledge");
  publish(40, "x".repeat(1 << 20)); // some between were cut
  await until(() => saidOf(said, "$/ack").length === 2, "much has come");
  assert.deepEqual(saidOf(said, "$/ack"), [{ n: 32 }, { n: 40 }]);
  assert.ok(!heard.includes("again"));
  client.close();
  close();
}

/** A stub that counts as the broker does, and can be cut off; `links` are the connections it had. */
async function resumable(answer = () => {}, received = () => 0) {
  const links = [];
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1", handleProtocols: () => "jsonrpc" });
  await new Promise((resolve) => server.on("listening", resolve));
  server.on("connection", (socket, request) => {
    const [, resume] = /resume\.([\w.-]+)/.exec(request.headers["sec-websocket-protocol"]) ?? [];
    const query = new URL(request.url, "http://stub").searchParams;
    const link = { socket, resume, received: query.get("received"), grace: query.get("grace"), said: [] };
    links.push(link);
    socket.on("message", (data, binary) => {
      link.said.push(binary ? data : JSON.parse(data));
      answer(link, link.said.at(-1));
    });
    const told = resume ? received(links) : null;
    tell(socket, "broker.session", { ...SESSION, grace: 9, resumed: told !== null, received: told ?? 0 });
  });
  const close = () => {
    for (const socket of server.clients) socket.terminate();
    server.close();
  };
  return { url: `http://127.0.0.1:${server.address().port}`, links, server, close };
}

export async function a_session_goes_on_over_another_connection() {
  const { url: there, links, close } = await resumable(() => {}, () => 2);
  const states = [];
  const client = await connect(there, { token, grace: 9, onState: (state) => states.push(state) });
  const [one, two, three] = ["one", "two", "three"].map((method) => client.call(`lab/${method}`));
  await until(() => links[0].said.length === 3, "they are there");
  links[0].socket.send(JSON.stringify({ jsonrpc: "2.0", id: links[0].said[0].id, result: 1, meta: { n: 1 } }));
  assert.equal(await one, 1);
  links[0].socket.terminate();
  await until(() => client.state === "connecting", "it noticed");
  const given = fails(two, broker.Cancelled);
  client.cancel(two); // told when there is a connection again
  const four = client.call("lab/four");
  await until(() => links[1]?.said.length === 3, "it goes on");
  assert.deepEqual([links[0].resume, links[0].received, links[0].grace], [undefined, null, "9"]);
  assert.deepEqual([links[1].resume, links[1].received, links[1].grace], ["a-b.xyz", "1", "9"]);
  // Two had arrived: the third is sent again as it was, then what came meanwhile.
  const [third, cancel, fourth] = links[1].said;
  assert.deepEqual(third, links[0].said[2]);
  assert.deepEqual([cancel.method, cancel.params.id], ["$/cancelRequest", links[0].said[1].id]);
  assert.equal(fourth.method, "lab/four");
  const { socket } = links[1];
  for (const [id, n] of [[links[0].said[0].id, 1], [third.id, 2], [fourth.id, 3]]) {
    socket.send(JSON.stringify({ jsonrpc: "2.0", id, result: n, meta: { n } }));
  }
  assert.deepEqual(await Promise.all([three, four]), [2, 3]);
  await given;
  assert.deepEqual(states, ["connected", "connecting", "connected"]);
  // What is acknowledged is not sent again.
  tell(socket, "$/ack", { n: 4 });
  tell(socket, "$/ack", { n: 99 });
  client.notify("lab/five");
  await until(() => links[1].said.length === 4, "it is there");
  socket.terminate();
  await until(() => links[2]?.said.length === 2, "it goes on");
  assert.deepEqual(links[2].said.map(({ method }) => method), ["lab/four", "lab/five"]);
  client.close();
  close();
}

export async function a_session_that_is_gone_ends_what_may_not_run_twice() {
  const { url: there, links, close } = await resumable((link, { id, method }) => {
    if (links.length === 2) link.socket.send(JSON.stringify({ jsonrpc: "2.0", id, result: method }));
  }, () => null);
  const client = await connect(there, { token });
  const lost = fails(client.call("lab/once"), broker.ConnectionLost, { mayHaveExecuted: true });
  const again = client.call("lab/again", null, { idempotent: true });
  const half = client.stream("lab/half", null, { idempotent: true });
  const sent = fails(client.call("lab/parts", null, { idempotent: true, parts: [1] }), broker.ConnectionLost);
  await until(() => links[0].said.length === 6, "they are there");
  const { id } = links[0].said.find(({ method }) => method === "lab/half");
  tell(links[0].socket, "$/part", { id, seq: 0, data: 1 }, { n: 1 });
  assert.equal((await half.next()).value, 1);
  links[0].socket.terminate();
  await lost;
  await fails(half.next(), broker.ConnectionLost); // some of it has been seen
  await sent;
  assert.equal(await again, "lab/again");
  assert.deepEqual([links[1].resume, links[1].received], ["a-b.xyz", "1"]);
  assert.deepEqual(links[1].said.map(({ method }) => method), ["lab/again"]);
  client.close();
  close();
}

export async function a_session_ends_with_its_grace() {
  const { url: there, server, close } = await stub((socket) => socket.terminate());
  const client = await connect(there, { token, grace: 0.2 });
  const call = fails(client.call("lab/read", null, { timeout: null }), broker.ConnectionLost, { mayHaveExecuted: true });
  server.close();
  await until(() => client.state === "connecting", "it noticed");
  const unsent = fails(client.call("lab/read"), broker.ConnectionLost, { mayHaveExecuted: false });
  await call;
  assert.equal(client.state, "connecting"); // what was never sent waits on
  client.close();
  await unsent;
  close();
}

export async function what_comes_before_the_session_is_ignored() {
  const server = new WebSocketServer({ port: 0, host: "127.0.0.1" });
  await new Promise((resolve) => server.on("listening", resolve));
  server.on("connection", (socket) => {
    tell(socket, "broker.message", { data: "early" });
    tell(socket, "broker.session", { ...SESSION, grace: 30 });
    tell(socket, "broker.session", { ...SESSION, id: "other", grace: 30 });
    tell(socket, "broker.message", { data: "in time" }, { n: 1 });
    socket.on("message", () => socket.terminate());
  });
  const client = await connect(`http://127.0.0.1:${server.address().port}`, { token });
  assert.ok(client.isConnected);
  client.close();
  for (const socket of server.clients) socket.terminate();
  server.close();
}

export async function a_session_that_is_not_let_in_again_is_given_up() {
  let refused = 0;
  Math.random = () => 0; // back at once
  const { url: there, server, links, close } = await resumable((link, { id }) => {
    if (links.length === 2) link.socket.send(JSON.stringify({ jsonrpc: "2.0", id, result: "here" }));
    else link.socket.terminate();
  });
  server.shouldHandle = ({ headers }) => !headers["sec-websocket-protocol"].includes("resume.") || !(refused += 1);
  const client = await connect(there, { ticket: () => "good" });
  assert.equal(await client.call("lab/read", null, { idempotent: true }), "here");
  assert.deepEqual([refused, links[1].resume], [3, undefined]);
  client.close();
  close();
}

export async function a_message_that_breaks_every_connection_is_given_up() {
  const { url: there, links, close } = await resumable((link) => link.socket.terminate());
  const client = await connect(there, { token });
  Math.random = () => 0; // back at once
  await fails(client.call("lab/read", null, { timeout: 25 }), broker.ConnectionLost, { mayHaveExecuted: true });
  assert.equal(links.filter(({ resume }) => resume).length, 5);
  assert.equal(links.at(-1).resume, undefined);
  client.close();
  close();
}

/** A way to a broker that can be cut: `cut` breaks all connections, `limit` lets each through that many bytes only. */
async function proxyTo(target) {
  const { port, hostname } = new URL(target);
  const proxy = { passed: 0, links: 0, limit: Infinity };
  const open = new Set();
  const server = createTcpServer((near) => {
    const far = createTcpConnection(Number(port), hostname);
    proxy.links += 1;
    let [left, ended] = [proxy.limit, false];
    const end = () => {
      ended = true;
      open.delete(end);
      near.destroy();
      far.destroy();
    };
    open.add(end);
    // The broker answers to its own name only.
    near.once("data", (data) => far.write(data.toString("latin1").replace(/^host: .*$/im, `Host: ${hostname}:${port}`), "latin1"));
    let first = true;
    for (const [from, to] of [[near, far], [far, near]]) {
      from.on("data", (data) => {
        if (ended) return;
        if (from === near && first) {
          first = false;
          return;
        }
        left -= data.length;
        proxy.passed += data.length;
        to.write(left < 0 ? data.subarray(0, data.length + left) : data, left < 0 ? end : undefined);
        ended ||= left < 0;
      });
      from.on("close", end);
      from.on("error", end);
    }
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  proxy.url = `http://127.0.0.1:${server.address().port}`;
  proxy.cut = () => [...open].forEach((end) => end());
  proxy.close = () => server.close(proxy.cut());
  return proxy;
}

export async function every_item_comes_once_over_links_that_break() {
  const proxy = await proxyTo(url);
  proxy.limit = 200_000; // each connection breaks in the midst of something
  const worker = await connect(proxy.url, { token });
  const caller = await connect(proxy.url, { token, timeout: null });
  Math.random = () => 0; // back at once
  let runs = 0;
  const sums = [];
  await worker.serve("cut", {
    async *rows({ count }) {
      runs += 1;
      for (let n = 0; n < count; n += 1) yield { n, data: bytes(500) };
      return "all";
    },
    async sum(params, request) {
      for await (const { n } of request.parts()) sums.push(n);
      return sums.length;
    },
    large: () => bytes(20 << 20),
  });
  const heard = [];
  await caller.subscribe("cut", ({ data, missed }) => heard.push([data, missed]), { topic: "news" });
  const stream = caller.stream("cut/rows", { count: 1000 });
  let count = 0;
  for await (const { n, data } of stream) {
    assert.equal(n, count++);
    same(data, bytes(500));
    if (n % 100 === 0) await caller.publish("cut", n, { topic: "news" });
  }
  assert.deepEqual([count, stream.result, runs], [1000, "all", 1]);
  const parts = function* () {
    for (let n = 0; n < 1000; n += 1) yield { n, data: bytes(500) };
  };
  assert.equal(await caller.call("cut/sum", null, { parts: parts() }), 1000);
  assert.deepEqual(sums, Array.from({ length: 1000 }, (_, n) => n));
  proxy.limit = 2_000_000;
  proxy.cut();
  same(await caller.call("cut/large"), bytes(20 << 20));
  const numbers = Array.from({ length: 1000 }, (_, n) => n);
  assert.deepEqual(await Promise.all(numbers.map((n) => caller.call("cut/sum", null, { parts: [{ n }] }).then(() => n))), numbers);
  await until(() => heard.length === 10, "all broadcasts are heard");
  assert.deepEqual(heard, Array.from({ length: 10 }, (_, n) => [100 * n, 0]));
  assert.ok(proxy.links > 10, `${proxy.links}`);
  caller.close();
  worker.close();
  proxy.close();
}

// ------------------------------------------------------------ credentials and addresses

export async function a_wrong_token_is_refused_with_the_reason() {
  const error = await fails(connect(url, { token: "wrong" }), broker.Refused, { status: 401, retryable: false });
  assert.match(error.message, /not valid/);
  assert.ok(!error.message.includes("wrong"));
  await fails(connect(url), broker.Refused, { status: 401 });
  await fails(connect(url, { token: "wrong", wait: true }), broker.Refused);
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
  const connecting = connect(url, { token, wait: true });
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
  await fails(client.call("lab/read"), broker.BadReply);
  client.close();
  close();
}

export async function frames_that_cannot_be_read_cost_only_the_connection() {
  const frames = ["{", "null", "5", Buffer.alloc(0), Buffer.alloc(3), Buffer.from([255, 255, 255, 255]), Buffer.from([0, 0, 0, 1, 0, 0, 0, 99])];
  for (const frame of frames) {
    const { url: there, close } = await stub((socket) => socket.send(frame));
    const client = await connect(there, { token, reconnect: false });
    await fails(client.call("lab/read"), broker.ConnectionLost, { mayHaveExecuted: true });
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
  assert.equal(await client.call("lab/read"), "mine");
  client.close();
  close();
}

// ------------------------------------------------------------ beside Python

export async function calls_a_python_worker() {
  const client = await connect(url, { token });
  const given = bytes(50_000);
  const { data, length } = await client.call("python/echo", { data: given, text: "ü" });
  same(data, given);
  assert.equal(length, 50_000);
  const error = await fails(client.call("python/fail"), broker.RemoteError, { type: "ValueError", detail: "no such thing" });
  assert.match(error.message, /^python\/fail: worker_error: ValueError: no such thing \(worker /);
  const { arrays } = await client.call("python/arrays");
  assert.deepEqual(
    arrays.map(({ data, shape, dtype }) => [dtype, shape, data instanceof ArrayBuffer ? "bytes" : [...data].map(Number)]),
    [
      ...["<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"].map((dtype) => [dtype, [2, 3], [0, 1, 2, 3, 4, 5]]),
      ["|b1", [2, 3], [0, 1, 1, 1, 1, 1]], [">f4", [2, 3], "bytes"], ["<c16", [2, 3], "bytes"], ["<f4", [], [7]], ["<f4", [0, 3], []],
    ],
  );
  assert.equal(await client.call("python/same", { arrays }), true);
  const large = bytes(20 << 20);
  same((await client.call("python/echo", { data: large, text: "ü" })).data, large);
  const told = [];
  const stream = client.stream("python/scaled", { by: 3 }, {
    parts: [1, bytes(1 << 20), [2]], onProgress: (...given) => told.push(given),
  });
  const items = [];
  for await (const item of stream) items.push(item);
  assert.deepEqual([items[0], items[1].byteLength, items[2], stream.result], [3, 3 << 20, [2, 2, 2], null]);
  assert.deepEqual(told.at(-1), [3, null, "scaled"]);
  client.close();
}

export async function serves_python_callers() {
  const client = await connect(url, { token });
  await client.serve("javascript", {
    echo: ({ data, text }) => ({ data, text, length: data.byteLength }),
    negative: ({ image }) => new broker.NdArray(image.data.map((value) => -value), image.shape),
    ramp: ({ length }) => Float32Array.from({ length }, (_, n) => n / 2),
    async *scaled({ by }, request) {
      let count = 0;
      for await (const item of request.parts()) {
        yield item instanceof ArrayBuffer ? item.byteLength * by : item * by;
        request.progress((count += 1), null, "scaled");
      }
      return count;
    },
  });
  await please("call");
  client.close();
}

export async function outcomes_have_their_classes() {
  console.log(`outcomes ${Object.keys(broker.OUTCOMES).sort().join(" ")}`);
}

/** What a program in JavaScript finds, for comparing: the members of the classes, and how errors read. */
export async function names_are_listed() {
  const client = await connect(url, { token });
  const worker = await client.serve("names", { about: (params, request) => membersOf(request) });
  const subscription = await client.subscribe("names");
  await client.publish("names", 1);
  const errors = Object.entries(broker).filter(([, value]) => value?.prototype instanceof broker.BrokerError);
  const facts = { endpoint: "lab", method: "read", code: 7, worker: "w1", attempts: 2, elapsedS: 0.25 };
  const told = { type: "ValueError", phase: "queued", bound: "queue", retry_after_ms: 1500, cause: "admin" };
  const classes = {
    Client: membersOf(client),
    Worker: membersOf(worker),
    Subscription: membersOf(subscription),
    Stream: membersOf(client.stream("broker.ping")),
    Message: Object.keys(await subscription.get(20)),
    ServedRequest: await client.call("names/about"),
    BrokerError: membersOf(new broker.BrokerError()),
    NdArray: membersOf(new broker.NdArray(new Uint8Array(0))),
  };
  const { errorOf } = await import(new URL("../../broker/admin/web/static/errors.js", import.meta.url));
  const REPLIES = [
    { code: -32007, data: { outcome: "shutting_down", dispatched: true, retryable: false } },
    { code: -32007, data: { outcome: "shutting_down", dispatched: false, retryable: true } },
    { code: -32005, data: { outcome: "cancelled", cause: "superseded" } },
    { code: -32005, data: { outcome: "cancelled", cause: "admin" } },
    { code: -32005, data: { outcome: "cancelled", cause: "caller" } },
    { code: -32006, data: { outcome: "denied", detail: "alice is no administrator" }, method: "broker.admin.peers" },
    { code: -32006, data: { outcome: "denied" }, endpoint: "lab", method: "read" },
  ];
  const replies = REPLIES.map(({ endpoint = "", method = "read", ...error }) => {
    const where = { endpoint, method };
    return { ...where, ...error, text: errorOf({ ...error, message: "so" }, undefined, where, 0.25).message };
  });
  const texts = errors.map(([name, kind]) => [name, { text: new kind("it is so", { ...facts, data: told }).message, outcome: kind.outcome, advice: kind.advice }]);
  console.log(JSON.stringify({ classes, replies, errors: Object.fromEntries(texts) }));
  client.close();
}

function membersOf(object) {
  const own = [Object.getOwnPropertyNames(object), Object.getOwnPropertyNames(Object.getPrototypeOf(object))].flat();
  return own.filter((name) => name !== "constructor" && name !== "stack");
}
