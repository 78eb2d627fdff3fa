"""Connection files and key files on disk: who may read them, and that jupyter_client reads ours."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file as upstream_writes

from broker.auth.connection_files import ConnectionFile, read_connection_file, read_key_file, write_connection_file
from broker.wire.connection_file import ConnectionFileError, ConnectionInfo

INFO = ConnectionInfo(
    shell_port=5001, iopub_port=5002, stdin_port=5003, control_port=5004, hb_port=5005, key="secret-key",
    signature_scheme="hmac-sha512", kernel_name="python3",
)  # fmt: skip


def test_it_is_written_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    path.write_text("older, for all")
    path.chmod(0o644)
    write_connection_file(path, INFO)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_connection_file(path) == INFO


def test_jupyter_client_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    write_connection_file(path, INFO)
    client = BlockingKernelClient(connection_file=str(path))
    client.load_connection_file()
    found = client.get_connection_info()
    assert found["key"] == b"secret-key"
    assert (found["shell_port"], found["hb_port"], found["ip"]) == (5001, 5005, "127.0.0.1")
    assert found["signature_scheme"] == client.session.signature_scheme == "hmac-sha512"


def test_jupyter_clients_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    upstream_writes(str(path), shell_port=5001, iopub_port=5002, stdin_port=5003, control_port=5004, hb_port=5005,
                    key=b"secret-key", signature_scheme="hmac-sha512", kernel_name="python3")  # fmt: skip
    assert read_connection_file(path) == INFO


def test_one_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    write_connection_file(path, INFO)
    path.chmod(0o640)
    with pytest.raises(PermissionError, match="can be read by others"):
        read_connection_file(path)


def test_what_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    with pytest.raises(FileNotFoundError, match=r"kernel\.json"):
        read_connection_file(path)
    for bad in (b"{", b"x" * 70_000):
        path.write_bytes(bad)
        path.chmod(0o600)
        with pytest.raises(ConnectionFileError, match=r"kernel\.json"):
            read_connection_file(path)


def test_one_that_is_wrong_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    with pytest.raises(ConnectionFileError, match="ip"):
        write_connection_file(path, ConnectionInfo(ip="", shell_port=1, iopub_port=2, stdin_port=3, control_port=4,
                                                   hb_port=5))  # fmt: skip
    assert not path.exists()


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"  secret-key\n")
    path.chmod(0o600)
    assert read_key_file(path) == b"secret-key"
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="is empty"):
        read_key_file(path)
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="can be read by others"):
        read_key_file(path)


def test_a_running_broker_s_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    write_connection_file(path, INFO)  # nobody's, or that of a broker that was killed
    mine = msgspec.structs.replace(INFO, key="this broker's")
    file = ConnectionFile.write(path, mine)
    with pytest.raises(ConnectionFileError, match=r"kernel\.json is that of another running broker"):
        ConnectionFile.write(path, INFO)
    assert read_connection_file(path) == mine
    file.remove()
    assert not path.exists()
    ConnectionFile.write(path, INFO).remove()


def test_one_is_removed_by_who_wrote_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    file = ConnectionFile.write(path, INFO)
    theirs = msgspec.structs.replace(INFO, key="another broker's")
    write_connection_file(path, theirs)
    file.remove()
    assert read_connection_file(path) == theirs
    file.remove()  # again is no error


def test_a_folder_that_is_not_there_is_named_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "kernel.json"
    with pytest.raises(FileNotFoundError) as caught:
        write_connection_file(path, INFO)
    assert caught.value.filename == str(path)
