"""Where the reply of `broker call` goes: JSON on standard output, its bytes to a file."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec

from broker.cli.bar import Bar
from broker.cli.connection import print_json
from broker.cli.exits import Exit, Failure
from broker.cli.ranges import is_empty
from broker.cli.transfer import Target
from broker.client.files import Tally
from broker.peer.values import encode
from broker.wire.attachments import expand

ONLY_BYTES = b'{"$buffer":0}'
"""the JSON of a value that is nothing but bytes"""


class Printed:
    """Prints JSON: an item a line; a reply that is no stream over several, for eyes.

    Bytes are in base64 for programs, in words for eyes.
    """

    def __init__(self, bar: Bar, as_json: bool) -> None:
        self._bar = bar
        self._for_eyes = sys.stdout.isatty() and not as_json
        self._items = 0

    async def item(self, value: Any) -> None:
        """Print it as a line. In a thread, as who reads the output may stall it."""
        self._items += 1
        self._bar.hide()
        await asyncio.to_thread(self._print, value, False)

    async def result(self, value: Any) -> None:
        """What the method returned: print it, unless it is only the end of a stream."""
        if self._items and value is None:
            return
        self._bar.hide()
        await asyncio.to_thread(self._print, value, self._for_eyes and not self._items)

    def _print(self, value: Any, pretty: bool) -> None:
        if self._for_eyes:
            value = _in_words(value)
        text, attachments = encode(value)
        print_json(msgspec.Raw(expand(text, attachments) if attachments else text), pretty=pretty)


class Saved:
    """Saves the bytes of every item, or of the reply; what is around them in an item is printed, if there is anything.

    `name` is the request's, for errors.
    """

    def __init__(self, target: Target, bar: Bar, as_json: bool, name: str) -> None:
        self._target = target
        self._bar = bar
        self._printed = Printed(bar, as_json)
        self._tally = Tally(name)
        self._items = 0

    async def item(self, value: Any) -> None:
        """Save its bytes; an item without any is only printed."""
        self._items += 1
        around = await self._save(value, needed=False)
        if around is not None and not self._target.is_standard:
            self._bar.hide()
            await asyncio.to_thread(print_json, around)
        self._bar.count(self._target.written)

    async def result(self, value: Any) -> msgspec.Raw | None:
        """As an item, but what has no items has to have bytes. Returns what is to be printed when all is saved.

        Raises BadReply where a worker tells length and CRC-32 of what it sent, and it was other bytes that came.
        """
        if isinstance(value, dict) and "crc32" in value and (self._items or is_empty(value)):
            self._tally.check(value)
        around = await self._save(value, needed=not self._items and not is_empty(value))
        return None if value is None else around

    async def _save(self, value: Any, *, needed: bool) -> msgspec.Raw | None:
        """Save the bytes of a value, of which it must not have several. Returns what is around them."""
        text, attachments = encode(value)
        if len(attachments) > 1 or (needed and not attachments):
            await self._printed.result(value)
            what = "an item" if self._items else "the reply"
            problem = f"{what} has {len(attachments)} attachments, not one"
            raise Failure(Exit.USAGE, f"--out {self._target.path}: {problem}")
        for data in attachments:
            self._tally.add(data)
            await self._target.write(data)
        return None if text == ONLY_BYTES else msgspec.Raw(text)


def _in_words(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes; --out FILE keeps them>"
    if isinstance(value, dict):
        return {name: _in_words(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_in_words(item) for item in value]
    return value
