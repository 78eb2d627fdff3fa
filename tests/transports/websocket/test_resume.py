"""Sessions that outlive their link: what is kept, who may come back, what is said again, and what ends them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from broker.auth.tokens import TokenStore, digest_of
from broker.core.access import Grant, Principal, Role
from broker.transports.websocket.peer import AT_ONCE
from tests.transports.websocket.harness import ADMIN, CALLER, WORKER, Peer, World, config, head, run, serving, until


class Life:
    """A peer with grace over one link after the other. It counts as the protocol says, by hand."""

    def __init__(self, world: World, path: str, secret: str = ADMIN) -> None:
        self.world = world
        self.path = path
        self.secret = secret
        self.told: dict[str, Any] = {}
        self.received = 0
        self.peer: Peer

    async def attach(self, *, secret: str | None = None, resume: str | None = None) -> dict[str, Any]:
        """A new link; what `broker.session` says on it."""
        names = ["jsonrpc"]
        path = self.path
        if self.told and resume is None:
            resume = f"{self.told['id']}.{self.told['secret']}"
        if resume:
            names.append(f"resume.{resume}")
            path += f"&received={self.received}"
        offered = [Subprotocol(name) for name in names]
        self.peer = await self.world.peer(path, secret or self.secret, subprotocols=offered)
        assert self.peer.socket.subprotocol == "jsonrpc"
        first = await self.peer.read()
        assert first["method"] == "broker.session" and "meta" not in first
        self.told = first["params"]
        if not self.told["resumed"]:
            self.received = 0
        return self.told

    async def read(self) -> Any:
        """The next numbered message."""
        message = await self.peer.read()
        if head(message).get("method") == "$/ack":
            return await self.read()
        n = head(message)["meta"]["n"]
        assert n > self.received, "a message came twice"
        self.received = n
        return message

    def cut(self) -> None:
        """The cable is cut."""
        self.peer.socket.transport.abort()

    async def gone(self) -> None:
        """Until the broker has noticed."""
        await until(lambda: self.world.broker.router.sessions.suspended == 1, "the session is suspended")


def test_a_caller_comes_back_and_gets_the_replies_it_missed_each_once() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, life = await world.worker(), Life(world, "/ws/lab?grace=30&listen=0")
            assert not (await life.attach())["resumed"]
            for wire_id in (1, 2, 3):
                await life.peer.send({"jsonrpc": "2.0", "id": wire_id, "method": "m"})
            calls = [await worker.taken() for _ in range(3)]
            await worker.answer(calls[0], result="one")
            assert (await life.read())["result"] == "one"
            life.cut()
            await life.gone()
            await worker.answer(calls[1], result="two")
            await worker.sync()
            told = await life.attach()
            assert told["resumed"] and told["received"] == 3
            assert (await life.read())["result"] == "two"
            await worker.answer(calls[2], result="three")
            assert (await life.read())["result"] == "three"
            assert world.counters.resumed == 1 and world.counters.ended["ok"] == 4  # one was a ping
            await life.peer.socket.close()

    run(main)


def test_what_was_acknowledged_is_not_kept_and_what_was_not_is_said_again() -> None:
    async def main() -> None:
        async with serving() as world:
            life, other = Life(world, "/ws/lab?grace=30"), await world.peer()
            await life.attach()
            for number in range(4):
                await other.call("broker.publish", {"endpoint": "lab", "data": number})
            seen = [await life.read() for _ in range(2)]
            await life.peer.send({"jsonrpc": "2.0", "method": "$/ack", "params": {"n": 2}})
            await life.peer.send({"jsonrpc": "2.0", "method": "$/ack", "params": {"n": 99}})
            await until(lambda: world.counters.acks_ignored == 1, "an ack of what was never sent is counted")
            life.cut()
            await life.gone()
            await other.call("broker.publish", {"endpoint": "lab", "data": 4})
            await life.attach()
            seen += [await life.read() for _ in range(3)]
            assert [message["params"]["seq"] for message in seen] == [1, 2, 3, 4, 5]
            await life.peer.socket.close()

    run(main)


def test_a_worker_that_comes_back_keeps_its_attempts() -> None:
    async def main() -> None:
        async with serving() as world:
            life, caller = Life(world, "/ws/lab?role=worker&grace=30&meta=1"), await world.caller()
            await life.attach()
            await caller.ask("m")
            call = await life.read()
            life.cut()
            await life.gone()
            waiting = await caller.ask("m")  # it is given nothing while it is away
            await caller.sync()
            assert (await life.attach())["resumed"]
            await life.peer.answer(call, result="kept")
            assert (await caller.reply(1))["result"] == "kept"
            await life.peer.answer(await life.read(), result="next")
            assert (await caller.reply(waiting))["result"] == "next"
            await life.peer.socket.close()

    run(main)


def test_after_its_grace_a_session_is_gone() -> None:
    async def main() -> None:
        async with serving() as world:
            life, caller = Life(world, "/ws/lab?role=worker&grace=0.1"), await world.caller()
            await life.attach()
            wire_id = await caller.ask("m")
            await life.read()
            life.cut()
            reply = await caller.reply(wire_id)
            assert reply["error"]["data"]["outcome"] == "worker_lost"
            old = life.told["id"]
            told = await life.attach()
            assert not told["resumed"] and told["id"] != old
            await life.peer.socket.close()

    run(main)


def test_a_close_on_purpose_ends_the_session_at_once() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, life = await world.worker(), Life(world, "/ws/lab?grace=30&listen=0")
            await life.attach()
            await life.peer.send({"jsonrpc": "2.0", "id": 1, "method": "m"})
            await worker.taken()
            await life.peer.socket.close(1000)
            assert (await worker.told("$/cancelRequest"))["params"]
            assert world.counters.suspended == 0

    run(main)


def test_a_newer_link_takes_over_from_one_that_is_still_open() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, life = await world.worker(), Life(world, "/ws/lab?grace=30&listen=0")
            await life.attach()
            await life.peer.send({"jsonrpc": "2.0", "id": 1, "method": "m"})
            call = await worker.taken()
            old = life.peer
            assert (await life.attach())["resumed"]
            assert (await old.closed())[0] == 4409
            await worker.answer(call, result=1)
            assert (await life.read())["result"] == 1
            await life.peer.socket.close()

    run(main)


@pytest.mark.parametrize("wrong", ["secret", "principal", "both"])
def test_a_session_that_is_not_theirs_is_refused_and_counted(wrong: str) -> None:
    async def main() -> None:
        async with serving() as world:
            life = Life(world, "/ws/lab?grace=30", CALLER)
            told = await life.attach()
            secret = "x" * 24 if wrong in ("secret", "both") else told["secret"]
            with pytest.raises(InvalidStatus) as refused:
                await life.attach(secret=ADMIN if wrong != "secret" else CALLER, resume=f"{told['id']}.{secret}")
            assert refused.value.response.status_code == 403
            assert told["secret"] not in refused.value.response.body.decode()
            assert world.broker.authenticator.counters.wrong == 1
            await life.peer.sync()  # the session and its link are untouched
            await life.peer.socket.close()

    run(main)


@pytest.mark.parametrize("resume", ["nobody-1.x", "x", "..", "-9.y", "n-99999999999999999999.z"])
def test_a_session_nobody_knows_is_a_new_one(resume: str) -> None:
    async def main() -> None:
        async with serving() as world:
            life = Life(world, "/ws/lab?grace=30")
            assert not (await life.attach(resume=resume))["resumed"]
            await life.peer.socket.close()

    run(main)


def test_a_session_is_resumed_as_it_was_attached() -> None:
    async def main() -> None:
        async with serving() as world:
            life = Life(world, "/ws/lab?grace=30")
            await life.attach()
            life.path = "/ws/lab2?grace=30"
            with pytest.raises(InvalidStatus) as refused:
                await life.attach()
            assert refused.value.response.status_code == 400
            await life.peer.socket.close()

    run(main)


def test_what_is_kept_is_bounded_and_a_cut_is_told() -> None:
    async def main() -> None:
        async with serving(config(limits={"kept_max": 3})) as world:
            life, other = Life(world, "/ws/lab?grace=30"), await world.peer()
            await life.attach()
            life.cut()
            await life.gone()
            for number in range(5):
                await other.call("broker.publish", {"endpoint": "lab", "data": number})
            assert (await life.attach())["cut"] == 2
            assert [(await life.read())["params"]["seq"] for _ in range(3)] == [3, 4, 5]
            await life.peer.socket.close()

    run(main)


def test_replies_that_were_cut_end_the_session() -> None:
    async def main() -> None:
        async with serving(config(limits={"kept_max": 1})) as world:
            worker, life = await world.worker(), Life(world, "/ws/lab?grace=30&listen=0")
            await life.attach()
            for wire_id in (1, 2):
                await life.peer.send({"jsonrpc": "2.0", "id": wire_id, "method": "m"})
            calls = [await worker.taken() for _ in range(2)]
            life.cut()
            await life.gone()
            for call in calls:
                await worker.answer(call, result=1)
            await worker.sync()
            assert not (await life.attach())["resumed"]
            await life.peer.socket.close()

    run(main)


def test_who_comes_back_too_late_while_its_old_link_is_open_leaves_nothing_behind() -> None:
    """The old link would else stay open, and what is said over it would be heard by nobody."""

    async def main() -> None:
        async with serving(config(limits={"kept_max": 1})) as world:
            caller, life = await world.caller(), Life(world, "/ws/lab?grace=30&role=worker&capacity=1")
            await life.attach()
            await caller.ask("m")
            await life.read()
            await life.peer.send({"jsonrpc": "2.0", "id": 1, "method": "broker.ping"})
            await life.read()
            old, life.received = life.peer, 0
            assert not (await life.attach())["resumed"]
            assert (await old.closed())[0] == 4409
            lost = (await caller.reply(1))["error"]["data"]
            assert lost["outcome"] == "worker_lost" and not lost["retryable"], "it had been given out"
            await life.peer.socket.close()

    run(main)


def test_very_many_that_were_kept_come_in_order_with_those_that_come_meanwhile() -> None:
    async def main() -> None:
        async with serving() as world:
            life, other = Life(world, "/ws/lab?grace=30"), await world.peer()
            await life.attach()
            life.cut()
            await life.gone()
            for number in range(3 * AT_ONCE):
                await other.ask("broker.publish", {"endpoint": "lab", "data": number})
            await other.sync()
            assert (await life.attach())["resumed"]
            await life.peer.send({"jsonrpc": "2.0", "id": 1, "method": "broker.ping"})
            for number in range(5):
                await other.ask("broker.publish", {"endpoint": "lab", "data": number})
            seen = [await life.read() for _ in range(3 * AT_ONCE + 6)]  # which asserts that none comes twice
            numbers = [message["params"]["seq"] for message in seen if "params" in message]
            assert numbers == list(range(1, 3 * AT_ONCE + 6)) and life.received == len(seen)
            await life.peer.socket.close()

    run(main)


def test_replies_of_a_batch_come_one_by_one_so_that_none_is_acknowledged_before_it_is_sent() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, life = await world.worker(), Life(world, "/ws/lab?grace=30&listen=0")
            await life.attach()
            members = [{"jsonrpc": "2.0", "id": each, "method": "m"} for each in (1, 2)]
            await life.peer.send([5, *members, {**members[1], "params": ["another"]}])
            first, second = await worker.taken(), await worker.taken()
            (refused,) = await life.peer.find(lambda message: isinstance(message, list))
            assert refused["error"]["code"] == -32600
            assert (await life.read())["error"]["data"]["outcome"] == "duplicate_id"
            await worker.answer(first, result="one")
            assert (await life.read())["result"] == "one"
            await life.peer.send({"jsonrpc": "2.0", "method": "$/ack", "params": {"n": life.received}})
            life.cut()
            await life.gone()
            await worker.answer(second, result="two")
            await worker.sync()
            assert (await life.attach())["resumed"]
            assert (await life.read())["result"] == "two"
            await life.peer.socket.close()

    run(main)


def test_a_stream_whose_reader_is_away_for_too_long_ends_as_slow_consumer() -> None:
    async def main() -> None:
        async with serving(config(limits={"kept_max_bytes": 1000})) as world:
            worker, life = await world.worker(), Life(world, "/ws/lab?grace=30&listen=0&stream=in")
            await life.attach()
            await life.peer.send({"jsonrpc": "2.0", "id": 1, "method": "m"})
            call = await worker.taken()
            life.cut()
            await life.gone()
            for seq in range(3):
                part = {"id": call["id"], "seq": seq, "data": "x" * 300}
                await worker.send({"jsonrpc": "2.0", "method": "$/part", "params": part})
            assert (await worker.told("$/cancelRequest"))["params"]["id"] == call["id"]
            await life.attach()
            assert (await life.read())["method"] == "$/part"
            last = [await life.read()]
            while "error" not in last[-1]:
                last.append(await life.read())
            assert last[-1]["error"]["data"]["outcome"] == "slow_consumer"
            await life.peer.socket.close()

    run(main)


def test_the_grants_of_the_credential_it_comes_back_with_hold() -> None:
    async def main() -> None:
        async with serving(config(limits={"grace_max_s": 5})) as world:
            life = Life(world, "/ws?grace=30", WORKER)
            assert (await life.attach())["grace"] == 5.0
            await life.peer.send({"jsonrpc": "2.0", "id": 1, "method": "broker.serve", "params": {"endpoint": "lab"}})
            await life.read()
            await life.peer.send({"jsonrpc": "2.0", "id": 2, "method": "broker.serve", "params": {"endpoint": "lab2"}})
            await life.read()
            fixed = world.broker.authenticator._fixed
            fixed[digest_of(WORKER)] = Principal("wanda", (Grant(Role.WORKER, ("lab",)),))
            life.cut()
            await life.gone()
            assert (await life.attach())["resumed"]
            served = {each.name for each in world.broker.router.registry.by_name.values() if each.registrations}
            assert served == {"lab"}
            await life.peer.socket.close()

    run(main)


def test_row_09_a_session_that_outlives_its_token_comes_back_with_a_new_one() -> None:
    async def main() -> None:
        grants = (Grant(Role.CALLER | Role.WORKER, ("lab",)),)
        short, long = "short-lived-secret-0123456789abcdefgh", "long-lived-secret-0123456789abcdefghi"
        fixed = {short: Principal("carol", grants, expires_at=time.time() + 0.5), long: Principal("carol", grants)}
        async with serving(fixed=fixed) as world:
            worker, life = await world.worker(secret=long), Life(world, "/ws/lab?grace=30&listen=0", short)
            await life.attach()
            await life.peer.send({"jsonrpc": "2.0", "id": 1, "method": "m"})
            call = await worker.taken()
            assert (await life.peer.closed())[0] == 4401
            await life.gone()
            await worker.answer(call, result="kept for it")
            await worker.sync()
            assert (await life.attach(secret=long))["resumed"]
            assert (await life.read())["result"] == "kept for it"
            await life.peer.socket.close()

    run(main)


def test_a_request_sent_again_by_a_peer_that_does_not_count_is_the_same_request() -> None:
    async def main() -> None:
        async with serving() as world:
            worker, life = await world.worker(), Life(world, "/ws/lab?grace=30&listen=0")
            await life.attach()
            message = {"jsonrpc": "2.0", "id": 1, "method": "m", "params": [1]}
            await life.peer.send(message)
            call = await worker.taken()
            life.cut()
            await life.gone()
            await life.attach()
            await life.peer.send(message)
            await life.peer.send({**message, "params": [2]})
            refused = await life.read()
            assert refused["id"] is None and refused["error"]["data"]["outcome"] == "duplicate_id"
            assert await worker.silent()
            await worker.answer(call, result=1)
            assert (await life.read())["result"] == 1
            await life.peer.socket.close()

    run(main)


def test_the_broker_says_now_and_then_what_has_arrived() -> None:
    async def main() -> None:
        async with serving() as world:
            life = Life(world, "/ws/lab?grace=30&listen=0")
            await life.attach()
            for _ in range(32):
                await life.peer.send({"jsonrpc": "2.0", "method": "$/nothing"})
            assert (await life.peer.told("$/ack"))["params"] == {"n": 32}
            await life.peer.socket.close()

    run(main)


def test_a_broker_that_leaves_keeps_no_session() -> None:
    async def main() -> None:
        async with serving() as world:
            life = Life(world, "/ws/lab?grace=30")
            await life.attach()
            life.cut()
            await life.gone()

    run(main)  # `serving` asserts that nothing is left


@pytest.mark.parametrize("successor", [False, True], ids=["nobody is left", "another token of the same name"])
def test_a_revoked_token_ends_sessions_that_are_away_at_once(successor: bool, tmp_path: Path) -> None:
    async def main() -> None:
        store = TokenStore(tmp_path / "tokens.json")
        record, secret = store.create("carol", endpoints=["lab"])
        other = store.create("carol", endpoints=["lab"])[1] if successor else secret
        async with serving(tokens=store) as world:
            gone, here = Life(world, "/ws/lab?grace=300", secret), Life(world, "/ws/lab?grace=300", secret)
            await gone.attach()
            await here.attach()
            gone.cut()
            await gone.gone()
            store.revoke(record.id)
            assert (await here.peer.closed())[0] == 4401
            if successor:
                assert (await here.attach(secret=other))["resumed"] and (await gone.attach(secret=other))["resumed"]
            else:
                await until(lambda: not len(world.broker.router.sessions), "both sessions have ended")

    run(main)


def test_one_who_never_acknowledges_does_not_take_the_memory_of_all() -> None:
    async def main() -> None:
        limits = {"memory_soft_bytes": 4 << 20, "memory_hard_bytes": 8 << 20, "kept_max_bytes": 1 << 20}
        async with serving(config(limits=limits)) as world:
            worker = await world.worker()
            for number in range(8):
                hoard = Life(world, "/ws/lab?grace=30&listen=0")
                await hoard.attach()
                for each in range(2):
                    await hoard.peer.send({"jsonrpc": "2.0", "id": each, "method": "m"})
                    await worker.answer(await worker.taken(), result="x" * 400_000)
                    await hoard.read()
                if number % 2:
                    hoard.cut()
            caller = await world.peer("/ws/lab", CALLER)
            await caller.ask("m")
            await worker.serve_one()
            assert (await caller.reply(1))["result"] == "done", "not overloaded"
            assert world.broker.router.state.budget.used <= 1.1 * (1 << 20)
            assert await world.metric("broker_over_share_total", of="messages") > 0

    run(main)
