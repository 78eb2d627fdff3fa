"""A browser, driven through chromedriver by plain HTTP (W3C WebDriver)."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.javascript.harness import tool, until

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver section 12, the name of an element's reference
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--hide-scrollbars", "--password-store=basic",
)  # fmt: skip
KEYS = {"enter": "\ue007", "tab": "\ue004", "control": "\ue009"}
PATIENCE_S = 20.0


class Browser:
    """One chromium with a fresh profile. Elements are named by CSS selectors."""

    def __init__(self, folder: Path) -> None:
        browser, driver = tool("chromium"), tool("chromedriver")
        log = folder / "chromedriver.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen([driver, "--port=0"], stdout=output, stderr=output)
        try:
            until(lambda: "started successfully on port" in log.read_text("utf-8", "replace"), "chromedriver listens")
            found = re.search(r"started successfully on port (\d+)", log.read_text("utf-8", "replace"))
            assert found
            self._base = f"http://127.0.0.1:{found[1]}/session"
            self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # not through a proxy
            options = {"binary": browser, "args": [*QUIET, f"--user-data-dir={folder / 'profile'}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            told = self._do("POST", "", {"capabilities": {"alwaysMatch": wanted}})
            self._base += f"/{told['sessionId']}"
        except BaseException:
            self._process.kill()
            raise

    def _do(self, method: str, path: str, body: object = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with self._open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.request.HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from None

    def close(self) -> None:
        try:
            self._do("DELETE", "")
        finally:
            self._process.terminate()
            self._process.wait()

    # ------------------------------------------------------------ going and looking

    def go(self, url: str) -> None:
        self._do("POST", "/url", {"url": url})

    def window(self) -> str:
        """The window that is looked at."""
        return str(self._do("GET", "/window"))

    def open_window(self) -> str:
        """Another window, which is looked at from now on. It draws while others are looked at, which a tab does not."""
        handle = str(self._do("POST", "/window/new", {"type": "window"})["handle"])
        self.use(handle)
        return handle

    def use(self, window: str) -> None:
        """Look at a window."""
        self._do("POST", "/window", {"handle": window})

    def close_window(self) -> None:
        """Close the window that is looked at; `use` another then."""
        self._do("DELETE", "/window")

    def run(self, script: str, *arguments: object) -> Any:
        """The value a script returns; a promise is waited for."""
        return self._do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """What is seen of an element; "" if there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def until(self, script: str, what: str) -> Any:
        """Wait until a JavaScript expression is true; its value."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.run(f"return ({script})")):
            assert time.monotonic() < deadline, f"never came true: {what}; the page: {self.text('body')[:3000]}"
            time.sleep(0.02)
        return value

    def until_text(self, selector: str, part: str) -> str:
        """Wait until an element's text holds `part`; the whole of it."""
        expression = f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(part)})"
        self.until(expression, f"{selector} shows {part!r}, not {self.text(selector)!r}")
        return self.text(selector)

    def console(self) -> list[str]:
        """What the browser complained about since it was last asked."""
        entries = self._do("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def cookies(self) -> list[dict[str, Any]]:
        return list(self._do("GET", "/cookie"))

    # ------------------------------------------------------------ hands

    def _find(self, selector: str) -> str:
        found = self._do("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[ELEMENT])

    def click(self, selector: str) -> None:
        self._do("POST", f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        element = self._find(selector)
        self._do("POST", f"/element/{element}/clear")
        self._do("POST", f"/element/{element}/value", {"text": text})

    def press(self, *names: str) -> None:
        """Press keys together, wherever the focus is."""
        keys = [KEYS.get(name, name) for name in names]
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._do("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    # ------------------------------------------------------------ how it looks

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the view, and which colours the person prefers."""
        self._cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._cdp("Emulation.setEmulatedMedia", features=features)

    def _cdp(self, command: str, **parameters: object) -> Any:
        return self._do("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def shoot(self, file: Path) -> None:
        """The whole page as a picture."""
        shot = self._cdp("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))
