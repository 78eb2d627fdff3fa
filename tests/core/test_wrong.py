"""What is wrong with options and parameters, in words."""

from __future__ import annotations

import msgspec
import pytest

from broker.core.commands import CallParams, CommandError, NoParams, ServeParams, read_params
from broker.core.options import OptionError, Written, read_options
from broker.core.wrong import hint_for, what_is_wrong

NAME = "expected text: 1 to 128 of A-Z a-z 0-9 _ . -, the first none of . -"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"idempotent":"yes"}', "idempotent: expected true or false, got text"),
        (b'{"retries":1.5}', "retries: expected a whole number, got a fraction"),
        (b'{"key":5}', "key: expected text, got a whole number"),
        (b'{"timeout":{}}', "timeout: expected a number, got an object"),
        (b'{"timeout":true}', "timeout: expected a number, got true or false"),
        (b'{"progress":[]}', "progress: expected true or false, a whole number or text, got a list"),
        (b'{"timeuot":1}', "meta: unknown member 'timeuot'; did you mean timeout?"),
        (b"[]", "meta: expected an object, got a list"),
    ],
)
def test_options(raw: bytes, said: str) -> None:
    with pytest.raises(OptionError) as raised:
        read_options(raw)
    assert str(raised.value) == said


def test_a_name_like_no_other_is_told_which_there_are() -> None:
    with pytest.raises(OptionError, match=r"^meta: unknown member 'xxxxxxxxxx'; there are timeout, idle, "):
        read_options(b'{"xxxxxxxxxx":1}')
    with pytest.raises(OptionError, match=f"^meta: unknown member '{'y' * 40}'; there are"):
        read_options(b'{"%s":1}' % (b"y" * 100_000))


@pytest.mark.parametrize(
    ("kind", "raw", "said"),
    [
        (ServeParams, b'{"capacity":0}', "capacity: expected a whole number >= 1"),
        (ServeParams, b'{"endpoint":"-"}', f"endpoint: {NAME}"),
        (ServeParams, b'{"methods":["a",5]}', "methods[1]: expected text, got a whole number"),
        (CallParams, b"{}", "params: method is missing"),
        (NoParams, b'{"a":1}', "params: unknown member 'a'; there are none"),
        (NoParams, b"null", "params: expected an object, got null"),
    ],
)
def test_parameters_of_the_brokers_own_methods(kind: type[msgspec.Struct], raw: bytes, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        read_params(raw, kind)
    assert str(raised.value) == said


def test_where_all_is_text_the_text_is_repeated() -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.convert({"timeout": "soon"}, Written, strict=False)
    assert what_is_wrong(raised.value, given={"timeout": "soon"}) == "timeout: expected a number, got 'soon'"


def test_hints() -> None:
    assert hint_for("rol", ("role", "wait"), "{}=") == "did you mean role=?"
    assert hint_for("xyz", ("role", "wait")) == "there are role, wait"
    assert hint_for("xyz", ()) == "there are none"
