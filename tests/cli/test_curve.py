"""`broker curve`, and a client that comes in with what it wrote."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from broker.auth.connection_files import read_connection_file, write_connection_file
from broker.auth.targets import place_of
from broker.auth.tokens import TokenStore, curve_digest
from broker.cli.main import main
from broker.client.async_client import AsyncClient
from broker.peer import errors
from broker.wire.connection_file import ConnectionInfo
from tests.transports.zeromq.harness import run, running


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("BROKER_CONFIG", "BROKER_AUTH__TOKENS_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_from_the_brokers_file_to_a_call_and_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TokenStore(tmp_path / "state" / "broker" / "tokens.json")
    brokers, own = tmp_path / "broker.json", tmp_path / "own.json"
    section: dict[str, Any] = {"curve": True, "curve_key_file": str(tmp_path / "curve.key")}

    async def story() -> None:
        async with running(store, zeromq=section) as home:
            write_connection_file(brokers, home.info)
            with pytest.raises(errors.CannotConnect, match="broker curve keys"):
                await AsyncClient(str(brokers), reconnect=False).connect()
            assert main(["curve", "keys", str(brokers), str(own)]) == 0
            key = capsys.readouterr().out.strip()
            with pytest.raises(errors.Refused, match="broker curve allow"):
                await AsyncClient(str(own), reconnect=False).connect()
            assert main(["curve", "allow", "anna", key, "--endpoint", "data"]) == 0
            async with AsyncClient(str(own)) as client:
                await client.call("broker.ping")
            assert main(["curve", "revoke", "anna"]) == 0
            store.tokens()  # which looks at the file at once, not within a second
            with pytest.raises(errors.Refused):
                await AsyncClient(str(own), reconnect=False).connect()

    run(story)
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    capsys.readouterr()
    assert main(["curve", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["state"], row["roles"], row["endpoints"]) == ("anna", "revoked", ["caller"], ["data"])
    assert main(["token", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    secret = read_connection_file(own).curve_secretkey
    assert secret
    assert secret not in (tmp_path / "state" / "broker" / "tokens.json").read_text()
    assert secret not in repr(place_of(str(own)))


def test_a_key_in_z85_is_taken_whatever_it_begins_with(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "state" / "broker" / "tokens.json")
    key = "-A#:#Y-yH90jf<e)dB*!YVJ8^Rc=tWxve?UGGiKe"
    assert main(["curve", "allow", "anna", key]) == 0
    principal = store.lookup(curve_digest(key.encode()))
    assert principal is not None
    assert principal.name == "anna"


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.json"
    write_connection_file(
        plain, ConnectionInfo(shell_port=1, iopub_port=2, stdin_port=3, control_port=4, hb_port=5, key="k")
    )
    for arguments, said in (
        (["keys", str(plain), str(tmp_path / "own.json")], "zeromq.curve"),
        (["keys", str(tmp_path / "none.json"), str(tmp_path / "own.json")], "there is no file"),
        (["allow", "anna", "too-short"], "40 characters"),
        (["allow", "anna", ""], "40 characters"),
        (["allow", "anna", "x" * 64], "64 hexadecimal digits"),
        (["revoke", "nobody"], "nobody"),
    ):
        assert main(["curve", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["curve", "list"]) == 0
    assert "broker curve allow" in capsys.readouterr().err
