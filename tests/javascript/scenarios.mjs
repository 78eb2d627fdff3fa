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
    large: () => new Uint8Array(17 << 20),
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
  for (const method of ["big", "nan", "around", "large"]) await fails(caller.call(`lab/${method}`), broker.RemoteError);
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
  await fails(caller.call("lab/read", {}, { retries: 2 }), broker.InvalidRequest);
  await fails(caller.call("lab/read", { data: new Uint8Array(16 << 20) }), broker.TooLarge);
  await fails(caller.call("lab/read", { text: "€".repeat(6 << 20) }), broker.TooLarge);
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
  const { caller, stop, close } = await pair("lab", { slow: () => new Promise((resolve) => (finish = resolve)), quick: () => 1 });
  const call = caller.call("lab/slow");
  await until(() => finish, "it has begun");
  const stopping = stop();
  await until(async () => !(await caller.endpoints()).find(({ endpoint }) => endpoint === "lab")?.workers, "it takes no more");
  await fails(caller.call("lab/quick"), broker.NoWorker);
  finish("done");
  assert.equal(await call, "done");
  await stopping;
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
  await hanging;
  await until(() => aborted === 1, "what ran for nobody is told");
  await until(() => caller.state === "connecting", "the caller noticed");
  const waiting = caller.call("lab/read", {}, { timeout: 25, wait: true });
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
  client.close();
}

export async function serves_python_callers() {
  const client = await connect(url, { token });
  await client.serve("javascript", {
    echo: ({ data, text }) => ({ data, text, length: data.byteLength }),
    negative: ({ image }) => new broker.NdArray(image.data.map((value) => -value), image.shape),
    ramp: ({ length }) => Float32Array.from({ length }, (_, n) => n / 2),
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
    Message: Object.keys(await subscription.get(20)),
    ServedRequest: await client.call("names/about"),
    BrokerError: membersOf(new broker.BrokerError()),
    NdArray: membersOf(new broker.NdArray(new Uint8Array(0))),
  };
  const texts = errors.map(([name, kind]) => [name, { text: new kind("it is so", { ...facts, data: told }).message, outcome: kind.outcome, advice: kind.advice }]);
  console.log(JSON.stringify({ classes, errors: Object.fromEntries(texts) }));
  client.close();
}

function membersOf(object) {
  const own = [Object.getOwnPropertyNames(object), Object.getOwnPropertyNames(Object.getPrototypeOf(object))].flat();
  return own.filter((name) => name !== "constructor" && name !== "stack");
}
