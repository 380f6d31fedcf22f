"""The states of the page: each function brings an empty page into one."""

import re
from collections.abc import Awaitable, Callable

from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import (
    ask,
    box,
    button,
    converse,
    cut,
    dismiss,
    idle,
    note,
    queue,
    state,
    text,
)
from tests.support.client import client
from tests.support.images import png
from tests.support.puppet import Puppet, Thinking
from wsserver import Code, ModelError

State = Callable[[Page, wsserver.Server, Puppet], Awaitable[None]]

TITLES = (
    "Plan a week in Kyoto in spring",
    "Why is the sky blue?",
    "Refactor the payment module so that it can be tested",
    "Names for a grey cat",
    "Letter to the landlord about the heating",
    "SQL: last row of each group",
    "Explain monads as if I were a gardener",
)


async def empty(page: Page, _server: wsserver.Server, _puppet: Puppet) -> None:
    await expect(page.get_by_role("list", name="Things to try")).to_be_visible()


async def thinking(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "How many piano tuners are there in Chicago?")
    thought = "Chicago has about 2.7 million people. If one household in twenty has a piano, "
    (await puppet.reply()).say(Thinking(thought * 3))
    await page.locator("summary").click()
    await expect(page.locator("details p")).to_contain_text("Chicago")


async def streaming(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "How many piano tuners are there in Chicago?")
    (await puppet.reply()).say(
        Thinking("Chicago has about 2.7 million people."),
        "About **100**, as an order of magnitude:\n\n1. There are 2.7 million people in Chicago, ",
        "so about a million households.\n2. One in twenty has",
    )
    await expect(text(page)).to_contain_text("One in twenty has")


