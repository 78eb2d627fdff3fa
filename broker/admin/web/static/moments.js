// Time in seconds, and calling what others wrote.

export const TIMER_MAX_MS = 2 ** 31 - 1; // setTimeout fires at once for more

export function now() {
  return performance.now() / 1000;
}

/** Wait for a promise, at most so many seconds; then a TimeoutError. */
export async function within(seconds, promise, late) {
  if (seconds === Infinity) return promise;
  let timer;
  const overdue = new Promise((_, reject) => {
    const fail = () => reject(new DOMException(late, "TimeoutError"));
    timer = setTimeout(fail, Math.min(Math.max(0, seconds) * 1000, TIMER_MAX_MS));
  });
  return Promise.race([promise, overdue]).finally(() => clearTimeout(timer));
}

/** Call somebody's function; what it throws must not reach whoever comes next. */
export function guarded(callback, ...given) {
  try {
    callback?.(...given);
  } catch (error) {
    console.error(error);
  }
}
