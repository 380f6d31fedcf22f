"""Markdown that streams to a terminal: parts are printed once, and nothing is lost."""

import re
from time import time
from typing import ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wsserver.terminal.blocks import LONGEST_BLOCK, LONGEST_PARAGRAPH
from wsserver.terminal.rendering import MarkdownRenderer, Painter, PlainRenderer, Renderer
from wsserver.terminal.wording import age, escape, quoted

ANSWER = """\
# A title
Some *text* with `code`, **bold** and Vec<String>.

1. one
2. two
   ```python
   x = 1
   ```
3. three
- a
- b

  more of b

| a | b |
|---|--:|
| 中文 | 1 |

> a quote

~~~~rust title
fn main() {
    ~~~
}
~~~~
The end of [it](http://example.org/) ![a](b.png) <div>

[1]: http://example.org/
"""


def plain(lines: list[str]) -> str:
    """Return lines without colours."""
    return "\n".join(re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines)


def streamed(renderer: Renderer, chunks: list[str], width: int = 60) -> str:
    """Return what is printed for a text that arrives in chunks."""
    lines: list[str] = []
    for chunk in chunks:
        renderer.feed(escape(chunk))
        lines += renderer.take(width)
        renderer.live(width)
    return plain(lines + renderer.take(width, final=True))


def cut(text: str, sizes: list[int]) -> list[str]:
    """Return the text in chunks; the last size repeats."""
    chunks: list[str] = []
    while text:
        size = sizes[min(len(chunks), len(sizes) - 1)]
        chunks.append(text[:size])
        text = text[size:]
    return chunks


def test_blocks_are_rendered() -> None:
    assert streamed(MarkdownRenderer(Painter()), [ANSWER]) == (
        "A title\n\n"
        "Some text with code, bold and Vec<String>.\n\n"
        " 1 one\n 2 two\n   python\n   x = 1\n 3 three\n\n"
        " • a\n • b\n   more of b\n\n"
        " a     b\n ───────\n 中文  1\n\n"
        "▌ a quote\n\n"
        "~~~~rust title\nfn main() {\n    ~~~\n}\n~~~~\n\n"
        "The end of it (http://example.org/) 🖼 a (b.png) <div>\n\n"
        "[1]: http://example.org/"
    )


@given(st.lists(st.integers(1, 40), min_size=1))
def test_chunks_do_not_change_what_is_printed(sizes: list[int]) -> None:
    whole = streamed(MarkdownRenderer(Painter()), [ANSWER])
    assert streamed(MarkdownRenderer(Painter()), cut(ANSWER, sizes)) == whole


class TestEveryWord:
    """Words are printed in their order, whatever is between them."""

    pieces: ClassVar = st.sampled_from(
        ["\n", "\n\n", " ", "- ", "1. ", "> ", "# ", "```\n", "~~~", "**", "*", "`", "|", "---\n"]
    ) | st.sampled_from(["    ", "<b>", "[", "](", ")", "$", "_", "\\", "&amp;", "=\n", "w"])

    @given(st.lists(pieces, max_size=60), st.lists(st.integers(1, 9), min_size=1))
    @example(["- ", "~~~", "w"], [1])
    def test_is_printed_once(self, pieces: list[str], sizes: list[int]) -> None:
        count = iter(range(len(pieces)))
        words = [f"word{next(count)}x" if piece == "w" else piece for piece in pieces]
        text = "".join(words)
        shown = streamed(MarkdownRenderer(Painter()), cut(text, sizes))
        # An address in a link may have them too; a table may break them over two lines.
        for word in re.findall(r"word\d+x", text):
            assert shown.replace("\n", "").count(word) >= 1, (text, shown)


def test_complete_blocks_are_printed_before_end() -> None:
    renderer = MarkdownRenderer(Painter())
    renderer.feed("One\n\nTwo\nthree")
    assert plain(renderer.take(60)) == "One"
    assert plain(renderer.live(60)) == "\nTwo three"
    renderer.feed("\n\n")
    assert renderer.take(60) == []
    renderer.feed("- a\n- b")
    assert plain(renderer.take(60)) == "\nTwo three"
    renderer.feed("\n")
    assert plain(renderer.take(60)) == "\n • a"
    assert plain(renderer.live(60)) == " • b"


