"""Remote objects: attributes that are calls, with the signatures and the documentation of whoever answers them."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import pydoc
from collections.abc import Iterator
from typing import Any

import pytest

from broker.client.async_client import AsyncClient
from broker.client.client import Client
from broker.client.description import Description
from broker.client.remote import Remote, RemoteMethod
from broker.node.broker import Broker
from broker.peer import errors
from broker.worker.worker import Worker
from tests.peer.harness import CALLER, SECRET, broker_thread

Running = tuple[Broker, asyncio.AbstractEventLoop]


class Calculator:
    """Adds what it is given."""

    def add(self, a: int, b: int = 2) -> int:
        """Add two numbers.

        Slowly.
        """
        return a + b

    def shape(self, data: bytes, *, mark: bytes = b"") -> list[Any]:
        return [len(data), mark]

    def mixed(self, a: int, /, b: int, *more: int, **rest: int) -> list[Any]:
        return [a, b, list(more), rest]

    def count(self, to: int) -> Iterator[int]:
        """Count."""
        yield from range(to)
        return "counted"

    def stream(self) -> str:
        return "a name like any other"

    def fail(self) -> None:
        raise RuntimeError("no light")


def worker_of(broker: Broker | str, endpoint: str = "data", *sources: object, **named: Any) -> Worker:
    worker = Worker(endpoint, broker if isinstance(broker, str) else broker.url, SECRET)
    for source in sources:
        worker.add_object(source)
    for name, function in named.items():
        worker.add(function, name.replace("__", "."))
    return worker


def start(running: Running, worker: Worker) -> Worker:
    asyncio.run_coroutine_threadsafe(worker.start(), running[1]).result(20)
    return worker


def stop(running: Running, worker: Worker) -> None:
    asyncio.run_coroutine_threadsafe(worker.stop(), running[1]).result(20)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with broker_thread() as (broker, loop):
        worker = worker_of(broker, "data", Calculator(), thread__count=lambda: 3, thread__names=lambda: ["main"])
        start((broker, loop), worker)
        yield broker, loop
        stop((broker, loop), worker)


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running[0].url, SECRET) as client:
        yield client


def accepted(running: Running) -> int:
    """How many requests there were, descriptions among them."""

    async def count() -> int:
        return running[0].router.counters.accepted

    return asyncio.run_coroutine_threadsafe(count(), running[1]).result(20)


# ---------------------------------------------------------------- calls


def test_attributes_become_calls(client: Client) -> None:
    remote = client.remote("data")
    assert remote.add(1, 2) == 3
    assert remote.add(1) == 3
    assert remote.add(a=1, b=5) == 6
    assert remote.add(1, b=7) == 8
    assert remote.shape(b"abc") == [3, b""]
    assert remote.shape(b"abc", mark=b"\x00\xff") == [3, b"\x00\xff"]
    assert remote.mixed(1, 2, 3, 4) == [1, 2, [3, 4], {}]
    assert remote.mixed(1, b=2) == [1, 2, [], {}]
    assert remote.stream() == "a name like any other"
    with pytest.raises(errors.RemoteError) as caught:
        remote.fail()
    assert (caught.value.type, caught.value.method) == ("RuntimeError", "fail")


def test_what_params_cannot_say_is_told_before_anything_is_sent(client: Client) -> None:
    remote = client.remote("data")
    with pytest.raises(TypeError, match=r"mixed\(a: int, /, b: int.*: it cannot be told a by position and others by"):
        remote.mixed(1, b=2, c=3)
    with pytest.raises(TypeError, match=r"add\(a: int, b: int = 2\) -> int: missing a required argument: 'a'"):
        remote.add()
    with pytest.raises(TypeError, match="unexpected keyword argument 'c'"):
        remote.add(1, c=2)
    with pytest.raises(TypeError, match="too many positional arguments"):
        remote.count.stream(1, 2)


def test_what_a_method_yields(client: Client) -> None:
    remote = client.remote("data")
    assert remote.count(3) == [0, 1, 2, "counted"]
    items = remote.count.stream(3)
    assert list(items) == [0, 1, 2]
    assert items.result == "counted"


def test_names_with_dots(client: Client) -> None:
    remote = client.remote("data")
    assert isinstance(remote.thread, Remote)
    assert remote.thread.count() == 3
    assert client.remote("data", "thread").names() == ["main"]
    assert repr(remote.thread) == "<remote data/thread>"
    assert set(dir(remote.thread)) >= {"count", "names"}
    with pytest.raises(AttributeError, match=r"data has no method thread\.counts; did you mean count\?"):
        _ = remote.thread.counts


def test_options_hold_for_every_call(client: Client) -> None:
    told: list[Any] = []
    remote = client.remote("data", timeout=5, idempotent=True, progress=lambda *far: told.append(far))
    assert remote.add(1, 2) == 3
    assert list(remote.count.stream(2)) == [0, 1]
    with pytest.raises(errors.InvalidRequest):
        client.remote("data", timeout=1e9).add(1, 2)
    for wrong in ({"timeout": "x"}, {"color": 3}, {"parts": [1]}, {"progress": 3}):
        with pytest.raises(TypeError):
            client.remote("data", **wrong)  # type: ignore[arg-type]
    for endpoint, name in (("a/b", None), ("", None), ("data", "a/b"), ("data", "")):
        with pytest.raises(ValueError, match="is no name"):
            client.remote(endpoint, name)


# ---------------------------------------------------------------- what is seen of it


def test_help_signature_and_completion(client: Client) -> None:
    remote = client.remote("data")
    assert str(inspect.signature(remote.add)) == "(a: int, b: int = 2) -> int"
    assert inspect.getdoc(remote.add) == "Add two numbers.\n\nSlowly."
    assert (remote.add.__name__, remote.add.__qualname__) == ("add", "data/add")
    assert repr(remote.add) == "<remote data/add(a: int, b: int = 2) -> int>"
    assert repr(remote) == "<remote data>"
    text = pydoc.plain(pydoc.render_doc(remote.add))
    assert "data/add(a: int, b: int = 2) -> int" in text and "Slowly." in text
    whole = pydoc.plain(pydoc.render_doc(remote))
    assert "Adds what it is given." in whole
    assert "add(a: int, b: int = 2) -> int  Add two numbers." in whole
    assert {"add", "count", "fail", "mixed", "shape", "stream", "thread"} <= set(dir(remote))
    assert (Remote.__doc__ or "").startswith("The methods below one name")
    assert "count" in dict(inspect.getmembers(remote))


PROBES = [
    "_repr_html_", "_ipython_canary_method_should_not_exist_", "_ipython_display_", "_repr_mimebundle_", "__len__",
    "__iter__", "__array__", "__wrapped__", "__deepcopy__", "__fspath__", "__getstate_x__", "_", "_add",
]  # fmt: skip


@pytest.mark.parametrize("name", PROBES)
def test_what_tools_look_for_is_never_a_call(client: Client, running: Running, name: str) -> None:
    remote = client.remote("data")
    method = remote.add
    before = accepted(running)
    for thing in (remote, method):
        assert not hasattr(thing, name)
    with pytest.raises(AttributeError, match="names that begin with an underscore are not remote"):
        getattr(remote, name)
    assert accepted(running) == before


def test_python_does_nothing_strange_with_it(client: Client) -> None:
    remote = client.remote("data")
    for thing in (remote, remote.add):
        with pytest.raises(TypeError):
            len(thing)
        with pytest.raises(TypeError):
            iter(thing)
        assert bool(thing) and thing == thing and hash(thing) == hash(thing)
        with pytest.raises(Exception, match="pickle"):
            pickle.dumps(thing)
    assert copy.copy(remote).add(1, 2) == 3
    with pytest.raises(AttributeError):
        remote.add = 3


def test_a_misspelled_method_gives_the_nearest_name(client: Client) -> None:
    remote = client.remote("data")
    with pytest.raises(AttributeError, match=r"data has no method ad; did you mean add\?"):
        _ = remote.ad
    with pytest.raises(AttributeError, match="data has no method zzz; there are add, count, fail"):
        _ = remote.zzz
    assert not hasattr(remote, "coumt")
    with pytest.raises(AttributeError):
        _ = remote.add.more


# ---------------------------------------------------------------- how long a description is good


def test_it_is_asked_for_once(client: Client, running: Running) -> None:
    before = accepted(running)
    remote = client.remote("data")
    assert accepted(running) == before, "nothing is asked before something is wanted"
    for _ in range(3):
        remote.add(1, 2)
        dir(remote)
        remote.thread.count()
    assert accepted(running) == before + 7, "six calls and one description"


def test_a_worker_that_is_another_by_now(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        old = start(running, worker_of(running[0], "lab", tell=lambda: "old", gone=lambda: "old"))
        remote = client.remote("lab")
        gone, tell = remote.gone, remote.tell
        assert tell() == "old"
        stop(running, old)
        new = start(running, worker_of(running[0], "lab", tell=lambda what: what, fresh=lambda: "new"))
        try:
            assert remote.fresh() == "new", "a name that is not known is looked for once more"
            with pytest.raises(AttributeError):
                _ = remote.gone
            with pytest.raises(errors.NoMethod):
                gone()
            assert tell("new") == "new", "as are arguments that do not fit"
            assert "gone" not in dir(remote)
        finally:
            stop(running, new)


def test_it_is_asked_for_again_after_no_method_and_after_a_lost_connection(running: Running) -> None:
    broker, loop = running

    def cut() -> None:
        for session in list(broker.router.sessions.by_id.values()):
            if session.principal == "caller":
                session.link.close(1001, "cut")

    with Client(broker.url, CALLER) as client:
        remote = client.remote("data")
        assert remote.add(1) == 3
        book = remote._book
        assert book.known is not None
        loop.call_soon_threadsafe(cut)
        for _ in range(2000):
            if book.known is None:
                break
            client.call("data/add", [1], idempotent=True)
        assert book.known is None
        assert remote.add(1) == 3
        assert book.known is not None
        book.forget(errors.NoMethod("x", code=-32601))
        assert book.known is None


def test_where_nothing_is_told_any_name_may_be_one(running: Running) -> None:
    def anything(method: str, params: Any) -> list[Any]:
        return [method, params]

    worker = Worker("bare", running[0].url, SECRET)
    worker.add_fallback(anything)
    start(running, worker)
    try:
        with Client(running[0].url, SECRET) as client:
            remote = client.remote("bare")
            assert remote.whatever(1, "a") == ["whatever", [1, "a"]]
            assert remote.whatever(a=1) == ["whatever", {"a": 1}]
            assert remote.whatever() == ["whatever", None]
            assert remote.some.thing.deeper(1) == ["some.thing.deeper", [1]]
            with pytest.raises(TypeError, match="tells no signature"):
                remote.whatever(1, a=1)
            assert not hasattr(remote, "_repr_html_")
            assert "Not all workers say" in (remote.__doc__ or "")
    finally:
        stop(running, worker)


def test_without_a_description_the_call_says_what_is_wrong(running: Running) -> None:
    with Client(running[0].url, SECRET) as client:
        nobody = client.remote("nobody")
        assert isinstance(nobody.anything, RemoteMethod)
        with pytest.raises(errors.NoEndpoint):
            nobody.anything(1)
        assert "anything" not in dir(nobody)
    with Client(running[0].url, CALLER) as client, pytest.raises(errors.Denied):
        client.remote("secret").anything(1)
    absent = Client("http://127.0.0.1:9", SECRET)
    with pytest.raises(errors.CannotConnect):
        absent.remote("data").add(1)
    assert "add" not in dir(absent.remote("data")), "to who only looks, an error is of no use"
    absent.close()


def test_a_client_on_the_brokers_own_loop(running: Running) -> None:
    broker, loop = running
    with Client(broker) as client:
        assert client.remote("data").add(20, b=22) == 42

    async def ask() -> Any:
        async with AsyncClient(broker) as client:
            return await client.remote("data").add(20, b=22)

    assert asyncio.run_coroutine_threadsafe(ask(), loop).result(20) == 42


def test_of_what_is_not_there_help_says_so(client: Client) -> None:
    text = client.remote("nosuch").__doc__
    assert text is not None and "not known: " in text and "no worker has served nosuch" in text, text
    assert "Not all workers" not in text


def test_an_option_that_there_is_not(client: Client) -> None:
    with pytest.raises(TypeError, match=r"remote\(\) has no argument 'tmeout'; did you mean timeout\?"):
        client.remote("data", tmeout=3)
    with pytest.raises(TypeError, match=r"submit\(\) has no argument 'tmeout'"):
        client.submit("data/add", [1, 2], tmeout=3)
    with pytest.raises(TypeError, match=r"stream\(\) has no argument 'idl'; did you mean idle\?"):
        client.stream("data/add", [1, 2], idl=3)
    with pytest.raises(TypeError, match=r"remote\(\) has no argument 'parts'"):
        client.remote("data", parts=[b"x"])


# ---------------------------------------------------------------- descriptions that say strange things


@pytest.mark.parametrize(
    "info",
    [None, 3, "x", [], {"methods": 3}, {"methods": {"add": 3}}, {"methods": {"add": {"doc": 3, "params": {}}}},
     {"methods": {"add": {"signature": ["x"], "params": [3]}}, "doc": {}, "dialect": {}}],
)  # fmt: skip
def test_a_worker_may_say_anything_of_itself(info: Any) -> None:
    description = Description([{"methods": ["add"], "info": info}])
    assert list(description.below("")) == ["add"]
    assert description.params("add", (1,), {}) == [1]
    assert description.summary("") == "add"
    assert not description.is_open


def test_of_many_workers_the_first_that_says_something_counts() -> None:
    told = {"methods": {"add": {"doc": "Add.", "signature": "(a)", "params": [{"name": "a", "required": True}]}}}
    other = {"methods": {"add": {"doc": "Other.", "signature": "(b)", "params": [{"name": "b", "required": True}]}}}
    workers = [{"methods": ["add"], "info": i} for i in (None, told, other)]
    assert Description(workers).methods["add"].doc == "Add."
    assert not Description(workers).is_open
    assert Description([*workers, {"methods": None, "info": None}]).is_open
    assert Description([]).is_open
