"""Runs it: `python -m examples.realtime`, from a clone."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys

from examples.realtime.program import HOST, PREFIX, Program

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
    given = arguments.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("tornado.access").setLevel("WARNING")
    return asyncio.run(run(given.port, with_scanner=not given.no_scanner))


async def run(port: int, *, with_scanner: bool) -> int:
    """One life of the program."""
    ending = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    program = Program()
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