def test_lines_of_code_are_printed_one_by_one() -> None:
    renderer = MarkdownRenderer(Painter())
    renderer.feed("```python\nif x:\n    y")
    assert plain(renderer.take(60)) == "```python\nif x:"
    assert plain(renderer.live(60)) == "    y"
    renderer.feed("()\n```")
    assert plain(renderer.take(60)) == "    y()"


def test_long_line_of_code_is_not_broken() -> None:
    code = "x = '" + 200 * "y" + "'"
    assert streamed(MarkdownRenderer(Painter()), [f"```\n{code}\n```\n"], 40).split("\n")[1] == code


@pytest.mark.parametrize("word", ["lorem", "中文字", "🧑‍🚀"])
def test_long_paragraph_is_printed_in_parts_without_a_visible_cut(word: str) -> None:
    text = " ".join(f"{word}{number}" for number in range(400))
    renderer = MarkdownRenderer(Painter())
    printed: list[str] = []
    for chunk in cut(text, [50]):
        renderer.feed(chunk)
        printed += renderer.take(40)
        assert len(renderer.live(40)) <= LONGEST_PARAGRAPH + 3
    printed += renderer.take(40, final=True)
    assert plain(printed) == streamed(MarkdownRenderer(Painter()), [text], 40)


def test_endless_line_is_cut() -> None:
    renderer = MarkdownRenderer(Painter())
    printed: list[str] = []
    for _ in range(30):
        renderer.feed(10_000 * "|")
        printed += renderer.take(100)
    assert printed
    printed += renderer.take(100, final=True)
    assert "".join(printed).count("|") == 300_000
    assert LONGEST_BLOCK < 100_000


def test_long_code_span_is_not_cut() -> None:
    text = "`" + " ".join(f"word{number}" for number in range(200)) + "`"
    renderer = MarkdownRenderer(Painter())
    renderer.feed(text)
    assert renderer.take(40) == []
    renderer.feed(" and more")
    printed = renderer.take(40, final=True)
    assert "`" not in "".join(printed)
    assert plain(printed).split() == [*text.strip("`").split(), "and", "more"]


def test_long_table_shows_its_source_until_it_is_complete() -> None:
    renderer = MarkdownRenderer(Painter())
    renderer.feed("| a | b |\n|---|---|\n" + "".join(f"| x{n} | y |\n" for n in range(400)))
    assert renderer.take(40) == []
    assert renderer.live(40)[-2] == "| x399 | y |"
    renderer.feed("\nEnd\n")
    printed = plain(renderer.take(40, final=True)).split("\n")
    assert [line.split() for line in printed[2:4]] == [["x0", "y"], ["x1", "y"]]
    assert printed[-3].split() == ["x399", "y"]
    assert printed[-1] == "End"


def test_endless_table_stays_a_table() -> None:
    renderer = MarkdownRenderer(Painter())
    printed: list[str] = []
    renderer.feed("Before\n\n| a | b |\n|---|---|\n")
    for number in range(4500):
        renderer.feed(f"| {number} | some text |\n")
        if not number % 500:
            printed += renderer.take(100)
    assert printed
    renderer.feed("\nAfter\n")
    printed += renderer.take(100, final=True)
    lines = plain(printed).split("\n")
    rows = [line.split()[0] for line in lines if "some text" in line]
    assert rows == [str(number) for number in range(4500)]
    assert "|" not in "".join(lines)
    assert 2 <= [line.split() for line in lines].count(["a", "b"]) < 10


@pytest.mark.parametrize("line", ["|" + 70_000 * "a|", "| " + 70_000 * "a" + " |"])
def test_endless_row_of_a_table_is_cut(line: str) -> None:
    renderer = MarkdownRenderer(Painter())
    renderer.feed(f"| a |\n|---|\n{line}")
    printed = renderer.take(100)
    renderer.feed("\n| b |\n| c |\n")
    printed += renderer.take(100)
    printed += renderer.take(100, final=True)
    assert plain(printed).count("c") == 1


def test_narrow_table_shows_all_text() -> None:
    table = "| one | two |\n|---|---|\n| a long cell | incomprehensibilities |\n"
    shown = streamed(MarkdownRenderer(Painter()), [table], width=16)
    assert "…" not in shown
    cells = [line.split() for line in shown.split("\n")]
    assert "".join(cell[-1] for cell in cells[2:] if cell) == "incomprehensibilities"


