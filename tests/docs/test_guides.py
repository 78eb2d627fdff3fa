"""The guides for those who come from other programs: no name is forgotten, and each has an example that runs."""

import re
from typing import NamedTuple

import pytest

from tests.docs.blocks import ROOT, blocks_of

NAMES = {
    "from-rtcloud.md": """
        websocketState BaseWebSocketHandler(name,callback,connNotify) connNotify defaultWebsocketCallback
        DataWebSocketHandler RejectWebSocketHandler(rejectMsg) sendWebSocketMessage(wsName,msg)
        sendWebSocketMessage(wsName,msg,conn) closeAllConnections() RequestHandler(name,ioLoop) doRequest(msg,timeout)
        prepare_request(msg) get_response(callId,timeout) callback(client,message) close_pending_requests()
        pruneCallbacks() dataInterface.getFile(path) login test
    """,
    "from-ipython.md": """
        ZMQStreamHandler _on_zmq_reply _reserialize_reply open on_close on_message write_message
        serialize_binary_message deserialize_binary_message AuthenticatedZMQStreamHandler get_current_user pre_get
        check_origin allow_origin allow_origin_pat ping_interval ping_timeout send_ping on_pong select_subprotocol
        get_compression_options session session_id serialize_msg_to_ws_v1 deserialize_msg_from_ws_v1
        Session(…) send recv send_raw track msg msg_header msg_id extract_header Message serialize deserialize
        unserialize feed_identities sign key keyfile signature_scheme packer unpacker digest_history_size
        write_connection_file load_connection_file
    """,
}
"""what each guide's table must have a row for, without blanks"""


class Row(NamedTuple):
    """A row of a guide's table of names."""

    theirs: list[str]
    ours: list[str]
    anchor: str


def rows_of(page: str) -> list[Row]:
    """The rows of all tables under "The names"."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n## The names\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"^\| (.+?) \| (.+?) \| \[[^\]]+\]\(#([\w-]+)\) \|$", text, re.MULTILINE)
    assert len(found) == len(re.findall(r"^\| .*`", text, re.MULTILINE)), "a row without an example"
    return [Row(_code(theirs), _code(ours), anchor) for theirs, ours, anchor in found]


def _code(cell: str) -> list[str]:
    return [re.sub(r"\s", "", code) for code in re.findall(r"`([^`]+)`", cell)]


def examples_of(page: str) -> dict[str, str]:
    """By anchor, the code under each heading that the tests run, with that of the page's files that it imports."""
    file = ROOT / "docs" / page
    files = {block.options["file"]: block.text for block in blocks_of(file) if "file" in block.options}
    lines = file.read_text(encoding="utf-8").splitlines()
    examples: dict[str, str] = {}
    for block in blocks_of(file):
        headings = [line for line in lines[: block.line] if re.match(r"#+ ", line)]
        anchor = re.sub(r"[^\w\- ]", "", headings[-1].lstrip("# ").lower()).replace(" ", "-")
        if block.language in ("python", "console") and "file" not in block.options:
            imported = [text for name, text in files.items() if f"from {name.removesuffix('.py')} import" in block.text]
            examples[anchor] = "\n".join([examples.get(anchor, ""), block.text, *imported])
    return examples


@pytest.mark.parametrize("page", NAMES)
def test_every_name_has_a_row(page: str) -> None:
    named = {name for row in rows_of(page) for name in row.theirs}
    wanted = set(NAMES[page].split())
    assert wanted <= named, f"{page} has no row for {sorted(wanted - named)}"


@pytest.mark.parametrize(
    ("page", "row"), [(page, row) for page in NAMES for row in rows_of(page)], ids=lambda value: str(value)[:60]
)
def test_every_row_has_an_example_that_runs_and_shows_it(page: str, row: Row) -> None:
    example = examples_of(page).get(row.anchor, "")
    assert "assert" in example or "$ " in example, f"{page}#{row.anchor} shows nothing"
    called = {name for code in row.ours for name in re.findall(r"(\w+)\(", code.removeprefix("await"))}
    missing = {name for name in called if not re.search(rf"\b{name}\(", example)}
    assert not missing, f"{page}#{row.anchor} does without {missing}"


@pytest.mark.parametrize("page", NAMES)
def test_every_example_is_some_rows(page: str) -> None:
    anchors = {row.anchor for row in rows_of(page)}
    steps = {"an-afternoons-work", "the-program-of-the-examples"}
    assert examples_of(page).keys() <= anchors | steps
