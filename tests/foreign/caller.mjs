// A caller made of one of the libraries: node caller.mjs LIBRARY. It knows nothing of the broker but its URL.
import { once } from "node:events";
import jayson from "jayson/lib/client/websocket.js";
import rpc20 from "json-rpc-2.0";
import { Client } from "rpc-websockets";
import * as vscode from "vscode-jsonrpc/node";
import { createRequire } from "node:module";
import { obey } from "./orders.mjs";
import { open, vscodeConnection, vscodeWebSocketConnection } from "./sockets.mjs";

const BROADCAST = "broker.message";

class RpcWebsockets {
  async connect(url, token, hear) {
    this.client = new Client(url, { reconnect: false, headers: { Authorization: `Bearer ${token}` } });
    this.client.on(BROADCAST, hear);
    await once(this.client, "open");
  }
  call(method, params) {
    return this.client.call(method, params);
  }
  notify(method, params) {
    return this.client.notify(method, params);
  }
  close() {
    this.client.close();
  }
}

class Jayson {
  async connect(url, token) {
    this.socket = await open(url, token);
    this.client = new jayson({ ws: this.socket });
  }
  call(method, params) {
    return new Promise((resolve, reject) =>
      this.client.request(method, params ?? [], (fault, error, result) =>
        fault || error ? reject(fault || error) : resolve(result),
      ),
    );
  }
  notify(method, params) {
    return new Promise((resolve, reject) =>
      this.client.request(method, params ?? [], null, (fault) => (fault ? reject(fault) : resolve())),
    );
  }
  close() {
    this.socket.close();
  }
}

class JsonRpc20 {
  async connect(url, token, hear) {
    this.socket = await open(url, token);
    const { JSONRPCClient, JSONRPCServer, JSONRPCServerAndClient } = rpc20;
    const client = new JSONRPCClient((request) => this.socket.send(JSON.stringify(request)));
    this.both = new JSONRPCServerAndClient(new JSONRPCServer(), client);
    this.both.addMethod(BROADCAST, hear);
    this.socket.on("message", (text) => this.both.receiveAndSend(JSON.parse(text)));
  }
  call(method, params) {
    return this.both.request(method, params);
  }
  notify(method, params) {
    this.both.notify(method, params);
  }
  close() {
    this.socket.close();
  }
}

class Vscode {
  constructor(library, connection) {
    this.library = library;
    this.connection = connection;
    this.cancels = new Map();
  }
  async connect(url, token, hear) {
    this.socket = await open(url, token);
    this.connection = this.connection(this.socket);
    this.connection.onNotification(BROADCAST, hear);
    this.connection.listen();
  }
  call(method, params, n) {
    const source = new this.library.CancellationTokenSource();
    this.cancels.set(n, source);
    return this.connection.sendRequest(method, ...this.spread(params), source.token);
  }
  cancel(n) {
    this.cancels.get(n).cancel();
  }
  notify(method, params) {
    return this.connection.sendNotification(method, ...this.spread(params));
  }
  spread(params) {
    const { byName, byPosition } = this.library.ParameterStructures;
    if (params === undefined) return [];
    return Array.isArray(params) ? [byPosition, ...params] : [byName, params];
  }
  close() {
    this.socket.close();
  }
}

// vscode-ws-jsonrpc brings a vscode-jsonrpc of its own version
const bundled = createRequire(createRequire(import.meta.url).resolve("vscode-ws-jsonrpc"))("vscode-jsonrpc");

const LIBRARIES = {
  "rpc-websockets": () => new RpcWebsockets(),
  jayson: () => new Jayson(),
  "json-rpc-2.0": () => new JsonRpc20(),
  "vscode-jsonrpc": () => new Vscode(vscode, vscodeConnection),
  "vscode-ws-jsonrpc": () => new Vscode(bundled, vscodeWebSocketConnection),
};

const connections = new Map();

obey({
  async connect({ on, url, token }) {
    const heard = [];
    const connection = { library: LIBRARIES[process.argv[2]](), heard, waiting: () => {} };
    await connection.library.connect(url, token, (params) => {
      heard.push(params);
      connection.waiting();
    });
    connections.set(on, connection);
  },
  call: ({ on, method, params }, n) => connections.get(on).library.call(method, params, n),
  notify: ({ on, method, params }) => connections.get(on).library.notify(method, params),
  cancel: ({ on, call }) => connections.get(on).library.cancel(call),
  async heard({ on, count }) {
    const connection = connections.get(on);
    while (connection.heard.length < count) await new Promise((resolve) => (connection.waiting = resolve));
    return connection.heard;
  },
  close({ on }) {
    connections.get(on).library.close();
    connections.delete(on);
  },
});