@pytest.mark.parametrize("width", [1, 20, 60])
def test_table_of_many_columns_shows_all_text(width: int) -> None:
    names = [f"x{number}y" for number in range(20)]
    row = f"| {' | '.join(names)} |\n"
    shown = streamed(MarkdownRenderer(Painter()), [row, "|" + 20 * "---|" + "\n", row], width)
    together = "".join(shown.split())
    assert [together.count(name) for name in names] == [2] * 20


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("".join(f"{'  ' * level}- level {level}\n" for level in range(40)), "level 39"),
        (">" * 100 + "deep", "deep"),
    ],
    ids=["lists", "quotes"],
)
def test_blocks_deeper_than_the_parser_reads_are_shown_as_source(source: str, last: str) -> None:
    assert last in streamed(MarkdownRenderer(Painter()), [source], width=100)


def test_endless_list_item_is_cut_at_a_line() -> None:
    renderer = MarkdownRenderer(Painter())
    printed: list[str] = []
    for number in range(9000):
        renderer.feed(f"- {number}\n" if not number else f"  line {number}\n")
        if not number % 500:
            printed += renderer.take(100)
    assert printed
    words = plain(printed + renderer.take(100, final=True)).split()
    assert [word for word in words if word.isdecimal()] == [str(n) for n in range(9000)]


def test_control_characters_do_not_reach_the_terminal() -> None:
    hostile = (
        "a\x1b]52;c;ZXZpbA==\x07 `\x1b[2J` &#x202e;b &#27;[31m\n```\n\x1b]0;t\x07\x9b2J\n```\n"
    )
    hostile += "[x](http://a/\x1b]8;;evil\x07) ![\x1b[1m](\x1b)\n\n|\x1b[5m|\n|-|\n|\u202e|\n"
    renderer = MarkdownRenderer(Painter())
    renderer.feed(escape(hostile))
    lines = renderer.take(60) + renderer.live(60) + renderer.take(60, final=True)
    left = plain(lines)
    assert "\\x1b]52;c;ZXZpbA==\\x07" in left
    assert all(c.isprintable() or c == "\n" for c in left), ascii(left)
    assert not set(left) & set("\u202e\x9b\x1b\x07")


def test_no_color_keeps_only_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    source = "`code` and **bold**\n```python\ndef f(): pass\n```\n"
    for no_color in (False, True):
        monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
        renderer = MarkdownRenderer(Painter())
        renderer.feed(source)
        text = "".join(renderer.take(60, final=True))
        assert "\x1b[1m" in text
        assert (re.search(r"\x1b\[[\d;]*3\d|9[0-7]m", text) is None) is no_color


def test_plain_text_is_unchanged() -> None:
    assert streamed(PlainRenderer(), cut(ANSWER, [7])) + "\n" == ANSWER
    assert streamed(PlainRenderer(), cut(ANSWER + "no end", [7])) == ANSWER + "no end"


def test_plain_text_shows_end_of_line_that_grows() -> None:
    renderer = PlainRenderer()
    renderer.feed("one\n" + 95 * "x")
    assert renderer.take(40) == ["one"]
    assert renderer.live(40) == [40 * "x", 40 * "x", 15 * "x"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode 🧑‍🚀\n\ttab", "plain, ünïcode 🧑‍🚀\n\ttab"),
        ("\x1b[2J\r\x00\x7f", r"\x1b[2J\r\x00\x7f"),
        ("\x85\x9b", r"\x85\x9b"),
        ("abc\u202edcb\u2066", r"abc\u202edcb\u2066"),
    ],
)
def test_escape_keeps_line_ends_and_tabs(text: str, shown: str) -> None:
    assert escape(text) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-5, "now"), (59, "now"), (3599, "59 min ago"), (90000, "1 d ago")]
)
def test_age_has_one_unit(seconds: float, shown: str) -> None:
    assert age(time() - seconds) == shown


def test_long_prompt_is_shown_in_part() -> None:
    assert quoted("one\ntwo\x1b") == "> one\n  two\\x1b"
    assert quoted("\n".join(map(str, range(25)))).endswith("\n  19\n  [15 more characters]")
    assert quoted(2500 * "x") == f"> {2000 * 'x'}\n  [500 more characters]"
