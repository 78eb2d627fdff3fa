"""Names and passwords: alike for who knows neither, bounded for who guesses, cheap for who was right, off the loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from broker.auth import passwords, sign_in
from broker.auth.attempts import PLACES_MAX, Attempts
from broker.auth.facts import Refused
from broker.auth.guesses import Guesses
from broker.auth.hashing import THREADS, Hashing
from broker.auth.sign_in import SignIn, Throttled
from broker.auth.users import UserStore
from tests.auth.helpers import Clock, cheap_passwords

PASSWORD = "a canary of a password"
HOME, ELSEWHERE = "10.0.0.1", "192.0.2.7"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_passwords(monkeypatch)


class Desk:
    """A sign-in over a real file, that tells how many slow hashes it took."""

    def __init__(self, folder: Path, *, per_minute: int = 5, per_address: int = 1000) -> None:
        self.clock = Clock()
        self.store = UserStore(folder / "users.json")
        self.guesses = Guesses(self.clock, per_minute=per_address)
        self.sign_in = SignIn(self.store, self.clock, self.guesses, per_minute=per_minute)
        self.hashes = 0

    async def outcome(self, name: str = "carol", password: str = PASSWORD, remote: str = HOME) -> str:
        """`in`, `wrong`, or the seconds to wait."""
        try:
            principal = await self.sign_in.check(name, password, remote)
        except Throttled as throttled:
            return str(throttled.wait_s)
        return "wrong" if principal is None else "in"

    async def outcomes(self, count: int, *arguments: str) -> list[str]:
        return [await self.outcome(*arguments) for _ in range(count)]


def run(folder: Path, story: Callable[[Desk], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, **bounds: int) -> None:
    desk = Desk(folder, **bounds)
    real = passwords.verify

    def counted(encoded: str, password: str) -> bool:
        assert threading.current_thread() is not threading.main_thread(), "off the loop"
        desk.hashes += 1
        return real(encoded, password)

    monkeypatch.setattr(sign_in, "verify", counted)

    async def main() -> None:
        before = threading.active_count()
        try:
            await story(desk)
        finally:
            await desk.sign_in.close()
        assert threading.active_count() == before

    asyncio.run(main())


def test_unknown_wrong_and_disabled_are_alike_and_cost_a_hash_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        desk.store.add("dave", PASSWORD)
        desk.store.set_disabled("dave", True)
        for name, password in (("carol", "wrong"), ("nobody", PASSWORD), ("dave", PASSWORD), ("dave", "wrong")):
            before = desk.hashes
            assert await desk.outcome(name, password) == "wrong"
            assert desk.hashes == before + 1
        # They are throttled alike, too: five in a minute.
        for name in ("carol", "nobody", "dave"):
            assert [await desk.outcome(name, f"guess {n}", ELSEWHERE) for n in range(5)].count("wrong") < 5
            assert await desk.outcome(name, "one more", ELSEWHERE) == "12"
        desk.clock.now += 60
        assert await desk.outcomes(6, "dave", PASSWORD) == ["wrong"] * 5 + ["12"], "a right one tells nothing"
        assert await desk.outcome("no" * 50_000, PASSWORD) == "wrong"

    run(tmp_path, story, monkeypatch)


def test_who_was_right_needs_no_hash_again_until_the_entry_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        assert await desk.outcomes(50) == ["in"] * 50 and desk.hashes == 1
        assert await desk.outcome(remote=ELSEWHERE) == "in" and desk.hashes == 1
        assert await desk.outcome("carol", "wrong") == "wrong" and desk.hashes == 2
        assert await desk.outcome() == "in" and desk.hashes == 2
        desk.store.set_password("carol", "quite another one")
        assert await desk.outcome() == "wrong" and desk.hashes == 3
        assert await desk.outcome("carol", "quite another one") == "in" and desk.hashes == 4
        assert len(desk.sign_in._remembered) == 1, "the old one is dropped"
        desk.store.set_disabled("carol", True)
        assert await desk.outcome("carol", "quite another one") == "wrong"
        desk.store.remove("carol")
        assert await desk.outcome("carol", "quite another one") == "wrong"
        assert desk.sign_in._remembered == {}
        for kept in (vars(desk.sign_in), vars(desk.store)):
            assert PASSWORD not in repr(kept) and "quite another" not in repr(kept)

    run(tmp_path, story, monkeypatch)


def test_right_passwords_use_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(desk: Desk) -> None:
        for name in "abcdefgh":
            desk.store.add(name, PASSWORD)
        for name in "abcdefgh":
            assert await desk.outcome(name) == "in"
        assert desk.hashes == 8

    run(tmp_path, story, monkeypatch, per_minute=1, per_address=1)


def test_a_flood_of_guesses_does_not_lock_the_user_out_of_where_he_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        assert await desk.outcome() == "in"
        desk.store.set_disabled("carol", True)  # a change: from now on she needs the slow hash again
        desk.store.set_disabled("carol", False)
        for number in range(100):
            await desk.outcome("carol", f"guess {number}", f"192.0.2.{number}")
        assert await desk.outcome("carol", PASSWORD, "192.0.2.200") == "12", "a right one from a new address waits, too"
        assert await desk.outcome() == "in", "from her own it does not"
        assert desk.hashes <= 2 + 5, "what is throttled costs nothing"
        # Her own address has a bucket of its own, which is bounded as well.
        assert await desk.outcomes(6, "carol", "wrong") == ["wrong"] * 5 + ["12"]
        desk.clock.now += 12
        assert await desk.outcome() == "in"
        desk.clock.now += 60
        assert await desk.outcome("carol", PASSWORD, "192.0.2.200") == "in"

    run(tmp_path, story, monkeypatch)


def test_an_address_pays_for_all_names_it_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        assert await desk.outcome(remote=ELSEWHERE) == "in"
        outcomes = [await desk.outcome(f"nobody{number}", PASSWORD, ELSEWHERE) for number in range(5)]
        assert outcomes == ["wrong"] * 3 + ["20"] * 2
        assert desk.guesses.wait_s(ELSEWHERE) == 20, "wrong tokens and wrong passwords share it"
        assert await desk.outcome(remote=ELSEWHERE) == "in", "who is known there comes in"
        assert await desk.outcome("nobody", PASSWORD, "198.51.100.1") == "wrong"

    run(tmp_path, story, monkeypatch, per_address=3)


def test_many_at_once_get_no_more_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        outcomes = await asyncio.gather(*(desk.outcome("carol", f"guess {number}") for number in range(20)))
        assert outcomes.count("wrong") == 5 == desk.hashes and set(outcomes) == {"wrong", "12"}

    run(tmp_path, story, monkeypatch)


def test_the_same_at_once_is_one_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        outcomes = await asyncio.gather(*(desk.outcome(remote=f"10.0.0.{number}") for number in range(50)))
        assert outcomes == ["in"] * 50 and desk.hashes == 1
        assert not desk.sign_in._under_way

    run(tmp_path, story, monkeypatch)


def test_who_leaves_while_waiting_changes_nothing_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        leaving = asyncio.ensure_future(desk.outcome())
        staying = asyncio.ensure_future(desk.outcome())
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == "in" and desk.hashes == 1

    run(tmp_path, story, monkeypatch)


def test_removed_while_the_hash_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        asking = asyncio.ensure_future(desk.outcome())
        await asyncio.sleep(0)
        desk.store.remove("carol")
        assert await asking == "wrong" and desk.sign_in._remembered == {}

    run(tmp_path, story, monkeypatch)


def test_without_users_there_is_nothing_to_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(desk: Desk) -> None:
        assert await desk.outcomes(6, "carol", "x") == ["wrong"] * 5 + ["12"]
        assert desk.hashes == 0

    run(tmp_path, story, monkeypatch)


# ---------------------------------------------------------------- the places of a user


def test_places_are_bounded_and_another_user_cannot_push_them_out() -> None:
    attempts = Attempts(Clock(), Guesses(Clock()))
    attempts.was_right("carol", HOME)
    for number in range(200):
        attempts.was_right("mallory", f"192.0.2.{number}")
    assert attempts.is_known("carol", HOME) and not attempts.is_known("mallory", HOME)
    assert not attempts.is_known("mallory", "192.0.2.100") and attempts.is_known("mallory", "192.0.2.199")
    assert len(attempts._seen["mallory"]) == PLACES_MAX
    attempts.was_right("carol", "2001:db8::1")
    assert attempts.is_known("carol", "2001:db8::2") and not attempts.is_known("carol", "2001:db8:0:1::1")


def test_attempts_that_were_none_push_nobody_out_of_the_books() -> None:
    attempts = Attempts(Clock(), Guesses(Clock()), per_minute=1)
    attempts.take("carol", HOME)
    for number in range(1000):  # refused, because too many wait: no hash bounds how many these are
        attempts.take(f"nobody {number}", ELSEWHERE)()
    assert len(attempts._names) == 1 and attempts.wait_s("carol", ELSEWHERE)


# ---------------------------------------------------------------- the threads


def test_the_line_is_bounded_and_strangers_do_not_fill_the_lane_of_the_known() -> None:
    async def main() -> None:
        hashing, go, order = Hashing(waiting_max=3), threading.Event(), []

        async def one(label: str, known: bool) -> None:
            def job() -> bool:
                order.append(label)
                return go.wait(20)

            assert await hashing.run(job, known=known)

        strangers = [asyncio.ensure_future(one(f"stranger {number}", False)) for number in range(THREADS + 3)]
        await asyncio.sleep(0)
        with pytest.raises(Refused) as caught:
            await one("too many", False)
        assert caught.value.status == 503 and dict(caught.value.headers)["Retry-After"]
        known = asyncio.ensure_future(one("known", True))
        await asyncio.sleep(0)
        strangers[-1].cancel()  # who leaves makes room for nobody twice
        go.set()
        await asyncio.gather(known, *strangers[:-1])
        assert sorted(order[:THREADS]) == ["stranger 0", "stranger 1"] and len(order) == THREADS + 3
        assert "known" in order[THREADS : 2 * THREADS], "served before the strangers who waited longer"
        await hashing.close()
        assert hashing._running == 0

    asyncio.run(main())


def test_at_the_end_who_waits_is_refused() -> None:
    async def main() -> None:
        hashing, go = Hashing(), threading.Event()
        asked = [asyncio.ensure_future(hashing.run(lambda: go.wait(20), known=False)) for _ in range(THREADS + 1)]
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(hashing.close())
        await asyncio.sleep(0)
        with pytest.raises(Refused):
            await asked[-1]
        go.set()
        assert await asyncio.gather(*asked[:-1]) == [True] * THREADS
        await closing
        with pytest.raises(Refused) as caught:
            await hashing.run(lambda: True, known=True)
        assert caught.value.status == 503

    asyncio.run(main())


def test_the_loop_turns_while_hashes_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "SCRYPT_LN", 15)

    async def story(desk: Desk) -> None:
        desk.store.add("carol", PASSWORD)
        asking = asyncio.gather(*(desk.outcome("carol", f"guess {number}") for number in range(4)))
        turns, until = 0, time.monotonic() + 20
        while not asking.done() and time.monotonic() < until:
            await asyncio.sleep(0.001)
            turns += 1
        assert await asking == ["wrong"] * 4 and turns > 10

    run(tmp_path, story, monkeypatch)
