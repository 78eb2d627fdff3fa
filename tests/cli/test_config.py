"""`broker config`: init, check, show."""

import json
import tomllib
from pathlib import Path

import pytest

from broker.cli.main import main
from broker.config.render import configuration_page, default_toml

SECRET = "s3cret-" + "x" * 40


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BROKER_CONFIG", raising=False)
    monkeypatch.delenv("BROKER_TRACEBACK", raising=False)


def test_init_writes_the_default_and_never_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "init"]) == 0
    assert (tmp_path / "broker.toml").read_text() == default_toml()
    assert capsys.readouterr() == ("", "wrote broker.toml; edit it, then: broker config check broker.toml\n")
    (tmp_path / "broker.toml").write_text("mine")
    assert main(["config", "init"]) == 2
    assert capsys.readouterr().err == "broker: broker.toml: exists already; --force overwrites it\n"
    assert (tmp_path / "broker.toml").read_text() == "mine"
    assert main(["config", "init", "--force"]) == 0
    assert (tmp_path / "broker.toml").read_text() == default_toml()


def test_init_to_standard_output_or_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "init", "-"]) == 0
    assert capsys.readouterr() == (default_toml(), "")
    assert main(["config", "init", "no/such/folder.toml"]) == 2
    assert capsys.readouterr() == ("", "broker: no/such/folder.toml: No such file or directory\n")


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["config", "check"]) == 0
    assert capsys.readouterr() == ("ok: nothing but defaults\n", "")
    (tmp_path / "a.toml").write_text("[server]\nport = 1\ndrain_s = 2\n")
    monkeypatch.setenv("BROKER_LOG__LEVEL", "debug")
    assert main(["config", "check", "a.toml"]) == 0
    assert capsys.readouterr() == ("ok: a.toml, BROKER_LOG__LEVEL\n", "")
    (tmp_path / "b.toml").write_text("[server]\nprot = 1\n")
    monkeypatch.setenv("BROKER_CONFIG", "b.toml")
    assert main(["config", "check"]) == 2
    assert capsys.readouterr() == ("", "broker: b.toml: unknown key server.prot; did you mean server.port?\n")
    assert main(["config", "check", "c.toml"]) == 2
    assert capsys.readouterr() == ("", "broker: c.toml: cannot be read: No such file or directory\n")


def test_check_reads_the_certificates_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text("[server]\ntls_certificate = 'c.pem'\ntls_key = 'k.pem'\n")
    assert main(["config", "check", "a.toml"]) == 2
    assert capsys.readouterr().err == (
        f"broker: server.tls_certificate = {tmp_path / 'c.pem'}: cannot be read: No such file or directory\n"
    )


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text("[server]\nport = 1\n[endpoints.data]\n")
    monkeypatch.setenv("BROKER_AUTH__ADMIN_TOKEN", SECRET)
    assert main(["config", "show", "a.toml"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert SECRET not in out
    assert "port = 1  # a.toml\n" in out
    assert 'admin_token = "<redacted>"  # BROKER_AUTH__ADMIN_TOKEN\n' in out
    assert "data" in tomllib.loads(out)["endpoints"]
    assert main(["config", "show", "--json", "a.toml"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert SECRET not in out
    shown = json.loads(out)
    assert (shown["server"]["port"], shown["auth"]["admin_token"]) == (1, "<redacted>")
    assert "data" in shown["endpoints"]


def test_docs_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "docs"]) == 0
    assert capsys.readouterr() == (configuration_page(), "")
    assert main(["config", "--help"]) == 0
    assert "docs" not in capsys.readouterr().out
