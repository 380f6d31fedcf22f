"""Replies are Markdown, which the page shows while it streams."""

import itertools
import json
import random
import re
from typing import Any

import pytest
from playwright.async_api import Page, Route, expect

import wsserver
from tests.browser.page import ask, box, idle, reply, text, visit
from tests.support.puppet import Puppet

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

# Each sample, and the HTML of its blocks without attributes of layout.
SAMPLES = {
    "a\nb\n\nc": "<p>a<br>b</p><p>c</p>",
    "## A `b`\nc": '<h4 aria-level="3">A <code>b</code></h4><p>c</p>',
    "## A\n# B\n### C\n## D\n# E": (
        '<h4 aria-level="3">A</h4><h3>B</h3><h5 aria-level="4">C</h5><h4>D</h4><h3>E</h3>'
    ),
    "#no\n-no\n1.no": "<p>#no<br>-no<br>1.no</p>",
    "**a b** *c* ``d`e`` _f_ ~~g~~": (
        "<p><strong>a b</strong> <em>c</em> <code>d`e</code> <em>f</em> <del>g</del></p>"
    ),
    "2 * 3 ** 4 snake_case_name \\*a\\* `d\n**e": (
        "<p>2 * 3 ** 4 snake_case_name *a* `d<br>**e</p>"
    ),
    "- a\n- b\n\nc": "<ul><li>a</li><li>b</li></ul><p>c</p>",
    "3. a\n   - b\n4. c": '<ol start="3"><li>a<ul><li>b</li></ul></li><li>c</li></ol>',
    "- a\n\n  b\n- c": "<ul><li><p>a</p><p>b</p></li><li><p>c</p></li></ul>",
    "- [x] a\n- [ ] b": "<ul><li>[done] a</li><li>[to do] b</li></ul>",
    "Title\n---\nb": '<h4 aria-level="3">Title</h4><p>b</p>',
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "> a\n> b\n\nc": "<blockquote><p>a<br>b</p></blockquote><p>c</p>",
    "| a | b |\n|:--|--:|\n| 1 | `x` |\n| 2<br>3 | |\n\nc": (
        '<table><thead><tr><th align="left">a</th><th align="right">b</th></tr></thead>'
        '<tbody><tr><td align="left">1</td><td align="right"><code>x</code></td></tr>'
        '<tr><td align="left">2<br>3</td><td align="right"></td></tr></tbody></table><p>c</p>'
    ),
    "```py\n**a**\n\nb\n```\nc": "[py|**a**\n\nb]<p>c</p>",
    "```\n``\n`` `": "[code|``\n`` `]",
    "````md\n```\nx\n```\n````\nb": "[md|```\nx\n```]<p>b</p>",
    "1. a\n\n   ```js\n   b\n     c\n   ```\n\n2. d": (
        "<ol><li><p>a</p>[js|b\n  c]</li><li><p>d</p></li></ol>"
    ),
    "~~~\na\n~~~": "[code|a]",
    "```\nab```\nc\n```\nd": "[code|ab```\nc]<p>d</p>",
    '[a](https://b.example/c "d") https://e.example': (
        '<p><a href="https://b.example/c">a</a> '
        '<a href="https://e.example">https://e.example</a></p>'
    ),
    "[a][1]\n\n[b][1]\n\n[1]: https://c.example": (
        '<p><a href="https://c.example">a</a></p><p><a href="https://c.example">b</a></p>'
    ),
    "It costs $5 and $10.": "<p>It costs $5 and $10.</p>",
    "H<sub>2</sub>O <kbd>Ctrl</kbd><br>x": "<p>H<sub>2</sub>O <kbd>Ctrl</kbd><br>x</p>",
    "a\r\nb\r\n\r\nc": "<p>a<br>b</p><p>c</p>",
    "": "",
}

LONG = {
    "prose": "Some **bold** words, and a [link](https://e.example/) that goes on.\n\n" * 2_500,
    "code": "```python\n" + "def f(x: int) -> str: return str(x)\n" * 4_000 + "```\n",
    "table": "| a | b |\n|---|---|\n" + "| **c** | `d` and more |\n" * 5_000,
    "formulas": "A formula $x^2$ in a sentence that is longer.\n\n" * 2_500,
}

