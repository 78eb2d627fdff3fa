"""The JavaScript client in a real browser: streams, values of any size, and a connection that breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.admin.web.test_page import sign_in, sign_out
from tests.admin.web.webdriver import Browser
from tests.javascript.harness import BrokerProcess

PRELUDE = """
const sockets = [];
const Plain = window.WebSocket;
window.WebSocket = class extends Plain {
  constructor(...given) { super(...given); sockets.push(this); }
};
const { connect } = await import('/static/broker.js');
const [worker, caller] = [await connect(), await connect()];
const bytes = (length) => new Uint8Array(length).map((_, index) => (index * 31 + (index >> 8)) & 255);
const same = (buffer, expected) => {
  const given = new Uint8Array(buffer);
  return given.length === expected.length && given.every((byte, index) => byte === expected[index]);
};
try {
"""
FINALE = "} finally { window.WebSocket = Plain; worker.close(); caller.close(); }"


@pytest.fixture
def page(browser: Browser, broker: BrokerProcess) -> Iterator[Browser]:
    """A page of the broker, signed in."""
    sign_in(browser, broker)
    yield browser
    sign_out(browser)


def run(page: Browser, script: str) -> Any:
    return page.run(PRELUDE + script + FINALE)


def test_a_thousand_items_come_in_order(page: Browser) -> None:
    seen = run(
        page,
        """
        await worker.serve('rows', {
          async *count({ upto }) {
            for (let n = 0; n < upto; n += 1) yield n;
            return 'all';
          },
        });
        const stream = caller.stream('rows/count', { upto: 1000 });
        const seen = [];
        for await (const n of stream) seen.push(n);
        return [seen, stream.result];
        """,
    )
    assert seen == [list(range(1000)), "all"]


def test_values_of_20_mib_go_both_ways(page: Browser) -> None:
    whole = run(
        page,
        """
        await worker.serve('echo', { echo: (params) => params });
        const data = bytes(20 << 20);
        const back = await caller.call('echo/echo', { data, text: 'ü' });
        return [same(back.data, data), back.text];
        """,
    )
    assert whole == [True, "ü"]


def test_what_a_broken_connection_missed_comes_once(page: Browser) -> None:
    told = run(
        page,
        """
        let runs = 0;
        await worker.serve('rows', {
          async *count({ upto }, request) {
            runs += 1;
            for (let n = 0; n < upto; n += 1) yield { n, data: bytes(500) };
            let sum = 0;
            for await (const n of request.parts()) sum += n;
            return sum;
          },
        });
        const parts = Array.from({ length: 300 }, (_, n) => n);
        const heard = [];
        await caller.subscribe('rows', ({ seq, missed }) => heard.push([seq, missed]));
        const stream = caller.stream('rows/count', { upto: 300 }, { parts });
        const seen = [];
        for await (const { n } of stream) {
          seen.push(n);
          if (n % 100 === 50) {
            for (const socket of sockets.splice(0)) socket.close(4000); // the broker keeps the sessions
            await caller.publish('rows', n);
          }
        }
        return [seen, stream.result, runs, heard];
        """,
    )
    assert told == [list(range(300)), sum(range(300)), 1, [[1, 0], [2, 0], [3, 0]]]


def test_leaving_a_stream_reaches_the_worker(page: Browser) -> None:
    aborted = run(
        page,
        """
        let aborted;
        const done = new Promise((resolve) => (aborted = resolve));
        await worker.serve('rows', {
          async *count(params, { signal }) {
            signal.addEventListener('abort', () => aborted(true));
            for (let n = 0; ; n += 1) yield n;
          },
        });
        for await (const n of caller.stream('rows/count')) if (n === 10) break;
        return await done;
        """,
    )
    assert aborted is True
