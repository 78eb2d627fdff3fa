"""The rules of parts, credit and progress: order, bounds, who may send what, deadlines, what comes after the end."""

from __future__ import annotations

from typing import Any

import pytest

from broker.core import errors
from broker.core.events import CreditGranted, Overrun, PartSent, Progressed
from broker.core.limits import EndpointLimits, Limits
from broker.core.messages import Body, Call, Credit, End, Message, Part, Progress
from broker.core.pending import Attempt
from broker.core.sessions import Session
from broker.wire.pieces import PIECE_DATA, Cutter
from tests.core.harness import World


class Pair:
    """A caller, a worker, and one request between them."""

    def __init__(self, limits: Limits | None = None, **options: Any) -> None:
        self.world = World(limits, options.pop("endpoints", None))
        self.caller, self.worker = self.world.caller(), self.world.worker()
        self.world.ask(self.caller, 7, **options)
        self.call = self.world.one_call(self.worker)
        self.attempt: Attempt = self.call.attempt

    def down(
        self, seq: int, raw: bytes = b"1", *, more: bool = False, last: bool = False, sender: Session | None = None,
        attachments: tuple[bytes, ...] = (),
    ) -> None:  # fmt: skip
        body = Body(raw, attachments)
        self.world.feed(PartSent(sender or self.worker, None, self.attempt.id, seq, body, more, last))

    def up(self, seq: int, raw: bytes = b"1", *, last: bool = False) -> None:
        self.world.feed(PartSent(self.caller, 7, 0, seq, Body(raw), False, last))

    def grant_down(self, upto: int) -> None:
        self.world.feed(CreditGranted(self.caller, 7, 0, upto))

    def grant_up(self, upto: int) -> None:
        self.world.feed(CreditGranted(self.worker, None, self.attempt.id, upto))

    def to_caller(self) -> list[Message]:
        messages = self.world.messages(self.caller)
        self.world.take()
        return messages

    def parts(self, session: Session) -> list[int]:
        return [message.seq for message in self.world.messages(session) if isinstance(message, Part)]

    def credits(self, session: Session) -> list[int]:
        return [message.upto for message in self.world.messages(session) if isinstance(message, Credit)]

    @property
    def counters(self) -> Any:
        return self.world.router.counters


def test_parts_come_in_order_before_the_end() -> None:
    pair = Pair(stream_in=True)
    for seq in range(3):
        pair.down(seq, b"%d" % seq)
    pair.world.answer(pair.worker, pair.attempt, b"null")
    *parts, end = pair.to_caller()
    assert [(p.wire_id, p.seq, bytes(p.body.raw)) for p in parts if isinstance(p, Part)] == [
        (7, 0, b"0"), (7, 1, b"1"), (7, 2, b"2"),
    ]  # fmt: skip
    assert isinstance(end, End) and end.outcome.kind is errors.OK


def test_credit_goes_through_and_what_is_beyond_it_breaks_the_stream() -> None:
    pair = Pair(stream_in=True)
    for seq in range(4):
        pair.down(seq)
    pair.grant_down(6)
    assert pair.credits(pair.worker) == [6]
    pair.down(4)
    pair.down(5)
    assert pair.parts(pair.caller) == [0, 1, 2, 3, 4, 5]
    pair.down(6)
    outcome = pair.world.outcome(pair.caller)
    assert outcome.kind is errors.BAD_REPLY and "beyond the credit" in outcome.detail
    assert pair.world.cancelled(pair.worker) == [pair.attempt.id]
    assert pair.counters.streams_broken == 1


@pytest.mark.parametrize("upto", [0, 3, 4])
def test_credit_that_is_no_more_than_before_changes_nothing(upto: int) -> None:
    pair = Pair(stream_in=True)
    pair.grant_down(upto)
    assert pair.credits(pair.worker) == []
    for seq in range(4):
        pair.down(seq)
    assert pair.parts(pair.caller) == [0, 1, 2, 3]


def test_credit_in_millions_is_cut_and_a_late_one_is_ignored() -> None:
    pair = Pair(stream_in=True)
    pair.grant_down(9_000_000)
    assert pair.credits(pair.worker) == [64]
    pair.world.answer(pair.worker, pair.attempt, b"null")
    pair.world.take()
    pair.grant_down(100)
    assert pair.world.take() == []


