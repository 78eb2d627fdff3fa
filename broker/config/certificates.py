"""The certificate and key of the configuration as a TLS context, or one clear error."""

import ssl
from pathlib import Path

from broker.config.errors import ConfigError
from broker.config.model import Server


def server_context(server: Server) -> ssl.SSLContext | None:
    """The TLS context the broker serves with (TLS 1.2 or newer), None without a certificate.

    Raises ConfigError if a file cannot be read, is no PEM, is encrypted, or the two do not belong together.
    """
    if not server.tls_certificate:
        return None
    certificate = f"server.tls_certificate = {server.tls_certificate}"
    key = f"server.tls_key = {server.tls_key}"
    _expect(certificate, server.tls_certificate, b"-----BEGIN CERTIFICATE-----", "a certificate")
    _expect(key, server.tls_key, b"PRIVATE KEY-----", "a private key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def refuse() -> str:  # asked for only if the key is encrypted; OpenSSL would ask the terminal
        raise ConfigError(f"{key}: the key is encrypted: expected one that can be read without a password")

    try:
        context.load_cert_chain(server.tls_certificate, server.tls_key, password=refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key}: expected the key that belongs to {server.tls_certificate}") from None
        raise ConfigError(f"{certificate}: OpenSSL refuses it or {server.tls_key}: {error}") from None
    return context


def _expect(key: str, file: str, mark: bytes, noun: str) -> None:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: cannot be read: {error.strerror}") from None
    if mark not in content:
        raise ConfigError(f"{key}: expected {noun} in PEM form, and the file holds none")
