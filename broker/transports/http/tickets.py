"""`POST /ticket`: what a browser exchanges its credential for, to open a WebSocket with."""

from broker.auth.door import Door
from broker.auth.tickets import Tickets


class TicketHandler(Door):
    """Answers `{"ticket": …, "expires_in_s": …}`; a page sees here, unlike at a WebSocket, why it is refused."""

    tickets: Tickets

    def post(self) -> None:
        """Issue a ticket to whoever authenticates. 401, 403, 421, 429 as everywhere."""
        principal = self.authenticate()
        self.answer({"ticket": self.tickets.issue(principal), "expires_in_s": self.tickets.live_s})
