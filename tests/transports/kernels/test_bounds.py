"""The nudge, front ends that stay away or do not read, and workers that do strange things; with a pretended kernel."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed

from broker.transports.kernels.front_end import FrontEnd
from tests.transports.kernels.harness import OTHER, Front, House, front
from tests.transports.kernels.pretended import Pretended

MIB = 1 << 20
_numbers = itertools.count()


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """A broker whose front ends may be away for as long as a test takes."""
    with House(kernels={"away_s": 60, "nudge_s": 30}) as house:
        yield house


@pytest.fixture
def kernel(house: House) -> Iterator[Pretended]:
    kernel = Pretended(house, f"p{next(_numbers)}")
    yield kernel
    kernel.end()


def number_of(kernel: Pretended) -> str:
    return kernel.worker.endpoint.removeprefix("kernels.")


def waiting_bytes(house: House) -> int:
    return house.look(lambda: house.broker.router.state.budget.outboxes)


def held_bytes(front_end: FrontEnd) -> int:
    """What the broker's own memory has of it: what waits, and what its link has and the system has not."""
    link = front_end._link
    assert link is not None
    return front_end._waiting.bytes + link.enqueued - link.flushed


async def flood(kernel: Pretended, mebibytes: int) -> None:
    """Text as a kernel prints it, then a display, a comm message and its last word."""
    for _ in range(mebibytes * 16):
        await kernel.say("stream", {"name": "stdout", "text": "x" * 65_000})
    for kind in ("display_data", "comm_msg"):
        await kernel.say(kind, {"data": {}, "comm_id": "c"})
    await kernel.say("status", {"execution_state": "idle"})


def read_to_idle(page: Front) -> list[str]:
    kinds = []
    while True:
        message = page.read()
        kinds.append(message["type"])
        if message["content"].get("execution_state") == "idle":
            return kinds


# --- the nudge -------------------------------------------------------------------------------------------------------


def test_nothing_is_let_through_before_the_kernel_has_answered(house: House, kernel: Pretended) -> None:
    kernel.silent = {"kernel_info_request"}
    with front(house, number_of(kernel)) as page:
        number = page.say("shell", "execute_request", {"code": "1"})
        house.until(lambda: len(kernel.asked) == 2, "it was nudged")
        assert sorted(kernel.asked) == [("control", "kernel_info_request"), ("shell", "kernel_info_request")]
        kernel.release()
        assert page.reply(number)["content"]["status"] == "ok"
        assert kernel.asked[2:] == [("shell", "execute_request")]


def test_what_the_kernel_says_first_is_heard(house: House, kernel: Pretended) -> None:
    with front(house, number_of(kernel)) as page:
        house.until(lambda: len(kernel.asked) == 2, "it was nudged")
        house.do(kernel.say("status", {"execution_state": "idle"}))
        assert page.status("idle")


def test_the_nudges_replies_are_nobodys(house: House, kernel: Pretended) -> None:
    with front(house, number_of(kernel)) as page:
        page.reply(page.say("shell", "history_request", {}))
        assert [m["type"] for m in page.inbox] == []


def test_a_kernel_that_never_answers_is_not_waited_for_for_ever() -> None:
    with House(kernels={"nudge_s": 0.1}) as house:
        kernel = Pretended(house, "mute")
        kernel.silent = {"kernel_info_request"}
        with front(house, "mute") as page:
            assert page.reply(page.say("shell", "execute_request", {"code": "1"}))["content"]["status"] == "ok"
        kernel.end()


# --- who does not read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v1", [True, False])
def test_one_that_does_not_read_costs_8_mib_and_nobody_notices(house: House, kernel: Pretended, *, v1: bool) -> None:
    number = number_of(kernel)
    # One message read ahead, no more: what a library or the system takes looks to the broker as if it were read.
    with (
        front(house, number, "stuck", v1=v1, max_queue=1) as stuck,
        front(house, number, "reads", OTHER, v1=v1) as page,
    ):
        for each in (stuck, page):
            each.reply(each.say("shell", "history_request", {}))
        before, most = waiting_bytes(house), [0]
        front_ends = {key.session: each for key, each in house.broker.front_ends._by_key.items()}

        async def printing() -> None:
            printed = asyncio.ensure_future(flood(kernel, 40))
            while not printed.done():
                most.append(held_bytes(front_ends["stuck"]))
                await asyncio.sleep(0.002)
            await printed

        kinds: list[str] = []
        reading = threading.Thread(target=lambda: kinds.extend(read_to_idle(page)))
        reading.start()
        house.do(printing())
        reading.join(30)
        assert kinds.count("stream") == 40 * 16, "who reads gets all of it"
        assert 2 * MIB < max(most) < 8 * MIB
        house.until(lambda: not house.broker.front_ends._pace._held, "the stuck one holds up nobody")
        assert house.look(lambda: house.broker.front_ends.left_out) > 0

        texts, kinds = [], []
        while True:
            message = stuck.read()
            kinds.append(message["type"])
            texts.append(message["content"].get("text", ""))
            if message["content"].get("execution_state") == "idle":
                break
        assert 16 < kinds.count("stream") < 40 * 16
        assert [text for text in texts if "were left out" in text], "it is told"
        assert kinds[-3:] == ["display_data", "comm_msg", "status"], "text is left out, nothing else"
    house.until(lambda: house.broker.router.state.budget.outboxes <= before, "nothing is left")