def test_what_was_granted_beyond_the_bound_is_told_as_parts_come() -> None:
    pair = Pair(Limits(parts_ahead_max=4), stream_in=True)
    pair.grant_down(100)
    assert pair.credits(pair.worker) == []
    for seq in range(40):
        assert seq < max([4, *pair.credits(pair.worker)]), "the stream stands still"
        pair.down(seq)
    assert pair.parts(pair.caller) == list(range(40))
    assert all(upto <= 44 for upto in pair.credits(pair.worker))


def test_credit_for_a_direction_that_was_not_asked_for_is_ignored() -> None:
    pair = Pair()
    pair.grant_down(50)
    pair.grant_up(50)
    assert pair.world.take() == []


def test_a_gap_is_a_bad_reply_and_a_repeated_part_is_dropped() -> None:
    pair = Pair(stream_in=True)
    pair.down(0)
    pair.down(0)
    assert pair.parts(pair.caller) == [0] and pair.counters.parts_dropped == 1
    pair.down(2)
    outcome = pair.world.outcome(pair.caller)
    assert outcome.kind is errors.BAD_REPLY and "part 2 came where part 1 was due" in outcome.detail


def test_parts_after_the_end_and_from_another_worker_are_dropped() -> None:
    pair = Pair(stream_in=True)
    other = pair.world.worker()
    pair.down(0, sender=other)
    assert pair.parts(pair.caller) == []
    pair.down(0, last=True)
    pair.down(1)
    assert pair.parts(pair.caller) == [0]
    pair.world.answer(pair.worker, pair.attempt, b"null")
    pair.down(2)
    assert pair.parts(pair.caller) == [0] and pair.counters.parts_dropped == 3


def test_a_part_above_the_bound_ends_the_request() -> None:
    pair = Pair(Limits(part_max_bytes=10), stream_in=True)
    pair.down(0, b'"89"', attachments=(b"123456",))
    assert pair.parts(pair.caller) == [0]
    pair.down(1, b'"89"', attachments=(b"1234567",))
    outcome = pair.world.outcome(pair.caller)
    assert outcome.kind is errors.BAD_REPLY and "11 bytes is above the bound of 10 bytes" in outcome.detail


# ---------------------------------------------------------------- callers who take no parts


def test_a_caller_who_takes_no_parts_gets_them_as_one_reply() -> None:
    pair = Pair()
    for seq in range(10):  # the broker grants what it gathers
        pair.down(seq, b"[%d]" % seq)
    assert pair.parts(pair.caller) == [] and pair.credits(pair.worker)[-1] >= 10
    pair.world.answer(pair.worker, pair.attempt, b"null")
    end = pair.world.one_end(pair.caller)
    assert end.body is not None and bytes(end.body.raw) == b"[[0],[1],[2],[3],[4],[5],[6],[7],[8],[9]]"


def test_a_part_that_only_ends_the_direction_is_no_item() -> None:
    pair = Pair()
    pair.down(0, b"5")
    pair.down(1, b"null", last=True)
    pair.world.answer(pair.worker, pair.attempt, b"null")
    end = pair.world.one_end(pair.caller)
    assert end.body is not None and bytes(end.body.raw) == b"[5]"


def test_what_is_gathered_is_bounded() -> None:
    pair = Pair(Limits(message_max_bytes=20))
    pair.down(0, b"1" * 20)
    pair.down(1, b"1")
    outcome = pair.world.outcome(pair.caller)
    assert outcome.kind is errors.TOO_LARGE and "stream: in" in outcome.detail


def test_a_value_in_pieces_is_made_whole_and_damage_is_a_bad_reply() -> None:
    cutter = Cutter(b'{"$buffer":0}', [b"x" * 300_000])
    pieces = list(cutter)
    for damage in (False, True):
        pair = Pair()
        for seq, piece in enumerate(pieces):
            pair.down(seq, PIECE_DATA, more=True, attachments=(piece[:-1] + b"!" if damage and seq else piece,))
        pair.world.answer(pair.worker, pair.attempt, cutter.mark)
        end = pair.world.one_end(pair.caller)
        if damage:
            assert end.outcome.kind is errors.BAD_REPLY and "CRC-32" in end.outcome.detail
        else:
            assert end.body is not None
            assert bytes(end.body.raw).rstrip() == b'{"$buffer":0}' and bytes(end.body.attachments[0]) == b"x" * 300_000