RENDER = """async (pieces) => {
    const { Markdown } = await import('/markdown.js')
    const root = document.createElement('div')
    document.body.append(root)
    const markdown = new Markdown(root)
    for (const piece of pieces) markdown.write(piece)
    await markdown.end()
    root.remove()
    for (const figure of root.querySelectorAll('figure')) {
        const [language, code] = ['.language', 'code'].map((part) =>
            figure.querySelector(part).textContent)
        figure.replaceWith(`[${language}|${code}]`)
    }
    for (const box of root.querySelectorAll('.task')) {
        box.replaceWith(`[${box.ariaLabel.toLowerCase()}]`)
    }
    for (const table of root.querySelectorAll('.table')) table.replaceWith(...table.childNodes)
    for (const element of root.querySelectorAll('*')) {
        for (const name of ['dir', 'class', 'target', 'rel', 'title']) element.removeAttribute(name)
    }
    return root.innerHTML.replaceAll('\\n<', '<').replaceAll('>\\n', '>')
}"""


async def render(page: Page, pieces: list[str]) -> str:
    html: str = await page.evaluate(RENDER, pieces)
    return html


def chopped(written: str, size: int) -> list[str]:
    return [written[at : at + size] for at in range(0, len(written), size)]


@pytest.mark.parametrize(("written", "shown"), SAMPLES.items())
async def test_markdown_is_the_same_however_it_arrives(
    page: Page, written: str, shown: str
) -> None:
    for size in (10_000, 1, 2, 3, 7):
        assert await render(page, chopped(written, size)) == shown, size


