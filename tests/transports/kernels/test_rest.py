"""Jupyter's REST interface, as its clients use it, and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from broker.worker.worker import Worker
from tests.transports.kernels.harness import OTHER, STRANGER, USER, WORKER, House, front


def test_somebody_is_there(house: House) -> None:
    assert "version" in house.request("GET", "/api")[2]


def test_kernels_are_listed_and_shown(house: House) -> None:
    status, _, kernels = house.request("GET", "/api/kernels?1763690000000")
    assert status == 200
    assert [kernel["id"] for kernel in kernels] == ["k1"]
    while (model := house.request("GET", "/api/kernels/k1")[2])["execution_state"] != "idle":
        time.sleep(0.05)  # a kernel says so after its reply
    assert model["name"] == "python3"
    assert model["last_activity"].endswith("Z")
    assert model["connections"] == 0


def test_the_specs_of_what_runs_are_there(house: House) -> None:
    specs = house.request("GET", "/api/kernelspecs")[2]
    assert specs["default"] == "python3"
    spec = specs["kernelspecs"]["python3"]
    assert (spec["name"], spec["resources"], spec["spec"]["language"]) == ("python3", {}, "python")
    assert isinstance(spec["spec"]["argv"], list)
    assert house.request("GET", "/api/kernelspecs/python3")[2] == spec
    assert house.request("GET", "/api/kernelspecs/nothing")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "token", "status"),
    [
        ("GET", "/api/kernels", "", 403),
        ("GET", "/api", "", 403),
        ("POST", "/api/kernels", "", 403),
        ("DELETE", "/api/kernels/k1", "", 403),
        ("DELETE", "/api/kernels/k1", STRANGER, 403),
        ("GET", "/api/kernels/k1", STRANGER, 403),
        ("POST", "/api/kernels/k1/restart", WORKER, 403),
        ("GET", "/api/kernels/nobody", USER, 404),
        ("POST", "/api/kernels/nobody/interrupt", USER, 404),
        ("GET", "/api/kernels/a b", USER, 404),
        ("POST", "/api/kernels", USER, 501),
        ("PUT", "/api/kernels", USER, 405),
        ("DELETE", "/api/kernels", USER, 405),
        ("GET", "/api/kernels/k1/restart", USER, 405),
        ("POST", "/api/kernels/k1", USER, 405),
    ],
)
def test_what_is_refused_says_why(house: House, method: str, path: str, token: str, status: int) -> None:
    code, headers, body = house.request(method, path.replace(" ", "%20"), token)
    assert code == status
    assert body["message"] == body["error"]
    if status == 405:
        assert method not in headers["Allow"]


@pytest.mark.parametrize("body", [7, [], "x", {"name": 7}])
def test_a_body_that_is_none_is_refused(house: House, body: Any) -> None:
    assert house.request("POST", "/api/kernels", body=body)[0] == 400


def test_who_may_not_call_sees_none(house: House) -> None:
    assert house.request("GET", "/api/kernels", STRANGER)[2] == []
    assert house.request("GET", "/api/kernelspecs", STRANGER)[2] == {"default": "", "kernelspecs": {}}


@pytest.fixture(scope="module")
def offering(house: House) -> Iterator[Worker]:
    """A worker that starts kernels; the tests from here on have it."""
    worker = house.offer()
    yield worker
    house.end(worker)


def test_a_kernel_is_started_used_and_ended(house: House, offering: Worker) -> None:
    status, headers, model = house.request("POST", "/api/kernels", body={"name": "python3", "path": "/"})
    assert status == 201
    assert headers["Location"] == f"/api/kernels/{model['id']}"
    assert model["name"] == "python3"
    assert len(house.request("GET", "/api/kernels", OTHER)[2]) == 2
    with front(house, model["id"]) as page:
        assert page.reply(page.execute("1"))["content"]["status"] == "ok"
        assert house.request("DELETE", f"/api/kernels/{model['id']}")[0] == 204
        page.status("dead")
    name = f"kernels.{model['id']}"
    registry = house.broker.router.registry
    house.until(lambda: not registry.by_name[name].registrations, "its worker has gone")
    assert house.request("GET", f"/api/kernels/{model['id']}")[0] == 404


def test_a_kernel_that_cannot_be_started_says_why(house: House, offering: Worker) -> None:
    status, _, body = house.request("POST", "/api/kernels", body={"name": "python2"})
    assert status == 500
    assert "python2" in body["message"]
    assert "python3" in body["message"], "what there is"


def test_without_a_name_it_is_the_default(house: House, offering: Worker) -> None:
    status, _, model = house.request("POST", "/api/kernels", body={})
    assert (status, model["name"]) == (201, "python3")
    assert house.request("DELETE", f"/api/kernels/{model['id']}")[0] == 204


def test_it_can_be_turned_off() -> None:
    with House(kernels={"enabled": False}) as house:
        assert house.request("GET", "/api/kernels")[0] == 404
