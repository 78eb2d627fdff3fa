// Runs one scenario: `node play.mjs NAME URL`, the token in the environment. Ends by itself if nothing is left open.

import * as scenarios from "./scenarios.mjs";

await scenarios[process.argv[2]]();
process.stdin.destroy();
