"""Certificates: what works, and what every bad pair is told."""

import datetime
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker.config.certificates import server_context
from broker.config.errors import ConfigError
from broker.config.model import Server

Pair = Callable[..., Server]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Writes a self-signed certificate and its key, and names both in a Server."""

    def make(name: str = "a", password: bytes | None = None) -> Server:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker.test")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (tmp_path / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
        (tmp_path / f"{name}.key").write_bytes(key.private_bytes(pem, form, encryption))
        return Server(tls_certificate=str(tmp_path / f"{name}.crt"), tls_key=str(tmp_path / f"{name}.key"))

    return make


def _error(certificate: str, key: str) -> str:
    with pytest.raises(ConfigError) as caught:
        server_context(Server(tls_certificate=certificate, tls_key=key))
    return str(caught.value)


def test_no_certificate_no_context() -> None:
    assert server_context(Server()) is None


def test_a_good_pair_gives_a_server_context(pair: Pair) -> None:
    context = server_context(pair())
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE  # clients show tokens, not certificates
    assert context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)


def test_files_that_cannot_be_read(pair: Pair, tmp_path: Path) -> None:
    good = pair()
    missing = str(tmp_path / "missing")
    assert _error(missing, good.tls_key) == (
        f"server.tls_certificate = {missing}: cannot be read: No such file or directory"
    )
    assert (
        _error(good.tls_certificate, missing)
        == f"server.tls_key = {missing}: cannot be read: No such file or directory"
    )
    assert _error(str(tmp_path), good.tls_key) == f"server.tls_certificate = {tmp_path}: cannot be read: Is a directory"


def test_files_that_hold_something_else(pair: Pair) -> None:
    good = pair()
    assert _error(good.tls_key, good.tls_key) == (
        f"server.tls_certificate = {good.tls_key}: expected a certificate in PEM form, and the file holds none"
    )
    assert _error(good.tls_certificate, good.tls_certificate) == (
        f"server.tls_key = {good.tls_certificate}: expected a private key in PEM form, and the file holds none"
    )


def test_a_key_of_another_certificate(pair: Pair) -> None:
    one, other = pair("a"), pair("b")
    assert _error(one.tls_certificate, other.tls_key) == (
        f"server.tls_key = {other.tls_key}: expected the key that belongs to {one.tls_certificate}"
    )


def test_an_encrypted_key_is_an_error_not_a_question(pair: Pair) -> None:
    locked = pair(password=b"secret")
    assert _error(locked.tls_certificate, locked.tls_key) == (
        f"server.tls_key = {locked.tls_key}: the key is encrypted: expected one that can be read without a password"
    )


def test_a_damaged_certificate(pair: Pair, tmp_path: Path) -> None:
    good = pair()
    damaged = tmp_path / "damaged.crt"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    error = _error(str(damaged), good.tls_key)
    assert error.startswith(f"server.tls_certificate = {damaged}: OpenSSL refuses it or {good.tls_key}: ")
