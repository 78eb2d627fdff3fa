// The page: one button, and a plot of what the program tells everybody.

import { connect } from "../broker/static/broker.js";
import { Plot } from "./plot.js";

const $ = (id) => document.getElementById(id);
const CONNECTION = { connecting: "Connecting…", connected: "Connected", closed: "Not connected" };

const plot = new Plot($("plot"), [["x_mm", "right"], ["y_mm", "down"]], "seconds", "mm");
let client = null;
let run = { images: 0, repetition_s: 1 };
let running = false;

function show(id, text, state) {
  $(id).textContent = text;
  $(id).dataset.state = state;
}

function showButton() {
  $("press").textContent = running ? "Stop" : "Start";
  $("press").disabled = !client?.isConnected;
  for (const id of ["repetition", "images"]) $(id).disabled = running;
}

function showScanner(here) {
  show("scanner", here ? "Scanner ready" : "Scanner away", here ? "here" : "away");
}

function way(mm, positive, negative) {
  return `${Math.abs(mm).toFixed(1)} mm ${mm < 0 ? negative : positive}`;
}

// What the program broadcasts. The same messages, in the same order, make up the page of who comes late.
const told = {
  began(message) {
    run = message;
    running = true;
    plot.clear(run.repetition_s);
    $("numbers").textContent = "No image yet.";
    show("status", `Run ${run.run}, started by ${run.by}.`, "running");
  },
  point(message) {
    plot.add(message);
    const place = `${way(message.x_mm, "right", "left")}, ${way(message.y_mm, "down", "up")}`;
    $("numbers").textContent = `Image ${message.image + 1} of ${run.images}: ${place}; asked and measured in ${message.took_ms} ms.`;
    if ($("status").dataset.state === "waiting") show("status", `Run ${message.run} goes on.`, "running");
  },
  missed(message) {
    show("status", message.text, "waiting");
  },
  ended(message) {
    running = false;
    show("status", `Run ${message.run} has ended: ${message.text}.`, "stopped");
  },
  scanner(message) {
    showScanner(message.here);
  },
};

function hear({ data }) {
  told[data.kind]?.(data);
  showButton();
}

function showConnection(state, error) {
  const refused = error?.status === 401 ? "Not let in: open the URL that the program has printed." : null;
  show("connection", refused ?? CONNECTION[state], state);
  showButton();
}

$("run").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("press").disabled = true;
  const params = { repetition_s: $("repetition").valueAsNumber, images: $("images").valueAsNumber };
  try {
    await (running ? client.call("realtime/stop") : client.call("realtime/start", params));
  } catch (error) {
    show("status", error.message, "failed");
  }
  showButton();
});

try {
  client = await connect(new URL("broker", document.baseURI).href, { wait: true, onState: showConnection });
  await client.subscribe("realtime", hear, { since: 0 });
  showButton();
  const { scanner } = await client.call("realtime/state", null, { timeout: 5, idempotent: true });
  if ($("scanner").dataset.state === "unknown") showScanner(scanner); // it came longer ago than anything that is kept
} catch (error) {
  showConnection("closed", error);
  show("status", error.message, "failed");
}
