"""Runs it: `python -m examples.realtime`, from a clone."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from broker.auth.token_file import TokenError
from broker.auth.users_file import UserError
from broker.config.errors import ConfigError
from broker.config.load import load
from examples.realtime.program import HOST, PREFIX, Program
from examples.realtime.runs import ask_daemon, ask_scanner

TOLD = """\
Open   {url}/?key={key}
and press Start. Every browser that opens it sees the same. The same from a terminal:
       BROKER_URL={url}{prefix} BROKER_TOKEN={key} broker call realtime/start '{{"repetition_s": 0.5}}'
Ctrl-C ends it."""


def main() -> int:
    """Read the arguments, and run until SIGTERM or Ctrl-C; the exit code."""
    arguments = argparse.ArgumentParser(prog="python -m examples.realtime", description=__doc__)
    arguments.add_argument("--port", type=int, default=8765, help="0 takes a free one [default: %(default)s]")
    arguments.add_argument("--no-scanner", action="store_true", help="start none; one will dial in")
    arguments.add_argument("--config", type=Path, help="configuration of the broker")
    arguments.add_argument("--daemon-file", metavar="PATH", help="start none; ask an rt-cloud daemon for this file, "
                           "{number} in it being the image's")  # fmt: skip
    given = arguments.parse_args()
    try:
        config = load(given.config, overrides={"server.port": given.port})
        program = Program(ask_daemon(given.daemon_file) if given.daemon_file else ask_scanner, config)
    except (ConfigError, TokenError, UserError) as error:
        arguments.error(str(error))
    if given.daemon_file and not config.rtcloud.enabled:
        arguments.error("--daemon-file needs a --config with rtcloud.enabled = true")
    with_scanner = not given.no_scanner and not given.daemon_file
    logging.basicConfig(level="INFO", format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("tornado.access").setLevel("WARNING")
    return asyncio.run(run(program, given.port, with_scanner=with_scanner))


async def run(program: Program, port: int, *, with_scanner: bool) -> int:
    """One life of the program."""
    ending = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    try:
        url = await program.start(port, with_scanner=with_scanner)
    except OSError as error:
        print(f"cannot listen on {HOST}:{port}: {error.strerror}; --port chooses another", file=sys.stderr)
        return 1
    try:
        print(TOLD.format(url=url, key=program.login.key, prefix=PREFIX), flush=True)
        await ending.wait()
    finally:
        await program.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
