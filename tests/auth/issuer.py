"""An issuer of JSON Web Tokens: keys, tokens, and a server with the keys."""

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from wsserver import Settings
from wsserver.auth.base import Handshake
from wsserver.auth.jwt import JwtAuthenticator

SECRET = "correct horse battery staple, 32"
HERE = Handshake("127.0.0.1", "/ws", {})


@cache
def private(name: str) -> Any:
    """Return the key of a name; the start of the name is the kind of key."""
    match name.partition("-")[0]:
        case "rsa":
            return rsa.generate_private_key(65537, 2048)
        case "weak":
            return rsa.generate_private_key(65537, 1024)
        case "ec":
            return ec.generate_private_key(ec.SECP256R1())
        case "p384":
            return ec.generate_private_key(ec.SECP384R1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


def public(name: str, *, kid: bool = True, **members: Any) -> dict[str, Any]:
    """Return the public key of a name as a member of a key set; the name is its kid."""
    key = private(name).public_key()
    kinds: Any = {"rsa": RSAAlgorithm, "weak": RSAAlgorithm, "ec": ECAlgorithm, "p384": ECAlgorithm}
    kind = kinds.get(name.partition("-")[0], OKPAlgorithm)
    return dict(kind.to_jwk(key, as_dict=True)) | ({"kid": name} if kid else {}) | members


def key_set(*keys: Any) -> bytes:
    """Return a JWK Set; a string stands for the public key of that name."""
    items = [public(key) if isinstance(key, str) else key for key in keys]
    return json.dumps({"keys": items}).encode()


def claims(**others: Any) -> dict[str, Any]:
    return {"sub": "ada", "exp": int(time.time()) + 60, "aud": "chat"} | others


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in claims().items() if name not in names}


def sign(
    key: str, algorithm: str = "RS256", kid: str | None = "", payload: Any = None, **header: Any
) -> str:
    """Return a token signed with the key of a name; the name is the kid by default."""
    if kid is not None:
        header["kid"] = kid or key
    return jwt.encode(payload or claims(), private(key), algorithm, headers=header)


def secretly(payload: Any = None, **header: Any) -> str:
    return jwt.encode(payload or claims(), SECRET, "HS256", headers=header)


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: object, payload: object, secret: bytes | None = None) -> str:
    """Return a token with any header, signed with HMAC if there is a secret."""
    signed = f"{part(header)}.{part(payload)}"
    signature = b"" if secret is None else hmac.digest(secret, signed.encode(), hashlib.sha256)
    return f"{signed}.{part(signature)}"


def authenticator(clock: Callable[[], float] = time.monotonic, **settings: Any) -> JwtAuthenticator:
    return JwtAuthenticator(Settings.load(**{"jwt_audience": "chat"} | settings), clock)


def with_secret(**settings: Any) -> JwtAuthenticator:
    return authenticator(jwt_secret=SECRET, **settings)


class Issuer:
    """An HTTP server with a response of the test, and a list of its requests."""

    def __init__(self) -> None:
        self.url = ""
        self.body = b""
        self.status = "200 OK"
        self.headers = ""
        self.paths: list[str] = []
        self.arrival = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.paths.append(head.split()[1].decode())
            self.arrival.set()
            await self.open.wait()
            length = f"Content-Length: {len(self.body)}\r\n"
            answer = f"HTTP/1.1 {self.status}\r\n{length}{self.headers}Connection: close\r\n\r\n"
            writer.write(answer.encode() + self.body)
            await writer.drain()
        writer.close()

    async def asked(self, times: int) -> None:
        async with asyncio.timeout(5):
            while len(self.paths) < times:
                self.arrival.clear()
                await self.arrival.wait()


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Issuer]:
    issuer = Issuer()
    async with await asyncio.start_server(issuer.answer, "127.0.0.1", 0, ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        issuer.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/keys"
        yield issuer
        issuer.open.set()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def fetching(
    url: str, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[JwtAuthenticator]:
    check = authenticator(clock, jwt_jwks=url)
    try:
        yield check
    finally:
        await check.aclose()
