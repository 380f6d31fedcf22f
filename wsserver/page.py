"""The page at ``/`` and the files that it loads."""

import functools
import gzip
import hashlib
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import ClassVar

from wsserver.logs import log
from wsserver.responses import Response, respond

BUILT = "built"  # the folder that hatch_build.py writes

# Comments that are lines, types, and comments without quotes at the end of a line.
_COMMENT = re.compile(
    rb"^[ \t]*/\*\*(?:(?!\*/).)*\*/[ \t]*(?=\n)"
    rb"|^[ \t]*//[^\n]*"
    rb"|/\*\* @(?:(?!\*/)[^\n])*\*/ "
    rb"|(?<=\S) // [^\n'\"`]*(?=\n)",
    re.MULTILINE | re.DOTALL,
)


class Page:
    """The page at ``/``, the files that it loads, and ``ai-sdk.js`` and ``react.js`` for apps.

    The content security policy allows only these files. It also makes browsers refuse to parse text
    as HTML (Trusted Types), unless DOMPurify has cleaned it.

    The libraries that format Markdown come from npm when the package is built. Without them the
    page shows replies as plain text.
    """

    FILES: ClassVar = (
        "index.html",
        "manifest.webmanifest",
        "icon-180.png",
        "icon-192.png",
        "icon-512.png",
        "page.css",
        "page.js",
        "attachments.js",
        "compose.js",
        "drafts.js",
        "drawer.js",
        "editing.js",
        "errors.js",
        "export.js",
        "groups.js",
        "login.js",
        "notice.js",
        "scroll.js",
        "settings.js",
        "shortcuts.js",
        "sidebar.js",
        "slices.js",
        "storage.js",
        "tab.js",
        "theme.js",
        "thinking.js",
        "times.js",
        "turn.js",
        "turns.js",
        "markdown.js",
        "code.js",
        "markdown-syntax.js",
        "patch.js",
        "dom.js",
        "client.js",
        "ai-sdk.js",
        "react.js",
    )
    POLICY = (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; font-src 'self'; manifest-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types dompurify"
    )
    _LIBRARY = "/libraries/markdown.js"
    _TYPES: ClassVar[Mapping[str, str]] = {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "webmanifest": "application/manifest+json",
        "png": "image/png",
        "txt": "text/plain; charset=utf-8",
        "woff2": "font/woff2",
    }

    def __init__(self) -> None:
        web = importlib.resources.files("wsserver").joinpath("web")
        files: dict[str, _File] = {}
        for name in self.FILES:
            body = web.joinpath(name).read_bytes()
            short = without_comments(body) if name.endswith(".js") else body
            files["/" if name == "index.html" else f"/{name}"] = _File(short, name)
        built = web.joinpath("libraries", BUILT)
        if built.is_dir():
            for folder, prefix in ((built, ""), (built.joinpath("fonts"), "fonts/")):
                for file in folder.iterdir():
                    if file.name.rpartition(".")[2] in self._TYPES:
                        path = f"/libraries/{prefix}{file.name}"
                        files[path] = _File(file.read_bytes(), file.name)
        self._complete = self._LIBRARY in files
        files.setdefault(self._LIBRARY, _File(b"export {}\n", "markdown.js"))
        self._files = files

    def __contains__(self, path: str) -> bool:
        """Whether a path is one of a file."""
        return path in self._files

    def respond(self, path: str, headers: Mapping[str, str]) -> Response:
        """Return a file; 304 if the browser has the same version (RFC 9110 section 13.1.2).

        Args:
            path: the path of a file.
            headers: headers of the request, names in lower case.
        """
        if path == self._LIBRARY and not self._complete:
            self._complete = True  # once is enough
            log.warning("page without Markdown", reason="the package was built without npm")
        file = self._files[path]
        known = re.findall(r'\*|"[^"]*"', headers.get("if-none-match", ""))
        fresh = file.tag in known or "*" in known
        more = {
            "Content-Security-Policy": self.POLICY,
            "ETag": f"W/{file.tag}",  # weak: the compressed body has other bytes
            "Referrer-Policy": "no-referrer",
        }
        body = file.body
        if file.compressed:
            more["Vary"] = "Accept-Encoding"
            if _takes_gzip(headers):
                body = file.compressed
                more["Content-Encoding"] = "gzip"
        response = respond(HTTPStatus.OK, body, self._TYPES[file.kind], more)
        return replace(response, status=HTTPStatus.NOT_MODIFIED, body=b"") if fresh else response


def without_comments(script: bytes) -> bytes:
    """Return a script without most comments, but with its first one.

    All lines keep their numbers. A script must not have a template literal with such a text.
    """
    start = script.find(b"*/") if script.startswith(b"/**") else 0
    rest = _COMMENT.sub(lambda comment: b"\n" * comment[0].count(b"\n"), script[start:])
    return script[:start] + rest


class _File:
    """A file of the page."""

    def __init__(self, body: bytes, name: str) -> None:
        self.body = body
        self.kind = name.rpartition(".")[2]
        self.tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'

    @functools.cached_property
    def compressed(self) -> bytes:
        """The body with the content coding gzip; empty for a file that is compressed already."""
        return b"" if self.kind in {"png", "woff2"} else gzip.compress(self.body, mtime=0)


def _takes_gzip(headers: Mapping[str, str]) -> bool:
    """Whether a client takes the content coding gzip (RFC 9110 section 12.5.3)."""
    codings = headers.get("accept-encoding", "").lower().replace(" ", "").split(",")
    return "gzip" in codings or any(re.fullmatch(r"gzip;q=(?!0(\.0*)?$).*", c) for c in codings)
