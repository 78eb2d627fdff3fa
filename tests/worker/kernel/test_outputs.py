"""The bounded queue between a kernel and one reader: what is joined, cut, dropped, and told."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from broker.links.kernel_channel import Received, read
from broker.peer.values import decode
from broker.wire.kernel import KernelMessage
from broker.worker.kernel.outputs import MESSAGE_MAX_BYTES, PIECE_MAX_BYTES, TEXT_MAX_BYTES, Outputs, as_item, as_part

PARENT = {"msg_id": "p", "msg_type": "execute_request"}


def made(kind: str, content: dict[str, Any], *buffers: bytes, parent: dict[str, Any] = PARENT) -> Received:
    header, encode = {"msg_id": "m", "msg_type": kind, "session": "s"}, msgspec.json.encode
    message = KernelMessage("iopub", encode(header), encode(parent), b"{}", encode(content), buffers)
    return read(message)


def text(text: str, name: str = "stdout", **more: Any) -> Received:
    return made("stream", {"name": name, "text": text}, **more)


def taken(outputs: Outputs) -> list[dict[str, Any]]:
    found = []
    while (one := outputs.take()) is not None:
        found.append(decode(one.text, list(one.attachments)))
    return found


def test_text_is_joined_while_it_waits_and_nothing_else_moves() -> None:
    outputs = Outputs()
    for number, one in enumerate(
        [text("a"), text("b"), text("c"), text("E", "stderr"), text("d"), made("display_data", {"data": {}}), text("e"),
         text("f", parent={"msg_id": "q"})], 1,
    ):  # fmt: skip
        outputs.put(one, number)
    told = [(one["content"].get("name"), one["content"].get("text"), one["n"]) for one in taken(outputs)]
    assert told == [
        ("stdout", "a", 1), ("stdout", "bc", 3), ("stderr", "E", 4), ("stdout", "d", 5), (None, None, 6),
        ("stdout", "e", 7), ("stdout", "f", 8),
    ]  # fmt: skip


def test_long_text_is_cut_into_pieces_with_ids_of_their_own() -> None:
    outputs = Outputs()
    whole = "ä" * PIECE_MAX_BYTES + "z" * 10
    outputs.put(text(whole), 1)
    found = taken(outputs)
    assert "".join(one["content"]["text"] for one in found) == whole
    assert len({one["header"]["msg_id"] for one in found}) == len(found) > 1


def test_above_the_bound_text_goes_first_and_what_is_missing_is_told_where_it_was() -> None:
    outputs = Outputs()
    outputs.put(text("x" * (TEXT_MAX_BYTES + 1000)))
    outputs.put(text("y" * 5))
    outputs.put(made("display_data", {"data": {"text/plain": "kept"}}))
    found = taken(outputs)
    kept = sum(len(one["content"]["text"]) for one in found if one["content"].get("name") == "stdout")
    assert kept <= TEXT_MAX_BYTES
    assert [one["header"]["msg_type"] for one in found[-2:]] == ["stream", "display_data"]
    missing = TEXT_MAX_BYTES + 1005 - kept
    assert found[-2]["content"] == {
        "name": "stderr", "text": f"\n[{missing} characters of text dropped: more than was taken on the way]\n",
    }  # fmt: skip
    assert found[-2]["parent_header"]["msg_id"] == "p"
    assert outputs.dropped_bytes == missing
    outputs.put(text("again"))
    assert taken(outputs)[0]["content"]["text"] == "again"


def test_what_is_larger_than_a_message_and_what_does_not_fit_is_told_by_its_kind() -> None:
    outputs = Outputs()
    outputs.put(made("display_data", {"data": {}}, b"x" * (MESSAGE_MAX_BYTES + 1)))
    for _ in range(6):
        outputs.put(made("comm_msg", {}, b"x" * (12 << 20)))
    found = taken(outputs)
    texts = [one["content"]["text"] for one in found if one["header"]["msg_type"] == "stream"]
    assert "a display_data message of" in texts[0] and "comm_msg messages dropped" in texts[1]
    assert sum(one["header"]["msg_type"] == "comm_msg" for one in found) == 5


def test_buffers_parts_and_items() -> None:
    outputs, parts, items = Outputs(), Outputs(as_part), Outputs(as_item)
    for each in (outputs, parts, items):
        each.put(made("comm_msg", {"comm_id": "c"}, b"\x00", b""), 3)
        each.put(made("clear_output", {}))
    assert [one.get("buffers") for one in taken(outputs)] == [[b"\x00", b""], None]
    assert [(one["channel"], one.get("n")) for one in taken(parts)] == [("iopub", 3), ("iopub", None)]
    assert taken(items) == [
        {"type": "comm_msg", "comm_id": "c", "buffers": [b"\x00", b""]}, {"type": "clear_output"},
    ]  # fmt: skip


def test_a_reader_waits_for_the_next_and_for_the_end() -> None:
    async def main() -> None:
        outputs = Outputs()
        waiting = asyncio.create_task(outputs.get())
        await asyncio.sleep(0)
        outputs.put(text("a"))
        assert await waiting is not None
        last = asyncio.create_task(outputs.get())
        await asyncio.sleep(0)
        outputs.end()
        assert await last is None

    asyncio.run(main())
