"""The model: complete, bounded, frozen."""

import re

import msgspec
import pytest

from broker.config.fields import FIELDS, SECTIONS, dotted, field_at, literal, values, variable
from broker.config.model import Config, Endpoint, Limits

EVERY = [field for fields in FIELDS.values() for field in fields.values()]


@pytest.mark.parametrize("field", EVERY, ids=lambda field: f"{field.section}.{field.name}")
def test_every_key_is_described_and_bounded(field) -> None:  # type: ignore[no-untyped-def]
    assert re.fullmatch(r"[A-Z].+\.", field.description), "one sentence"
    assert field.expects
    if field.default is not None:
        assert msgspec.convert(field.default, field.kind) == field.default, "the default is right by its own bounds"
    if field.expects.startswith(("a whole number", "a number")):
        assert re.fullmatch(r"a (whole )?number (from \S+ to|above \S+, at most) [\d_]+", field.expects)


def test_every_section_has_a_sentence() -> None:
    assert list(SECTIONS) == list(Config.__struct_fields__)
    for section in SECTIONS.values():
        assert (section.__doc__ or "").endswith(".")


def test_the_documented_defaults() -> None:
    """What PROTOCOL's list of defaults promises."""
    limits = Config().limits
    assert (limits.deadline_s, limits.deadline_max_s, limits.slot_ms) == (30, 3600, 50)
    assert (limits.capacity, limits.queue_max) == (1024, 1000)
    assert (limits.in_flight_max, limits.endpoints_known_max, limits.batch_max) == (10_000, 10_000, 1000)
    assert (limits.ping_interval_s, limits.ping_timeout_s) == (20, 20)
    assert (limits.message_max_bytes, limits.unauthenticated_max_bytes) == (16 << 20, 64 << 10)
    assert (limits.outbox_soft_bytes, limits.outbox_hard_bytes, limits.stall_s) == (1 << 20, 8 << 20, 10)
    assert (limits.header_timeout_s, limits.body_timeout_s, limits.strikes_max) == (10, 30, 3)
    assert (Config().server.host, Config().server.port, Config().server.drain_s) == ("127.0.0.1", 8787, 25)
    assert Config().auth.ticket_s == 30


def test_configurations_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().server.port = 1  # type: ignore[misc]


def test_paths() -> None:
    assert dotted(("server", "port")) == "server.port"
    assert dotted(("endpoints", "a.b", "closed")) == 'endpoints."a.b".closed'
    assert variable(("server", "port")) == "BROKER_SERVER__PORT"
    assert variable(("endpoints", "daTa", "closed")) == "BROKER_ENDPOINTS__daTa__CLOSED"
    assert field_at(("server", "port")) is FIELDS["server"]["port"]
    for path in (("server",), ("server", "x"), ("x", "port"), ("endpoints", "closed"), ("server", "a", "port")):
        assert field_at(path) is None


def test_values_hide_secrets() -> None:
    config = Config(
        auth=msgspec.structs.replace(Config().auth, admin_token="x" * 40), endpoints={"a": Endpoint(closed="no")}
    )
    found = dict(values(config))
    assert found["auth", "admin_token"] == "<redacted>"
    assert found["endpoints", "a", "closed"] == "no"
    assert found["limits", "slot_ms"] == Limits().slot_ms
    assert dict(values(Config()))["auth", "admin_token"] == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (False, "false"),
        (5, "5"),
        (10_000, "10_000"),
        (30.0, "30"),
        (0.5, "0.5"),
        ("", '""'),
        ('a"\\\n\x7fé', r'"a\"\\\n\u007fé"'),
        (("a", "b"), '["a", "b"]'),
        ((), "[]"),
        (None, ""),
    ],
)
def test_literals(value: object, text: str) -> None:
    assert literal(value) == text
