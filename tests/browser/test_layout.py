"""Appearance of the page: security policy, sizes, scrolling, speed."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Route, expect

import wsserver
from tests.browser.page import (
    ask,
    box,
    button,
    converse,
    cut,
    idle,
    prompts,
    reply,
    rows,
    state,
    text,
    title,
    visit,
)
from tests.support.puppet import BOUND, Puppet, Thinking
from wsserver import Request

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_content_security_policy_blocks_foreign_content(
    browser: Browser, server: wsserver.Server
) -> None:
    page = await browser.new_page()
    await visit(page, server)
    violated = await page.evaluate("""() => new Promise((resolve) => {
        const violated = [];
        addEventListener('securitypolicyviolation', (event) => {
            violated.push(event.effectiveDirective);
            if (violated.length === 7) resolve(violated.sort());
        });
        const add = (name, values) => document.body.append(
            Object.assign(document.createElement(name), values));
        const taken = (how) => { try { how() } catch { } };
        taken(() => add('script', { textContent: 'document.title = "Taken over"' }));
        taken(() => { document.body.innerHTML = '<img src=x>' });
        taken(() => {
            const script = document.createElement('script');
            script.append('document.title = "Taken over"');
            document.body.append(script);
        });
        add('style', { textContent: 'body { display: none }' });
        add('img', { src: 'https://example.invalid/' });
        new WebSocket('wss://example.invalid/').onerror = () => {};
        const button = document.createElement('button');
        document.body.append(button);
        button.setAttribute('style', 'color: red');
    })""")
    assert violated == [
        *("connect-src", "img-src"),
        *["require-trusted-types-for"] * 3,
        *("style-src-attr", "style-src-elem"),
    ]
    await expect(page).to_have_title("wsserver")
    await page.close()


async def test_empty_page_begins_at_its_top_on_small_screen(
    browser: Browser, server: wsserver.Server
) -> None:
    page = await browser.new_page(viewport={"width": 320, "height": 480})
    await visit(page, server)
    await expect(page.get_by_text("What is on your mind?")).to_be_in_viewport(ratio=1)
    await page.set_viewport_size({"width": 320, "height": 440})
    await expect(page.get_by_text("What is on your mind?")).to_be_in_viewport(ratio=1)
    assert await page.evaluate("scrollY") == 0
    await page.close()


@pytest.mark.parametrize("width", [320, 360, 390])
async def test_page_fits_phone_screen(page: Page, puppet: Puppet, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 844})
    await ask(page, "x" * 300)
    code = f"\n```\n{'w' * 300}\n```\n`{'v' * 300}`"
    (await puppet.reply()).say(Thinking("y" * 300), "z" * 300, code).end()
    await page.get_by_text("Thought").click()
    await idle(page)
    assert await page.evaluate("document.documentElement.scrollWidth") == width
    await expect(button(page)).to_be_in_viewport(ratio=1)
    await expect(rows(page)).to_have_count(0)  # visibly, and for screen readers
    await page.get_by_role("button", name="Conversations").click()
    await expect(page.get_by_role("button", name="Close the list")).to_be_focused()
    await expect(rows(page)).to_have_count(1)
    await expect(page.get_by_role("main")).to_have_attribute("inert", "")
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Conversations")).to_be_focused()
    await page.get_by_role("button", name="Conversations").click()
    await page.get_by_role("link", name="New conversation").click()
    await expect(box(page)).to_be_focused()
    await expect(page.locator("article")).to_have_count(0)


async def test_page_follows_dark_mode(page: Page) -> None:
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(colour)
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate(colour) != light


async def test_page_scrolls_with_text_unless_reader_scrolled_up(page: Page, puppet: Puppet) -> None:
    await page.set_viewport_size({"width": 390, "height": 400})
    jump = page.get_by_role("button", name="Jump to the end")
    await ask(page, "Count")
    model = (await puppet.reply()).say("line\n" * 100)
    await expect(text(page)).to_contain_text("line")
    end = text(page).locator("p").last
    await expect(end).to_be_in_viewport()
    await expect(jump).to_be_hidden()
    await page.evaluate("scrollTo(0, 100)")
    await expect(jump).to_be_visible()
    model.say("more\n" * 100)
    await expect(text(page)).to_contain_text("more")
    assert await page.evaluate("scrollY") == 100
    await expect(jump).to_have_accessible_name("New text: jump to the end")
    await jump.click()
    await expect(jump).to_be_hidden()
    await expect(box(page)).to_be_focused()
    model.say("and more\n" * 100, "\nend")
    await expect(text(page)).to_contain_text("end")
    await expect(end).to_be_in_viewport()
    await page.mouse.move(200, 150)
    await page.mouse.wheel(0, -20)  # a short scroll is enough
    await expect(jump).to_be_visible()
    where = await page.evaluate("scrollY")
    model.say("\n\nlast" * 10).end()
    await idle(page)
    assert await page.evaluate("scrollY") <= where


FRAMES = "() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
BELOW = "document.documentElement.scrollHeight - innerHeight - scrollY"


async def test_reader_stays_at_end_when_text_takes_the_place_of_a_notice(
    page: Page, puppet: Puppet
) -> None:
    await page.set_viewport_size({"width": 390, "height": 400})
    await converse(page, puppet, "Count", "word " * 400 + "end")
    height = "document.querySelector('main').getBoundingClientRect().height"
    without = await page.evaluate(height)
    await page.evaluate("import('/notice.js').then(({ showNotice }) => showNotice('Words.'))")
    await page.evaluate(FRAMES)
    grown = await page.evaluate(height) - without
    await page.evaluate(
        """(grown) => import('/notice.js').then(({ showNotice }) => {
            showNotice('')
            document.querySelector('footer').style.paddingTop = `${grown}px`
        })""",
        grown,
    )
    await page.evaluate(FRAMES)
    assert await page.evaluate(height) == without + grown
    assert await page.evaluate(BELOW) < 1
    await expect(page.get_by_role("button", name="Jump to the end")).to_be_hidden()


async def test_reader_stays_at_end_while_typing_without_field_sizing(
    browser: Browser, server: wsserver.Server, puppet: Puppet
) -> None:
    page = await browser.new_page(viewport={"width": 390, "height": 400})
    await page.add_init_script("CSS.supports = () => false")

    async def without_field_sizing(route: Route) -> None:
        sheet = await (await route.fetch()).text()
        sheet = sheet.replace("field-sizing", "no-field-sizing")
        await route.fulfill(content_type="text/css", body=sheet)

    await page.route("**/page.css", without_field_sizing)
    await visit(page, server)
    await converse(page, puppet, "Count", "word " * 400 + "end")
    await box(page).fill("one\ntwo\nthree")
    await box(page).press_sequentially(" four")
    await page.evaluate(FRAMES)
    assert await page.evaluate(BELOW) < 1
    await expect(page.get_by_role("button", name="Jump to the end")).to_be_hidden()
    await page.close()


async def test_opened_thinking_stays_visible(page: Page, puppet: Puppet) -> None:
    await page.set_viewport_size({"width": 390, "height": 500})
    await ask(page, "Think")
    (await puppet.reply()).say(Thinking("hm\n" * 100), "line\n" * 5).end()
    await idle(page)
    await page.get_by_text("Thought").click()
    await expect(page.get_by_text("Thought")).to_be_in_viewport()
    await expect(page.get_by_role("button", name="Jump to the end")).to_be_visible()


async def test_page_keeps_up_with_fast_model(blank: Page) -> None:
    """Stream 3,000 tokens per second for three seconds, and then 9,000 without a pause."""
    words = ["**fast** ", "and `so` ", "on, ", *["word "] * 60, "\n\n", "- item\n", "```py\n"]
    words += ["x = 1\n"] * 20 + ["```\n"]

    async def model(request: Request) -> AsyncGenerator[str]:
        began = time.monotonic()
        for number in range(9_000):
            yield words[number % len(words)]
            ahead = number / 3_000 - (time.monotonic() - began)
            if request.prompt == "steady" and ahead > 0:
                await asyncio.sleep(ahead)

    settings: dict[str, Any] = {"max_tokens": 100_000, "max_tokens_limit": 100_000}
    async with wsserver.serve(model, port=0, drain_timeout=0, **settings) as server:
        await visit(blank, server)
        await blank.evaluate("""() => {
            globalThis.long = []
            globalThis.frames = []
            new PerformanceObserver((list) => long.push(...list.getEntries()))
                .observe({ type: 'longtask' })
            let last = performance.now()
            const frame = (now) => {
                frames.push(now - last)
                last = now
                requestAnimationFrame(frame)
            }
            requestAnimationFrame(frame)
        }""")
        for prompt in ("steady", "at once"):
            await ask(blank, prompt)
            began = time.monotonic()
            await expect(reply(blank)).to_have_attribute("aria-busy", "false", timeout=BOUND * 3000)
            took = time.monotonic() - began
            long, frames = await blank.evaluate("""() => [
                long.splice(0).map(({ duration }) => Math.round(duration)),
                frames.splice(0).sort((a, b) => a - b).map(Math.round),
            ]""")
            print(
                f"{prompt}: {9_000 / took:.0f} tokens/s; long tasks: {long} ms; "
                f"{len(frames)} frames, the longest {frames[-5:]} ms"
            )
        shown = await text(blank).inner_text()
        assert shown.count("fast") == 9_000 // len(words) + 1


async def test_reply_is_busy_until_all_its_text_is_on_the_page(page: Page, puppet: Puppet) -> None:
    await page.evaluate("""() => {
        const busy = () => document.querySelector('.reply')?.getAttribute('aria-busy')
        new MutationObserver((_, observer) => {
            if (busy() !== 'false') return
            observer.disconnect()
            globalThis.shown = document.querySelector('.text').textContent.includes('the end')
        }).observe(document.body, { attributes: true, childList: true, subtree: true })
    }""")
    await ask(page, "Long")
    (await puppet.reply()).say("- an *item* with `code`\n" * 8_000, "the end").end()
    await expect(reply(page)).to_have_attribute("aria-busy", "false")
    assert await page.evaluate("shown")


async def test_reply_stays_in_its_place_when_it_ends(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    said = (await puppet.reply()).say("1, 2")
    await expect(text(page)).to_have_text("1, 2")
    before = await text(page).bounding_box()
    said.end()
    await expect(page.get_by_role("button", name="Edit the message")).to_be_visible()
    assert await text(page).bounding_box() == before


async def test_title_is_readable_without_connection_on_small_screen(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await page.set_viewport_size({"width": 320, "height": 640})
    await converse(page, puppet, "Count")
    shown = "heading => heading.clientWidth"
    connected = await title(page).evaluate(shown)
    await page.context.set_offline(True)
    cut(server)
    await expect(state(page)).to_have_text("Not connected, trying again…")
    assert await title(page).evaluate(shown) >= connected
    await expect(prompts(page)).to_be_in_viewport(ratio=1)


async def test_page_is_small_before_it_shows_formulas(page: Page) -> None:
    sizes: dict[str, int] = await page.evaluate(
        """() => Object.fromEntries(['navigation', 'resource'].flatMap((kind) =>
            performance.getEntriesByType(kind).map((each) =>
                [new URL(each.name).pathname, each.encodedBodySize])))"""
    )
    assert {"/", "/page.js", "/page.css", "/libraries/markdown.js"} <= sizes.keys()
    assert all(sizes.values()), sizes
    print(f"{sum(sizes.values()):,} bytes")
    assert sum(sizes.values()) < 150_000, sizes
