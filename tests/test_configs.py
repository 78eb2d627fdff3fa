"""The files in configs/ and the generated pages: right, and what the code says."""

import shutil
import subprocess
from pathlib import Path

import pytest

from broker.config.load import load
from broker.config.model import Config, Limits
from broker.config.render import configuration_page, default_toml

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
UNIT = CONFIGS / "broker.service"


def test_the_default_file_is_the_generated_one() -> None:
    written = (CONFIGS / "default.toml").read_text()
    assert written == default_toml(), "run: broker config init configs/default.toml --force"


def test_the_documentation_page_is_the_generated_one() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == configuration_page(), "run: broker config docs > docs/configuration.md"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.name)
def test_every_file_loads(file: Path) -> None:
    load(file)


def test_the_situations_are_what_they_say() -> None:
    assert load(CONFIGS / "default.toml") == Config()
    local = load(CONFIGS / "local.toml")
    assert (local.server.host, local.log.level) == ("127.0.0.1", "debug")
    tls = load(CONFIGS / "tls.toml")
    assert tls.server.host == "0.0.0.0"
    assert not tls.server.insecure
    assert tls.server.tls_certificate == str(CONFIGS / "certificate.pem")
    assert tls.server.tls_key == str(CONFIGS / "key.pem")


@pytest.mark.parametrize("name", ["local.toml", "tls.toml"])
def test_what_is_commented_out_is_right_too(name: str, tmp_path: Path) -> None:
    lines = (CONFIGS / name).read_text().splitlines()
    uncommented = [line.removeprefix("# ") if _is_setting(line) else line for line in lines]
    assert uncommented != lines
    file = tmp_path / name
    file.write_text("\n".join(uncommented))
    config = load(file)
    assert config.server.allowed_origins
    if name == "tls.toml":
        assert config.endpoints["scanner3"].closed
        assert config.server.trusted_proxies == ("10.0.0.5",)


def _is_setting(line: str) -> bool:
    words = line.removeprefix("# ").split()
    return line.startswith(("# [endpoints.",)) or (line.startswith("# ") and len(words) > 2 and words[1] == "=")


def _directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_unit() -> None:
    unit = _directives()
    assert unit["Type"] == ["notify"]
    assert unit["ExecStart"] == ["/opt/broker/bin/broker serve"]
    assert unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert unit["Restart"] == ["on-failure"]
    assert float(unit["TimeoutStopSec"][0]) >= Config().server.drain_s + 10, "a drain must not be killed"
    assert float(unit["WatchdogSec"][0]) >= 30
    assert int(unit["LimitNOFILE"][0]) >= 2 * Limits().unauthenticated_max
    for hardening in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "MemoryDenyWriteExecute", "LockPersonality"):
        assert unit[hardening] == ["yes"]
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["CapabilityBoundingSet"] == [""]


def test_the_environment_of_the_unit_is_right() -> None:
    environment = dict(setting.split("=", 1) for setting in _directives()["Environment"])
    assert environment.pop("BROKER_CONFIG") == "/etc/broker/broker.toml"
    assert load(environment=environment).auth.tokens_file == "%S/broker/tokens.json"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/broker/bin/broker", "/bin/true")  # it looks for the program
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_script_is_executable_and_bash_reads_it() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
