"""One API in two languages: the JavaScript client has the names and arguments of the Python package, or a reason."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from broker.client.async_client import AsyncClient, Subscription
from broker.client.client import Client
from broker.client.requests import all_options
from broker.client.stream import Stream
from broker.client.subscription import Message
from broker.peer import errors
from broker.peer.values import Array
from broker.worker.faults import Fault
from broker.worker.requests import Request
from broker.worker.worker import Worker
from tests.javascript.harness import STATIC, BrokerProcess
from tests.javascript.test_client import play

ONLY_PYTHON = {
    "Client.submit": "a call of JavaScript is a promise, which is a future",
    "Client.remote": "names that are learned while it runs are no names to a type checker; `call` has them all",
    "Worker.method": "`serve` takes the functions",
    "Worker.add": "`serve` takes the functions",
    "Worker.add_object": "`serve` takes the functions of an object",
    "Worker.add_fallback": "`serve` takes the functions",
    "Worker.drain": "an option of `serve`",
    "Worker(grace)": "that of its client",
    "Worker.info": "what front ends of kernels want to know; no worker of JavaScript serves one",
    "Worker.methods": "`serve` takes the functions",
    "Worker.run": "`serve` runs it",
    "Worker.start": "`serve` starts it",
    "Worker.is_answering_here": "for a program that would wait for itself; JavaScript knows no current task",
    "Worker.wait": "it lives as long as its client; `onState` tells",
    "Worker(url)": "those of its client",
    "Worker(token)": "those of its client",
    "Worker(wait)": "that of its client",
    "Worker(ssl_context)": "the browser's, or node's own",
    "Client(url)": "the first argument of `connect`",
    "Client(ssl_context)": "the browser's, or node's own",
    "ServedRequest.deadline": "`leftS`: the clocks differ",
    "ServedRequest.wait_cancelled": "`signal`: there are no threads",
    "ServedRequest.caller": "known only to functions in the process of the broker",
    "ServedRequest.cancel": "for the worker itself",
    "ServedRequest.asked": "for the worker itself",
    "ServedRequest.send": "a generator yields its items",
    "ServedRequest.sender": "for the worker itself",
    "ServedRequest.task": "for the worker itself",
    "ServedRequest.begun": "for the worker itself",
    "ServedRequest.gate": "for the worker itself",
    "ServedRequest.incoming": "for the worker itself",
    "ServedRequest.progress_told": "for the worker itself",
    "ServedRequest.waiting": "for the worker itself",
    "Stream.aclose": "`close`, as elsewhere",
    "call(progress)": "`onProgress`, as callbacks are called here",
    "map(progress)": "`onProgress`",
    "map(timing)": "one stream tells its own",
    "stream(progress)": "`onProgress`",
    "stream(key)": "refused: what is repeated is one message",
    "Fault(message)": "its first argument",
}
ONLY_JAVASCRIPT = {
    "Client.cancel": "a future of Python has its own",
    "Client.serve": "Worker.start",
    "Client.state": "",
    "connect.ticket": "browsers cannot show a token",
    "connect.wait": "Worker(wait)",
    "connect.onState": "there is nobody to block",
    "connect.onError": "there is nobody to raise to",
    "map.signal": "a task of Python is cancelled itself",
    "call.signal": "a task of Python is cancelled itself",
    "stream.signal": "a task of Python is cancelled itself",
    "map.onProgress": "`progress`",
    "call.onProgress": "`progress`",
    "stream.onProgress": "`progress`",
    "Stream.next": "`anext` of the iterator",
    "Stream.return": "leaving the loop",
    "Stream.close": "Stream.aclose",
    "serve.doc": "Python takes the docstring",
    "ServedRequest.signal": "how JavaScript cancels",
    "BrokerError.name": "every Error has its class as its name; Python's is endpoint/method",
    "BrokerError.message": "str(error)",
}
CALLBACKS = {
    "asked", "cancel_asked", "heard", "item", "items_ended", "link_changed", "standing_refused", "gave_up",
}  # fmt: skip
"""public only towards the connection"""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker process."""
    process = BrokerProcess(tmp_path_factory.mktemp("broker"))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def found(broker: BrokerProcess) -> dict[str, Any]:
    """What a program in node finds: `classes` with their members, and how `errors` read."""
    (line,) = play("names_are_listed", broker.url)
    listed: dict[str, Any] = json.loads(line)
    return listed


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def public(kind: type) -> set[str]:
    """What stands in a class for its users, its instances' attributes too."""
    names = set(dir(kind)) | set(getattr(kind, "__annotations__", {}))
    if kind is Worker:
        names |= set(re.findall(r"self\.([a-z]\w*)(?:: [^=]+)? = ", inspect.getsource(kind.__init__)))
    return {name for name in names if not name.startswith("_")} - CALLBACKS


def arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


OPTIONS = arguments(all_options)


def options(name: str) -> set[str]:
    """The members of an interface in broker.d.ts, inherited ones too."""
    text = (STATIC / "broker.d.ts").read_text("utf-8")
    match = re.search(rf"^export interface {name}(?: extends (\w+))? {{(.*?)^}}", text, re.MULTILINE | re.DOTALL)
    assert match is not None, name
    own = set(re.findall(r"^  (?:readonly )?(\w+)\??:", match[2], re.MULTILINE))
    return own | (options(match[1]) if match[1] else set())


