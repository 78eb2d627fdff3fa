"""The file of tokens: what is stored, how it changes while somebody reads, what happens when it is broken."""

import json
import logging
import multiprocessing
import os
import stat
import time
from pathlib import Path

import msgspec
import pytest

from broker.auth import private_files
from broker.auth.token_file import TokenError, TokenRecord
from broker.auth.tokens import (
    ENDED_KEPT_S,
    PREFIX,
    TokenStore,
    UnknownToken,
    default_tokens_path,
    digest_of,
    new_secret,
)
from broker.core.access import Role
from tests.auth.helpers import Clock


def store(folder: Path, wall: Clock | None = None, steady: Clock | None = None) -> TokenStore:
    return TokenStore(folder / "tokens.json", clock=wall or Clock(), monotonic=steady or Clock(0.0))


def test_a_secret_is_recognisable_and_has_256_random_bits() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(secret.startswith(PREFIX) and len(secret) == len(PREFIX) + 43 for secret in secrets)


def test_a_created_token_is_looked_up_by_its_digest(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    record, secret = tokens.create("camera", ["worker", "caller"], ["data", "image*"], 60)
    principal = tokens.lookup(digest_of(secret))
    assert principal is not None
    assert (principal.name, principal.kind, principal.token_id) == ("camera", "token", record.id)
    assert principal.grants[0].roles == Role.WORKER | Role.CALLER
    assert principal.grants[0].endpoints == ("data", "image*")
    assert principal.expires_at == 1_000_060.0
    assert tokens.lookup(digest_of(new_secret())) is None
    assert tokens.lookup(b"") is None


def test_row_06_the_file_holds_digests_and_never_the_secret(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    secret = tokens.create("camera")[1]
    text = (tmp_path / "tokens.json").read_text()
    assert secret not in text
    assert secret.removeprefix(PREFIX) not in text
    assert digest_of(secret).hex() in text


def test_the_file_is_private_even_under_a_generous_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store(tmp_path / "deep" / "state").create("camera")
    finally:
        os.umask(before)
    folder = tmp_path / "deep" / "state"
    assert stat.S_IMODE((folder / "tokens.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(entry.name for entry in folder.iterdir()) == [".tokens.json.lock", "tokens.json"]


def test_a_token_without_a_name_is_named_by_its_id(tmp_path: Path) -> None:
    record = store(tmp_path).create()[0]
    assert record.name == record.id


def test_row_02_expired_and_revoked_tokens_are_not_found(tmp_path: Path) -> None:
    wall = Clock()
    tokens = store(tmp_path, wall)
    short = tokens.create("short", expires_in_s=10)[1]
    out, out_secret = tokens.create("out")
    wall.now += 9.5
    assert tokens.lookup(digest_of(short)) is not None
    wall.now += 0.5
    assert tokens.lookup(digest_of(short)) is None
    assert tokens.revoke("out").revoked == wall.now
    assert tokens.lookup(digest_of(out_secret)) is None
    assert not tokens.is_valid(out.id)
    assert [record.state(wall.now) for record in tokens.tokens()] == ["expired", "revoked"]


def test_a_clock_set_back_revives_no_revoked_token(tmp_path: Path) -> None:
    wall = Clock()
    tokens = store(tmp_path, wall)
    record, secret = tokens.create("out")
    tokens.revoke("out")
    wall.now -= 3600
    assert tokens.lookup(digest_of(secret)) is None
    assert not tokens.is_valid(record.id)


def test_a_token_of_another_process_works_at_once_and_its_end_is_seen_within_a_second(tmp_path: Path) -> None:
    steady = Clock(0.0)
    daemon = store(tmp_path, steady=steady)
    secret = store(tmp_path).create("late")[1]
    assert daemon.lookup(digest_of(secret)) is not None, "the file is looked at before anybody is told no"
    store(tmp_path).revoke("late")
    assert daemon.lookup(digest_of(secret)) is not None, "one that is known is not looked up again within the second"
    steady.now += 1
    assert daemon.lookup(digest_of(secret)) is None


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    steady = Clock(0.0)
    store(tmp_path).create("a")
    daemon = store(tmp_path, steady=steady)
    for _ in range(10):
        steady.now += 1
        daemon.lookup(bytes(32))
    assert daemon.reloads == 0


def test_refresh_tells_once_which_tokens_are_gone(tmp_path: Path) -> None:
    steady = Clock(0.0)
    cli = store(tmp_path)
    kept, revoked, removed, altered = (cli.create(name)[0] for name in ("kept", "revoked", "removed", "altered"))
    daemon = store(tmp_path, steady=steady)
    assert daemon.refresh() == frozenset()
    cli.revoke("revoked")
    assert daemon.refresh() == {revoked.id}
    assert daemon.refresh() == frozenset()
    path = tmp_path / "tokens.json"
    document = json.loads(path.read_text())
    document["tokens"] = [token for token in document["tokens"] if token["name"] != "removed"]
    document["tokens"][-1]["roles"] = ["listener"]
    path.write_text(json.dumps(document))
    steady.now += 1
    daemon.lookup(bytes(32))  # notices the change; nothing may be lost by that
    assert daemon.refresh() == {removed.id, altered.id}
    assert daemon.is_valid(kept.id)
    path.unlink()
    assert daemon.refresh() == {kept.id, altered.id}, "no file means no tokens"


def test_a_new_token_is_nobody_gone(tmp_path: Path) -> None:
    daemon = store(tmp_path)
    daemon.refresh()
    store(tmp_path).create("new")
    assert daemon.refresh() == frozenset()
    assert len(daemon.tokens()) == 1


def test_a_damaged_file_keeps_the_old_tokens_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steady = Clock(0.0)
    cli = store(tmp_path)
    secret = cli.create("good")[1]
    daemon = store(tmp_path, steady=steady)
    path = tmp_path / "tokens.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            steady.now += 1
            assert daemon.lookup(digest_of(secret)) is not None
            assert daemon.refresh() == frozenset()
    assert len(caplog.records) == 1
    assert "tokens.json is damaged" in caplog.text
    with pytest.raises(TokenError, match="is damaged"):
        cli.create("more")
    path.write_bytes(whole)
    cli.create("more")
    steady.now += 1
    assert daemon.lookup(digest_of(secret)) is not None
    assert len(daemon.tokens()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"version": 2, "tokens": []}',
        '{"version": 1, "tokens": [], "more": 1}',
        '{"version": 1, "tokens": [{}]}',
        "[" * 100_000,
        '"\ud800"',
    ],
)
def test_a_damaged_file_stops_a_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokens.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TokenError, match=r"tokens\.json is damaged"):
        store(tmp_path)


GOOD = TokenRecord(id="0123abcd", name="a", digest="0" * 64, roles=("caller",), endpoints=("*",), created=1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "x"},
        {"id": "0123abcd\n"},
        {"name": "a\n"},
        {"name": "<script>"},
        {"name": ""},
        {"name": "admin"},
        {"name": "local"},
        {"digest": "0" * 63},
        {"digest": "G" * 64},
        {"roles": ()},
        {"roles": ("god",)},
        {"endpoints": ()},
        {"endpoints": ("../x",)},
        {"endpoints": ("a\n",)},
        {"created": -1.0},
        {"created": 1e300},
        {"expires": 1e12},
    ],
)
def test_every_member_of_a_record_is_checked(tmp_path: Path, wrong: dict[str, object]) -> None:
    def write(*records: TokenRecord) -> None:
        document = {"version": 1, "tokens": records}
        (tmp_path / "tokens.json").write_bytes(msgspec.json.encode(document))

    write(GOOD)
    assert len(store(tmp_path).tokens()) == 1
    write(msgspec.structs.replace(GOOD, **wrong))
    with pytest.raises(TokenError, match="damaged"):
        store(tmp_path)