def test_an_error_after_parts_is_the_error() -> None:
    pair = Pair()
    pair.down(0)
    pair.world.fail(pair.worker, pair.attempt)
    assert pair.world.outcome(pair.caller).kind is errors.WORKER_ERROR


# ---------------------------------------------------------------- what the caller sends


def test_parts_of_the_caller_reach_the_worker_with_its_credit() -> None:
    pair = Pair(stream_out=True)
    for seq in range(4):
        pair.up(seq)
    pair.grant_up(5)
    assert pair.credits(pair.caller) == [5]
    pair.up(4, last=True)
    assert pair.parts(pair.worker) == [0, 1, 2, 3, 4]
    pair.up(5)
    assert pair.parts(pair.worker) == [0, 1, 2, 3, 4] and pair.counters.parts_dropped == 1


@pytest.mark.parametrize(
    ("options", "seq", "reason"),
    [({}, 0, "stream: out"), ({"stream_out": True}, 1, "part 0 was due"), ({"stream_out": True}, 4, "part 0 was due")],
)
def test_a_caller_that_breaks_the_rules_ends_its_own_request(options: dict[str, Any], seq: int, reason: str) -> None:
    pair = Pair(**options)
    pair.up(seq)
    outcome = pair.world.outcome(pair.caller)
    assert outcome.kind is errors.INVALID_REQUEST and reason in outcome.detail
    assert pair.world.cancelled(pair.worker) == [pair.attempt.id]


def test_parts_that_come_before_a_worker_is_free_are_for_it() -> None:
    world = World()
    caller, worker = world.caller(), world.worker(capacity=1)
    busy = world.busy(worker, world.caller())
    world.ask(caller, 7, stream_out=True)
    for seq in range(4):
        world.feed(PartSent(caller, 7, 0, seq, Body(b"%d" % seq)))
    assert world.messages(worker) == []
    world.answer(worker, busy)
    call, *parts = world.messages(worker)
    assert isinstance(call, Call)
    assert [(part.attempt_id, part.seq) for part in parts if isinstance(part, Part)] == [
        (call.attempt.id, seq) for seq in range(4)
    ]


# ---------------------------------------------------------------- readers who do not read


def test_credit_is_withheld_from_a_sender_whose_receiver_does_not_read() -> None:
    pair = Pair(stream_in=True, stream_out=True)
    pair.world.congested(pair.caller, True)
    pair.grant_down(8)
    pair.grant_down(12)
    assert pair.credits(pair.worker) == []
    pair.world.congested(pair.caller, False)
    assert pair.credits(pair.worker) == [12]
    pair.world.congested(pair.worker, True)
    pair.grant_up(9)
    assert pair.credits(pair.caller) == []
    pair.world.congested(pair.worker, False)
    assert pair.credits(pair.caller) == [9]


def test_credit_withheld_from_who_asks_itself_is_told_in_both_directions() -> None:
    world = World()
    peer = world.worker()
    world.ask(peer, 7, stream_in=True, stream_out=True)
    attempt = world.one_call(peer).attempt
    world.congested(peer, True)
    world.feed(CreditGranted(peer, 7, 0, 9))
    world.feed(CreditGranted(peer, None, attempt.id, 11))
    world.take()
    world.congested(peer, False)
    told = [(m.wire_id, m.attempt_id, m.upto) for m in world.messages(peer) if isinstance(m, Credit)]
    assert told == [(None, attempt.id, 9), (7, 0, 11)]


def test_credit_withheld_for_what_has_ended_goes_nowhere() -> None:
    pair = Pair(stream_in=True)
    pair.world.congested(pair.caller, True)
    pair.grant_down(8)
    pair.world.answer(pair.worker, pair.attempt)
    pair.world.take()
    pair.world.congested(pair.caller, False)
    assert pair.credits(pair.worker) == []


# ---------------------------------------------------------------- deadlines


def test_a_stream_may_go_on_as_long_as_it_does_not_stand_still() -> None:
    pair = Pair(Limits(deadline_s=30, idle_s=5), stream_in=True)
    for seq in range(20):
        pair.grant_down(seq + 4)
        pair.down(seq)
        pair.world.sleep(4)
    assert pair.world.ends(pair.caller) == []
    pair.world.sleep(2)
    outcome = pair.world.outcome(pair.caller)
    assert (outcome.kind, outcome.phase, outcome.detail) == (errors.DEADLINE, "executing", "nothing came for 5 s")
    assert pair.world.cancelled(pair.worker) == [pair.attempt.id]