async def test_any_mixture_of_blocks_is_the_same_however_it_arrives(page: Page) -> None:
    chance = random.Random(7)
    samples = [sample for sample in SAMPLES if "[1]" not in sample]
    for _ in range(60):
        blocks = chance.choices(samples, k=8)
        written = "\n\n".join(blocks)
        whole = await render(page, [written])
        places = sorted(chance.sample(range(len(written)), 20))
        pieces = [written[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]
        assert await render(page, pieces) == whole, written
        assert await render(page, chopped(written, 1)) == whole, written


async def stream(page: Page, pieces: list[str], look: str) -> list[Any]:
    """Return the value of an expression about `root` after each piece, and at the end."""
    found: list[Any] = await page.evaluate(
        """async (pieces) => {
            const { Markdown } = await import('/markdown.js')
            const root = document.createElement('div')
            const markdown = new Markdown(root)
            const found = []
            for (const piece of pieces) {
                markdown.write(piece)
                await new Promise((resolve) => setTimeout(resolve, 20))
                found.push(LOOK)
            }
            await markdown.end()
            found.push(LOOK)
            return found
        }""".replace("LOOK", look),
        pieces,
    )
    return found


@pytest.mark.parametrize(
    ("written", "marks"),
    [
        ("See [the link](https://example.com/page) and **more** here.", ("[", "](", "**")),
        ("Some *emphasis*, `code` and ~~more~~ text.", ("*", "`", "~")),
        ("Intro\n\n| Name | Size |\n|:---|---:|\n| a | 1 |\n| b | 2 |\n", ("|", "--")),
        ("Intro\n\n```python\nx = 1\n```\n\nEnd", ("`",)),
        ("- one\n- two\n  1. three\n\n## Head\n", ("- ", "1.", "#")),
        ("Title\n=====\n\ntext", ("=",)),
        ("> quoted\n> text", (">",)),
        ("- [x] done\n- [ ] open", ("[",)),
        ('A\n\n[1]: <https://b.example> "t"\n\nc [d][1] e', ("1", "[", "]", "<", ":")),
    ],
)
async def test_half_a_mark_is_never_shown(page: Page, written: str, marks: tuple[str, ...]) -> None:
    shown = await stream(page, chopped(written, 1), "root.textContent")
    assert not [step for step in shown if any(mark in step for mark in marks)]


async def test_text_only_grows_while_it_streams(page: Page) -> None:
    written = "A **b _c_ d** `e f` [g h](https://i.example) ~~j~~\n\n- k **l**\n- m\n\n> n _o_ p\n"
    shown = await stream(page, chopped(written, 1), "root.textContent.replaceAll('\\n', '')")
    for before, after in itertools.pairwise(shown):
        assert after.startswith(before)


@pytest.mark.parametrize("written", ["prose", "code", "table", "formulas"])
async def test_long_reply_is_rendered_in_slices(page: Page, written: str) -> None:
    """Count what is shown from frame to frame; each look at the clock takes a millisecond."""
    shown: list[int] = await page.evaluate(
        """async (text) => {
            let now = 0
            performance.now = () => ++now
            const { Markdown } = await import('/markdown.js')
            const root = document.body.appendChild(document.createElement('div'))
            const shown = []
            const look = () => {
                shown.push(root.textContent.length)
                frame = requestAnimationFrame(look)
            }
            let frame = requestAnimationFrame(look)
            const markdown = new Markdown(root, true)
            markdown.write(text)
            await markdown.end()
            cancelAnimationFrame(frame)
            shown.push(root.textContent.length)
            root.remove()
            return shown
        }""",
        LONG[written],
    )
    assert shown[-1] > 60_000
    assert max(after - before for before, after in itertools.pairwise([0, *shown])) < 25_000


async def test_mark_is_at_the_end_of_running_reply(page: Page, puppet: Puppet) -> None:
    marked = """() => [...document.querySelectorAll('.text, .text *')]
        .filter((each) => getComputedStyle(each, '::after').content === '""'
            && getComputedStyle(each, '::after').display !== 'none')
        .map((each) => each.matches('.text') ? 'nothing' : each.lastChild.textContent.trim())"""
    await ask(page, "Go")
    model = await puppet.reply()
    steps = {
        "": "nothing",
        "First": "First",
        " and **more**\n\n## Head": "Head",
        "\n\n- one\n- two": "two",
        "\n  - three\n\n  four": "four",
        "\n\n| a |\n|--|\n| b |\n\n": "",
        "last": "last",
    }
    for said, end in steps.items():
        if said:
            model.say(said)
        await page.wait_for_function(f"end => String(({marked})()) === end", arg=end)
    model.end()
    await page.wait_for_function(f"() => String(({marked})()) === ''")
    await expect(text(page).locator("[data-end]")).to_have_count(0)


async def test_end_of_reply_styles_only_what_changes(page: Page, puppet: Puppet) -> None:
    browser = page.context.browser
    assert browser is not None
    await ask(page, "Go")
    model = (await puppet.reply()).say("Words.\n\n- item\n\n" * 300 + "The end")
    await expect(text(page).locator("p").last).to_have_text("The end")
    await browser.start_tracing(page=page, categories=["devtools.timeline"])
    model.end()
    await expect(reply(page)).to_have_attribute("aria-busy", "false")
    await page.evaluate("() => new Promise((done) => setTimeout(done, 100))")
    events = json.loads(await browser.stop_tracing())["traceEvents"]
    styled = [each["args"] for each in events if each["name"] == "UpdateLayoutTree"]
    assert 0 < max(args.get("elementCount", 0) for args in styled) < 300


async def test_complete_blocks_are_not_rendered_again(page: Page) -> None:
    changes = await page.evaluate(
        """async () => {
            const pause = () => new Promise((resolve) => setTimeout(resolve, 500))
            const { Markdown } = await import('/markdown.js')
            const root = document.createElement('div')
            const markdown = new Markdown(root)
            markdown.write('# A\\n\\nb **c**\\n\\n- d\\n- e\\n\\n```js\\nlet f\\n```\\n\\n')
            markdown.write('| g |\\n|--|\\n| h |\\n\\nlast ')
            await pause()
            const first = [...root.children].slice(0, -1)
            let changes = 0
            const observer = new MutationObserver((records) => { changes += records.length })
            for (const each of first) {
                const all = { childList: true, attributes: true, characterData: true }
                observer.observe(each, { subtree: true, ...all })
            }
            for (let piece = 0; piece < 50; piece++) markdown.write('words **and** more. ')
            await pause()
            markdown.write('\\n\\nanother')
            await markdown.end()
            await pause()
            const kept = first.every((each, place) => root.children[place] === each)
            return [first.length, kept, changes]
        }"""
    )
    assert changes == [5, True, 0]


LATE = {
    "paragraph": "[name %][k%] and [k%] here.\n\n" * 30,
    "list": "- item [name %][k%]\n  1. nested [k%]\n" * 40,
    "table": "| [head][k%] | b |\n|--|--|\n" + "| row [name %][k%] | [k%] |\n" * 40,
    "quote": "> quoted [name %][k%]\n> - [k%]\n\n" * 20,
    "long paragraph": "words [name %][k%] and more words. " * 200,
    "footnote": "[^n]: note [name %][k%]\n\n",
}


def numbered(written: str) -> str:
    """Put numbers from 0 to 2 for the names of links."""
    counter = itertools.count()
    return re.sub(r"k%|%", lambda match: match[0].replace("%", str(next(counter) % 3)), written)


@pytest.mark.parametrize("kind", LATE)
async def test_link_is_the_same_wherever_its_definition_is(page: Page, kind: str) -> None:
    async def rendered(written: str, size: int) -> str:
        return re.sub(r"note-\d+-", "note-", await render(page, chopped(written, size)))

    links = numbered(LATE[kind])
    definitions = "".join(f"[k{n}]: https://e.example/{n}\n" for n in range(3))
    first, last = f"{definitions}\nBegin.\n\n{links}", f"Begin.\n\n{links}\n\n{definitions}"
    shown = await rendered(first, 50)
    assert shown.count("<a href") == links.count("[k")
    for size in (10_000, 200, 7):
        assert await rendered(last, size) == shown, size


async def test_definition_that_arrives_in_parts_is_whole(page: Page) -> None:
    written = '[a][b]\n\n[b]: https://b.example/long "title"\n\n[c][d]\n\n[d]: https://d.example'
    look = "[...root.querySelectorAll('a')].map(({ href, title }) => [href, title])"
    *_, shown = await stream(page, chopped(written, 1), look)
    assert shown == [["https://b.example/long", "title"], ["https://d.example/", ""]]


async def test_links_with_late_definitions_are_rendered_in_slices(page: Page) -> None:
    """Count the links from frame to frame; each look at the clock takes a millisecond."""
    numbers = range(1000)
    links = "".join(f"[a {number}][{number}] and **more** words.\n\n" for number in numbers)
    definitions = "".join(f"[{number}]: https://e.example/{number}\n" for number in numbers)
    shown: list[int] = await page.evaluate(
        """async (text) => {
            let now = 0
            performance.now = () => ++now
            const { Markdown } = await import('/markdown.js')
            const root = document.body.appendChild(document.createElement('div'))
            const shown = []
            const look = () => {
                shown.push(root.querySelectorAll('a[href]').length)
                frame = requestAnimationFrame(look)
            }
            let frame = requestAnimationFrame(look)
            const markdown = new Markdown(root)
            markdown.write(text)
            await markdown.end()
            cancelAnimationFrame(frame)
            shown.push(root.querySelectorAll('a[href]').length)
            root.remove()
            return shown
        }""",
        links + definitions,
    )
    assert shown[-1] == 1000
    assert max(after - before for before, after in itertools.pairwise([0, *shown])) < 900


async def test_late_definition_changes_only_the_links(page: Page) -> None:
    changes = await page.evaluate(
        """async () => {
            const pause = () => new Promise((resolve) => setTimeout(resolve, 300))
            const { Markdown } = await import('/markdown.js')
            const root = document.body.appendChild(document.createElement('div'))
            const markdown = new Markdown(root)
            const parts = ['# A', 'a [b][c] *d*', '- [e][f]', '```js\\nlet [g]\\n```', 'last']
            for (const part of parts) {
                markdown.write(part + '\\n\\n')
                await pause()
            }
            const blocks = [...root.children]
            getSelection().selectAllChildren(blocks[1].querySelector('em'))
            const changed = new Set()
            const observer = new MutationObserver((records) => {
                for (const { target } of records) {
                    changed.add(blocks.findIndex((block) => block.contains(target)))
                }
            })
            observer.observe(root, { childList: true, characterData: true, subtree: true })
            markdown.write('[c]: https://c.example\\n')
            await markdown.end()
            await pause()
            const kept = blocks.every((block, place) => root.children[place] === block)
            const found = [kept, [...changed], String(getSelection()), blocks[1].innerHTML]
            root.remove()
            return found
        }"""
    )
    link = '<a href="https://c.example" target="_blank" rel="noopener noreferrer nofollow">b</a>'
    assert changes == [True, [1], "d", f"a {link} <em>d</em>"]


async def test_selection_survives_in_the_last_block(page: Page, puppet: Puppet) -> None:
    await ask(page, "Go")
    model = (await puppet.reply()).say("Select **these** words")
    await expect(text(page).locator("strong")).to_have_text("these")
    await page.evaluate("getSelection().selectAllChildren(document.querySelector('.text strong'))")
    model.say(" while *more* text arrives").end()
    await idle(page)
    await expect(text(page)).to_have_text("Select these words while more text arrives")
    assert await page.evaluate("getSelection().toString()") == "these"


@pytest.mark.parametrize(
    "written",
    [
        "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1))",
        "[c](data:text/html,<script>alert(1)</script>)",
        "[a](java\nscript:alert(1)) [b](vbscript:x) [c](//evil.example) [d](/path) [e](x:y)",
        "<javascript:alert(1)> <a href='javascript:alert(1)'>x</a> <a href=https://e.example>y</a>",
        "<img src=x onerror=alert(1)> <svg onload=alert(1)> <iframe srcdoc=x>",
        "<script>alert(1)</script>",
        "<style>*{display:none}</style> <form action=/x><input name=id><button>x</button></form>",
        "<b onclick=alert(1)>a</b> <details open ontoggle=alert(1)>x</details>",
        "<div id=prompt>x</div> <p id=send class=stop>y</p> <b id=log>z</b>",
        "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
        "$\\href{javascript:alert(1)}{x}$ $\\includegraphics{https://t.example/x.png}$",
        "$\\htmlId{prompt}{x}$ $\\htmlStyle{position:fixed}{x}$",
        "![a](https://tracker.example/p.png) ![b](javascript:alert(1))",
        "![c](data:image/svg+xml,<svg/>)",
        "![a](/api/chat/x) ![b](logout) [![c](/logout)](/logout) ![d][e]\n\n[e]: /logout",
        "```<img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```",
        "| <script>alert(1)</script> |\n|--|\n| <img src=x onerror=alert(1)> |",
        '[a](https://e.example "\\" onmouseover=alert(1)")',
        "[^<img>]: <img src=x onerror=alert(1)>\n\n[^<img>]",
    ],
)
async def test_hostile_markdown_is_harmless(page: Page, puppet: Puppet, written: str) -> None:
    """The page of the fixture also fails for a dialog, and for a report of its security policy."""
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for pieces in ([written], chopped(written, 1)):
        number = len(puppet.replies)
        await ask(page, "Go")
        (await puppet.reply(number)).say(*pieces).end()
        await idle(page)
    unsafe = await page.evaluate(
        """() => [...document.querySelectorAll('.text *')].filter((element) => {
            const names = [...element.attributes].map(({ name }) => name)
            const { localName, id, href } = element
            return element.matches('script, iframe, style, form, input, object, embed, img')
                || (id && !id.startsWith('note-'))
                || names.some((name) => name.startsWith('on') || name === 'srcdoc')
                || (localName === 'a' && href && !/^(https?|mailto|tel):/.test(href)
                    && !element.dataset.ref)
        }).map((element) => element.outerHTML)"""
    )
    assert unsafe == []
    assert [url for url in requests if "/libraries/" not in url] == []
    await expect(box(page)).to_be_visible()


async def test_browser_asks_no_name_server_for_hosts_of_links(
    page: Page, server: wsserver.Server
) -> None:
    """A link of a model can have a secret in its host, which a lookup would tell."""
    response = await page.goto(server.page)
    assert response is not None
    assert response.headers["x-dns-prefetch-control"] == "off"


async def test_links_open_in_a_tab_that_knows_nothing(page: Page, puppet: Puppet) -> None:
    await ask(page, "Go")
    (await puppet.reply()).say("[a](https://a.example) ![b](https://b.example/b.png)").end()
    for name, address in (("a", "https://a.example/"), ("b", "https://b.example/b.png")):
        link = text(page).get_by_role("link", name=name)
        assert await link.evaluate("({ href, target, rel }) => [href, target, rel]") == [
            address,
            "_blank",
            "noopener noreferrer nofollow",
        ]


async def test_formulas_are_set_by_katex(page: Page, puppet: Puppet) -> None:
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
    await ask(page, "Without")
    (await puppet.reply()).say("It costs $5.").end()
    await idle(page)
    assert "math.js" not in loaded
    await ask(page, "With")
    said = (
        "Inline $a^2$ and \\(b^2\\).\n\n$$\n\\frac{1}{2}\n$$\n\n\\[ c \\]\n\n- item $d$\n\n$\\bad{$"
    )
    (await puppet.reply(1)).say(*chopped(said, 3)).end()
    await idle(page)
    await expect(text(page).locator(".katex")).to_have_count(5)
    await expect(text(page).locator(".katex-display")).to_have_count(2)
    await expect(text(page).locator("p").last).to_have_text("\\bad{")
    assert "math.js" in loaded


async def test_colours_are_loaded_for_code_that_names_its_language(
    page: Page, puppet: Puppet
) -> None:
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url.rpartition("/")[2]))
    await ask(page, "Without")
    (await puppet.reply()).say("`if`\n\n```\nif\n```").end()
    await idle(page)
    assert "code.js" not in loaded
    code = "if x:\n    return None\n"
    await ask(page, "With")
    (await puppet.reply(1)).say(
        *chopped(f"- item\n\n  ```py\n  if\n  ```\n\n```py\n{code}```\n", 3)
    ).end()
    await expect(text(page).locator(".hljs-keyword")).to_have_text(["if", "if", "return"])
    assert await text(page).locator("code").last.text_content() == code.strip()
    assert loaded.count("code.js") == 1


