"""Text that UTF-8 can encode, and the estimate of its tokens."""

import pytest

from wsserver.text import tokens_in, well_formed


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("plain", "plain"),
        ("naïve 😀", "naïve 😀"),
        ("\ud83d\ude00", "😀"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00\ud83d!", "\ufffd\ufffd!"),
    ],
)
def test_lone_surrogates_become_replacement_characters(broken: str, whole: str) -> None:
    assert well_formed(broken) == whole


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 0, 0),
        ("a", 1, 1),
        ("some words here and there " * 100, 600, 700),
        ("0123456789" * 100, 300, 400),
        ("if (x[i] != 0) { y += f(x[i]); }\n" * 100, 850, 1300),
        ("Пример текста " * 100, 600, 800),
        ("漢字仮名交じり文" * 250, 2000, 3000),
        ("한국어 문장 " * 100, 500, 800),
        ("😀" * 100, 100, 300),
        ("\ud83d", 1, 3),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_tokens_are_estimated_by_script(text: str, least: int, most: int) -> None:
    assert least <= tokens_in(text) <= most