def test_a_named_timeout_holds_whatever_flows() -> None:
    pair = Pair(Limits(idle_s=5), stream_in=True, timeout=10.0)
    for seq in range(4):
        pair.down(seq)
        pair.world.sleep(3)
    outcome = pair.world.outcome(pair.caller)
    assert outcome.kind is errors.DEADLINE and outcome.detail == "" and outcome.elapsed_ms <= 10_250


def test_a_named_idle_time_counts_from_the_start_and_progress_is_a_sign_of_life() -> None:
    pair = Pair(idle=2.0, progress=b"")
    for _ in range(5):
        pair.world.sleep(1.5)
        pair.world.feed(Progressed(pair.worker, pair.attempt.id, b"", Body(b"{}")))
    assert pair.world.ends(pair.caller) == []
    pair.world.sleep(2.5)
    assert pair.world.outcome(pair.caller).detail == "nothing came for 2 s"


def test_an_endpoint_may_have_its_own_idle_time() -> None:
    pair = Pair(endpoints={"e": EndpointLimits(idle_s=1.0)}, stream_in=True)
    pair.down(0)
    pair.world.sleep(1.2)
    assert pair.world.outcome(pair.caller).kind is errors.DEADLINE


# ---------------------------------------------------------------- workers that go


@pytest.mark.parametrize("stream_in", [True, False])
def test_a_stream_is_tried_again_only_while_nothing_was_passed_on(stream_in: bool) -> None:
    pair = Pair(stream_in=stream_in, idempotent=True, retries=1)
    other = pair.world.worker()
    pair.down(0, b'"of the first"')
    pair.world.take()
    pair.world.detach(pair.worker)
    if stream_in:
        assert pair.world.outcome(pair.caller).kind is errors.WORKER_LOST
        assert pair.world.calls(other) == []
        return
    attempt = pair.world.one_call(other).attempt
    pair.world.feed(PartSent(other, None, attempt.id, 0, Body(b'"of the second"')))
    pair.world.answer(other, attempt, b"null")
    end = pair.world.one_end(pair.caller)
    assert end.body is not None and bytes(end.body.raw) == b'["of the second"]'


def test_what_the_caller_has_sent_is_not_sent_twice() -> None:
    pair = Pair(stream_out=True, idempotent=True, retries=1)
    other = pair.world.worker()
    pair.up(0)
    pair.world.detach(pair.worker)
    assert pair.world.outcome(pair.caller).kind is errors.WORKER_LOST and pair.world.calls(other) == []


def test_credit_granted_before_a_retry_counts_for_the_next_worker() -> None:
    pair = Pair(stream_in=True, idempotent=True, retries=1)
    other = pair.world.worker()
    pair.grant_down(20)
    pair.world.detach(pair.worker)
    attempt = pair.world.one_call(other).attempt
    assert [(m.attempt_id, m.upto) for m in pair.world.messages(other) if isinstance(m, Credit)] == [(attempt.id, 20)]


# ---------------------------------------------------------------- progress


def test_progress_reaches_who_asked_under_the_token_it_named() -> None:
    for token in (b"", b'"mine"'):
        pair = Pair(progress=token)
        pair.world.feed(Progressed(pair.worker, pair.attempt.id, b"", Body(b'{"done":1}')))
        (message,) = pair.to_caller()
        assert isinstance(message, Progress)
        assert (message.wire_id, message.token, message.body.raw) == (7, token, b'{"done":1}')


def test_progress_by_the_token_alone_finds_its_request_unless_two_share_it() -> None:
    pair = Pair(progress=b'"t"')
    pair.world.feed(Progressed(pair.worker, 0, b'"t"', Body(b"1")))
    assert len(pair.to_caller()) == 1
    pair.world.ask(pair.caller, 8, progress=b'"t"')
    pair.world.take()
    pair.world.feed(Progressed(pair.worker, 0, b'"t"', Body(b"2")))
    assert pair.to_caller() == [] and pair.counters.progress_dropped == 1