async def formatted(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await converse(page, puppet, "Short, please: what is a derivative?", "A rate of change.")
    await ask(page, "Show me a table, a formula and some code")
    (await puppet.reply(1)).say(
        "Here is each of them.\n\n## A table\n\n| function | derivative | at 2 |\n|---|---|---:|\n"
        "| $x^2$ | $2x$ | 4 |\n| $\\sin x$ | $\\cos x$ | -0.416 |\n| `exp(x)` | `exp(x)` | 7.389 |"
        "\n\n"
        "## A formula\n\n$$f'(x) = \\lim_{h \\to 0} \\frac{f(x + h) - f(x)}{h}$$\n\n"
        "## Code\n\n- [x] with colours\n- [ ] without\n\n```python\ndef derivative(f, x, h=1e-6):\n"
        '    """Return the slope of f at x."""\n'
        "    return (f(x + h) - f(x - h)) / (2 * h)  # central\n```\n\n"
        "> A quote, with a [link](https://example.com/) and `code`.\n\nThat is all."
    ).end()
    await idle(page)
    await expect(page.locator(".katex").first).to_be_visible()


async def long_thread(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    for number, title in enumerate(TITLES[:6]):
        said = (
            f"**{number + 1}.** " + "The reply has several sentences, as replies of models do. " * 6
        )
        await ask(page, title)
        (await puppet.reply(number)).say(said + "\n\n" + said).end()
        await idle(page)
    await page.evaluate("scrollTo(0, 300)")
    await expect(page.get_by_role("button", name="Jump to the end")).to_be_visible()


async def long_prompt(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    prompt = "Explain this:\n\n" + "def double(x):\n    return x + x\n\n" * 30
    await converse(page, puppet, prompt, "The function doubles its argument.")
    await expect(page.get_by_role("button", name="Show the whole message")).to_be_visible()


async def error(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "Write a poem about rain")
    model = (await puppet.reply()).say("Rain taps on the window,")
    model.fail(ModelError(Code.OVERLOADED, retry_after=60))
    await expect(page.get_by_role("button", name="Retry in")).to_be_visible()


async def stopped(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "Count to a thousand")
    (await puppet.reply()).say("1, 2, 3, 4, 5")
    await expect(text(page)).to_contain_text("5")
    await button(page).click()
    await expect(note(page)).to_have_text("Stopped.")


async def waiting(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "Count to a thousand")
    (await puppet.reply()).say("1, 2, 3, 4, 5")
    await expect(text(page)).to_contain_text("5")
    await ask(page, "Then count backwards, please, and say how long both lists are")
    await ask(page, "And stop")
    await expect(queue(page)).to_have_count(2)
    await box(page).fill("A draft of the next")


async def editing(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await converse(page, puppet, "Write a poem about rain", "Rain taps on the window.")
    await page.get_by_role("button", name="Edit the message").click()
    await expect(page.locator("#editing")).to_be_visible()


async def attachments(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    picture = {"type": "base64", "media_type": "image/png", "data": png(240, 150)}
    content = [
        {"type": "image", "source": picture},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/duck.png"}},
        {"type": "document", "title": "Minutes of March", "source": {}},
        {"type": "text", "text": "What do these have in common?"},
    ]
    async with client(server) as other:
        await other.send({"prompt": content, "conversation": "0123456789abcdef"})
        (await puppet.reply()).say("Nothing that I can see.").end()
        await other.next("done")
    await page.goto(f"{server.page}#0123456789abcdef")
    await expect(text(page)).to_contain_text("Nothing")


async def _list(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    async with client(server) as other:
        for number, title in enumerate(TITLES):
            start = await other.prompt(title, conversation=f"{number:032}")
            (await puppet.reply(number)).say("Reply").end()
            await other.text(start["id"])
    # The page gets older times than the server has.
    await page.add_init_script("""{
        const { parse } = JSON
        JSON.parse = (text) => {
            const frame = parse(text)
            frame?.items?.forEach?.((item, place) => { item.updated -= 86_400 * place ** 2 * 2 })
            return frame
        }
    }""")
    await page.goto(f"{server.page}#{3:032}")
    await page.reload()
    await expect(text(page)).to_be_visible()


async def groups(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await _list(page, server, puppet)
    await open_list(page)


async def open_list(page: Page) -> None:
    """Show the list, also where it is a drawer."""
    menu = page.locator("#menu[aria-expanded=false]")
    if await menu.is_visible():
        await menu.click()
    await expect(page.get_by_role("searchbox")).to_be_visible()


async def search(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await groups(page, server, puppet)
    await page.get_by_role("searchbox").fill("the")
    await expect(page.locator("#matches")).to_contain_text("titles found")


async def search_without_result(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await groups(page, server, puppet)
    await page.get_by_role("searchbox").fill("giraffe")
    await expect(page.locator("#matches")).to_contain_text("No titles found")


async def renaming(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await groups(page, server, puppet)
    await open_title(page)


async def open_title(page: Page) -> None:
    """Let the title of the open conversation be edited. A drawer that closes ends the editing."""
    title = page.get_by_role("textbox", name="Title")
    if not await title.is_visible():
        row = page.locator("li:has([aria-current])")
        await row.get_by_role("button", name=re.compile("^Rename")).click()
    await expect(title).to_be_focused()


async def delete_dialog(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await groups(page, server, puppet)
    row = page.locator("li:has([aria-current])")
    await row.get_by_role("button", name=re.compile("^Delete")).click()
    await expect(page.get_by_role("dialog")).to_be_visible()


async def export_dialog(page: Page, _server: wsserver.Server, puppet: Puppet) -> None:
    await converse(page, puppet, "Write a poem about rain", "Rain taps on the window.")
    await page.get_by_role("button", name="Export the conversation").click()
    await expect(page.get_by_role("dialog")).to_be_visible()


async def settings_dialog(page: Page, _server: wsserver.Server, _puppet: Puppet) -> None:
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_role("textbox", name="System prompt").fill("Answer in one sentence.")
    await expect(page.get_by_role("dialog")).to_be_visible()


async def shortcuts_dialog(page: Page, _server: wsserver.Server, _puppet: Puppet) -> None:
    await box(page).evaluate("box => box.blur()")
    await page.keyboard.press("?")
    await expect(page.get_by_role("dialog")).to_be_visible()


async def lost_connection(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "Count to a thousand")
    (await puppet.reply()).say("1, 2, 3, 4, 5")
    await expect(text(page)).to_contain_text("5")
    await page.context.set_offline(True)
    cut(server)
    await expect(state(page)).to_have_text("Not connected, trying again…")


async def closed_connection(page: Page, server: wsserver.Server, _puppet: Puppet) -> None:
    dismiss(server, 1008, "too many unusable frames")
    await expect(box(page)).to_be_disabled()


async def notice(page: Page, server: wsserver.Server, _puppet: Puppet) -> None:
    await page.goto(f"{server.page}#{'x' * 20}")
    await expect(page.get_by_role("alert").locator("span").first).to_contain_text("no such")


STATES: dict[str, State] = {
    function.__name__: function
    for function in (
        *(
            empty,
            thinking,
            streaming,
            formatted,
            long_prompt,
            long_thread,
            error,
            stopped,
            waiting,
            editing,
        ),
        *(attachments, groups, search, search_without_result, renaming, delete_dialog),
        *(export_dialog, settings_dialog, shortcuts_dialog, lost_connection, closed_connection),
        notice,
    )
}
