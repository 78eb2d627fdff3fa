"""Options of a request, as callers write them."""

from __future__ import annotations

import pytest

from broker.core.messages import DEFAULT_OPTIONS, Options
from broker.core.options import KEY_MAX, PRIORITY_MAX, RETRIES_MAX, TRACE_MAX, OptionError, read_options


def test_nothing_written_is_the_defaults_and_a_wish_for_meta() -> None:
    assert read_options(b"{}") == Options(meta=True)
    assert read_options(b"{}", Options(timeout=5.0, wait=True)) == Options(timeout=5.0, wait=True, meta=True)


def test_what_is_written_wins_over_the_defaults() -> None:
    raw = b'{"timeout":2,"wait":false,"trace":"t","idempotent":true,"retries":3}'
    assert read_options(raw, Options(timeout=5.0, wait=True)) == Options(
        timeout=2.0, wait=False, trace="t", idempotent=True, retries=3, meta=True
    )


def test_idempotent_brings_one_retry_unless_told() -> None:
    assert read_options(b'{"idempotent":true}').retries == 1
    assert read_options(b'{"idempotent":true,"retries":0}').retries == 0
    assert read_options(b"{}").retries == 0


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"timeout":0}', "timeout"),
        (b'{"timeout":-0.5}', "timeout"),
        (b'{"timeout":1e999}', "timeout"),
        (b'{"timeout":"5"}', "timeout"),
        (b'{"timeout":true}', "timeout"),
        (b'{"retries":1}', "retries"),
        (b'{"idempotent":true,"retries":-1}', "retries"),
        (b'{"idempotent":true,"retries":%d}' % (RETRIES_MAX + 1), "retries"),
        (b'{"idempotent":1}', "idempotent"),
        (b'{"wait":"yes"}', "wait"),
        (b'{"trace":"%s"}' % (b"x" * (TRACE_MAX + 1)), "trace"),
        (b'{"timeuot":1}', "timeuot"),
        (b'{"idle":0}', "idle"),
        (b'{"priority":%d}' % (PRIORITY_MAX + 1), "priority"),
        (b'{"priority":1.5}', "priority"),
        (b'{"stream":"sideways"}', "stream"),
        (b'{"key":""}', "key"),
        (b'{"key":"%s"}' % (b"x" * (KEY_MAX + 1)), "key"),
        (b'{"group":""}', "group"),
        (b'{"progress":"%s"}' % (b"x" * 200), "progress"),
        (b'{"progress":[1]}', "progress"),
        (b"[]", "meta"),
        (b"5", "meta"),
        (b"{", "meta"),
        (b"[" * 100_000, "meta"),
        (b'{"progress":' + b"[" * 100_000, "progress"),
        (b'{"timeout":NaN}', "meta"),
    ],
)
def test_what_cannot_be_honoured_is_named(raw: bytes, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        read_options(raw)


def test_options_of_streams_lanes_and_keys() -> None:
    raw = b'{"stream":"both","idle":2,"priority":-3,"group":"g","progress":"t","timing":true}'
    assert read_options(raw) == Options(
        stream_in=True, stream_out=True, idle=2.0, priority=-3, group="g", progress=b'"t"', timing=True, meta=True
    )
    assert read_options(b'{"stream":"none"}', Options(stream_in=True)) == Options(meta=True)
    assert read_options(b'{"progress":true}').progress == b""
    assert read_options(b'{"progress":5}').progress == b"5"


@pytest.mark.parametrize("raw", [b'{"priority":0}', b'{"progress":false}', b'{"timing":false}', b'{"key":null}'])
def test_what_asks_for_nothing_is_no_error(raw: bytes) -> None:
    assert read_options(raw) == Options(meta=True)


def test_the_defaults_ask_for_nothing() -> None:
    assert Options() == DEFAULT_OPTIONS and not DEFAULT_OPTIONS.meta
