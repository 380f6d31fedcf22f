"""Validators of the protocol's frames, made from the published schema."""

import re
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend

from wsserver.schema import json_schema

__all__ = ["OF_CLIENT", "OF_SERVER", "of"]


def _pattern(
    validator: Validator, pattern: str, value: object, schema: Any
) -> Iterator[ValidationError]:
    """Match as ECMA-262 does: ``$`` matches only at the end of the text."""
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator: type[Draft202012Validator] = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"pattern": _pattern}
)
_SCHEMA = json_schema()


def of(name: str) -> Validator:
    """Return the validator of a definition in the schema."""
    return _Validator({"$ref": f"#/$defs/{name}", "$defs": _SCHEMA["$defs"]})


OF_CLIENT = of("client")
OF_SERVER = of("server")