async def test_code_is_shown_although_its_colours_cannot_be_loaded(
    page: Page, puppet: Puppet
) -> None:
    await page.route(
        "**/libraries/code.js",
        lambda route: route.fulfill(body="export {}", content_type="text/javascript"),
    )
    await ask(page, "With")
    (await puppet.reply()).say(*chopped("```py\nif x:\n    pass\n```\n\nThe end", 3)).end()
    await expect(text(page)).to_contain_text("The end")
    assert await text(page).locator("code").text_content() == "if x:\n    pass"


async def test_footnotes_are_numbered_and_reached(page: Page, puppet: Puppet) -> None:
    await ask(page, "Go")
    (await puppet.reply()).say(
        "A[^x] and B[^y].\n\n" + "p\n\n" * 80 + "[^y]: Why.\n[^x]: X *is*."
    ).end()
    await idle(page)
    address = page.url
    marks = text(page).locator("p:first-child sup a")
    await expect(marks).to_have_text(["1", "2"])
    notes = text(page).locator("[data-note]")
    await expect(notes).to_have_text(["2 Why.", "1 X is."])
    await marks.first.click()
    await expect(notes.last).to_be_in_viewport()
    assert page.url == address, "the address keeps the conversation"


async def test_right_to_left_text_has_its_direction(page: Page, puppet: Puppet) -> None:
    await ask(page, "اكتب")
    (await puppet.reply()).say(
        "نص عربي\n\n1. عنصر\n\n> قول\n\n| عمود |\n|--|\n\nEnglish\n\n- a\n\n```\ncode\n```"
    ).end()
    await idle(page)
    await expect(text(page).locator("pre")).to_have_count(1)
    directions = (
        await text(page)
        .locator("p, ol, ul, li, blockquote, table, pre")
        .evaluate_all("(all) => all.map((each) => getComputedStyle(each).direction)")
    )
    assert directions == [*["rtl"] * 6, *["ltr"] * 4]
    direction = await page.locator(".you p").evaluate("(p) => getComputedStyle(p).direction")
    assert direction == "rtl"


