"""Installs and runs the Autobahn fuzzing client (RFC 6455) against the echo, over both kinds of link.

    python -m benchmarks.autobahn install FOLDER     leaves FOLDER/wstest; Debian's package tools are needed
    python -m benchmarks.autobahn run FOLDER/wstest  exits 1 when a case failed

The suite needs Python 2.7, which is unpacked (not installed) from Debian packages of the machine's own mirror.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ALL_CASES = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*")
SHORT_CASES = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.1.1", "9.2.1", "9.7.1", "9.8.1", "10.*")
LINKS = ("socket", "stream", "tls")
GOOD = {"OK", "NON-STRICT", "INFORMATIONAL"}

_DEBIAN = (
    "python2.7-minimal libpython2.7-minimal libpython2.7-stdlib python2.7 libpython2.7 libpython2.7-dev"
    " libssl1.1 libffi7"
)
_BUILD = "setuptools==44.0.0 wheel==0.36.2 incremental==16.10.1"
_NEEDED = (
    "cffi<1.16 pyOpenSSL==19.1.0 cryptography==3.3.2 Twisted==19.10.0 txaio==2.1.0 zope.interface==4.6.0"
    " jinja2==2.11.3 markupsafe==1.1.1 Werkzeug==1.0.1 klein==17.10.0 service_identity==18.1.0"
    " unittest2==1.1.0 six==1.16.0 autobahn==0.10.9"
)
_SUITE = "autobahntestsuite==25.10.1"
_PIP = "pip==20.3.4"


# ── installing ──


def mirror() -> str:
    """The package mirror of the system's own settings."""
    texts = [path.read_text() for path in sorted(Path("/etc/apt").rglob("*")) if path.suffix in {".list", ".sources"}]
    for line in "\n".join(texts).splitlines():
        if re.match(r"URIs:|deb ", line) and "security" not in line:
            found = re.search(r"https?://\S+", line)
            if found:
                return found[0]
    raise SystemExit("no package mirror found in the system's apt settings")


def install(folder: Path) -> Path:
    """Install the suite under ``folder``; return its ``wstest``."""
    for name in ("apt/state/lists/partial", "apt/cache/archives/partial", "downloads", "root", "site"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    downloads, site = folder / "downloads", folder / "site"
    _unpack_python(folder, downloads)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", downloads, _PIP], check=True)
    libraries = next((folder / "root/usr/lib").glob("*-linux-gnu"))
    python = _script(
        folder / "py27",
        f"exec env LD_LIBRARY_PATH={libraries} PYTHONHOME={folder}/root/usr PYTHONPATH={site}"
        f' C_INCLUDE_PATH={folder}/root/usr/include {folder}/root/usr/bin/python2.7 "$@"',
    )
    wheel = next(downloads.glob("pip-*.whl"))
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    pip: list[str | Path] = [python, wheel / "pip", "install", "-q", "--no-cache-dir", f"--target={site}"]
    for arguments in (
        _BUILD.split(),
        ["--no-build-isolation", "--upgrade", *_NEEDED.split()],
        ["--no-deps", "--no-build-isolation", _SUITE],
    ):
        subprocess.run([*pip, *arguments], check=True, env=environment)
    (site / "zope/__init__.py").touch()
    code = "import sys; sys.argv[0]='wstest'; import autobahntestsuite.wstest as w; w.run()"
    wstest = _script(folder / "wstest", f'exec {python} -W ignore -c "{code}" "$@"')
    subprocess.run([wstest, "-a"], check=True)
    return wstest


def _unpack_python(folder: Path, downloads: Path) -> None:
    sources = folder / "apt/sources.list"
    sources.write_text(f"deb {mirror()} bullseye main\n")
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": folder / "apt/state",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "apt/cache",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *_DEBIAN.split()], check=True, cwd=downloads)
    for package in sorted(downloads.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)


def _script(path: Path, line: str) -> Path:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


# ── running ──


def run(
    wstest: Path, link: str, cases: tuple[str, ...], *, loop: str = "uvloop", timeout_s: float = 900
) -> dict[str, dict[str, Any]]:
    """Run cases against an echo over one kind of link, "socket", "stream" or "tls" (a stream under TLS); return the
    suite's record of each case by its id.
    """
    kind = ["--link", "stream", "--tls"] if link == "tls" else ["--link", link]
    echo = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.echo", *kind, "--loop", loop], stdout=subprocess.PIPE, text=True
    )
    assert echo.stdout is not None
    try:
        port = int(echo.stdout.readline().split()[-1])
        with tempfile.TemporaryDirectory() as folder:
            agent = {
                "agent": link,
                "url": f"{'wss' if link == 'tls' else 'ws'}://127.0.0.1:{port}",
                "options": {"version": 18},
            }
            chosen = {"cases": list(cases), "exclude-cases": [], "exclude-agent-cases": {}}
            options = {"outdir": f"{folder}/reports", "servers": [agent], "options": {"failByDrop": False}}
            specification = Path(folder, "spec.json")
            specification.write_text(json.dumps(options | chosen))
            command: list[str | Path] = [wstest, "-m", "fuzzingclient", "-s", specification]
            subprocess.run(command, check=True, cwd=folder, timeout=timeout_s, stdout=subprocess.DEVNULL)
            records: dict[str, dict[str, Any]] = json.loads(Path(folder, "reports/index.json").read_text())[link]
            return records
    finally:
        echo.terminate()
        echo.wait(10)
        echo.stdout.close()


def failures(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The cases that are not good, with what the suite says of behaviour and close."""
    return {
        case: f"{record['behavior']}, close {record['behaviorClose']} ({record['remoteCloseCode']})"
        for case, record in records.items()
        if record["behavior"] not in GOOD or record["behaviorClose"] not in GOOD
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autobahn", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install").add_argument("folder", type=Path)
    running = commands.add_parser("run")
    running.add_argument("wstest", type=Path)
    running.add_argument("--link", choices=LINKS, action="append", help="default: all")
    running.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    running.add_argument("--all", action="store_true", help="all of 1-7, 9 and 10; otherwise few of 9")
    running.add_argument("--cases", nargs="*", help="such as 9.1.*")
    options = parser.parse_args()
    if options.command == "install":
        print(install(options.folder))
        return
    cases = tuple(options.cases or ()) or (ALL_CASES if options.all else SHORT_CASES)
    failed = False
    for link in options.link or LINKS:
        records = run(options.wstest.resolve(), link, cases, loop=options.loop)
        counts = Counter(record["behavior"] for record in records.values())
        summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        print(f"{link} ({options.loop}): {len(records)} cases: {summary}")
        for case, words in failures(records).items():
            failed = True
            print(f"  {case}: {words}")
        for case, record in records.items():
            if record["behavior"] == "NON-STRICT":
                print(f"  {case}: NON-STRICT")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
