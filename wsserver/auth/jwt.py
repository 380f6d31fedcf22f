"""JSON Web Tokens (RFC 7519), signed with a shared secret or with the keys of an issuer.

Only this module imports PyJWT. It follows the best current practices of RFC 8725: the key decides
which algorithm verifies a token (section 3.1), and the header of the token does not.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from wsserver.auth.base import Handshake, Principal
from wsserver.auth.jwks import PATIENCE, FetchedKeys, Key, Keys, ReadKeys
from wsserver.errors import ConfigError
from wsserver.logs import log
from wsserver.settings import Settings

try:
    import jwt
    from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm
except ImportError as missing:
    raise ConfigError("JSON Web Tokens need PyJWT: pip install 'PyJWT[crypto]'") from missing

MAX_TOKEN = 8192  # characters; most proxies refuse a longer header
MAX_NAME = 256  # characters
MIN_SECRET = 32  # bytes, the size of the hash (RFC 7518 section 3.2)
MIN_RSA = 2048  # bits (RFC 7518 section 3.3)
CLOCK_DIFFERENCE = 10.0  # seconds between the clocks of issuer and server; NTP keeps them closer
DOTS = 2  # in a signed token; an encrypted token has more

# For each kind of key: its class, its algorithms, and the names of its public members.
_KINDS: dict[tuple[str, str | None], tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    ("RSA", None): (RSAAlgorithm, ("RS256", "PS256"), ("n", "e")),
    ("EC", "P-256"): (ECAlgorithm, ("ES256",), ("x", "y")),
    ("OKP", "Ed25519"): (OKPAlgorithm, ("EdDSA",), ("x",)),
}
_ASYMMETRIC = tuple(name for _, names, _ in _KINDS.values() for name in names)
_SYMMETRIC = ("HS256",)
# Exceptions of PyJWT and its libraries for malformed input. They differ between versions.
_FAULTS = (jwt.PyJWTError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError)


class _Refused(Exception):
    """The token is invalid. The message is the kind of error, and contains no part of the token."""


class JwtAuthenticator:
    """Authenticates clients by JSON Web Tokens.

    A token must have the signature of a known key, an expiry (``exp``), and the name of a
    principal: 1 to 256 printable characters. ``nbf`` and ``iat`` are checked if the token has them.
    ``aud`` is checked if the token or the settings have an audience (RFC 7519 section 4.1.3).

    Args:
        settings: the keys, the audience and the issuer.
        clock: monotonic clock for the age of the keys, in seconds.

    Raises:
        ConfigError: the settings have no key, two kinds of keys, or a key that cannot be used.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        shared = bool(settings.jwt_secret.get_secret_value() or settings.jwt_secret_file)
        self._has_kids = not shared  # a token may have any `kid` if there is one secret
        self._algorithms = _SYMMETRIC if shared else _ASYMMETRIC
        if shared == bool(settings.jwt_jwks):
            raise ConfigError("JSON Web Tokens need one of jwt_secret and jwt_jwks, and not both")
        self._source = (
            ReadKeys(lambda: _of_secret(settings)) if shared else _of_issuer(settings, clock)
        )

    async def __call__(self, token: str | None, _handshake: Handshake, /) -> Principal | None:
        """Return the principal of the token, or None if the token is invalid.

        Raises:
            Unavailable: the issuer's keys cannot be fetched now.
        """
        if token is None:
            return None
        try:
            return await self._verify(token)
        except _Refused as refused:
            kind = str(refused)
        except _FAULTS as error:
            kind = type(error).__name__  # the text of the error may quote the token
        log.debug("token refused", kind=kind)
        return None

    async def reload(self) -> bool:
        """Read the keys again. Invalid keys change nothing, and are logged."""
        return await self._source.reload()

    async def aclose(self) -> None:
        """Close the HTTP client, if there is one."""
        await self._source.aclose()

    async def _verify(self, token: str) -> Principal:
        if len(token) > MAX_TOKEN or token.count(".") != DOTS or not token.isascii():
            raise _Refused("not a token")
        header = jwt.get_unverified_header(token)
        if "crit" in header:  # extensions that must be understood (RFC 7515 section 4.1.11)
            raise _Refused("crit")
        algorithm = header.get("alg")
        kid = header.get("kid") if self._has_kids else None
        if algorithm not in self._algorithms:  # checked before a fetch of keys
            raise _Refused("alg")
        keys = await self._source.get()
        claims = self._claims(token, algorithm, kid, keys)
        if claims is None and not (kid is not None and any(key.kid == kid for key in keys)):
            claims = self._claims(token, algorithm, kid, await self._source.newer())
        if claims is None:
            raise _Refused("no key")
        return self._principal(claims)

    def _claims(
        self, token: str, algorithm: object, kid: str | None, keys: Keys
    ) -> dict[str, Any] | None:
        """Return the claims of a token, or None if no key verifies its signature."""
        for key in keys:
            if algorithm in key.algorithms and (kid is None or key.kid == kid):
                try:
                    return jwt.decode(
                        token,
                        key.material,
                        algorithms=list(key.algorithms),
                        audience=self._settings.jwt_audience or None,
                        issuer=self._settings.jwt_issuer or None,
                        leeway=CLOCK_DIFFERENCE,
                        options={"require": ["exp"]},
                    )
                except jwt.InvalidSignatureError:
                    continue
        return None

    def _principal(self, claims: dict[str, Any]) -> Principal:
        name = claims.get(self._settings.jwt_claim)
        # A line end would break a line of the log. A store cannot write half of a surrogate pair.
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
            raise _Refused("name")
        # PyJWT accepts a text as a number; RFC 7519 section 2 does not.
        if any(type(claims.get(claim, 0)) not in {int, float} for claim in ("exp", "nbf", "iat")):
            raise _Refused("time")
        return Principal(name, claims["exp"] + CLOCK_DIFFERENCE)