async def test_code_can_be_copied_wrapped_and_folded(page: Page, puppet: Puppet) -> None:
    long = "\n".join(f"line {number}" for number in range(100))
    await ask(page, "Code")
    said = f"1. Item:\n\n   ```py\n   if x:\n       y = 1\n   ```\n\n```js\n{long}\n```\n"
    (await puppet.reply()).say(*chopped(said, 50)).end()
    await idle(page)
    await expect(text(page).locator("figure")).to_have_count(2)
    short, other = await text(page).locator("figure").all()
    copy = short.get_by_role("button", name="Copy the code")
    await copy.click()
    await expect(short.get_by_role("button", name="Copied the code")).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == "if x:\n    y = 1"
    await expect(short.locator(".hljs-keyword")).to_have_text(["if"])
    await short.get_by_role("button", name="Wrap").click()
    await expect(short.get_by_role("button", name="Wrap")).to_have_attribute("aria-pressed", "true")
    await expect(short.locator("pre")).to_have_css("white-space", "pre-wrap")
    fold = other.locator(".fold")
    await expect(fold).to_have_text("Show fewer lines")
    height = await other.evaluate("(figure) => figure.offsetHeight")
    await page.reload()
    other = text(page).locator("figure").last
    await expect(other.locator(".fold")).to_have_text("Show all 100 lines")
    assert await other.evaluate("(figure) => figure.offsetHeight") < height / 2
    await other.locator(".fold").click()
    assert await other.evaluate("(figure) => figure.offsetHeight") == height


