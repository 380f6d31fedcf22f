"""Parsing what clients send: from a text to a frame of the protocol, or to a refusal."""

import itertools
import json
import re
import reprlib
from typing import Any, NoReturn

from pydantic import ValidationError

from wsserver.errors import Code, Refused
from wsserver.logs import printable
from wsserver.protocol import CLIENT_FRAMES, MESSAGES, ClientFrame
from wsserver.wire import ID_PATTERN, REQUEST_PATTERN

# Brackets, commas and colons of a frame outside of its strings, checked before anything is built of
# it: a value takes up to a hundred times the memory of its text. A message has five of them.
PARTS = 6 * MESSAGES
DEPTH = 64  # brackets within each other; the frames of the protocol have three
KEYS = 32  # of one object; a prompt has twelve
DIGITS = 18  # of an integer: what SQLite and others can hold
LARGEST = 10**18  # what an integer with more digits is read as

_STRINGS = re.compile(r'"[^"]*(?:"|\Z)')
_KEY = re.compile(r"[\w.\\]+: ")
_BRACKET = re.compile(r"[\[\]{}]")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}  # from a bracket to the depth behind it

_FIRST_REQUEST = re.compile(r'\s*{\s*"request"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*[,}]')


def parse(text: str) -> ClientFrame:
    """Parse what a client sent.

    Raises:
        Refused: it is not a frame of the protocol; the message says why and names the key.
    """
    value = _decode(text)
    if not isinstance(value, dict):
        raise Refused(Code.INVALID_FRAME, 'A frame is a JSON object, such as {"prompt": "Hello"}.')
    value = {key: item for key, item in value.items() if item is not None}
    try:
        return _validate(value)
    except Refused as refused:
        refused.about = _match(value, ID_PATTERN, "id", "conversation")
        refused.request = _match(value, REQUEST_PATTERN, "request")
        raise


def first_request(message: str) -> str | None:
    """Return the ``request`` of a frame that is not parsed, if that is the frame's first key."""
    found = _FIRST_REQUEST.match(message)
    return None if found is None else found[1]


def _validate(value: dict[str, Any]) -> ClientFrame:
    name = value.get("type", "prompt" if "prompt" in value or "messages" in value else None)
    if name is None:
        raise Refused(
            Code.INVALID_FRAME,
            'type: missing. Without it, give either `prompt` or `messages`: {"prompt": "Hello"}.',
        )
    model = CLIENT_FRAMES.get(name) if isinstance(name, str) else None
    if model is None:
        known = ", ".join(CLIENT_FRAMES)
        raise Refused(Code.UNKNOWN_TYPE, f"type: {_shown(name)} is not one of {known}.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None


def _decode(text: str) -> object:
    _check_shape(text)
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        raise Refused(
            Code.INVALID_JSON,
            f"Not JSON at character {error.pos + 1}. "
            'Send an object such as {"prompt": "Hello"} or {"type": "stop"}.',
        ) from None
    except RecursionError:
        raise _too_deep() from None


def _check_shape(text: str) -> None:
    """Refuse a frame of too many parts before anything is built of it.

    Raises:
        Refused: the frame has more parts, or brackets within each other, than it may.
    """
    if len(text) <= PARTS and text.count("[") + text.count("{") <= DEPTH:
        return  # nearly all frames
    bare = _without_strings(text)
    if bare.count("[") + bare.count("{") > DEPTH:
        # Each bracket is looked at once. What closes more brackets than there are is not JSON.
        brackets = itertools.islice(_BRACKET.finditer(bare), 2 * PARTS)
        steps = (_STEPS[bracket[0]] for bracket in brackets)
        if max(itertools.accumulate(steps)) > DEPTH:
            raise _too_deep()
    if _count(bare) > PARTS:
        raise Refused(
            Code.TOO_LONG, f"The frame has too many values; `messages` may be {MESSAGES}."
        )


def count_parts(text: str) -> int:
    """Count the brackets, commas and colons of a frame outside of its strings."""
    return _count(_without_strings(text))


def _count(bare: str) -> int:
    return sum(map(bare.count, ",:[{"))


def _without_strings(text: str) -> str:
    return _STRINGS.sub("", text.replace("\\\\", "").replace('\\"', ""))


def _too_deep() -> Refused:
    return Refused(Code.INVALID_JSON, "The frame is nested too deeply.")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its keys and values."""
    if len(pairs) > KEYS:
        raise Refused(Code.INVALID_FRAME, f"An object of the frame has more than {KEYS} keys.")
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise Refused(Code.INVALID_FRAME, f"{_shown(key, quote=False)}: given twice.")
        seen.add(key)
    return dict(pairs)


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:  # it is beyond every bound, and stays so
        return -LARGEST if digits.startswith("-") else LARGEST
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise Refused(Code.INVALID_JSON, f"{name} is not JSON.")


def _match(value: dict[str, Any], pattern: str, *keys: str) -> str | None:
    """Return the first of the keys whose value fits, of a frame that is not usable as a whole."""
    found = (value.get(key) for key in keys)
    return next((v for v in found if isinstance(v, str) and re.fullmatch(pattern, v)), None)


def _refusal(error: ValidationError) -> Refused:
    """Make a refusal of the first thing that a model found wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    if (first["type"], first["loc"]) == ("too_long", ("messages",)):
        return Refused(Code.TOO_LONG, f"messages: at most {MESSAGES}.")
    where = ".".join(_shown(part, quote=False) for part in first["loc"])
    what = {
        "extra_forbidden": "no such key",
        "string_pattern_mismatch": "16 to 64 of A-Z, a-z, 0-9, _ and -",
        "string_unicode": "has half of a surrogate pair",
    }.get(first["type"])
    if what is None:
        what = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    # An error within content begins with the keys that lead there.
    separator = "." if where and _KEY.match(what) else ": "
    return Refused(Code.INVALID_FRAME, f"{where}{separator}{what}." if where else f"{what}.")


def _shown(value: object, *, quote: bool = True) -> str:
    """Show what a client sent in a message: short, and whatever it is, safe to encode."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text if len(text) <= 40 else text[:40] + "…"  # noqa: PLR2004
    text = printable(text)
    return f'"{text}"' if quote else text
