// Takes orders as lines of JSON on stdin and answers each on stdout, so that a test can drive a library.
import readline from "node:readline";

export function obey(orders) {
  const lines = readline.createInterface({ input: process.stdin });
  lines.on("line", async (line) => {
    const { n, op, ...given } = JSON.parse(line);
    let answer;
    try {
      answer = { result: (await orders[op](given, n)) ?? null };
    } catch (error) {
      answer = { error: { code: error?.code ?? null, message: String(error?.message ?? error), data: error?.data } };
    }
    process.stdout.write(JSON.stringify({ n, ...answer }) + "\n");
  });
  lines.on("close", () => process.exit(0));
}