@pytest.mark.parametrize(
    ("unit", "blocks"),
    [
        ("word **bold** and `code` words. ", 3),
        ("x" * 31, 3),
        ("😀", 3),
        ("- an item with **bold** text\n", 1),
        ("1. item\n   - nested\n", 1),
    ],
    ids=["paragraph", "one word", "emoji", "list", "nested list"],
)
async def test_long_block_keeps_its_text(page: Page, unit: str, blocks: int) -> None:
    written = unit * (40_000 // len(unit))
    look = "[root.children.length, root.textContent.replaceAll(/\\s/g, '')]"
    *_, shown = await stream(page, chopped(written, 1000), look)
    marks = str.maketrans("", "", "*`- \n." if unit.startswith(("-", "1")) else "*` ")
    assert shown[1].translate(marks) == written.replace("1.", "").translate(marks)
    assert shown[0] == 1 if blocks == 1 else shown[0] >= blocks


@pytest.mark.parametrize(
    "hostile",
    [
        *(" " * 12_000 + "x", "|" * 12_000 + "x", "*" * 12_000, "`" * 12_000, "$" * 12_000),
        *("- " * 6_000, "[^" * 6_000, "\\[" * 6_000, "|-" * 6_000 + "\n", "_a" * 6_000),
        "> " * 3_000 + "x",
        " " * 250_000 + "x",
        "[a]:" + " " * 100_000 + "x y" + " z" * 3_000,
        "[a]: b" + " " * 50_000 + "x y" + " z" * 3_000,
        "][" * 50_000,
        "[a][" + "[" * 50_000,
        "[a] " * 10_000 + "\n\n" + "".join(f"[{number}]: b\n" for number in range(10_000)),
    ],
)
@pytest.mark.timeout(20)
async def test_hostile_text_costs_no_more_than_other_text(page: Page, hostile: str) -> None:
    """A pattern that backtracks would take minutes, and this test would not end in time."""
    *_, shown = await stream(page, chopped(hostile, 1000), "root.children.length")
    assert shown > 0


async def test_block_nested_too_deeply_is_plain_text(page: Page, puppet: Puppet) -> None:
    await ask(page, "Go")
    (await puppet.reply()).say("Before.\n\n" + "> " * 5_000 + "x\n\nAfter **all**.").end()
    await expect(text(page).locator("p").first).to_have_text("Before.")
    await expect(text(page)).to_contain_text("> > x")
    await expect(text(page)).to_contain_text("After")


async def test_long_quote_keeps_its_last_mark(page: Page) -> None:
    quote = "> word\n" * 4000
    *_, shown = await stream(page, [f"{quote}> 2 *"], "root.textContent.trimEnd().slice(-8)")
    assert shown == "word\n2 *"


async def test_long_table_stays_one_table(page: Page) -> None:
    rows = "".join(f"| {number} | **b** |\n" for number in range(2000))
    look = """[
        root.querySelectorAll('table').length,
        [...root.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent),
        root.lastChild?.textContent,
    ]"""
    *_, shown = await stream(page, chopped(f"| a | b |\n|---|---|\n{rows}\nThe end", 500), look)
    assert shown == [1, [str(number) for number in range(2000)], "The end"]


async def test_long_code_keeps_its_text_and_colours(page: Page) -> None:
    code = "".join(f"def f{number}(x):\n    return x\n" for number in range(2000))
    look = "[root.textContent, root.querySelectorAll('.hljs-keyword').length]"
    *_, shown = await stream(page, chopped(f"```python\n{code}```\n", 500), look)
    assert code.rstrip("\n") in shown[0]
    assert shown[1] == 4000


async def test_page_without_libraries_shows_plain_text(
    blank: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    async def leave_out(route: Route) -> None:
        await route.fulfill(body="export {}", content_type="text/javascript")

    await blank.route("**/libraries/markdown.js", leave_out)
    await visit(blank, server)
    await ask(blank, "Go")
    (await puppet.reply()).say("# A\n\n**b** <i>").end()
    await expect(text(blank)).to_contain_text("<i>")
    assert await text(blank).text_content() == "# A\n\n**b** <i>"
    await expect(text(blank)).to_have_css("white-space", "pre-wrap")
