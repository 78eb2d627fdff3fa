"""`/livez` and `/readyz`: whether the process works, and whether it takes new work."""

from broker.auth.door import Door
from broker.core.router import Router


class LiveHandler(Door):
    """200 as long as the loop runs. Open to anybody who addresses the broker by its name."""

    def get(self) -> None:
        """The process answers."""
        self.check_door()
        self.answer({"status": "ok"})


class ReadyHandler(Door):
    """200 while new requests are taken, 503 while the broker drains."""

    router: Router

    def get(self) -> None:
        """Whether to send work here."""
        self.check_door()
        if self.router.draining:
            self.answer({"status": "draining", "pending": self.router.pending.count}, 503)
        else:
            self.answer({"status": "ok"})
