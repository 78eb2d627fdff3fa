// WebSockets as vscode-jsonrpc and vscode-ws-jsonrpc want them.
import { once } from "node:events";
import { AbstractMessageReader, AbstractMessageWriter, createMessageConnection } from "vscode-jsonrpc/node";
import { createWebSocketConnection, toSocket } from "vscode-ws-jsonrpc";
import WebSocket from "ws";

export async function open(url, token) {
  const socket = new WebSocket(url, { headers: { Authorization: `Bearer ${token}` }, maxPayload: 1 << 26 });
  await once(socket, "open");
  return socket;
}

class Reader extends AbstractMessageReader {
  constructor(socket) {
    super();
    this.socket = socket;
  }
  listen(callback) {
    this.socket.on("message", (text) => callback(JSON.parse(text)));
    this.socket.on("close", () => this.fireClose());
    return { dispose() {} };
  }
}

class Writer extends AbstractMessageWriter {
  constructor(socket) {
    super();
    this.socket = socket;
  }
  async write(message) {
    this.socket.send(JSON.stringify(message));
  }
  end() {}
}

const silent = { error() {}, warn() {}, info() {}, log() {} };

export function vscodeConnection(socket) {
  return createMessageConnection(new Reader(socket), new Writer(socket), silent);
}

export function vscodeWebSocketConnection(socket) {
  return createWebSocketConnection(toSocket(socket), silent);
}
