"""The example without a browser: what is measured, how runs go on and end, and the program as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker import AsyncClient, Broker, errors
from broker.config.model import Config, Endpoint
from broker.worker import current
from examples.realtime import measure, runs, scanner
from tests.daemon.process import REPOSITORY, environment
from tests.examples.program import Program, is_alive
from tests.transports.rtcloud.daemon import Daemon

PATIENCE_S = 30.0
Scanner = Callable[[int], Any]

# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize(("x_mm", "y_mm"), [(0.0, 0.0), (5.0, -9.0), (-12.5, 20.0)])
def test_the_spot_is_found_where_the_phantom_has_it(x_mm: float, y_mm: float) -> None:
    x, y = measure.centre(scanner.phantom(7, x_mm, y_mm))
    middle = (scanner.SIDE - 1) / 2
    assert ((x - middle) * scanner.PIXEL_MM, (y - middle) * scanner.PIXEL_MM) == pytest.approx((x_mm, y_mm), abs=0.5)


def test_an_image_of_eight_bits_is_measured() -> None:
    assert measure.centre(b"P5 3 2 255\n" + bytes([0, 0, 0, 0, 0, 9])) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "no binary PGM"),
        (b"\x89PNG", "no binary PGM"),
        (b"P5 3 2 255\n12345", "5 bytes of grey"),
        (b"P5 3 2 65535\n123456", "6 bytes of grey; 3 x 2 pixels have 12"),
        (b"P5 3 2 255\n" + bytes(6), "black"),
        (b"P5 0 0 255\n", "black"),
    ],
)
def test_what_cannot_be_measured_is_said(image: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        measure.centre(image)


# ---------------------------------------------------------------- runs


class Lab:
    """A broker with the laboratory in it, and somebody who hears what pages hear."""

    def __init__(self, asks: runs.Asks = runs.ask_scanner) -> None:
        self.broker = Broker(Config(endpoints={runs.NAME: Endpoint(history=1000)}))
        self.laboratory = runs.Laboratory(self.broker, asks)

    async def __aenter__(self) -> Lab:
        await self.broker.start()
        self.broker.serve(runs.NAME, self.laboratory)
        self.client = AsyncClient(self.broker)
        self.heard = await self.client.subscribe(runs.NAME, since=0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.laboratory.stop)
        await self.client.close()
        await self.broker.stop()

    async def call(self, method: str, **params: Any) -> Any:
        return await self.client.call(f"{runs.NAME}/{method}", params)

    async def until(self, kind: str) -> Any:
        """The next broadcast of a kind; others are passed over."""
        while True:
            message = await self.heard.get(PATIENCE_S)
            assert message is not None
            assert message.missed == 0
            if message.data["kind"] == kind:
                return message.data


def test_a_run_measures_every_image_and_ends() -> None:
    def expose(number: int) -> bytes:
        return scanner.phantom(number, 2.0 * number, -1.0 * number)

    async def main() -> None:
        async with Lab() as lab:
            lab.broker.serve("scanner", [expose])
            state = await lab.call("start", repetition_s=0.1, images=4)
            assert state == {"running": True, "run": 1, "scanner": False}  # functions of the process are nobody's peer
            began = await lab.until("began")
            assert (began["run"], began["images"], began["by"]) == (1, 4, "local")
            ended = await lab.until("ended")
            assert ended["text"] == "all images are taken"
            assert (await lab.call("state"))["running"] is False
            points = []
            async with AsyncClient(lab.broker) as another, await another.subscribe(runs.NAME, since=0) as late:
                async for message in late:  # who comes late hears all of it
                    if message.data["kind"] == "point":
                        points.append(message.data)
                    elif message.data["kind"] == "ended":
                        break
            assert points
            first = points[0]["image"]  # on a busy machine some are left out
            for point in points:
                moved = point["image"] - first
                assert (point["x_mm"], point["y_mm"]) == pytest.approx((2.0 * moved, -1.0 * moved), abs=0.6)

    asyncio.run(main())


def test_a_run_without_a_scanner_says_so_and_goes_on_when_one_comes() -> None:
    async def main() -> None:
        async with Lab() as lab:
            await lab.call("start", repetition_s=0.1, images=10_000)
            assert "The scanner is away" in (await lab.until("missed"))["text"]
            served = lab.broker.serve("scanner", {"expose": lambda number: scanner.phantom(number, 0, 0)})
            await lab.until("point")
            await served.close(now=True)
            assert "The scanner is away" in (await lab.until("missed"))["text"]
            lab.broker.serve("scanner", {"expose": lambda number: scanner.phantom(number, 0, 0)})
            await lab.until("point")
            assert (await lab.call("stop"))["running"] is False
            assert (await lab.until("ended"))["text"] == "stopped"

    asyncio.run(main())


def test_an_image_that_waited_is_told_with_the_time_at_which_it_came() -> None:
    exposure_s = 0.3

    def expose(number: int) -> bytes:
        current().wait_cancelled(exposure_s)
        return scanner.phantom(number, 0, 0)

    async def main() -> None:
        async with Lab() as lab:
            await lab.call("start", repetition_s=0.1, images=10_000)
            await lab.until("missed")
            lab.broker.serve("scanner", [expose])
            for _ in range(2):
                point = await lab.until("point")
                assert point["at_s"] >= point["image"] * 0.1 + exposure_s - 0.001

    asyncio.run(main())


def test_a_run_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PATIENCE_S", 0.3)

    async def main() -> None:
        async with Lab() as lab:
            await lab.call("start", repetition_s=0.1, images=10_000)
            assert (await lab.until("ended"))["text"] == "no scanner has come within 0.3 s"
            assert lab.broker.pending() == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda number: b"GIF89a", "no binary PGM"),
        (lambda number: {"no": "bytes"}, "gave no bytes"),
        (lambda number: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_run_ends_when_the_scanner_gives_nothing_to_measure(answer: Scanner, why: str) -> None:
    async def main() -> None:
        async with Lab() as lab:
            lab.broker.serve("scanner", {"expose": answer})
            await lab.call("start", repetition_s=0.1, images=10_000)
            assert why in (await lab.until("missed"))["text"]
            text = (await lab.until("ended"))["text"]
            assert text.startswith("5 images in a row did not come")
            assert why in text

    asyncio.run(main())


def test_a_scanner_that_hangs_is_noticed_and_stop_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Lab() as lab:
            asked, cancelled = asyncio.Event(), asyncio.Event()

            async def expose(number: int) -> None:
                asked.set()
                try:
                    await asyncio.sleep(3600)
                finally:
                    cancelled.set()

            lab.broker.serve("scanner", [expose])
            await lab.call("start")
            await asyncio.wait_for(asked.wait(), PATIENCE_S)
            await lab.call("stop")
            assert (await lab.until("ended"))["text"] == "stopped"
            await asyncio.wait_for(cancelled.wait(), PATIENCE_S)

            monkeypatch.setattr(runs, "IMAGE_TIMEOUT_S", 0.1)
            await lab.call("start", repetition_s=0.1)
            assert "deadline" in (await lab.until("missed"))["text"]
            assert (await lab.until("ended"))["text"].startswith("5 images in a row")

    asyncio.run(main())


def test_one_run_at_a_time_and_within_bounds(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Lab() as lab:
            for wrong in ({"repetition_s": 0}, {"repetition_s": 61}, {"images": 0}, {"images": 10_001}):
                with pytest.raises(errors.RemoteError, match="it goes from"):
                    await lab.call("start", **wrong)
            for mistyped in ({"repetition_s": "fast"}, {"repetition_s": True}, {"repetition_s": None}):
                with pytest.raises(errors.RemoteError, match=r"repetition_s is .*; give a number of seconds"):
                    await lab.call("start", **mistyped)
            for mistyped in ({"images": "x"}, {"images": 2.5}, {"images": True}):
                with pytest.raises(errors.RemoteError, match=r"images is .*; give a whole number"):
                    await lab.call("start", **mistyped)
            assert not any(record.exc_info for record in caplog.records)  # no traceback: it is no defect here
            await lab.call("stop")  # there is none
            await lab.call("start")
            with pytest.raises(errors.RemoteError, match="run 1 is under way"):
                await lab.call("start")

    asyncio.run(main())


class DataInterface:
    """What an rt-cloud daemon offers."""

    def getFile(self, path: str) -> bytes:
        return scanner.phantom(int(path.removesuffix(".pgm").rpartition("-")[2]), 0, 0)


def test_images_may_come_from_a_daemon_of_rtcloud(tmp_path: Path) -> None:
    """As docs/embedding.md says it."""
    (tmp_path / "lab.toml").write_text("[rtcloud]\nenabled = true\ntest_user = true\n")
    flags = ("--config", str(tmp_path / "lab.toml"), "--daemon-file", "/data/image-{number:04}.pgm")

    async def main(url: str, key: str) -> None:
        async with AsyncClient(f"{url}/broker", key) as client, await client.subscribe("realtime", since=0) as heard:

            async def until(kind: str) -> Any:
                while (message := await heard.get(PATIENCE_S)).data["kind"] != kind:  # type: ignore[union-attr]
                    pass
                return message.data  # type: ignore[union-attr]

            async with Daemon(url, {"DataInterface": DataInterface()}) as daemon:
                assert (await until("scanner"))["here"]
                await client.call("realtime/start", {"repetition_s": 0.1, "images": 10_000})
                point = await until("point")
                assert (point["x_mm"], point["y_mm"]) == (0, 0)
                assert daemon.seen[0]["args"] == [f"/data/image-{point['image']:04}.pgm"]
            assert "away" in (await until("missed"))["text"]

    with Program(tmp_path, *flags) as program:
        asyncio.run(main(program.url, program.key))
        assert program.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--daemon-file", "/x"), "needs a --config with rtcloud.enabled"),
        (("--config", "/nowhere/at/all.toml"), "/nowhere/at/all.toml"),
        (("--port", "99999"), "server.port = 99_999: expected a whole number from 0 to 65_535"),
        (("--port", "-1"), "server.port = -1: expected"),
    ],
)
def test_wrong_flags_are_said(tmp_path: Path, flags: tuple[str, ...], why: str) -> None:
    done = started(tmp_path, *flags)
    assert done.returncode == 2
    assert why in done.stderr


def started(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The program, which is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "examples.realtime", *flags],
        capture_output=True, text=True, env=environment(folder), cwd=REPOSITORY, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


# ---------------------------------------------------------------- the program


def test_the_command_line_has_the_same_api_and_nothing_is_left(tmp_path: Path) -> None:
    with Program(tmp_path) as program:
        scanner_process = int(program.logged(r"the scanner is process (\d+)"))
        program.logged("serving scanner")
        with program.client() as client, client.subscribe("realtime", since=0) as heard:

            def until(kind: str) -> Any:
                return next(message.data for message in heard if message.data["kind"] == kind)

            assert client.call("realtime/state") == {"running": False, "run": 0, "scanner": True}
            assert client.call("realtime/start", {"repetition_s": 0.1, "images": 10_000})["running"] is True
            until("point")
            with pytest.raises(errors.Denied):
                client.call("scanner/expose", [0])  # not what the key is for
            os.kill(scanner_process, signal.SIGKILL)
            assert "away" in until("missed")["text"]
            another = int(program.logged(r"the scanner is process (\d+)", 2))
            until("point")
        assert program.end(signal.SIGINT) == 0
        assert "Traceback" not in program.log
        program.until(lambda: not is_alive(another), "the scanner has ended, too")


def test_the_scanner_ends_with_a_program_that_is_killed(tmp_path: Path) -> None:
    with Program(tmp_path) as program:
        scanner_process = int(program.logged(r"the scanner is process (\d+)"))
        program.logged("serving scanner")
        program.end(signal.SIGKILL)
        program.until(lambda: not is_alive(scanner_process), "the scanner has ended, too")


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = started(tmp_path, "--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use; --port")


def test_the_program_ends_in_good_order_in_the_middle_of_a_run(tmp_path: Path) -> None:
    with Program(tmp_path, "--no-scanner") as program, program.scanner() as room, program.client() as client:
        with client.subscribe("realtime") as heard:
            client.call("realtime/start", {"repetition_s": 0.1, "images": 10_000})
            assert next(message for message in heard if message.data["kind"] == "point")
            program.process.send_signal(signal.SIGTERM)
            ended = next(message for message in heard if message.data["kind"] == "ended")
        assert ended.data["text"] == "stopped"
        assert program.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in program.log
        assert room.process.poll() is None  # somebody else's; it waits for the next start
