"""The configuration as the bounds of the parts."""

from __future__ import annotations

import msgspec
import pytest

from broker.config.errors import ConfigError
from broker.config.model import Config
from broker.core.limits import EndpointLimits
from broker.core.limits import Limits as CoreLimits
from broker.links.limits import LinkLimits
from broker.node.settings import accept_limits, core_limits, endpoint_limits, link_limits


def config(**limits: object) -> Config:
    return msgspec.convert({"limits": limits}, Config)


def test_the_defaults_of_the_configuration_are_those_of_the_core() -> None:
    assert core_limits(Config()) == CoreLimits()


@pytest.mark.parametrize("name", [name for name in CoreLimits.__struct_fields__ if hasattr(Config().limits, name)])
def test_every_bound_of_the_core_that_has_a_key_follows_it(name: str) -> None:
    value = type(getattr(Config().limits, name))(5000)
    if name == "strikes_max":
        value = 500
    if name == "start_grace_s":
        value = 3000.0
    if name == "principal_share":
        value = 0.5
    if name == "part_max_bytes":
        value = 300_000
    if name.startswith("memory_"):
        value = 5000 << 20
    assert getattr(core_limits(config(**{name: value})), name) == value


def test_milliseconds_become_seconds() -> None:
    assert core_limits(config(slot_ms=20)).slot_s == 0.02


@pytest.mark.parametrize("name", [name for name in LinkLimits.__slots__ if hasattr(Config().limits, name)])
def test_every_bound_of_a_link_that_has_a_key_follows_it(name: str) -> None:
    value = getattr(Config().limits, name)
    other = value * 2 if name not in {"close_timeout_s", "ping_interval_s"} else value + 1
    changes = {name: other}
    if name == "outbox_soft_bytes":
        changes["outbox_hard_bytes"] = other
    assert getattr(link_limits(config(**changes)), name) == other


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"write_turn_bytes": 4096}, "limits.write_turn_bytes is 4096"),
        ({"outbox_soft_bytes": 9_000_000}, "limits.outbox_hard_bytes"),
        ({"stall_s": 0.001}, "limits.stall_s"),
    ],
)
def test_bounds_with_which_no_link_could_work_name_their_key(limits: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        link_limits(config(**limits))


def test_the_machine_itself_may_have_as_many_unknown_sockets_as_all_together() -> None:
    limits = accept_limits(config(unauthenticated_max=50, unauthenticated_per_address_max=100))
    assert limits.unauthenticated_loopback_max == 50
    assert limits.unauthenticated_per_address_max == 50


def test_endpoints_keep_what_is_said_of_them() -> None:
    settings = msgspec.convert({"endpoints": {"a": {"queue_max": 0, "policy": "newest"}, "b": {"closed": "x"}}}, Config)
    made = endpoint_limits(settings)
    assert made == {"a": EndpointLimits(queue_max=0, policy="newest"), "b": EndpointLimits(closed="x")}