def compare(python_form: str, python: set[str], javascript_form: str, javascript: set[str]) -> None:
    """The same, but for what has a reason; the forms say under which name the reason stands."""
    left = {python_form.format(name) for name in python if camel(name) not in javascript} - set(ONLY_PYTHON)
    right = {javascript_form.format(name) for name in javascript - set(map(camel, python))} - set(ONLY_JAVASCRIPT)
    assert not left | right


@pytest.mark.parametrize(
    ("name", "python"),
    [
        ("Client", AsyncClient), ("Client", Client), ("Worker", Worker), ("Subscription", Subscription),
        ("Stream", Stream), ("ServedRequest", Request), ("NdArray", Array),
    ],
)  # fmt: skip
def test_members_are_the_same(name: str, python: type, found: dict[str, Any]) -> None:
    module = {"connect"} if name == "Client" else set()
    compare(name + ".{}", public(python), name + ".{}", set(found["classes"][name]) | module)


def test_messages_are_the_same(found: dict[str, Any]) -> None:
    assert set(Message.__struct_fields__) == set(found["classes"]["Message"])


@pytest.mark.parametrize(
    ("python_form", "python", "where"),
    [
        ("Client({})", arguments(AsyncClient), "connect"),
        ("call({})", arguments(AsyncClient.call) - {"method", "params"}, "call"),
        ("stream({})", arguments(AsyncClient.stream) - {"method", "params", "options"} | OPTIONS, "stream"),
        ("map({})", arguments(AsyncClient.map) - {"method", "many", "options"} | OPTIONS, "map"),
        ("publish({})", arguments(AsyncClient.publish) - {"endpoint", "data"}, "publish"),
        ("subscribe({})", arguments(AsyncClient.subscribe) - {"endpoint"}, "subscribe"),
        ("Worker({})", arguments(Worker) - {"endpoint"}, "serve"),
    ],
)
def test_options_are_the_same(python_form: str, python: set[str], where: str) -> None:
    compare(python_form, python, where + ".{}", options(f"{where.capitalize()}Options"))


def test_options_of_the_types_are_those_the_module_takes() -> None:
    text = (STATIC / "broker.js").read_text("utf-8")
    common = re.findall(r'^const REQUEST_OPTIONS = "([\w ]+)";', text, re.MULTILINE)
    text = text.replace("${REQUEST_OPTIONS}", *common)
    checked = dict(re.findall(r'checkOptions\("(\w+)", [^;]*?, ["`]([\w ]+)["`]\)', text))
    assert set(checked) == {"connect", "call", "stream", "publish", "subscribe", "serve"}
    for where, names in checked.items():
        assert set(names.split()) == options(f"{where.capitalize()}Options"), where


def test_members_of_the_types_are_those_of_the_module(found: dict[str, Any]) -> None:
    text = (STATIC / "broker.d.ts").read_text("utf-8")
    for name, members in found["classes"].items():
        match = re.search(rf"^export (?:class|interface) {name}\b.*?{{\n(.*?)^}}", text, re.MULTILINE | re.DOTALL)
        assert match is not None, name
        typed = set(re.findall(r"^  (?:readonly )?(\w+)\??[:(<]", match[1], re.MULTILINE)) - {"constructor"}
        assert typed | ({"name", "message"} if name == "BrokerError" else set()) == set(members), name


def test_errors_have_the_same_facts(found: dict[str, Any]) -> None:
    facts = set(vars(errors.BrokerError())) | {"outcome"}
    compare("BrokerError.{}", facts, "BrokerError.{}", set(found["classes"]["BrokerError"]))
    text = (STATIC / "broker.d.ts").read_text("utf-8")
    for name, kind in _error_classes().items():
        body = re.search(rf"^export class {name} extends BrokerError {{(.*?)}}$", text, re.MULTILINE | re.DOTALL)
        assert body is not None, name
        own = set(vars(kind("")) | vars(kind)) - set(vars(errors.BrokerError())) - {"outcome", "advice"}
        javascript = set(re.findall(r"readonly (\w+)\??:", body[1])) - {"reason"}
        assert {camel(each) for each in own if not each.startswith("_")} == javascript, name


def test_errors_read_the_same(found: dict[str, Any]) -> None:
    assert set(found["errors"]) == set(_error_classes())
    data = {"type": "ValueError"}
    for name, kind in _error_classes().items():
        facts: dict[str, Any] = {"endpoint": "lab", "method": "read", "code": 7, "worker": "w1", "attempts": 2}
        error = kind("it is so", data=data, elapsed_s=0.25, **facts)
        told = found["errors"][name]
        assert (told["outcome"], told["advice"]) == (kind.outcome, kind.advice), name
        assert told["text"] == str(error), name


def test_replies_read_the_same(found: dict[str, Any]) -> None:
    assert len(found["replies"]) == 7
    for told in found["replies"]:
        error = errors.from_reply(
            told["code"], "so", told["data"], endpoint=told["endpoint"], method=told["method"], worker=None, attempts=0,
            retryable=False, elapsed_s=0.25,
        )  # fmt: skip
        assert told["text"] == str(error)


def test_faults_are_the_same() -> None:
    text = (STATIC / "broker.d.ts").read_text("utf-8")
    body = text[text.index("export class Fault") :]
    taken = set(re.findall(r"(\w+)\?:", body.partition("}")[0])) - {"options"}
    compare("Fault({})", arguments(Fault), "Fault.{}", taken)


def _error_classes() -> dict[str, type[errors.BrokerError]]:
    kinds = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
    return {
        name: kind for name, kind in kinds.items()
        if issubclass(kind, errors.BrokerError) and kind is not errors.BrokerError
    }  # fmt: skip
