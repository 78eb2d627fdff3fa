"""Rendering: what is written can be read again, and says all there is to say but no secret."""

import tomllib
from pathlib import Path

from broker.config import render
from broker.config.fields import FIELDS
from broker.config.load import load, load_with_origins
from broker.config.model import Config, Endpoint

SECRET = "s3cret-" + "x" * 40


def test_the_default_file_names_every_key_with_its_default(tmp_path: Path) -> None:
    text = render.default_toml()
    document = tomllib.loads(text)
    assert list(document) == [section for section in FIELDS if section != "endpoints"]
    for section, table in document.items():
        assert list(table) == list(FIELDS[section])
    file = tmp_path / "default.toml"
    file.write_text(text)
    assert load(file) == Config()
    assert all(line.startswith("#") or len(line) <= 60 for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= render.WIDTH


def test_the_endpoint_example_is_right_once_it_is_uncommented(tmp_path: Path) -> None:
    example = render.default_toml().partition("# [endpoints.NAME]")
    keys = [line.removeprefix("# ") for line in example[2].splitlines() if line.startswith("# ") and " = " in line]
    assert len(keys) == len(FIELDS["endpoints"])
    file = tmp_path / "broker.toml"
    file.write_text("[endpoints.data]\n" + "\n".join(keys))
    endpoint = load(file).endpoints["data"]
    limits = Config().limits
    assert (endpoint.queue_max, endpoint.deadline_s) == (limits.queue_max, limits.deadline_s)


def test_what_holds_can_be_read_again_and_says_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('[endpoints."a.b"]\nclosed = "with \\"quotes\\" and é"\n[server]\nallowed_hosts = ["a", "b"]\n')
    loaded = load_with_origins(file, {"BROKER_LIMITS__STALL_S": "0.5"}, {"server.port": 0})
    text = render.effective_toml(loaded.config, loaded.origins)
    assert f'closed = "with \\"quotes\\" and é"  # {file}' in text
    assert "stall_s = 0.5  # BROKER_LIMITS__STALL_S" in text
    assert "port = 0  # command line" in text
    assert 'host = "127.0.0.1"\n' in text
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert load(again) == loaded.config


def test_a_file_name_cannot_break_out_of_its_comment(tmp_path: Path) -> None:
    text = render.effective_toml(Config(), {("server", "port"): "a\nport = 1"})
    assert tomllib.loads(text)["server"]["port"] == 8787


def test_secrets_are_shown_nowhere() -> None:
    loaded = load_with_origins(environment={"BROKER_AUTH__ADMIN_TOKEN": SECRET})
    assert SECRET not in render.effective_toml(loaded.config, loaded.origins)
    shown = render.effective_dict(loaded.config)
    assert shown["auth"]["admin_token"] == "<redacted>"
    assert SECRET not in str(shown)


def test_the_dict_holds_everything() -> None:
    config = load(overrides={"endpoints.data.closed": "no", "server.allowed_hosts": ["a"]})
    shown = render.effective_dict(config)
    assert list(shown) == list(FIELDS)
    assert shown["server"]["allowed_hosts"] == ["a"]
    data = shown["endpoints"]["data"]
    assert list(data) == list(Endpoint.__struct_fields__)
    assert (data["policy"], data["queue_max"], data["closed"]) == ("least_pending", None, "no")


def test_the_page_has_a_row_for_every_key() -> None:
    page = render.configuration_page()
    for section, fields in FIELDS.items():
        for name in fields:
            middle = "NAME__" if section == "endpoints" else ""
            assert f"`BROKER_{section.upper()}__{middle}{name.upper()}` |" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(map(len, FIELDS.values()))
    assert all(row.count("|") == 6 for row in rows)
