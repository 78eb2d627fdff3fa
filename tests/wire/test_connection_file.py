"""Connection files and addresses: read, checked, compared, written; the key is in no text."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.wire.connection_file import (
    Address,
    ConnectionFileError,
    ConnectionInfo,
    differing,
    parse,
    parse_address,
    render,
    render_address,
    require_same,
)

FILE: dict[str, Any] = {
    "transport": "tcp", "ip": "127.0.0.1", "shell_port": 5001, "iopub_port": 5002, "stdin_port": 5003,
    "control_port": 5004, "hb_port": 5005, "key": "secret-key", "signature_scheme": "hmac-sha256",
    "kernel_name": "python3",
}  # fmt: skip


def parsed(**changed: Any) -> ConnectionInfo:
    return parse(json.dumps({k: v for k, v in {**FILE, **changed}.items() if v is not ...}).encode())


def test_a_file_comes_back() -> None:
    info = parsed()
    assert json.loads(render(info)) == FILE
    assert parse(render(info)) == info
    curved = msgspec.structs.replace(info, curve_publickey="p" * 40, curve_secretkey="s" * 40)
    assert parse(render(curved)) == curved


def test_the_urls_of_its_sockets() -> None:
    assert parsed().url("iopub") == "tcp://127.0.0.1:5002"
    assert parsed(ip="::1").url("hb") == "tcp://[::1]:5005"
    assert parsed(transport="ipc", ip="/run/me/kernel", shell_port=1).url("shell") == "ipc:///run/me/kernel-1"


def test_what_may_be_absent_and_what_is_not_known() -> None:
    info = parsed(key=..., signature_scheme=..., kernel_name=..., transport=..., ip=..., jupyter_session="x")
    assert (info.key, info.signature_scheme, info.transport, info.ip) == ("", "hmac-sha256", "tcp", "127.0.0.1")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"shell_port": ...}, "shell_port"),
        ({"hb_port": ...}, "hb_port"),
        ({"hb_port": 0}, "hb_port"),
        ({"hb_port": 65536}, "hb_port"),
        ({"hb_port": True}, "hb_port"),
        ({"hb_port": "5005"}, "hb_port"),
        ({"hb_port": 5001}, "hb_port and shell_port are both 5001"),
        ({"transport": "udp"}, "transport"),
        ({"ip": ""}, "ip"),
        ({"ip": "-oProxyCommand=x"}, "ip"),
        ({"ip": "127.0.0.1 x"}, "ip"),
        ({"ip": "a\nb", "transport": "ipc"}, "ip"),
        ({"key": 7}, "key"),
        ({"key": "é"}, "ASCII"),
        ({"signature_scheme": "sha256"}, "hmac-HASH"),
        ({"signature_scheme": "hmac-nope"}, "names no hash"),
        ({"curve_publickey": "short"}, "40 characters"),
    ],
)
def test_a_file_that_is_wrong_says_where(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConnectionFileError, match=named) as refused:
        parsed(**changed)
    assert "secret-key" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"{" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_connection_file(data: bytes) -> None:
    with pytest.raises(ConnectionFileError, match="no connection file"):
        parse(data)


@pytest.mark.parametrize("field", ["key", "signature_scheme"])
def test_two_files_that_do_not_fit_say_in_what(field: str) -> None:
    other = parsed(**{field: {"key": "other-key", "signature_scheme": "hmac-sha512"}[field]})
    with pytest.raises(
        ConnectionFileError, match=rf"a\.json and b\.json do not fit: they differ in {field} "
    ) as refused:
        require_same(parsed(), other, ("a.json", "b.json"))
    assert "secret-key" not in str(refused.value)
    assert "other-key" not in str(refused.value)
    if field == "signature_scheme":
        assert "hmac-sha256 in a.json, hmac-sha512 in b.json" in str(refused.value)


def test_two_files_with_one_key_fit() -> None:
    require_same(parsed(), parsed(ip="10.0.0.1", shell_port=7))
    assert differing(parsed(), parsed(ip="10.0.0.1", shell_port=7)) == ["ip", "shell_port"]


@pytest.mark.parametrize(
    ("text", "url", "key"),
    [
        ("tcp://127.0.0.1:5001/secret-key", "tcp://127.0.0.1:5001", "secret-key"),
        ("tcp://127.0.0.1:5001", "tcp://127.0.0.1:5001", None),
        ("tcp://127.0.0.1:5001/", "tcp://127.0.0.1:5001", None),
        ("tcp://[::1]:5001/a%2Fb%3F", "tcp://[::1]:5001", "a/b?"),
        ("tcp://lab-3.example:5001/k", "tcp://lab-3.example:5001", "k"),
        ("ipc:///run/me/sock", "ipc:///run/me/sock", None),
    ],
)
def test_addresses(text: str, url: str, key: str | None) -> None:
    address = parse_address(text)
    assert address == Address(url, key)
    assert parse_address(render_address(address)) == address
    assert key is None or key not in repr(address)


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_key_goes_into_an_address(key: str) -> None:
    address = Address("tcp://127.0.0.1:5001", key)
    assert parse_address(render_address(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "tcp", "tcp://", "ipc://", "tcp://host", "tcp://host/secret-key", "tcp://:5/secret-key", "http://h:1/k",
        "tcp://h:0/k", "tcp://h:99999/k", "tcp://h:x/secret-key", "tcp://[::1/secret-key", "tcp://u@h:1/k", "tcp://h:1/k?x",
        "ipc://a\0b", "tcp://a b:5/k", "tcp://-o:5/k",
    ],
)  # fmt: skip
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(ConnectionFileError) as refused:
        parse_address(text)
    assert "secret-key" not in str(refused.value)


def test_no_key_is_shown() -> None:
    assert "secret-key" not in repr(parsed())
