"""Parses the frames of clients: a text becomes a frame of the protocol, or a refusal."""

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

# Most brackets, commas and colons of a frame outside its strings. They are counted before the frame
# is parsed: a value takes up to a hundred times the memory of its text. A message has five.
PARTS = 6 * MESSAGES
DEPTH = 64  # nested brackets; frames without content blocks have three
KEYS = 32  # keys of one object; a prompt has twelve
DIGITS = 18  # digits of an integer that fits into 64 bits
LARGEST = 10**18  # replaces an integer with more digits

_STRINGS = re.compile(r'"[^"]*(?:"|\Z)')
_KEY = re.compile(r"[\w.\\]+: ")
_BRACKET = re.compile(r"[\[\]{}]")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}  # from a bracket to the depth behind it

_FIRST_REQUEST = re.compile(r'\s*{\s*"request"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*[,}]')


def parse(text: str) -> ClientFrame:
    """Parse a frame of a client.

    Raises:
        Refused: the text is not a frame of the protocol. The message has the reason and the key.
    """
    return parse_object(decode(text))


def decode(text: str) -> dict[str, Any]:
    """Return the JSON object of a text, without the keys whose value is null.

    Raises:
        Refused: the text is not JSON, not an object, or has too many values.
    """
    value = _decode(text)
    if not isinstance(value, dict):
        raise Refused(Code.INVALID_FRAME, 'A frame is a JSON object, such as {"prompt": "Hello"}.')
    return {key: item for key, item in value.items() if item is not None}


def parse_object(value: dict[str, Any]) -> ClientFrame:
    """Parse a frame of a client that is decoded.

    Raises:
        Refused: the object is not a frame of the protocol. The message has the reason and the key.
    """
    try:
        return _validate(value)
    except Refused as refused:
        refused.about = _match(value, ID_PATTERN, "id", "conversation")
        refused.request = _match(value, REQUEST_PATTERN, "request")
        raise


def first_request(message: str) -> str | None:
    """Return the ``request`` of an unparsed frame, if it is the first key of the frame."""
    found = _FIRST_REQUEST.match(message)
    return None if found is None else found[1]


def _validate(value: dict[str, Any]) -> ClientFrame:
    name = value.get("type", "prompt" if "prompt" in value or "messages" in value else None)
    if name is None:
        raise Refused(
            Code.INVALID_FRAME,
            'type: missing. A frame without it has `prompt` or `messages`: {"prompt": "Hello"}.',
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
    """Refuse a frame with too many parts before it is parsed.

    Raises:
        Refused: the frame has too many parts, or is nested too deeply.
    """
    if len(text) <= PARTS and text.count("[") + text.count("{") <= DEPTH:
        return  # nearly all frames
    bare = _without_strings(text)
    if bare.count("[") + bare.count("{") > DEPTH:
        # This looks at each bracket once. Surplus closing brackets fail in the JSON parser.
        brackets = itertools.islice(_BRACKET.finditer(bare), 2 * PARTS)
        steps = (_STEPS[bracket[0]] for bracket in brackets)
        if max(itertools.accumulate(steps)) > DEPTH:
            raise _too_deep()
    if _count(bare) > PARTS:
        raise Refused(
            Code.TOO_LONG, f"The frame has too many values; `messages` may be {MESSAGES}."
        )


def count_parts(text: str) -> int:
    """Count the brackets, commas and colons of a frame outside its strings."""
    return _count(_without_strings(text))


def _count(bare: str) -> int:
    return sum(map(bare.count, ",:[{"))


def _without_strings(text: str) -> str:
    return _STRINGS.sub("", text.replace("\\\\", "").replace('\\"', ""))


def _too_deep() -> Refused:
    return Refused(Code.INVALID_JSON, "The frame is nested too deeply.")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object from its keys and values."""
    if len(pairs) > KEYS:
        raise Refused(Code.INVALID_FRAME, f"An object of the frame has more than {KEYS} keys.")
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise Refused(Code.INVALID_FRAME, f"{_shown(key, quote=False)}: given twice.")
        seen.add(key)
    return dict(pairs)


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:  # every limit refuses it, and LARGEST as well
        return -LARGEST if digits.startswith("-") else LARGEST
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise Refused(Code.INVALID_JSON, f"{name} is not valid JSON.")


def _match(value: dict[str, Any], pattern: str, *keys: str) -> str | None:
    """Return the value of the first key that matches, from a frame that is not valid as a whole."""
    found = (value.get(key) for key in keys)
    return next((v for v in found if isinstance(v, str) and re.fullmatch(pattern, v)), None)


def _refusal(error: ValidationError) -> Refused:
    """Convert the first validation error to a refusal."""
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
    """Format a value of a client for an error message: short, and valid UTF-8."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text if len(text) <= 40 else text[:40] + "…"  # noqa: PLR2004
    text = printable(text)
    return f'"{text}"' if quote else text