@pytest.mark.parametrize("why", ["not asked", "not reading", "ended", "of another worker", "unknown token"])
def test_progress_nobody_wants_is_dropped(why: str) -> None:
    pair = Pair(progress=None if why == "not asked" else b"")
    sender, token, number = pair.worker, b"", pair.attempt.id
    if why == "not reading":
        pair.world.congested(pair.caller, True)
    elif why == "ended":
        pair.world.answer(pair.worker, pair.attempt)
    elif why == "of another worker":
        sender = pair.world.worker()
    elif why == "unknown token":
        token, number = b'"x"', 0
    pair.world.take()
    pair.world.feed(Progressed(sender, number, token, Body(b"1")))
    assert pair.world.take() == [] and pair.counters.progress_dropped == 1


# ---------------------------------------------------------------- the end


def test_nothing_is_left_of_streams() -> None:
    pair = Pair(stream_in=True, stream_out=True)
    pair.down(0)
    pair.up(0)
    pair.world.congested(pair.caller, True)
    pair.grant_down(8)
    pair.world.detach(pair.caller)
    assert pair.world.cancelled(pair.worker) == [pair.attempt.id]
    pair.world.detach(pair.worker)
    assert pair.world.router.pending.count == 0 and not pair.caller.withheld and not pair.worker.withheld


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("up", [True, False])
def test_parts_that_stay_here_are_refused_when_the_memory_is_full(up: bool) -> None:
    """New requests are refused above the soft bound, but those that are here could go on filling it."""
    world = World(Limits(memory_soft_bytes=1000, memory_hard_bytes=1500))
    caller = world.caller()
    if up:
        world.ask(caller, 7, "e/m", wait=True, stream_out=True)
        senders: tuple[Session, int | None, int] = caller, 7, 0
    else:
        worker = world.worker()
        world.ask(caller, 7)
        senders = worker, None, world.one_call(worker).attempt.id
    for seq in range(3):
        world.feed(PartSent(*senders, seq, Body(b"x" * 600)))
    end = world.one_end(caller)
    assert end.outcome.kind is errors.OVERLOADED and end.outcome.bound == "memory"
    assert end.outcome.retryable == up, "a worker may have begun with it"
    assert world.router.counters.overloaded["memory"] == 1
    assert world.router.state.budget.used == 0


def test_a_request_that_has_ended_is_not_remembered_for_its_credit() -> None:
    """Else who does not read could let bodies pile up here that no bound counts."""
    pair = Pair(stream_in=True, stream_out=True)
    pair.world.congested(pair.caller, True)
    pair.world.congested(pair.worker, True)
    pair.grant_down(20)
    pair.grant_up(20)
    assert pair.caller.withheld and pair.worker.withheld
    pair.world.cancel(pair.caller, 7)
    assert not pair.caller.withheld and not pair.worker.withheld


def test_credit_withheld_when_its_worker_was_lost_is_told_when_another_has_the_request() -> None:
    """Else the next worker could grant as much again, which is nothing new, and the caller would wait for ever."""
    pair = Pair(stream_out=True, idempotent=True, retries=1)
    pair.world.congested(pair.worker, True)
    pair.grant_up(6)
    assert pair.credits(pair.caller) == []
    pair.world.worker()
    pair.world.detach(pair.worker)
    assert pair.credits(pair.caller) == [6]


# ---------------------------------------------------------------- workers that know no credit


def test_a_worker_that_cannot_wait_has_its_request_ended_when_too_much_is_held() -> None:
    pair = Pair(stream_in=True)
    pair.down(0)
    pair.world.take()
    pair.world.feed(Overrun(pair.worker, pair.attempt.id, "too much is held"))
    end = pair.world.one_end(pair.caller)
    assert end.outcome.kind is errors.SLOW_CONSUMER and end.outcome.detail == "too much is held"
    assert pair.world.cancelled(pair.worker) == [pair.attempt.id]
    assert pair.counters.streams_broken == 1
    pair.world.take()
    pair.world.feed(Overrun(pair.worker, pair.attempt.id, "again"))
    assert pair.world.take() == []


def test_only_the_worker_that_has_a_request_can_overrun_it() -> None:
    pair = Pair(stream_in=True)
    other = pair.world.worker()
    pair.world.take()
    pair.world.feed(Overrun(other, pair.attempt.id, "not mine"))
    assert pair.world.take() == []
    pair.world.answer(pair.worker, pair.attempt)
    assert pair.world.one_end(pair.caller).outcome.kind is errors.OK