def _of_secret(settings: Settings) -> Keys:
    """Read the shared secret.

    Raises:
        ConfigError: the secret cannot be read, is too short, or is a public key.
    """
    material = settings.secret("jwt_secret").encode()
    if len(material) < MIN_SECRET:
        raise ConfigError(f"jwt_secret: must have at least {MIN_SECRET} bytes")
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(material)
    except jwt.InvalidKeyError:  # PyJWT refuses a public key as a secret
        raise ConfigError("jwt_secret: this is a public key; see jwt_jwks") from None
    return (Key(None, _SYMMETRIC, material),)


def _of_issuer(settings: Settings, clock: Callable[[], float]) -> ReadKeys | FetchedKeys:
    place = settings.jwt_jwks
    if "://" not in place:
        return ReadKeys(lambda: _of_file(place))
    if not settings.jwt_audience:
        raise ConfigError(
            "jwt_jwks: an address needs jwt_audience, because the issuer signs tokens for other "
            "services with the same keys"
        )
    # Admission gives an authenticator half of `open_timeout`.
    return FetchedKeys(place, _parse, min(PATIENCE, settings.open_timeout / 4), clock)


def _of_file(place: str) -> Keys:
    """Read a file with a JWK Set.

    Raises:
        ConfigError: the file cannot be read, or is not a JWK Set.
    """
    try:
        return _parse(Path(place).expanduser().read_bytes())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no such user in `~user`
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"jwt_jwks: {place}: {reason}") from None


def _parse(document: bytes) -> Keys:
    """Read a JWK Set. Keys for other purposes and unknown keys are left out (RFC 7517 section 5).

    Raises:
        ValueError: the document is not a JWK Set, or has no usable key.
    """
    try:
        items = from_json(document)["keys"]
        if not isinstance(items, list):
            raise TypeError("keys is not a list")
    except (ValueError, TypeError, LookupError):
        raise ValueError("not a JSON Web Key Set") from None
    keys = tuple(key for key in map(_key, items) if key is not None)
    if not keys:
        raise ValueError("no usable key")
    return keys


def _key(item: Any) -> Key | None:
    try:
        kind, curve = item["kty"], item.get("crv")
        algorithm, names, members = _KINDS[kind, None if kind == "RSA" else curve]
        kid = item.get("kid")
        if item.get("use", "sig") != "sig" or "verify" not in item.get("key_ops", ["verify"]):
            return None
        if "alg" in item:
            names = tuple(name for name in names if name == item["alg"])
        if not (names and isinstance(kid, str | None)):
            return None
        public = {"kty": kind, "crv": curve} | {member: item[member] for member in members}
        material = algorithm.from_jwk(public)
        if kind == "RSA" and material.key_size < MIN_RSA:
            return None
    except (*_FAULTS, AttributeError):
        return None
    return Key(kid, names, material)
