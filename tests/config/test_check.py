"""Configurations that programs make themselves are judged as files are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from broker.config.errors import ConfigError
from broker.config.load import check, load
from broker.config.model import Auth, Config, Endpoint, Limits, RtCloud, Server
from broker.node.broker import Broker
from tests.transports.websocket.harness import run, serving

SECRET = "short-secret"


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"limits": Limits(queue_max=-5)}, "limits.queue_max = -5: expected a whole number from 0"),
        ({"limits": Limits(ping_interval_s="x")}, 'limits.ping_interval_s = "x": expected a number'),  # type: ignore[arg-type]
        ({"limits": Limits(stall_s=float("nan"))}, "limits.stall_s"),
        ({"limits": Limits(deadline_s=9, deadline_max_s=1)}, "limits.deadline_s = 9: expected at most"),
        ({"limits": Limits(deadline_max_s=1)}, "limits.deadline_max_s = 1: expected at least"),
        ({"server": Server(allowed_hosts=("lab.example"))}, 'server.allowed_hosts = "lab.example": expected a list'),  # type: ignore[arg-type]
        ({"server": Server(port=99_999)}, "server.port = 99_999"),
        ({"server": Server(host="0.0.0.0")}, "server.host"),
        ({"server": {"port": 1}}, "server is a dict: expected broker.config.model.Server"),
        ({"rtcloud": RtCloud(endpoints={"ws data": "da ta"})}, "rtcloud.endpoints"),
        ({"rtcloud": 1}, "rtcloud is a int"),
        ({"endpoints": [Endpoint()]}, "endpoints is a list: expected a dict"),
        ({"endpoints": {"a b": Endpoint()}}, "expected as an endpoint's name"),
        ({"endpoints": {3: Endpoint()}}, "endpoints has the key 3"),
        ({"endpoints": {"a": {"policy": "newest"}}}, "endpoints.a is a dict"),
        ({"endpoints": {"a": Endpoint(policy="fastest")}}, "endpoints.a.policy"),  # type: ignore[arg-type]
    ],
)
def test_a_broker_takes_no_wrong_configuration(made: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Broker(Config(**made))
    assert str(caught.value).startswith("Config: ")
    assert named in str(caught.value)


def test_no_secret_stands_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"auth\.admin_token = <secret>") as caught:
        Broker(Config(auth=Auth(admin_token=SECRET)))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("given", [{"rtcloud": 1}, {}, "lab.toml", 0])
def test_what_is_no_configuration(given: Any) -> None:
    with pytest.raises(TypeError, match="expected a Config"):
        Broker(given)


def test_what_is_right_passes() -> None:
    check(Config())
    check(load(None, {}, {"server.port": 0}))
    check(Config(endpoints={"a.b": Endpoint(policy="newest", queue_max=None)}, server=Server(allowed_hosts=("lab",))))


def test_a_reload_is_judged_too() -> None:
    async def main() -> None:
        async with serving() as world:
            before = world.broker.config
            with pytest.raises(ConfigError, match=r"limits\.queue_max = -1"):
                world.broker.reload(msgspec.structs.replace(before, limits=Limits(queue_max=-1)))
            with pytest.raises(TypeError, match="expected a Config"):
                world.broker.reload(None)  # type: ignore[arg-type]
            assert world.broker.config is before

    run(main)


def test_a_file_may_be_named_by_a_text(tmp_path: Any) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("[limits]\nqueue_max = 7\n")
    assert load(str(file)).limits.queue_max == 7
