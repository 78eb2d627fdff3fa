"""The files a browser gets: the page at `/`, and under `/static/` what it loads and the JavaScript client."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files

import msgspec

from broker.auth.door import Door
from broker.auth.facts import Refused

PAGE = "index.html"

MODULES = (
    "calls.js", "errors.js", "moments.js", "serving.js", "sessions.js", "sockets.js", "streams.js", "subscriptions.js",
    "values.js",
)  # fmt: skip
"""What `broker.js` is made of; nobody else loads them."""

_SCRIPT = "text/javascript; charset=utf-8"
TYPES = {
    "broker.js": _SCRIPT,
    **dict.fromkeys(MODULES, _SCRIPT),
    "page.js": _SCRIPT,
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "broker.d.ts": "text/plain; charset=utf-8",
    PAGE: "text/html; charset=utf-8",
}
"""All files there are, with their content types; a name that is not among them does not reach the disk."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
"""The page runs no script but its own files, loads nothing from elsewhere, and stands in no frame."""


class File(msgspec.Struct, frozen=True):
    """One file as it is served."""

    content: bytes
    content_type: str
    etag: str


@lru_cache(maxsize=len(TYPES))
def read_file(name: str) -> File:
    """A file of this package. Raises KeyError for a name that is none of them."""
    content_type = TYPES[name]
    content = files(__package__).joinpath("static", name).read_bytes()
    return File(content, content_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


class FileHandler(Door):
    """`/static/{name}`. Open to anybody who addresses the broker by its name: nothing in the files is secret."""

    def get(self, name: str) -> None:
        """The file; 304 if the browser has it (RFC 9110 section 13.1.2), 404 for what is none."""
        self.check_door()
        self.send_file(name)

    def send_file(self, name: str) -> None:
        """Answer with a file of the package."""
        if name not in TYPES:
            raise Refused(404, "no such path")
        file = read_file(name)
        self.set_header("Cache-Control", "no-cache")
        self.set_header("Etag", file.etag)
        if self.check_etag_header():
            self.set_status(304)
            self.finish()
            return
        self.set_header("Content-Type", file.content_type)
        self.finish(file.content)


class PageHandler(FileHandler):
    """`/`: the page for people. What it shows it asks for after signing in."""

    def get(self, name: str = PAGE) -> None:
        """The page, which may be framed by nobody and run nothing but its own scripts."""
        self.check_door()
        self.set_header("Content-Security-Policy", PAGE_POLICY)
        self.set_header("Referrer-Policy", "no-referrer")
        self.send_file(PAGE)
