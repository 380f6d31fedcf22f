"""Text that UTF-8 can encode, and an estimate of its tokens."""

_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ "
_FIRST_OF_TWO, _FIRST_OF_THREE, _FIRST_OF_FOUR = (  # the first byte of a character in UTF-8
    bytes(range(first, end)) for first, end in ((0xC0, 0xE0), (0xE0, 0xF0), (0xF0, 0xF8))
)


def well_formed(text: str) -> str:
    """Return a text that UTF-8 can encode.

    A string that comes from JSON can have half of a surrogate pair. Two halves side by side become
    the character that they encode; a half alone becomes U+FFFD.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def tokens_in(text: str) -> int:
    """Return an estimate of the tokens of a text, rounded up.

    One token counts as 4 English letters or spaces, as 3 digits or signs, as 2 letters of Greek,
    Cyrillic, Hebrew or Arabic, as 4/5 of a Chinese, Japanese or Korean character, or as half an
    emoji.
    """
    data = text.encode(errors="surrogatepass")

    def count(kind: bytes) -> int:
        return len(data) - len(data.translate(None, kind))

    letters = count(_LETTERS)
    if text.isascii():
        return -(-(3 * letters + 4 * (len(data) - letters)) // 12)
    two, three, four = map(count, (_FIRST_OF_TWO, _FIRST_OF_THREE, _FIRST_OF_FOUR))
    signs = len(data) - letters - 2 * two - 3 * three - 4 * four
    return -(-(3 * letters + 4 * signs + 6 * two + 15 * three + 24 * four) // 12)
