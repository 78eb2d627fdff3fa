"""What must hold between several keys, or cannot be said by a type."""

import ipaddress
from collections.abc import Iterator

from broker.config.fields import Path, literal
from broker.config.model import MIB, Config, Limits, RtCloud, Server

CLOSE_REASON_MAX_BYTES = 123
"""RFC 6455, section 5.5: a control frame carries 125 bytes, two of which are the code."""

OWN_PATHS = frozenset(
    "api broadcast call events livez login logout metrics readyz rpc static ticket whoami ws".split()  # noqa: SIM905
)
"""first parts of the broker's own paths"""
DAEMON_FRAME_BYTES = 14 * MIB
"""the largest message an rt-cloud daemon sends"""

Problem = tuple[tuple[Path, str], ...]
"""The keys that may be at fault, each with what would be right; the one that somebody set is to be blamed."""


def problems(config: Config) -> Iterator[Problem]:
    """Everything that is wrong with a configuration whose values are right one by one."""
    yield from _server(config.server)
    yield from _limits(config.limits)
    if config.rtcloud.enabled:
        yield from _rtcloud(config.rtcloud, config)
    for name, endpoint in config.endpoints.items():
        longest_s = config.limits.deadline_max_s if endpoint.deadline_max_s is None else endpoint.deadline_max_s
        if endpoint.deadline_s is not None and endpoint.deadline_s > longest_s:
            right = f"expected at most the longest timeout there, {literal(longest_s)} (deadline_max_s)"
            yield ((("endpoints", name, "deadline_s"), right),)
        if len(endpoint.closed.encode()) > CLOSE_REASON_MAX_BYTES:
            yield ((("endpoints", name, "closed"), f"expected at most {CLOSE_REASON_MAX_BYTES} bytes of UTF-8"),)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket that listens on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _server(server: Server) -> Iterator[Problem]:
    if server.tls_certificate and not server.tls_key:
        yield ((("server", "tls_certificate"), "expected tls_key beside it, the file of its private key"),)
    if server.tls_key and not server.tls_certificate:
        yield ((("server", "tls_key"), "expected tls_certificate beside it, the file of its certificate"),)
    if not (server.tls_certificate or server.insecure or is_loopback(server.host)):
        right = (
            "other machines can reach this address and there is no TLS: expected a loopback address such as "
            "127.0.0.1, or tls_certificate and tls_key, or insecure = true (--insecure)"
        )
        yield ((("server", "host"), right),)
    for proxy in server.trusted_proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            right = f"expected IP addresses or networks such as 10.0.0.0/8, but {error}"
            yield ((("server", "trusted_proxies"), right),)


def _limits(limits: Limits) -> Iterator[Problem]:
    for lower, upper in (
        ("deadline_s", "deadline_max_s"),
        ("outbox_soft_bytes", "outbox_hard_bytes"),
        ("memory_soft_bytes", "memory_hard_bytes"),
    ):
        low, high = getattr(limits, lower), getattr(limits, upper)
        if low > high:
            yield (
                (("limits", lower), f"expected at most limits.{upper}, which is {literal(high)}"),
                (("limits", upper), f"expected at least limits.{lower}, which is {literal(low)}"),
            )


def _rtcloud(rtcloud: RtCloud, config: Config) -> Iterator[Problem]:
    for path in sorted(OWN_PATHS.intersection(rtcloud.endpoints)):
        right = f"expected names of paths the broker does not have itself, and it has /{path}"
        yield ((("rtcloud", "endpoints"), right),)
    for path in sorted(rtcloud.classes.keys() - rtcloud.endpoints.keys()):
        right = f"expected paths that stand in rtcloud.endpoints, and {path} does not"
        yield ((("rtcloud", "classes"), right), (("rtcloud", "endpoints"), right))
    if config.limits.message_max_bytes < DAEMON_FRAME_BYTES:
        size = literal(DAEMON_FRAME_BYTES)
        right = f"expected at least {size}, the size of messages from rt-cloud's daemons, as rtcloud.enabled is set"
        yield ((("limits", "message_max_bytes"), right), (("rtcloud", "enabled"), right))
    if rtcloud.test_user and not is_loopback(config.server.host):
        right = "everybody knows that password: expected false, or a server.host that only this machine can reach"
        yield ((("rtcloud", "test_user"), right),)
