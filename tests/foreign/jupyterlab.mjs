// What JupyterLab does with a kernel, by JupyterLab's own library: `node jupyterlab.mjs URL TOKEN KERNEL SUBPROTOCOLS`.
// Writes what came of it as one line of JSON.
import { createRequire } from 'node:module';
import WebSocket from 'ws';

const require = createRequire(import.meta.url);
globalThis.self = globalThis; // the library is made for pages
const services = require('@jupyterlab/services');
const { KernelManager, KernelAPI, KernelSpecAPI, KernelConnection, ServerConnection } = services;

const [url, token, kernelId, offer] = process.argv.slice(2);
const sockets = [];

class Socket extends WebSocket {
  constructor(address, protocols) {
    super(address, offer === 'v1' ? protocols : []);
    sockets.push(this);
  }
}

console.debug = console.warn = console.log = () => undefined; // the result alone is written
const settings = ServerConnection.makeSettings({
  baseUrl: url + '/', wsUrl: url.replace('http', 'ws') + '/', token, appendToken: true, WebSocket: Socket
});
const found = {};
process.on('unhandledRejection', () => undefined); // what was asked of a kernel that dies, which pages log

function until(condition, what) {
  return new Promise((resolve, reject) => {
    const begun = Date.now();
    const look = () => {
      if (condition()) resolve();
      else if (Date.now() - begun > 20000) reject(new Error(`never came true: ${what}`));
      else setTimeout(look, 5);
    };
    look();
  });
}

async function run(kernel, code, { onStdin, ...more } = {}) {
  const outputs = [];
  const future = kernel.requestExecute({ code, allow_stdin: Boolean(onStdin), ...more });
  future.onIOPub = message => outputs.push([message.header.msg_type, message.content]);
  if (onStdin) future.onStdin = message => onStdin(message);
  const reply = await future.done;
  return { status: reply.content.status, ename: reply.content.ename, outputs };
}

async function connected() {
  const manager = new KernelManager({ serverSettings: settings });
  await manager.ready;
  found.running = Array.from(manager.running(), model => model.id);
  found.specs = Object.keys((await KernelSpecAPI.getSpecs(settings)).kernelspecs);
  const model = await KernelAPI.getKernelModel(kernelId, settings);
  const kernel = manager.connectTo({ model });
  found.language = (await kernel.info).language_info.name;
  found.subprotocol = sockets.at(-1).protocol;
  return [manager, kernel];
}

async function cells(kernel) {
  found.cell = await run(kernel, "print('out'); display({'text/html': '<b>x</b>', 'image/png': 'aGk='}, raw=True); 6*7");
  found.failed = await run(kernel, '1/0');
  found.asked = await run(kernel, "print('hello', input('who? '))", {
    onStdin: message => {
      found.prompt = message.content.prompt;
      kernel.sendInputReply({ value: 'lab', status: 'ok' }, message.header);
    }
  });
  found.completed = (await kernel.requestComplete({ code: 'pri', cursor_pos: 3 })).content.matches.includes('print');
}

async function comms(kernel) {
  await run(kernel, `
def _open(comm, message):
    @comm.on_msg
    def _(message):
        comm.send({"echo": message["content"]["data"]}, buffers=[bytes(b)[::-1] for b in message["buffers"]])
get_ipython().kernel.comm_manager.register_target("echo", _open)`);
  const comm = kernel.createComm('echo');
  const echoed = new Promise(resolve => (comm.onMsg = resolve));
  await comm.open({}).done;
  comm.send({ n: 1 }, {}, [new Uint8Array([0, 1, 2]).buffer, new Uint8Array([255]).buffer]);
  const message = await echoed;
  found.echo = message.content.data;
  found.buffers = message.buffers.map(buffer => Array.from(new Uint8Array(buffer.buffer ?? buffer)));
  await comm.close().done;
}

async function interrupted(kernel) {
  const future = kernel.requestExecute({ code: "import time; print('now', flush=True); time.sleep(60)" });
  await new Promise(resolve => (future.onIOPub = message => message.header.msg_type === 'stream' && resolve()));
  await kernel.interrupt();
  found.interrupted = (await future.done).content.ename;
}

async function twoOnOne(kernel) {
  const other = kernel.clone();
  const heard = [];
  other.anyMessage.connect((_, { msg, direction }) => direction === 'recv' && heard.push(msg));
  await other.info;
  await run(kernel, "print('to both')");
  await until(() => heard.some(msg => msg.content.text === 'to both\n'), 'the other hears it too');
  found.both = heard.filter(msg => msg.header.msg_type === 'execute_reply').length;
  other.dispose();
}

async function reconnected(kernel) {
  const texts = [];
  const future = kernel.requestExecute({ code: 'import time\nfor i in range(4):\n    time.sleep(0.2)\n    print(i, flush=True)' });
  future.onIOPub = message => message.header.msg_type === 'stream' && texts.push(message.content.text);
  await until(() => texts.length > 0, 'it prints');
  const count = sockets.length;
  sockets[0].terminate(); // as a cable that breaks; it was the first
  await until(() => sockets.length > count, 'it reconnects by itself');
  found.replayed = [(await future.done).content.status, texts.join('')];
}

async function restarted(kernel) {
  await run(kernel, 'before = 1');
  const states = [];
  kernel.statusChanged.connect((_, status) => states.push(status));
  await kernel.restart();
  await kernel.info;
  found.restarted = [(await run(kernel, 'before')).ename, states.includes('restarting') || states.includes('autorestarting')];
}

async function died(kernel) {
  const states = [];
  kernel.statusChanged.connect((_, status) => states.push(status));
  const future = kernel.requestExecute({ code: 'import os; os._exit(1)' });
  const ended = await future.done.then(reply => reply.content.ename, error => `canceled: ${error.message}`);
  await until(() => states.includes('autorestarting') || states.includes('restarting'), 'its death is told');
  await until(() => kernel.status === 'idle', 'it is there again');
  found.died = ended;
  found.alive = (await run(kernel, '1')).status;
}

async function refused() {
  const attempt = promise => promise.then(() => 'done', error => error.response?.status ?? String(error));
  found.unknown = await KernelAPI.getKernelModel('nobody', settings).then(model => model ?? null);
  found.stranger = await attempt(KernelAPI.listRunning(ServerConnection.makeSettings({ ...settings, token: 'wrong' })));
  found.noOffer = await attempt(KernelAPI.startNew({ name: 'python3' }, settings));
}

const tell = () => process.stdout.write(JSON.stringify(found) + '\n', () => process.exit(0));
setTimeout(tell, 40000); // `at` says what hung

try {
  const [manager, kernel] = await connected();
  for (const part of [cells, comms, interrupted, twoOnOne, reconnected, restarted, died]) {
    found.at = part.name;
    await part(kernel);
  }
  await refused();
  found.at = 'the end';
  kernel.dispose();
  manager.dispose();
} catch (error) {
  found.error = String(error?.stack ?? error);
}
tell();