def test_doubled_ids_and_digests_are_damage(tmp_path: Path) -> None:
    for other in ({"id": "11111111"}, {"digest": "1" * 64}):
        document = {"version": 1, "tokens": [GOOD, msgspec.structs.replace(GOOD, **other)]}
        (tmp_path / "tokens.json").write_bytes(msgspec.json.encode(document))
        with pytest.raises(TokenError, match="doubled"):
            store(tmp_path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_others_may_write_is_not_believed(tmp_path: Path, mode: int) -> None:
    store(tmp_path).create("a")
    (tmp_path / "tokens.json").chmod(mode)
    with pytest.raises(TokenError, match="could have been written by others"):
        store(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_not_believed(tmp_path: Path) -> None:
    store(tmp_path).create("a")
    os.chown(tmp_path / "tokens.json", 12345, 12345)
    with pytest.raises(TokenError, match="uid 12345"):
        store(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_root_leaves_the_file_to_the_service_whose_folder_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = tmp_path / "service"
    service.mkdir(0o700)
    os.chown(service, 12345, 12345)
    store(service).create("a")
    assert {entry.stat().st_uid for entry in service.iterdir()} == {12345}


def test_a_directory_or_a_fifo_instead_of_a_file_is_named_and_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").mkdir()
    with pytest.raises(TokenError, match="no regular file"):
        store(tmp_path)
    (tmp_path / "tokens.json").rmdir()
    os.mkfifo(tmp_path / "tokens.json")
    with pytest.raises(TokenError, match="no regular file"):
        store(tmp_path)


def test_a_link_is_read_but_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    secret = store(tmp_path / "real").create("a")[1]
    (tmp_path / "tokens.json").symlink_to(tmp_path / "real" / "tokens.json")
    tokens = store(tmp_path)
    assert tokens.lookup(digest_of(secret)) is not None
    with pytest.raises(TokenError, match="is a symbolic link"):
        tokens.create("b")


def test_what_cannot_be_written_leaves_the_old_file_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = store(tmp_path)
    tokens.create("a")
    before = (tmp_path / "tokens.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("broker.auth.private_files.os.fsync", full)
    with pytest.raises(TokenError, match="No space left"):
        tokens.create("b")
    assert (tmp_path / "tokens.json").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".tokens.json.lock", "tokens.json"]


def test_a_lock_that_is_held_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens.json"
    with (
        private_files.locked(path),
        pytest.raises(TimeoutError, match=r"\.tokens\.json\.lock is held"),
        private_files.locked(path, timeout_s=0.05),
    ):
        pass
    with private_files.locked(path, timeout_s=0.05):
        pass


def test_the_lock_follows_no_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".tokens.json.lock").symlink_to(target)
    with pytest.raises(TokenError, match="cannot change the tokens"):
        store(tmp_path).create("a")
    assert not target.exists()


def _create_many(folder: str, count: int) -> None:
    tokens = TokenStore(Path(folder) / "tokens.json")
    for _ in range(count):
        tokens.create()


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_create_many, args=(str(tmp_path), 10)) for _ in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        now = len(TokenStore(tmp_path / "tokens.json").tokens())  # a reader never sees half a file
        assert now >= seen
        seen = now
        time.sleep(0.005)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(TokenStore(tmp_path / "tokens.json").tokens()) == 30


def test_revoking_by_id_by_name_and_when_it_is_unclear(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    first, second = tokens.create("alice")[0], tokens.create("alice")[0]
    with pytest.raises(UnknownToken, match=f"{first.id}, {second.id}"):
        tokens.revoke("alice")
    assert tokens.revoke(first.id).id == first.id
    assert tokens.revoke("alice").id == second.id, "the only valid one of the name"
    assert tokens.revoke("alice").id == second.id, "again is no error"
    with pytest.raises(UnknownToken, match="did you mean 'alice'"):
        tokens.revoke("alise")
    with pytest.raises(UnknownToken, match=r"no token has the id or name 'zzz'$"):
        tokens.revoke("zzz")


def test_keys_and_tokens_of_one_name_are_revoked_each_by_its_kind(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    token = tokens.create("anna")[0]
    key = tokens.create("anna", curve_key=b"-A#:#Y-yH90jf<e)dB*!YVJ8^Rc=tWxve?UGGiKe")[0]
    with pytest.raises(UnknownToken, match="no CURVE key has the id"):
        tokens.revoke(token.id, "curve")
    with pytest.raises(UnknownToken, match="no token has the id"):
        tokens.revoke(key.id)
    assert tokens.revoke("anna", "curve").id == key.id
    assert tokens.is_valid(token.id)
    assert tokens.revoke("anna").id == token.id


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a b",), "the name 'a b'"),
        (("a\n",), r"the name 'a\\n'"),
        (("host",), "the broker's own"),
        (("a", ["boss"]), "the role 'boss' is none of caller, worker, listener, admin"),
        (("a", []), "needs a role"),
        (("a", ["caller"], []), "1 to 100 endpoint patterns"),
        (("a", ["caller"], ["x"] * 50 + [f"y{n}" for n in range(100)]), "1 to 100 endpoint patterns"),
        (("a", ["caller"], ["../etc"]), "'../etc' is no endpoint pattern"),
        (("a", ["caller"], ["*"], 0), "cannot expire in 0"),
        (("a", ["caller"], ["*"], -1), "cannot expire in -1"),
        (("a", ["caller"], ["*"], float("nan")), "cannot expire in nan"),
        (("a", ["caller"], ["*"], 1e300), "cannot expire in"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path: Path, arguments: tuple, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(TokenError, match=said):
        store(tmp_path).create(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_ended_tokens_are_dropped_in_the_end_and_the_number_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = Clock()
    tokens = store(tmp_path, wall)
    tokens.create("out")
    tokens.create("old", expires_in_s=1)
    kept = tokens.create("kept")[0]
    tokens.revoke("out")
    monkeypatch.setattr("broker.auth.tokens.TOKENS_MAX", 3)
    with pytest.raises(TokenError, match="3 tokens already"):
        tokens.create("more")
    wall.now += ENDED_KEPT_S + 1
    more = tokens.create("more")[0]
    assert [record.id for record in tokens.tokens()] == [kept.id, more.id]


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_tokens_path() == tmp_path / "broker" / "tokens.json"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_tokens_path() == tmp_path / ".local" / "state" / "broker" / "tokens.json"
