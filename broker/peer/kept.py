"""What a session with grace has sent and does not know to have arrived, and what it has got: how it can go on."""

from __future__ import annotations

from collections import deque

from broker.peer.calls import Frame, Pending

ACK_EVERY = 32
ACK_EVERY_BYTES = 1 << 20
"""an acknowledgement is due after so many messages, or so many bytes, whichever comes first"""
STALLS_MAX = 5
"""links in a row that took none of what is kept: then it is the first message that breaks them"""


class Kept:
    """One session as the broker knows it: `id` and `secret` to come back with, `received` the number of the last
    message that came, `sent` how many were given to links.

    Every message that a link was given counts, in order, over all links. Frames are kept as they are, not copied,
    until the broker has acknowledged them: it does so every 32 messages or 1 MiB, and a link is given no more than
    its outbox takes, so there are never many.
    """

    __slots__ = ("_arrived", "_frames", "_stalls", "_unacked", "_unacked_bytes", "id", "received", "secret", "sent")

    def __init__(self, session_id: str, secret: str) -> None:
        self.id = session_id
        self.secret = secret
        self.received = 0
        self._frames: deque[Frame] = deque()
        self.sent = 0
        self._arrived = 0
        self._stalls = 0
        self._unacked = 0
        self._unacked_bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, frame: Frame) -> None:
        """This frame is given to a link, for the first time."""
        self.sent += 1
        frame.number = self.sent
        self._frames.append(frame)

    def acknowledge(self, n: int) -> None:
        """The broker has got the first `n`. What was never sent is not believed, what is old says nothing."""
        if not self._arrived < n <= self.sent:
            return
        self._arrived = n
        frames = self._frames
        while frames and frames[0].number <= n:
            frames.popleft()

    def replace(self, call: Pending, text: bytes) -> bool:
        """Send this in the place of a call that never arrived, as each place counts. False if it is not kept."""
        for frame in self._frames:
            if frame.call is call:
                frame.call, frame.pieces, frame.binary = None, [text], False
                return True
        return False

    def begin_again(self, received: int) -> list[Frame]:
        """Another link has taken over: what must be sent again on it, in order, before anything else."""
        self._stalls = self._stalls + 1 if self._frames and received <= self._arrived else 0
        self.acknowledge(received)
        return list(self._frames)

    @property
    def is_given_up(self) -> bool:
        """Whether it goes on no more. So it is when link after link broke before the first message that is kept
        arrived: it would break the next.
        """
        return self._stalls >= STALLS_MAX

    def give_up(self) -> None:
        """Do not go on."""
        self._stalls = STALLS_MAX

    def got(self, number: int, size: int) -> tuple[bool, int]:
        """A message with this number came: whether it is new, and the number to acknowledge now, 0 for none."""
        if number <= self.received:
            return False, 0
        self.received = number
        self._unacked += 1
        self._unacked_bytes += size
        if self._unacked < ACK_EVERY and self._unacked_bytes < ACK_EVERY_BYTES:
            return True, 0
        self._unacked = self._unacked_bytes = 0
        return True, number
