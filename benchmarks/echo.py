"""A bare echo over the broker's own handshake, links and parser: python -m benchmarks.echo --port N."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import signal
import ssl
import tempfile
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from broker.links.acceptor import Acceptor
from broker.links.handshake import Refusal, check_upgrade, choose_subprotocol, switching_protocols
from broker.links.limits import LinkLimits
from broker.links.link import Link
from broker.links.loop import LoopLinks
from broker.links.take import take


class Echo:
    """Sends every message back; reads no further while the other end does not."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def message(self, payload: bytes, binary: bool) -> None:
        self._link.send(payload, binary)

    def congested(self, congested: bool) -> None:
        if congested:
            self._link.pause_reading()
        else:
            self._link.resume_reading()

    def closed(self, code: int, reason: str) -> None: ...


class EchoHandler(RequestHandler):
    def initialize(self, links: LoopLinks, acceptor: list[Acceptor], keep_stream: bool) -> None:
        self.links = links
        self.acceptor = acceptor
        self.keep_stream = keep_stream

    async def get(self) -> None:
        judged = check_upgrade(self.request.method or "", self.request.headers, self.request.version)
        if isinstance(judged, Refusal):
            self.set_status(judged.status)
            for name, value in judged.headers:
                self.set_header(name, value)
            self.finish(judged.reason + "\n")
            return
        chosen = choose_subprotocol(judged.subprotocols)
        reply = switching_protocols(judged.key, chosen)
        stream = self.detach()
        self.acceptor[0].authenticated(stream)
        try:
            link = await take(stream, reply, self.links, subprotocol=chosen, keep_stream=self.keep_stream)
        except OSError:
            return
        link.start(Echo(link))


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server context for localhost with a certificate made just now, left as cert.pem in ``folder``."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    names: list[Any] = [x509.DNSName("localhost")]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


async def serve(port: int, *, keep_stream: bool, ssl_context: ssl.SSLContext | None) -> None:
    """Serve until SIGTERM or SIGINT; prints one line when ready."""
    # Room for the largest echoes of the conformance suite (9.1.6: 16 MiB) without calling them slow.
    links = LoopLinks(LinkLimits(outbox_hard_bytes=32 << 20))
    acceptors: list[Acceptor] = []
    arguments = {"links": links, "acceptor": acceptors, "keep_stream": keep_stream}
    server = HTTPServer(Application([("/.*", EchoHandler, arguments)]), idle_connection_timeout=10)
    acceptors.append(Acceptor(server, ssl_context=ssl_context))
    acceptors[0].add_sockets(bind_sockets(port, "127.0.0.1"))
    print(f"echo on port {acceptors[0].sockets[0].getsockname()[1]}", flush=True)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await stopping.wait()
    acceptors[0].close()
    await links.close()
    await server.close_all_connections()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one, printed")
    parser.add_argument("--link", choices=("socket", "stream"), default="socket")
    parser.add_argument("--tls", action="store_true", help="with a certificate made on the fly")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    options = parser.parse_args()
    factory = None
    if options.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=factory) as runner:
        context = self_signed(Path(folder)) if options.tls else None
        runner.run(serve(options.port, keep_stream=options.link == "stream", ssl_context=context))


if __name__ == "__main__":
    main()
