"""Remote objects: a worker's methods as attributes, with the names, signatures and documentation that it tells.

Nothing is pickled and no code comes over: an attribute stands for a name, calling it is `call`. Names that begin with
an underscore are never remote, so that Python, notebooks and debuggers may look for whatever they know.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from broker.client.description import Described, Description
from broker.client.requests import UNSET, Unset, all_options, check_names
from broker.core.access import is_name
from broker.peer.errors import BrokerError

if TYPE_CHECKING:
    from broker.client.async_client import AsyncClient
    from broker.client.client import Client, Stream
    from broker.client.stream import Stream as AsyncStream

AnyClient = TypeVar("AnyClient")

DESCRIBE_S = 10.0
"""seconds that a description is waited for"""
_DESCRIBE = "broker.describe"
_NO_METHOD = -32601


class Doc:
    """A documentation that is asked for when somebody reads it; of the class, what it says itself."""

    __slots__ = ("_own",)

    def __init__(self, own: str) -> None:
        self._own = own

    def __get__(self, remote: Remote | AsyncRemote | None, kind: type) -> str:
        return self._own if remote is None else remote._documentation()


class Book:
    """What is known of one endpoint now, for one remote object and all that is taken from it.

    It is good until the client's connection was lost, or a method turned out not to be there.
    """

    __slots__ = ("_description", "_links", "endpoint", "inner", "options", "stream_options")

    def __init__(
        self, inner: AsyncClient, endpoint: str, timeout: float | Unset | None, options: dict[str, Any]
    ) -> None:
        if not is_name(endpoint):
            raise ValueError(f"{endpoint!r:.140} is no name of an endpoint")
        check_names("remote", options, ("timing", "progress"))
        self.inner = inner
        self.endpoint = endpoint
        self.stream_options = options if timeout is UNSET else options | {"timeout": timeout}
        all_options(**({"timeout": None} | self.stream_options))
        self.options = {name: value for name, value in options.items() if name != "timing"} | {"timeout": timeout}
        self._description: Description | None = None
        self._links = 0

    @property
    def known(self) -> Description | None:
        """The description, if there is a good one."""
        return self._description if self._links == self.inner._links_made else None

    def learn(self, told: dict[str, Any]) -> Description:
        """What the broker says of the endpoint now."""
        self._description = Description(told["workers"])
        self._links = self.inner._links_made
        return self._description

    def forget(self, error: BrokerError) -> None:
        """A call ended so. If there was no such method, what was known holds no more."""
        if error.code == _NO_METHOD:
            self._description = None

    def excuse(self, error: BrokerError) -> Description:
        """There is no description: any name may be one, and the call says what is wrong. Raises for no connection."""
        if isinstance(error, ConnectionError):
            raise error
        return Description(unknown=error.detail)

    def missing(self, description: Description, prefix: str, name: str) -> AttributeError:
        """There is no such method."""
        return AttributeError(f"{self.endpoint} has no method {prefix}{name}; {description.hint(name, prefix)}")


def _check_local(name: str) -> None:
    """Raises AttributeError for what is nobody's method: names that Python and its tools look for."""
    if name.startswith("_"):
        raise AttributeError(f"{name}: names that begin with an underscore are not remote; `call` asks for any")


class Named(Generic[AnyClient]):
    """The methods below one name of an endpoint; or, without a name, all of them."""

    __slots__ = ("_book", "_client", "_prefix")

    def __init__(self, client: AnyClient, book: Book, name: str | None) -> None:
        if name is not None and not is_name(name):
            raise ValueError(f"{name!r:.140} is no name of an object")
        self._prefix = "" if name is None else f"{name}."
        self._client = client
        self._book = book

    def __repr__(self) -> str:
        return f"<remote {self._book.endpoint}{f'/{self._prefix[:-1]}' if self._prefix else ''}>"


class Method(Generic[AnyClient]):
    """One method, with what `help` and notebooks look at, as far as it is known."""

    __signature__: inspect.Signature

    def __init__(self, client: AnyClient, book: Book, name: str) -> None:
        self._client = client
        self._book = book
        self._name = name
        about = (book.known or Description()).methods.get(name, Described())
        self._text = about.text
        self.__name__ = name.rpartition(".")[2]
        self.__qualname__ = f"{book.endpoint}/{name}"
        self.__doc__ = about.doc or f"{book.endpoint}/{name}, of which its worker tells nothing more."
        if about.signature is not None:
            self.__signature__ = about.signature

    def __repr__(self) -> str:
        return f"<remote {self.__qualname__}{self._text}>"


# ---------------------------------------------------------------- blocking


class Remote(Named["Client"]):
    """The methods below one name of an endpoint, as attributes. Made by `Client.remote`; for any number of threads."""

    __slots__ = ()
    __doc__ = Doc(__doc__)

    def __getattr__(self, name: str) -> Any:
        """The method of that name, or what stands below it. Raises AttributeError with the nearest name if none."""
        _check_local(name)
        return _find(self._client, self._book, self._prefix, name)

    def __dir__(self) -> list[str]:
        return [*_told(self._client, self._book).below(self._prefix), *object.__dir__(self)]

    def _documentation(self) -> str:
        return _told(self._client, self._book).summary(self._prefix)


