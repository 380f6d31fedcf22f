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

# Comments that begin and end lines. esbuild shows in a test that no other text matches. The comment
# at the beginning of a script says what the script is, and stays.
_COMMENT = re.compile(rb"(?!\A)^[ \t]*/\*\*(?:(?!\*/).)*\*/[ \t]*$", re.MULTILINE | re.DOTALL)


class Page:
    """The page at ``/``, the files that it loads, and ``ai-sdk.js`` and ``react.js`` for apps.

    The content security policy allows nothing else. It also makes browsers refuse to parse text
    as HTML (Trusted Types), unless DOMPurify has cleaned it.

    The libraries that format Markdown come from npm when the package is built. Without them the
    page shows replies as plain text.
    """

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
        built = web.joinpath("libraries", BUILT)
        folders = {"": web, "libraries/": built, "libraries/fonts/": built.joinpath("fonts")}
        files: dict[str, _File] = {}
        for prefix, folder in folders.items():
            for file in folder.iterdir() if folder.is_dir() else ():
                kind = file.name.rpartition(".")[2]
                if kind in self._TYPES:
                    body = file.read_bytes()
                    if folder is web and kind == "js":
                        body = without_comments(body)
                    files[f"/{prefix}{file.name}"] = _File(body, kind)
        files["/"] = files.pop("/index.html")
        self._warns = self._LIBRARY not in files  # at the first request for the library
        files.setdefault(self._LIBRARY, _File(b"export {}\n", "js"))
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
        if self._warns and path == self._LIBRARY:
            self._warns = False
            log.warning("page without Markdown", reason="the package was built without npm")
        file = self._files[path]
        known = re.findall(r'\*|"[^"]*"', headers.get("if-none-match", ""))
        fresh = file.tag in known or "*" in known
        more = {
            "Content-Security-Policy": self.POLICY,
            "ETag": f"W/{file.tag}",  # weak: the compressed body has other bytes
            "Referrer-Policy": "no-referrer",
            "X-DNS-Prefetch-Control": "off",  # a link of a model may have a secret in its host
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
    """Return a script without most of its comments. All lines keep their numbers."""
    return _COMMENT.sub(lambda comment: b"\n" * comment[0].count(b"\n"), script)


class _File:
    """A file of the page."""

    def __init__(self, body: bytes, kind: str) -> None:
        self.body = body
        self.kind = kind
        self.tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'

    @functools.cached_property
    def compressed(self) -> bytes:
        """The body with the content coding gzip; empty for a file that is compressed already."""
        return b"" if self.kind in {"png", "woff2"} else gzip.compress(self.body, mtime=0)


def _takes_gzip(headers: Mapping[str, str]) -> bool:
    """Whether a client takes the content coding gzip (RFC 9110 section 12.5.3)."""
    codings = headers.get("accept-encoding", "").lower().replace(" ", "").split(",")
    return "gzip" in codings or any(re.fullmatch(r"gzip;q=(?!0(\.0*)?$).*", c) for c in codings)
