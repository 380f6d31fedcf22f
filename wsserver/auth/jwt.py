"""JSON Web Tokens (RFC 7519), signed with a shared secret or by an issuer whose keys are known.

The only module that knows PyJWT. It follows the best current practices of RFC 8725: which
algorithm verifies a token is decided by the key (section 3.1), and by nothing that the token says.
"""

from pathlib import Path
from typing import Any

from pydantic_core import from_json

from wsserver.auth.base import Handshake, Principal
from wsserver.auth.jwks import PATIENCE, FetchedKeys, FixedKeys, Key, Keys, ReadKeys
from wsserver.errors import ConfigError
from wsserver.logs import log
from wsserver.settings import Settings

try:
    import jwt
    from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm
except ImportError as missing:
    raise ConfigError("JSON Web Tokens need PyJWT: pip install wsserver[jwt]") from missing

__all__ = ["JwtAuthenticator"]

MAX_TOKEN = 8192  # characters; a header of that length is more than most proxies let through
MAX_NAME = 256  # characters
MIN_SECRET = 32  # bytes: as many as the hash has (RFC 7518 section 3.2)
MIN_RSA = 2048  # bits (RFC 7518 section 3.3)
CLOCK_DIFFERENCE = 10.0  # seconds between the clocks of issuer and server; NTP keeps them closer
DOTS = 2  # in a token that is signed; one that is encrypted has more

# What each kind of key is used with, and what of it is public.
_KINDS: dict[tuple[str, str | None], tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    ("RSA", None): (RSAAlgorithm, ("RS256", "PS256"), ("n", "e")),
    ("EC", "P-256"): (ECAlgorithm, ("ES256",), ("x", "y")),
    ("OKP", "Ed25519"): (OKPAlgorithm, ("EdDSA",), ("x",)),
}
_ASYMMETRIC = tuple(name for _, names, _ in _KINDS.values() for name in names)
_SYMMETRIC = ("HS256",)
# What PyJWT and the libraries below it raise about what is malformed; some of it only by versions.
_FAULTS = (jwt.PyJWTError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError)


class _Refused(Exception):
    """The token is not good; the message is its kind of fault and holds nothing of the token."""


class JwtAuthenticator:
    """Takes JSON Web Tokens.

    A token has to be signed by a known key, to say when it ends (``exp``), and to carry the name
    of a principal: 1 to 256 printable characters. ``nbf`` and ``iat`` hold where they are given,
    and ``aud`` where either side names one (RFC 7519 section 4.1.3).

    Raises:
        ConfigError: the settings name no keys, two kinds of them, or such as cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        shared = bool(settings.jwt_secret.get_secret_value() or settings.jwt_secret_file)
        self._has_kids = not shared  # one secret needs no name, whatever a token calls it
        self._algorithms = _SYMMETRIC if shared else _ASYMMETRIC
        if shared == bool(settings.jwt_jwks):
            raise ConfigError("JSON Web Tokens need one of jwt_secret and jwt_jwks, and not both")
        self._source = ReadKeys(lambda: _of_secret(settings)) if shared else _of_issuer(settings)

    async def __call__(self, token: str | None, _handshake: Handshake, /) -> Principal | None:
        """Return whom the token names, or None where it is not good.

        Raises:
            Unavailable: the issuer's keys cannot be had now.
        """
        if token is None:
            return None
        try:
            return await self._verify(token)
        except _Refused as refused:
            kind = str(refused)
        except _FAULTS as error:
            kind = type(error).__name__  # not its text, which may quote the token
        log.debug("token refused", kind=kind)
        return None

    async def reload(self) -> bool:
        """Read the keys anew. Such as cannot be used change nothing, and are logged."""
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
        if algorithm not in self._algorithms:  # and nothing is fetched for it
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
        """Return what a token says, or None where none of the keys made it."""
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
        # Not printable are the ends of lines, which a log would break at, and half characters,
        # which no store can write down.
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
            raise _Refused("name")
        # PyJWT takes text for a number as well, which is none (RFC 7519 section 2).
        if any(type(claims.get(claim, 0)) not in {int, float} for claim in ("exp", "nbf", "iat")):
            raise _Refused("time")
        return Principal(name, claims["exp"] + CLOCK_DIFFERENCE)


def _of_secret(settings: Settings) -> Keys:
    """Read the shared secret.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    material = settings.secret("jwt_secret").encode()
    if len(material) < MIN_SECRET:
        raise ConfigError(f"jwt_secret: must have at least {MIN_SECRET} bytes")
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(material)
    except jwt.InvalidKeyError:  # what everybody may know is no secret
        raise ConfigError("jwt_secret: that is a key of another kind; see jwt_jwks") from None
    return (Key(None, _SYMMETRIC, material),)


def _of_issuer(settings: Settings) -> FixedKeys:
    place = settings.jwt_jwks
    if "://" not in place:
        return ReadKeys(lambda: _of_file(place))
    if not settings.jwt_audience:
        raise ConfigError(
            "jwt_jwks: an address needs jwt_audience, as its keys sign tokens for others too"
        )
    # Admission gives an authenticator half of the time for a handshake.
    return FetchedKeys(place, _parse, min(PATIENCE, settings.open_timeout / 4))


def _of_file(place: str) -> Keys:
    """Read a file with a JWK Set.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        return _parse(Path(place).expanduser().read_bytes())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no such user
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"jwt_jwks: {place}: {reason}") from None


def _parse(document: bytes) -> Keys:
    """Read a JWK Set; what is in it for others, or is not understood, is left out.

    RFC 7517 section 5.

    Raises:
        ValueError: it is not one, or has no key for this.
    """
    try:
        items = from_json(document)["keys"]
        if not isinstance(items, list):
            raise TypeError("keys that are none")
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
