// Opening a WebSocket to a broker, from a page or from node, with whatever lets us in.

import { CannotConnect, InvalidRequest, Refused } from "./errors.js";

export const OPEN_TIMEOUT_S = 10;
const IN_NODE = Boolean(globalThis.process?.versions?.node);

async function webSocketClass() {
  if (globalThis.WebSocket) return globalThis.WebSocket;
  try {
    return (await import("ws")).WebSocket;
  } catch {
    // npm links a folder it installs: then "ws" lies beside the program, not beside this file
    const { createRequire } = await import("node:module");
    try {
      return createRequire(`${process.cwd()}/`)("ws").WebSocket;
    } catch {
      throw new CannotConnect("this node has no WebSocket: `npm install ws`, or use node 22 or newer");
    }
  }
}

/** The address of a broker without what a WebSocket adds to it. Throws InvalidRequest. */
export function baseOf(url) {
  let base;
  try {
    base = new URL(url);
  } catch {
    throw new InvalidRequest(`${url} is no URL of a broker, such as http://127.0.0.1:8787`);
  }
  const scheme = { "http:": "http:", "ws:": "http:", "https:": "https:", "wss:": "https:" }[base.protocol];
  if (!scheme || base.username || base.search) {
    throw new InvalidRequest("the URL of a broker is http(s) or ws(s), with neither a user name nor a query");
  }
  return `${scheme}//${base.host}${base.pathname.replace(/\/(ws\/?)?$/, "")}`;
}

/** Exchange the token, or the page's cookie, for a ticket. Unlike a WebSocket this says why we are not let in. */
async function ticketFor(base, token) {
  let response, told;
  try {
    response = await fetch(`${base}/ticket`, {
      method: "POST",
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: AbortSignal.timeout(OPEN_TIMEOUT_S * 1000),
    });
    told = await response.json().catch(() => ({}));
  } catch (error) {
    const reason = error.cause?.message ?? error.message;
    throw new CannotConnect(`no broker at ${base}: ${reason}`, { url: base, retryable: true });
  }
  if (response.ok && told.ticket) return told.ticket;
  const { status } = response;
  if (status === 404 || response.ok) {
    throw new CannotConnect(`what answers at ${base} is no broker (HTTP ${status})`, { url: base });
  }
  const reason = typeof told.error === "string" ? told.error.slice(0, 500) : `HTTP ${status}`;
  const comeBack = status === 429 || status >= 500;
  const facts = { status, code: status, comeBack, retryable: comeBack };
  throw new Refused(`the broker at ${base} does not let us in: ${reason}`, facts);
}

function base64url(text) {
  const bytes = new TextEncoder().encode(text);
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/**
 * A WebSocket that is open, to go on with a session if there is one. `heard` is called with what comes, from the first
 * message on: it may come in the very packet that opens the WebSocket.
 */
export async function openSocket(base, options, grace, session, heard) {
  const resuming = session?.resuming;
  const [token, given] = await Promise.all([valueOf(options.token), valueOf(options.ticket)]);
  // A browser shows no reason where a WebSocket is refused, so there the ticket is asked for first.
  const ticket = given ?? (IN_NODE ? null : await ticketFor(base, token));
  const protocols = ["jsonrpc"];
  if (!ticket && token) protocols.push(`bearer.${base64url(token)}`);
  if (resuming) protocols.push(resuming.protocol);
  const query = new URLSearchParams({ binary: 1, meta: 1, stream: "in" });
  if (grace) query.set("grace", grace);
  if (resuming) query.set("received", resuming.received);
  if (ticket) query.set("ticket", ticket);
  const WebSocket = await webSocketClass();
  const socket = new WebSocket(`${base.replace(/^http/, "ws")}/ws?${query}`, protocols);
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => heard(socket, event.data);
  const why = await new Promise((resolve) => {
    const timer = setTimeout(() => resolve(`no answer within ${OPEN_TIMEOUT_S} s`), OPEN_TIMEOUT_S * 1000);
    const done = (reason) => {
      clearTimeout(timer);
      resolve(reason);
    };
    socket.onopen = () => done("");
    socket.onerror = (event) => done(event.message || "its WebSocket did not open");
    socket.onclose = (event) => done(event.reason || "its WebSocket did not open");
  });
  if (!why) return socket;
  abandon(socket);
  if (IN_NODE && !ticket) await ticketFor(base, token); // says whether it was the credential, or that nobody is there
  if (session) session.refusals += 1; // it may be for the session: nobody says so to a page
  throw new CannotConnect(`no connection to ${base}: ${why}`, { url: base, retryable: true });
}

/** Hear no more of a socket, and close it. */
export function abandon(socket, code) {
  socket.onopen = socket.onmessage = socket.onclose = null;
  socket.onerror = () => {}; // without one, node would end the process
  socket.close(code);
}

async function valueOf(given) {
  return typeof given === "function" ? given() : given;
}
