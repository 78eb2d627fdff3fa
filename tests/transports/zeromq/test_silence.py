"""What a peer hears that the ZeroMQ door does not answer, because its key is another."""

from __future__ import annotations

import pytest

from broker.client.async_client import AsyncClient
from broker.peer import connection as connection_module
from broker.peer import errors
from tests.transports.zeromq.harness import run, running


def test_who_has_another_key_is_told_what_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "OPEN_TIMEOUT_S", 0.5)

    async def main() -> None:
        async with running() as home:
            for address in (f"{home.info.url('shell')}/another-key", home.info.url("shell")):
                with pytest.raises(errors.CannotConnect, match="is the key this broker's"):
                    await AsyncClient(address, reconnect=False).connect()
            assert set(home.refused()) == {"invalid_signature", "unsigned"}

    run(main)
