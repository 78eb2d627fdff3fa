"""Forwarding headers are believed from trusted proxies only, and only as far as those wrote them."""

import pytest

from broker.auth.proxies import TrustedProxies

PROXIES = TrustedProxies(["10.0.0.0/8", "::1"])


def client(remote: str, *forwarded: str, proto: tuple[str, ...] = (), secure: bool = False) -> tuple[str, bool]:
    headers = tuple(("x-forwarded-for", value) for value in forwarded)
    return PROXIES.client_of(remote, secure, headers + tuple(("x-forwarded-proto", value) for value in proto))


def test_row_27_a_stranger_s_forwarding_headers_are_not_believed() -> None:
    assert client("192.0.2.1", "127.0.0.1", proto=("https",)) == ("192.0.2.1", False)
    everything = (("x-forwarded-for", "127.0.0.1"), ("x-forwarded-proto", "https"))
    assert TrustedProxies().client_of("10.0.0.1", False, everything) == ("10.0.0.1", False)


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        ((), "10.0.0.1"),
        (("192.0.2.7",), "192.0.2.7"),
        (("127.0.0.1, 192.0.2.7",), "192.0.2.7"),
        (("127.0.0.1", "192.0.2.7, 10.0.0.9"), "192.0.2.7"),
        (("192.0.2.7, 10.0.0.9, 10.0.0.8",), "192.0.2.7"),
        (("10.0.0.3, 10.0.0.2",), "10.0.0.3"),
        (("192.0.2.7, evil",), "10.0.0.1"),
        (("192.0.2.7, evil, 10.0.0.9",), "10.0.0.9"),
        (("",), "10.0.0.1"),
        (("192.0.2.7:5123",), "192.0.2.7"),
        (("[2001:db8::7]:5123",), "2001:db8::7"),
        (("2001:db8::7",), "2001:db8::7"),
        (("::ffff:192.0.2.7",), "192.0.2.7"),
    ],
)
def test_the_rightmost_address_that_is_not_trusted(forwarded: tuple[str, ...], expected: str) -> None:
    assert client("10.0.0.1", *forwarded) == (expected, False)


@pytest.mark.parametrize(
    ("proto", "secure", "expected"),
    [
        ((), True, True),
        (("https",), False, True),
        (("HTTPS",), False, True),
        (("http",), True, False),
        (("https, http",), False, False),
        (("http", "https"), False, True),
        (("wss",), False, False),
        (("",), True, True),
    ],
)
def test_the_scheme_the_nearest_proxy_wrote(proto: tuple[str, ...], secure: bool, expected: bool) -> None:
    assert client("::1", proto=proto, secure=secure) == ("::1", expected)


@pytest.mark.parametrize("entry", ["", "proxy.example", "10.0.0.0/33", "10.0.0.1:80"])
def test_an_entry_that_is_no_address_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="trusted proxy") as caught:
        TrustedProxies([entry])
    assert repr(entry) in str(caught.value)
