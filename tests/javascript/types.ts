// What a program in TypeScript may write, and what it may not: checked, never run.

import {
  connect, BrokerError, Client, ConnectionLost, DeadlineExceeded, Fault, NdArray, Overloaded, Refused, Worker, type Message,
} from "request-broker-client";

const client: Client = await connect("http://127.0.0.1:8765", {
  token: async () => "token",
  onState: (state, error) => console.log(state === "connected", error?.message),
});
const controller = new AbortController();
const image = await client.call<{ pixels: ArrayBuffer }>("camera/image", { number: 1, mask: new Uint8Array(3) }, {
  timeout: 5,
  signal: controller.signal,
  idempotent: true,
  retries: 2,
});
const size: number = image.pixels.byteLength;
client.notify("camera/note", [size, new NdArray(new Float32Array(6), [2, 3])]);
const { seq, listeners }: { seq: number | null; listeners: number } = await client.publish("camera", null, { topic: "new" });
const subscription = await client.subscribe<{ file: string }>("camera", { topic: "new" });
for await (const { data, missed } of subscription) console.log(data.file.length, missed.toFixed(), subscription.dropped);
const shown = (message: Message<{ file: string }>) => console.log(message.data.file, message.seq, message.missed);
await client.subscribe("camera", shown, { topic: "new" });
await client.subscribe("camera", ({ data }) => console.log(data));
const worker: Worker = await client.serve("camera", {
  image: async (params, { signal, leftS, cancelled }) => {
    signal.throwIfAborted();
    if (!params || cancelled) throw new Fault("no params", { code: 5, data: { leftS }, retryable: true });
    return new Uint8Array(10);
  },
});
worker.publish({ file: worker.peer }, { topic: "new" });
const array = await client.call<NdArray<Float32Array>>("camera/array");
const value: number | undefined = array.data[array.shape.length];
for await (const each of client.map<number>("camera/count", [{ from: 1 }, null], { concurrency: 4 })) each.toFixed(value);
const [first] = (await client.describe("camera")).workers;
console.log(first?.methods?.length, seq, listeners, (await client.endpoints())[0]?.workers.toFixed());
const rows = client.stream<{ n: number }, string>("camera/rows", { from: 1 }, {
  onProgress: (done, total) => console.log(done.toFixed(), total?.toFixed()),
  parts: (async function* () { yield new Uint8Array(3); })(),
  idle: 10,
  timing: true,
});
for await (const { n } of rows) console.log(n.toFixed());
console.log(rows.result.length, rows.timing?.ended_ms.toFixed());
await rows.close();
await client.serve("rows", {
  async *rows(params, request) {
    for await (const part of request.parts<string>()) yield part.length;
    request.progress(1, 2, "half");
    return request.hasParts;
  },
});
const call = client.call("camera/image", null, { key: "8e03978e", group: "a", priority: 9, parts: null });
const taken: boolean = client.cancel(call);
try {
  await call;
} catch (error) {
  if (error instanceof DeadlineExceeded) console.log(error.phase, error.code, taken);
  else if (error instanceof ConnectionLost) console.log(error.mayHaveExecuted);
  else if (error instanceof Refused) console.log(error.status, error.comeBack);
  else if (error instanceof Overloaded) console.log(error.retryAfterS.toFixed(), error.bound);
  else if (error instanceof BrokerError) console.log(error.outcome, error.retryable, error.endpoint, error.method, error.data);
}
await subscription.close();
await worker.stop({ now: true });
client.close();

// @ts-expect-error a method is named
client.call();
// @ts-expect-error seconds are numbers
client.call("camera/image", {}, { timeout: "5" });
// @ts-expect-error params are an object or an array
client.call("camera/image", "text");
// @ts-expect-error what is repeated is one message
client.stream("camera/rows", {}, { key: "8e03978e" });
// @ts-expect-error parts are iterated over
client.call("camera/image", {}, { parts: 5 });
// @ts-expect-error there is no such option
client.call("camera/image", {}, { timout: 5 });
// @ts-expect-error clients are made by connect
new Client();