class RemoteMethod(Method["Client"]):
    """One method of a worker: calling it asks, and waits for the result. `stream` gives what it yields item by item."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Ask, with the arguments of the method itself; bytes and arrays as everywhere.

        Raises TypeError for arguments that do not fit the signature, and what `Client.call` raises.
        """
        params = self._params(arguments, named)
        try:
            return self._client.call(self.__qualname__, params, **self._book.options)
        except BrokerError as error:
            self._book.forget(error)
            raise

    def stream(self, *arguments: Any, **named: Any) -> Stream:
        """As `Client.stream`, with the arguments of the method itself."""
        return self._client.stream(self.__qualname__, self._params(arguments, named), **self._book.stream_options)

    def _params(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            return _describe(self._client, self._book).params(self._name, arguments, named)
        except TypeError:  # perhaps the worker is another by now
            return _describe(self._client, self._book, anew=True).params(self._name, arguments, named)

    def __getattr__(self, name: str) -> Any:
        """A method whose name goes on with a dot. Raises AttributeError if there is none."""
        _check_local(name)
        return _find(self._client, self._book, f"{self._name}.", name)

    def __dir__(self) -> list[str]:
        return [*_told(self._client, self._book).below(f"{self._name}."), *object.__dir__(self)]


def _describe(client: Client, book: Book, *, anew: bool = False) -> Description:
    """What is told of the endpoint's methods, asked for if it is not known. Raises ConnectionError."""
    if not anew and (known := book.known) is not None:
        return known
    try:
        return book.learn(client.call(_DESCRIBE, {"endpoint": book.endpoint}, timeout=DESCRIBE_S))
    except BrokerError as error:
        return book.excuse(error)


def _told(client: Client, book: Book) -> Description:
    """The same for who only looks, to whom an error would be of no use."""
    try:
        return _describe(client, book)
    except BrokerError:
        return Description()


def _find(client: Client, book: Book, prefix: str, name: str) -> Remote | RemoteMethod:
    anew = book.known is not None
    found = _choose(client, book, _describe(client, book), prefix, name)
    if found is None and anew:  # perhaps it has come since
        found = _choose(client, book, _describe(client, book, anew=True), prefix, name)
    if found is None:
        raise book.missing(book.known or Description(), prefix, name)
    return found


def _choose(
    client: Client, book: Book, description: Description, prefix: str, name: str
) -> Remote | RemoteMethod | None:
    if description.is_class(prefix, name):
        return Remote(client, book, prefix + name)
    return RemoteMethod(client, book, prefix + name) if description.may_have(prefix + name) else None


# ---------------------------------------------------------------- asynchronous


class AsyncRemote(Named["AsyncClient"]):
    """The methods below one name of an endpoint, as attributes. Made by `AsyncClient.remote`.

    Awaiting it asks for the description, so that `dir` and `help` know it; otherwise the first call does.
    """

    __slots__ = ()
    __doc__ = Doc(__doc__)

    def __await__(self) -> Generator[Any, None, AsyncRemote]:
        yield from _describe_async(self._client, self._book, anew=True).__await__()
        return self

    def __getattr__(self, name: str) -> Any:
        """The method of that name, or what stands below it; whether there is one, calling it tells."""
        _check_local(name)
        known = self._book.known
        if known is not None and known.is_class(self._prefix, name):
            return AsyncRemote(self._client, self._book, self._prefix + name)
        return AsyncRemoteMethod(self._client, self._book, self._prefix + name)

    def __dir__(self) -> list[str]:
        return [*(self._book.known or Description()).below(self._prefix), *object.__dir__(self)]

    def _documentation(self) -> str:
        known = self._book.known
        return "Not described yet: await it first." if known is None else known.summary(self._prefix)


class AsyncRemoteMethod(Method["AsyncClient"]):
    """One method of a worker: awaiting a call of it gives the result, `await stream(…)` what it yields item by item."""

    async def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Ask, with the arguments of the method itself; bytes and arrays as everywhere.

        Raises AttributeError with the nearest name if no worker has the method, TypeError for arguments that do not fit
        its signature, and what `AsyncClient.call` raises.
        """
        params = await self._params(arguments, named)
        try:
            return await self._client.call(self.__qualname__, params, **self._book.options)
        except BrokerError as error:
            self._book.forget(error)
            raise

    async def stream(self, *arguments: Any, **named: Any) -> AsyncStream:
        """As `AsyncClient.stream`, with the arguments of the method itself."""
        params = await self._params(arguments, named)
        return await self._client.stream(self.__qualname__, params, **self._book.stream_options)

    async def _params(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        book, name = self._book, self._name
        if (known := book.known) is not None and known.may_have(name):
            try:
                return known.params(name, arguments, named)
            except TypeError:
                pass  # perhaps the worker is another by now
        description = await _describe_async(self._client, book, anew=known is not None)
        if not description.may_have(name):
            prefix, dot, last = name.rpartition(".")
            raise book.missing(description, prefix + dot, last)
        return description.params(name, arguments, named)

    def __getattr__(self, name: str) -> Any:
        """A method whose name goes on with a dot; whether there is one, calling it tells."""
        _check_local(name)
        return AsyncRemoteMethod(self._client, self._book, f"{self._name}.{name}")

    def __dir__(self) -> list[str]:
        return [*(self._book.known or Description()).below(f"{self._name}."), *object.__dir__(self)]


async def _describe_async(client: AsyncClient, book: Book, *, anew: bool = False) -> Description:
    """What is told of the endpoint's methods, asked for if it is not known. Raises ConnectionError."""
    if not anew and (known := book.known) is not None:
        return known
    try:
        return book.learn(await client.call(_DESCRIBE, {"endpoint": book.endpoint}, timeout=DESCRIBE_S))
    except BrokerError as error:
        return book.excuse(error)
