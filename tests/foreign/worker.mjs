// A worker made of one of the libraries: node worker.mjs LIBRARY. It dials out and serves what `service` has.
import jayson from "jayson";
import rpc20 from "json-rpc-2.0";
import { Server } from "rpc-websockets";
import * as vscode from "vscode-jsonrpc/node";
import { createRequire } from "node:module";
import { obey } from "./orders.mjs";
import { open, vscodeConnection, vscodeWebSocketConnection } from "./sockets.mjs";

// The methods: names of the parameters, and what to do. `cancelled` is a promise where the library has such a thing.
function service(fail) {
  const held = new Map();
  const logged = [];
  const cancelled = [];
  return {
    subtract: [["minuend", "subtrahend"], (minuend, subtrahend) => minuend - subtrahend],
    echo: [["value"], (value) => value],
    nothing: [[], () => null],
    fail: [[], () => fail(1234, "no film", { tray: [1, null, "é"] })],
    log: [["line"], (line) => void logged.push(line)],
    logged: [[], () => logged],
    hold: [
      ["key"],
      (key, cancellation) =>
        new Promise((resolve, reject) => {
          held.set(key, () => resolve(key));
          cancellation?.then((answer) => {
            held.delete(key);
            cancelled.push(key);
            reject(answer);
          });
        }),
    ],
    held: [[], () => held.size],
    cancelled: [[], () => cancelled],
    release: [
      ["key"],
      (key) => {
        held.get(key)();
        held.delete(key);
        return null;
      },
    ],
  };
}

function positional(names, params) {
  return Array.isArray(params) ? params : names.map((name) => params?.[name]);
}

function throwObject(code, message, data) {
  throw { code, message, data };
}

// The Server of rpc-websockets wants to be dialled; here it is handed a socket that dialled out.
function rpcWebsockets(socket) {
  const server = new Server({ noServer: true });
  for (const [name, [names, run]] of Object.entries(service(throwObject)))
    server.register(name, (params) => run(...positional(names, params)));
  server.wss.emit("connection", socket, { url: "/" });
}

function jaysonServer(socket) {
  const methods = {};
  for (const [name, [names, run]] of Object.entries(service(throwObject)))
    methods[name] = async (params, done) => {
      try {
        done(null, (await run(...positional(names, params))) ?? null);
      } catch (error) {
        done(error);
      }
    };
  const server = new jayson.Server(methods);
  socket.on("message", (text) =>
    server.call(text.toString(), (error, reply) => {
      if (error || reply) socket.send(JSON.stringify(error || reply));
    }),
  );
}

function jsonRpc20(socket) {
  const server = new rpc20.JSONRPCServer({ errorListener() {} });
  const fail = (code, message, data) => {
    throw new rpc20.JSONRPCErrorException(message, code, data);
  };
  for (const [name, [names, run]] of Object.entries(service(fail)))
    server.addMethod(name, (params) => run(...positional(names, params)));
  socket.on("message", async (text) => {
    const reply = await server.receive(JSON.parse(text));
    if (reply) socket.send(JSON.stringify(reply));
  });
}

function vscodeWorker(library, connect) {
  return (socket) => {
    const connection = connect(socket);
    const fail = (code, message, data) => {
      throw new library.ResponseError(code, message, data);
    };
    const requestCancelled = new library.ResponseError(-32800, "Request cancelled"); // LSP's code for it
    for (const [name, [names, run]] of Object.entries(service(fail))) {
      const handler = (...given) => {
        const params = given.slice(0, names.length);
        const token = given[given.length - 1];
        const byName = names.length && params[0] !== null && typeof params[0] === "object" && names[0] in params[0];
        const args = byName ? positional(names, params[0]) : params;
        const cancellation = name === "hold" && new Promise((resolve) =>
          token.onCancellationRequested(() => resolve(requestCancelled)),
        );
        return run(...args, ...(cancellation ? [cancellation] : []));
      };
      connection.onRequest(name, handler);
      if (name === "log") connection.onNotification(name, handler);
    }
    connection.listen();
  };
}

// vscode-ws-jsonrpc brings a vscode-jsonrpc of its own version
const bundled = createRequire(createRequire(import.meta.url).resolve("vscode-ws-jsonrpc"))("vscode-jsonrpc");

const LIBRARIES = {
  "rpc-websockets": rpcWebsockets,
  jayson: jaysonServer,
  "json-rpc-2.0": jsonRpc20,
  "vscode-jsonrpc": vscodeWorker(vscode, vscodeConnection),
  "vscode-ws-jsonrpc": vscodeWorker(bundled, vscodeWebSocketConnection),
};

const sockets = new Map();

obey({
  async attach({ on, url, token }) {
    const socket = await open(url, token);
    LIBRARIES[process.argv[2]](socket);
    sockets.set(on, socket);
  },
  detach({ on }) {
    sockets.get(on).close();
    sockets.delete(on);
  },
});
