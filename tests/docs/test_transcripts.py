"""The transcripts of the protocol, replayed; and that the replaying notices what is wrong."""

import pytest

from tests.docs.blocks import PAGES, Block, blocks_of
from tests.docs.transcript import Mismatch, replay

TRANSCRIPTS = [block for page in PAGES for block in blocks_of(page) if block.language == "transcript"]


@pytest.mark.parametrize("block", TRANSCRIPTS, ids=lambda block: block.place)
def test_the_broker_says_what_the_transcript_says(block: Block) -> None:
    try:
        replay(block.text)
    except Mismatch as mismatch:
        pytest.fail(f"{block.place}, {mismatch}", pytrace=False)


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 15


CALL = """
W attaches /ws/data?role=worker
C attaches /ws/data
C → B {"jsonrpc":"2.0","id":1,"method":"read"}
B → W {"jsonrpc":"2.0","id":"<call>","method":"read"}
"""


@pytest.mark.parametrize(
    "wrong",
    [
        'W → B {"jsonrpc":"2.0","id":"<call>","result":1}\nB → C {"jsonrpc":"2.0","id":1,"result":2}',
        'W → B {"jsonrpc":"2.0","id":"<call>","result":1}\nB → C {"jsonrpc":"2.0","id":"<call>","result":1}',
        'W → B {"jsonrpc":"2.0","id":"<call>","result":1}\nB → C {"jsonrpc":"2.0","id":1,"result":true}',
        'W → B {"jsonrpc":"2.0","id":"<call>","result":1}',
        'W → B {"jsonrpc":"2.0","id":"<call>","result":1}\nB → C close 1000 ',
        "X is refused /ws: 401 null",
    ],
)
def test_what_is_wrong_is_noticed(wrong: str) -> None:
    with pytest.raises(Mismatch):
        replay(CALL + wrong)
