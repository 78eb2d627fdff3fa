"""Threads for blocking functions: as many as needed, never more, and none that keeps the process."""

import subprocess
import sys
import threading
import time
from functools import partial

from broker.worker.pool import Pool


def wait_until(condition: object, timeout_s: float = 20) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends_at
        time.sleep(0.002)


def test_threads_are_started_when_none_is_idle_up_to_the_most() -> None:
    pool, release, begun = Pool(3, "test-pool"), threading.Event(), threading.Semaphore(0)

    def job() -> None:
        begun.release()
        release.wait(20)

    for _ in range(5):
        pool.put(job)
    for _ in range(3):
        assert begun.acquire(timeout=20)
    assert not begun.acquire(blocking=False), "no more than three at a time"
    assert len(pool._threads) == 3
    release.set()
    for _ in range(2):
        assert begun.acquire(timeout=20)
    pool.stop()
    wait_until(lambda: not pool.is_alive)


def test_one_after_the_other_needs_one_thread() -> None:
    pool, done = Pool(8, "test-pool"), threading.Event()
    for number in range(50):
        done.clear()
        pool.put(done.set)
        assert done.wait(20)
        wait_until(lambda: pool._idle._value == 1)
        assert len(pool._threads) == 1, number
    pool.stop()
    wait_until(lambda: not pool.is_alive)


def test_what_was_put_is_done_before_they_end() -> None:
    pool = Pool(2, "test-pool")
    done: list[int] = []
    for number in range(100):
        pool.put(partial(done.append, number))
    pool.stop()
    wait_until(lambda: not pool.is_alive)
    assert sorted(done) == list(range(100))


def test_a_thread_that_blocks_for_ever_does_not_keep_the_process() -> None:
    program = "import threading; from broker.worker.pool import Pool; Pool(1, 'x').put(threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0
