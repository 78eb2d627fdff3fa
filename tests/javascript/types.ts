// What a program in TypeScript may write, and what it may not: checked, never run.

import { connect, BrokerError, Client, ConnectionLost, DeadlineExceeded, Fault, Refused, type Message } from "request-broker-client";

const client: Client = await connect("http://127.0.0.1:8765", {
  token: async () => "token",
  onState: (state, error) => console.log(state === "connected", error?.message),
});
const controller = new AbortController();
const image = await client.call<{ pixels: ArrayBuffer }>("camera", "image", { number: 1, mask: new Uint8Array(3) }, {
  timeout: 5,
  signal: controller.signal,
  idempotent: true,
  retries: 2,
});
const size: number = image.pixels.byteLength;
client.notify("camera", "note", [size]);
const { seq, listeners }: { seq: number | null; listeners: number } = await client.publish("camera", null, { topic: "new" });
const stop: () => Promise<void> = await client.subscribe<{ file: string }>("camera", "new", (message: Message<{ file: string }>) => {
  console.log(message.data.file, message.seq, message.missed);
});
await client.subscribe("camera", ({ data }) => console.log(data));
await client.serve("camera", {
  image: async (params, { signal, timeout }) => {
    signal.throwIfAborted();
    if (!params) throw new Fault("no params", { code: 5, data: { timeout }, retryable: true });
    return new Uint8Array(10);
  },
});
const [first] = (await client.describe("camera")).workers;
console.log(first?.methods?.length, seq, listeners, (await client.endpoints())[0]?.workers.toFixed());
const call = client.call("camera", "image");
const taken: boolean = client.cancel(call);
try {
  await call;
} catch (error) {
  if (error instanceof DeadlineExceeded) console.log(error.phase, error.code, taken);
  else if (error instanceof ConnectionLost) console.log(error.mayHaveExecuted);
  else if (error instanceof Refused) console.log(error.status);
  else if (error instanceof BrokerError) console.log(error.outcome, error.retryable, error.endpoint, error.method, error.data);
}
await stop();
client.close();

// @ts-expect-error a method is named
client.call("camera");
// @ts-expect-error seconds are numbers
client.call("camera", "image", {}, { timeout: "5" });
// @ts-expect-error params are an object or an array
client.call("camera", "image", "text");
// @ts-expect-error there is no such option
client.call("camera", "image", {}, { timout: 5 });
// @ts-expect-error clients are made by connect
new Client();
