"""The command line over ZeroMQ: an address with its key, by `--url` and by BROKER_URL, as real processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from broker.auth.connection_files import write_connection_file
from broker.worker.worker import Worker
from tests.transports.zeromq.harness import Home, run, running


async def command(*arguments: str, **environ: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker", *arguments, env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def address_of(home: Home, folder: Path, form: str) -> str:
    if form == "address":
        return home.url
    write_connection_file(folder / "zeromq.json", home.info)
    return str(folder / "zeromq.json")


@pytest.mark.parametrize("form", ["address", "file"])
@pytest.mark.parametrize("by", ["--url", "BROKER_URL"])
def test_a_call_by_address_and_by_file(by: str, form: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with running() as home:
            worker = Worker("scanner", home.url)
            worker.add(lambda number: {"number": number}, name="volume")
            await worker.start()
            where = address_of(home, tmp_path, form)
            asked = ["call", "scanner/volume", '{"number": 4}', *(["--url", where] if by == "--url" else [])]
            environ = {"XDG_CONFIG_HOME": str(tmp_path), "BROKER_URL": where if by == "BROKER_URL" else ""}
            code, out, err = await command(*asked, **environ)
            assert (code, json.loads(out)) == (0, {"number": 4}), err
            await worker.stop(now=True)

    run(main)


def test_another_key_is_an_error_that_says_so_and_not_the_key() -> None:
    async def main() -> None:
        async with running() as home:
            place = home.url.rpartition("/")[0]
            code, out, err = await command("call", "scanner/volume", "--url", f"{place}/a-key-that-is-secret")
            assert code != 0
            assert not out
            assert place in err
            assert "signed with another key" in err
            assert "a-key-that-is-secret" not in err
            assert "Traceback" not in err

    run(main)
