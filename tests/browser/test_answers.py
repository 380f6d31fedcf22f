"""Ten long answers, as real models write them, are shown without a stray mark.

``GALLERY=folder pytest tests/browser/test_answers.py`` keeps a picture of each, light and dark.
"""

import os
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.browser.page import ask, reply, text
from tests.support.puppet import Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

FOLDER = Path(__file__).parent / "answers"
ANSWERS = {path.stem: path.read_text() for path in FOLDER.glob("*.md")}
LINES = 2000
ANSWERS["long_file"] = (
    "Here is the whole file:\n\n```python\n"
    + "".join(
        f"def handler_{number}(request: Request) -> Response:  # route {number}\n"
        f'    return Response(f"<p>{{request.path}} {number}</p>")\n'
        for number in range(LINES // 2)
    )
    + "```\n\nThat is **all** of it."
)
# Marks that no answer shows outside of code and formulas.
MARKS = (
    "**",
    "__",
    "~~",
    "```",
    "](",
    "|--",
    "|:-",
    "[^",
    "$$",
    "\\(",
    "\\[",
    "- [",
    "&lt;",
    "&amp;",
    "\n> ",
    "\n# ",
)
SHOWN = """(root) => {
    const copy = root.cloneNode(true)
    for (const part of copy.querySelectorAll('code, .math, .katex')) part.remove()
    return copy.textContent
}"""


@pytest.mark.parametrize("name", sorted(ANSWERS))
async def test_answer_shows_no_stray_mark(page: Page, puppet: Puppet, name: str) -> None:
    answer = ANSWERS[name]
    size = 4 if len(answer) < 10_000 else 200
    await ask(page, f"Write {name}")
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    (await puppet.reply()).say(*pieces).end()
    await expect(reply(page)).to_have_attribute("aria-busy", "false")
    await expect(text(page).locator(":scope > *").last).to_be_visible()
    shown: str = await text(page).evaluate(SHOWN)
    assert not [mark for mark in MARKS if mark in shown], shown
    if folder := os.environ.get("GALLERY"):
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            height = await page.evaluate("document.documentElement.scrollHeight")
            await page.set_viewport_size({"width": 1000, "height": min(4000, height)})
            await page.screenshot(path=Path(folder, f"{name}-{scheme}.png"))