def test_one_that_stands_still_is_closed_and_hears_the_rest_when_it_is_back() -> None:
    with House(limits={"stall_s": 0.3, "outbox_soft_bytes": 65_536}) as house:
        kernel = Pretended(house, "p")
        with front(house, "p", "stalls") as page:
            page.reply(page.say("shell", "history_request", {}))
            house.do(flood(kernel, 8))
            house.until(lambda: house.broker.front_ends.connected == 0, "it was closed")
            first = []
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    first.append(page.read()["type"])
        assert closed.value.rcvd is None or closed.value.rcvd.code == 4408
        with front(house, "p", "stalls") as page:
            second = read_to_idle(page)
        assert second[-3:] == ["display_data", "comm_msg", "status"]
        assert "stream" in second
        kernel.end()


def test_what_waits_for_one_that_is_away_is_bounded() -> None:
    with House(kernels={"waiting_max_bytes": MIB}) as house:
        kernel = Pretended(house, "p")
        with front(house, "p", "away") as page:
            page.reply(page.say("shell", "history_request", {}))
            page.socket.close(1001)
        house.until(lambda: house.broker.front_ends.connected == 0, "it is away")
        before = waiting_bytes(house)
        house.do(flood(kernel, 8))
        assert waiting_bytes(house) - before < MIB
        assert house.request("GET", "/api/kernels/p")[2]["connections"] == 0
        with front(house, "p", "away") as page:
            kinds = read_to_idle(page)
        assert kinds[-3:] == ["display_data", "comm_msg", "status"]
        assert 5 < kinds.count("stream") < 12
        kernel.end()


def test_one_that_stays_away_is_forgotten() -> None:
    with House(kernels={"away_s": 0.05}) as house:
        kernel = Pretended(house, "p")
        kernel.silent = {"execute_request"}
        with front(house, "p", "gone") as page:
            page.say("shell", "execute_request", {"code": "1"})
            house.until(lambda: ("shell", "execute_request") in kernel.asked, "it is asked")
            page.socket.close(1001)
        house.do(flood(kernel, 1))
        house.until(lambda: waiting_bytes_here(house) == 0, "nothing waits for it")
        assert house.look(lambda: len(house.broker.front_ends)) == 1, "its request goes on"
        kernel.release()
        house.until(lambda: len(house.broker.front_ends) == 0, "it has ended")
        house.until(lambda: house.broker.router.pending.count == 0, "nothing is pending")
        kernel.end()


def waiting_bytes_here(house: House) -> int:
    """On the broker's own loop."""
    return house.broker.router.state.budget.outboxes


def test_one_that_says_goodbye_is_forgotten_at_once(house: House, kernel: Pretended) -> None:
    with front(house, number_of(kernel), "bye") as page:
        page.reply(page.say("shell", "history_request", {}))
        page.socket.close(1000)
    front_ends = house.broker.front_ends
    house.until(lambda: not any(key.session == "bye" for key in front_ends._by_key), "it is no more")


# --- what a worker may do --------------------------------------------------------------------------------------------


def test_a_broadcast_that_is_no_message_hurts_nobody(house: House, kernel: Pretended) -> None:
    with front(house, number_of(kernel)) as page:
        page.reply(page.say("shell", "history_request", {}))
        for data in (None, [], {}, {"header": 7}, {"header": {}, "content": []}):
            house.do(kernel._client.publish(kernel.worker.endpoint, data, topic="iopub"))
        house.do(kernel.say("status", {"execution_state": "idle"}))
        assert page.status("idle")
        assert not page.inbox


def test_other_topics_are_not_the_kernels(house: House, kernel: Pretended) -> None:
    with front(house, number_of(kernel)) as page:
        page.reply(page.say("shell", "history_request", {}))
        message = kernel.message("stream", {"name": "stdout", "text": "elsewhere"})
        house.do(kernel._client.publish(kernel.worker.endpoint, message, topic="other"))
        house.do(kernel._client.publish(kernel.worker.endpoint, message))
        house.do(kernel.say("status", {"execution_state": "idle"}))
        assert page.status("idle")
        assert not page.inbox


def test_a_worker_that_tells_no_state_is_listed_all_the_same(house: House, kernel: Pretended) -> None:
    kernel.silent = {"state"}
    model = house.request("GET", f"/api/kernels/{number_of(kernel)}")[2]
    assert (model["execution_state"], model["name"]) == ("unknown", "none")


def test_a_worker_that_goes_away_and_has_said_nothing(house: House) -> None:
    kernel = Pretended(house, "leaves")
    kernel.silent = {"execute_request"}
    with front(house, "leaves") as page:
        number = page.say("shell", "execute_request", {"code": "1"})
        house.until(lambda: ("shell", "execute_request") in kernel.asked, "it is asked")
        house.end(kernel.worker)
        reply = page.reply(number)
        assert (reply["type"], reply["content"]["status"]) == ("execute_reply", "error")
        assert [m["type"] for m in page.heard(number)] == ["error", "status"]
        assert page.status("dead")
        again = page.say("shell", "complete_request", {})
        assert page.reply(again)["content"]["ename"] == "no_worker"
    house.do(kernel._client.close())


def test_metrics_tell_of_front_ends(house: House) -> None:
    from prometheus_client import generate_latest
    from prometheus_client.core import CollectorRegistry

    from broker.admin.metrics import Collector, Sources

    broker = house.broker
    sources = Sources(
        broker.router, broker.links, broker.authenticator.counters, broker._lag, lambda: None, broker.front_ends
    )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(sources))
    text = house.look(lambda: generate_latest(registry).decode())
    figures = dict(line.split() for line in text.splitlines() if line.startswith("broker_front_end"))
    assert set(figures) >= {
        "broker_front_ends", "broker_front_ends_connected", "broker_front_end_messages_left_out_total",
    }  # fmt: skip
    assert json.loads(figures["broker_front_end_messages_left_out_total"]) > 0
