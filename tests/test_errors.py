"""The messages of error codes are sentences for people."""

import re

import pytest

from wsserver import Code

PROGRAMMERS = {Code.INVALID_JSON, Code.INVALID_FRAME, Code.UNKNOWN_TYPE}
PROTOCOL_WORDS = re.compile(r"[`_]|\b(frames?|generations?|pieces?|sockets?|turns?|upstream|API)\b")


@pytest.mark.parametrize("code", sorted(set(Code) - PROGRAMMERS))
def test_message_of_code_is_plain_and_says_what_to_do(code: Code) -> None:
    assert not PROTOCOL_WORDS.search(code.meaning)
    sentences = re.findall(r"[A-Z][^.]*\.", code.meaning)
    assert " ".join(sentences) == code.meaning
    assert len(sentences) > 1 or code is Code.NOT_RUNNING  # there is nothing to do
