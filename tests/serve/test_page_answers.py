"""The chat page with scripted answers: rendering while they stream, versions, notices."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from selenium.webdriver.common.keys import Keys

from aria.engine import Piece
from aria.media import document
from tests.helpers.browser import ANSWERS, CLIP, Page, driver, in_browser, live, page  # noqa: F401  (fixtures)
from tests.helpers.made_media import pdf
from tests.helpers.serving import PICTURES, engine, until

pytestmark = in_browser
PAUSE = None
"""In an answer: it goes on once the test lets it."""


class Script:
    """Scripted answers in place of the model's, in order."""

    def __init__(self):
        self.answers: list[tuple[str | None, ...]] = []
        self.asked: list = []
        """Sampling parameters of each request."""
        self.steps = threading.Semaphore(0)

    def say(self, *pieces: str | None) -> None:
        self.answers.append(pieces)

    async def pieces(self, prepared, params, **_):
        self.asked.append(params)
        pieces = self.answers.pop(0)
        for i, text in enumerate(pieces):
            while text is PAUSE and not self.steps.acquire(blocking=False):
                await asyncio.sleep(0.01)
            finish = "stop" if i == len(pieces) - 1 else None
            yield Piece(SimpleNamespace(cached_tokens=0), 0, text or "", 5, None, finish)


@pytest.fixture
def script(monkeypatch):
    script = Script()
    monkeypatch.setattr(engine(), "pieces", script.pieces)
    return script


@pytest.fixture
def fast_timers(driver):  # noqa: F811
    """Timers of pages opened from now on run 100 times faster."""
    source = "const wait = window.setTimeout; window.setTimeout = (work, ms, ...more) => wait(work, ms / 100, ...more);"
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    yield
    driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def render(page: Page, *texts: str) -> list[dict]:  # noqa: F811
    """How the page renders answers, while they stream and when complete."""
    script = """
        const [texts, done] = arguments;
        import('./markdown.js').then(async ({ render }) => {
            const settled = () => new Promise((ready) => setTimeout(ready));
            render('$x$', true);
            await import('./vendor/katex/katex.min.js');
            await settled();
            done(texts.map((text) => [false, true].map((whole) => {
                const element = document.createElement('div');
                element.append(render(text, whole));
                const formulas = [...element.querySelectorAll('.math')];
                const drawn = formulas.filter((one) => one.querySelector('.katex'));
                const tags = [...new Set([...element.querySelectorAll('*')].map((one) => one.localName))];
                const annotations = [...element.querySelectorAll('annotation')].map((one) => one.textContent);
                drawn.forEach((one) => one.remove());
                return { text: element.textContent.trim(), tags, formulas: annotations, html: element.innerHTML,
                         displayed: formulas.filter((one) => one.classList.contains('display')).length };
            })));
        });
    """
    shown = page.driver.execute_async_script(script, texts)
    # A fence that has just been opened looks like code.
    assert all(growing == complete or "pre" in growing["tags"] for growing, complete in shown)
    return [complete for _, complete in shown]


BLOCKS = {"li", "ol", "ul", "h1", "h2", "h3", "blockquote", "hr"}
LONE = "85. | 85 . |85.  |1) |1. |0.|-|- |*|+|#|##|###### |>|> |***|---|~~~|[1]: x|-\n-|Total\n-|Total\n=|- 85.|* #"
LONE += "|1984. It was.|85.\nThat is all.|> 90 %|>50|>= 3"
LONE += "|$|$$|$5 and $6|($5)|US$5, US$6|$5 million or 6$|`$x$`|\\$5 and 6\\$"


def test_lone_markdown_signs_are_text(page):  # noqa: F811
    texts = LONE.split("|")
    for text, shown in zip(texts, render(page, *texts), strict=True):
        wanted = text.strip().replace("\n", "")
        for hidden in ("`", "\\"):
            wanted = wanted.replace(hidden, "")
        if wanted.startswith(("- 8", "* #")):  # an item that contains a sign
            wanted = wanted[2:]
            assert "li" in shown["tags"]
        else:
            assert not BLOCKS & set(shown["tags"]), text
        assert shown["text"] == wanted
        assert shown["formulas"] == []


def test_blocks_are_still_blocks(page):  # noqa: F811
    texts = ["1. a\n2. b", "3. a\n4. b", "- a", "# a", "> a", "a\n===", "1. a\n\n```\nx\n```\n\n2. b", "a\n\n---\n\nb"]
    tags = [BLOCKS & set(shown["tags"]) for shown in render(page, *texts)]
    wanted = [{"ol", "li"}, {"ol", "li"}, {"ul", "li"}, {"h1"}, {"blockquote"}, {"h1"}, {"ol", "li"}, {"hr"}]
    assert tags == wanted


def test_a_number_is_shown_while_it_streams(page, script):  # noqa: F811
    script.say("8", "5", PAUSE, ".", PAUSE, "")
    page.say("How many?")
    for shown in ("85", "85."):
        until(lambda shown=shown: page.texts(ANSWERS) == [shown])
        assert page.all(".markdown li") == []
        script.steps.release()
    assert page.answered() == "85."
    assert page.texts(".markdown p") == ["85."]


def test_formulas_are_drawn(page):  # noqa: F811
    texts = {
        "$x_1$ and \\(y_1\\)": ["x_1", "y_1"],
        "so:\n$$\na\n- b\n$$\nand": ["\na\n- b\n"],
        "\\[\n\\frac12\n\\]": ["\n\\frac12\n"],
        "**$a*b$** costs $5, *not $c$*": ["a*b", "c"],
        "- $n$th\n\n| $p$ |\n|---|\n| $q$ |": ["n", "p", "q"],
        "$2 \\text{ apples and pears}$": ["2 \\text{ apples and pears}"],
        "```\n$x$\n```\n`\\(y\\)` $\\unknown$ $x": [],
    }
    shown = render(page, *texts)
    assert [one["formulas"] for one in shown] == list(texts.values())
    assert [one["displayed"] for one in shown] == [0, 1, 1, 0, 0, 0, 0]
    assert "$\\unknown$ $x" in shown[-1]["text"]


def test_formulas_run_and_load_nothing(page):  # noqa: F811
    hostile = [
        "\\href{javascript:alert(1)}{x}",
        "\\url{javascript:alert(1)}",
        "\\includegraphics{//elsewhere.example/x.png}",
        "\\htmlStyle{position:fixed}{x}",
        "\\htmlClass{sidebar}{x}",
        "\\text{<img src=x onerror=alert(1)>}",
        "\\text{</annotation><script>alert(1)</script>}",
        "\\def\\a{\\a\\a}\\a",
        "{" * 5000,
        "\\rule{9999em}{9999em}",
    ]
    shown = render(page, *(f"${one}$" for one in hostile), *(f"$${one}$$" for one in hostile))
    tags = set().union(*(one["tags"] for one in shown))
    assert not tags & {"a", "img", "image", "script", "style", "iframe", "form", "use", "foreignobject"}
    assert page.do("return document.querySelectorAll('.katex a, .katex img, .katex script').length") == 0


def test_an_unreadable_file_is_not_sent(page, script, tmp_path):  # noqa: F811
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.one("#files").send_keys(f"{broken}\n{PICTURES / 'word.png'}")
    # At once, before the server has checked the file.
    page.say("What is it?")
    until(lambda: "broken.png cannot be read" in page.one("#cost").text)
    assert "not an image" in page.one(".item.refused .price").text
    assert not page.one("#send").is_enabled()
    page.one("#question").send_keys(Keys.ENTER)
    assert (page.all(".turn"), script.asked) == ([], [])
    page.one(".item.refused button").click()
    script.say("A word.")
    page.one("#send").click()
    assert page.answered() == "A word."
    assert len(page.all(".medium")) == 1
    script.say("Again.")
    page.say("And now?")
    until(lambda: page.texts(ANSWERS) == ["A word.", "Again."])
    assert page.all(".trouble") == []
    # The browser itself logs the refused request.
    assert all("status of 400" in entry["message"] for entry in page.driver.get_log("browser"))


def test_missing_pages_of_a_document_are_not_sent(page, script, tmp_path):  # noqa: F811
    file = tmp_path / "two.pdf"
    file.write_bytes(pdf((200, 100), (200, 100)))
    page.attach(file)
    page.one(".item input").send_keys("3")
    page.say("What is it?")
    until(lambda: page.all(".item.refused"))
    assert "pages 1 to 2" in page.one(".price").text
    page.one(".item input").send_keys(Keys.BACKSPACE, "2")
    until(lambda: page.texts(".price") and page.texts(".price")[0].startswith("1 page, "))
    assert page.texts(".badge") == ["2 pages"]
    script.say("The second.")
    page.one("#send").click()
    assert page.answered() == "The second."
    assert all("status of 400" in entry["message"] for entry in page.driver.get_log("browser"))


def test_progress_is_shown_while_media_are_read(page, script, monkeypatch, tmp_path):  # noqa: F811
    processor = engine().engine.processor
    monkeypatch.setattr(processor, "media", replace(processor.media, cache_bytes=0, workers=0))
    render_page, turns = document._render, threading.Semaphore(0)

    def slowly(pdf, number, *more):
        if number == 2:
            turns.acquire()
        return render_page(pdf, number, *more)

    monkeypatch.setattr(document, "_render", slowly)
    file = tmp_path / "three.pdf"
    file.write_bytes(pdf(*[(200, 100)] * 3))
    page.one("#files").send_keys(str(file))
    until(lambda: page.texts(".item .progress") == ["Reading page 2 of 3"])
    turns.release()
    until(lambda: page.texts(".price")[0].startswith("3 pages, "))
    assert page.texts(".item .progress") == [""]
    script.say("Three.")
    page.say("How many?")
    until(lambda: page.texts(".waiting .progress") == ["Reading page 2 of 3"])
    turns.release()
    assert page.answered() == "Three."
    assert page.one(".medium .badge").text == "3 pages"
    until(lambda: page.do("return document.querySelector('.medium img').naturalWidth") == 320)


def test_counts_of_one_are_singular(page):  # noqa: F811
    assert page.attach(CLIP) == ["8 frames, 512 tokens"]
    assert len(page.all(".item .play")) == 1
    frames = page.one(".item input")
    frames.clear()
    frames.send_keys("1")
    until(lambda: page.texts(".price") == ["1 frame, 64 tokens"])
    script = """
        const done = arguments[0];
        import('./words.js').then(({ costText, statsText }) => done([
            costText('document', {count: 1, tokens: 1}), costText('image', {count: 1, tokens: 2}),
            statsText({prompt: 1, completion: 1}), statsText({completion: 1}), statsText({completion: 1200})]));
    """
    assert page.driver.execute_async_script(script) == [
        "1 page, 1 token",
        "2 tokens",
        "1 prompt token, 1 generated",
        "1 token generated",
        "1,200 tokens generated",
    ]


def test_the_view_stays_at_the_end_until_the_reader_scrolls_up(page, script):  # noqa: F811
    rest = "const one = document.querySelector('#scroll'); return one.scrollHeight - one.scrollTop - one.clientHeight"
    lines = "line\n\n" * 30
    script.say(lines, PAUSE, lines + "second", PAUSE, lines + "third", PAUSE, "")
    page.say("Tell me much.")
    until(lambda: len(page.all(".markdown p")) == 30)
    until(lambda: page.do(rest) < 2)
    script.steps.release()
    until(lambda: "second" in page.texts(ANSWERS)[0])
    until(lambda: page.do(rest) < 2)
    page.do("document.querySelector('#scroll').scrollTop -= 60")
    before = page.do("return document.querySelector('#scroll').scrollTop")
    script.steps.release()
    until(lambda: "third" in page.texts(ANSWERS)[0])
    assert page.do("return document.querySelector('#scroll').scrollTop") == before
    page.one("#latest").click()
    assert page.do(rest) < 2
    assert not page.one("#latest").is_displayed()
    script.steps.release()
    assert page.answered()


def test_any_answer_has_versions(page, script, tmp_path):  # noqa: F811
    for text in ("One.", "Two.", "Another one."):
        script.say(text)
    page.say("first?")
    page.answered()
    page.say("second?")
    until(lambda: page.texts(ANSWERS) == ["One.", "Two."])
    page.answered()
    page.all(".retry")[0].click()
    until(lambda: page.texts(ANSWERS) == ["Another one."])
    page.answered()
    assert page.texts(".versions span") == ["2/2"]
    script.say("Three.")
    page.say("third?")
    until(lambda: page.texts(ANSWERS) == ["Another one.", "Three."])
    page.answered()
    earlier, later = ("[aria-label='Earlier version']", "[aria-label='Later version']")
    assert not page.one(later).is_enabled()
    page.one(earlier).send_keys(Keys.ENTER)
    assert page.texts(ANSWERS) == ["One.", "Two."]
    assert page.texts(".versions span") == ["1/2"]
    page.open()
    until(lambda: page.texts(ANSWERS) == ["One.", "Two."])
    text = exported(page)
    kept = json.loads(text)["conversations"][0]["turns"]
    assert [turn["text"] for turn in kept] == ["first?", "One.", "second?", "Two."]
    assert [turn["text"] for turn in kept[1]["others"][0]["rest"]] == ["third?", "Three."]
    file = tmp_path / "one.json"
    file.write_text(text)
    page.one("#import-file").send_keys(str(file))
    until(lambda: page.texts(".entry .title").count("first?") == 2)
    page.one(later).click()
    assert page.texts(ANSWERS) == ["Another one.", "Three."]
    page.one("#search").send_keys("Two.")
    assert len(page.all(".entry")) == 2
    page.one("#search").clear()


def exported(page: Page) -> str:  # noqa: F811
    page.do("""
        window.saved = null;
        const original = URL.createObjectURL;
        URL.createObjectURL = (blob) => ((window.saved = blob), original(blob));
        HTMLAnchorElement.prototype.click = () => {};
    """)
    page.one(".entry:has([aria-current]) summary").click()
    page.all(".entry:has([aria-current]) .choices button")[1].click()
    until(lambda: page.do("return window.saved !== null"))
    return page.driver.execute_async_script("window.saved.text().then(arguments[0])")


def test_settings_belong_to_a_conversation_and_are_marked(page, script):  # noqa: F811
    script.say("Yes.")
    script.say("No.")
    page.one("#settings-open").click()
    page.one("#settings textarea").send_keys("Be brief.")
    field = page.one("#settings input[name=temperature]")
    field.clear()
    field.send_keys("0.25")
    assert len(page.all("#settings .mark-changed")) == 2
    page.one("#settings button.strong").click()
    page.say("Is it?")
    assert page.answered() == "Yes."
    marked = page.one("#settings-open").get_attribute("aria-label")
    assert "System prompt, Temperature 0.25" in marked
    assert page.one("#changed").text == "System prompt · Temperature 0.25"
    page.new()
    assert page.one("#settings-open").get_attribute("aria-label") == "Settings"
    assert not page.one("#changed").is_displayed()
    page.say("Is it?")
    assert page.answered() == "No."
    assert [params.temperature for params in script.asked] == [0.25, 0]
    assert [params.max_tokens for params in script.asked] == [64, 64]
    page.all(".entry .title")[1].click()
    assert page.one("#changed").is_displayed()
    page.open()
    until(lambda: page.texts(ANSWERS) == ["Yes."])
    assert page.one("#changed").is_displayed()
    page.one("#changed").click()
    page.one("#settings-reset").click()
    assert page.one("#settings input[name=temperature]").get_attribute("value") == "0"
    page.one("#settings textarea").send_keys(Keys.ESCAPE)
    until(lambda: not page.all("dialog[open]"))
    assert not page.one("#changed").is_displayed()


def test_escape_closes_open_elements(page, script):  # noqa: F811
    script.say("Yes.")
    page.attach(PICTURES / "word.png")
    page.say("Is it?")
    page.answered()
    page.one("summary").click()
    assert page.all(".more[open]")
    page.one("summary").send_keys(Keys.ESCAPE)
    assert page.all(".more[open]") == []
    assert page.do("return document.activeElement.localName") == "summary"
    page.one("summary").click()
    page.one("#question").click()
    assert page.all(".more[open]") == []
    for opener, dialog in (("#settings-open", "#settings"), ("#shortcuts-open", "#shortcuts"), (".medium", ".large")):
        page.one(opener).click()
        until(lambda dialog=dialog: page.all(f"{dialog}[open]"))
        page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        until(lambda: not page.all("dialog[open]"))


def test_the_viewer_fits_its_medium(page, script):  # noqa: F811
    script.say("Yes.")
    page.attach(PICTURES / "word.png")
    page.say("Is it?")
    page.answered()
    page.one(".medium").click()
    until(lambda: page.do("return document.querySelector('dialog.large img')?.naturalWidth") == 448)
    box = """
        const {x, y, width, height} = document.querySelector(arguments[0]).getBoundingClientRect();
        return [x, y, width, height];
    """
    assert page.do(box, "dialog.large") == page.do(box, "dialog.large img")
    assert page.do(box, "dialog.large img")[2:] == [448, 224]
    backdrop = "return getComputedStyle(document.querySelector('dialog.large'), '::backdrop').backgroundColor"
    red, green, blue, alpha = page.do(backdrop).removeprefix("rgba(").removesuffix(")").split(",")
    assert max(int(red), int(green), int(blue)) < 32 and float(alpha) > 0.7
    page.one("dialog.large button").click()
    until(lambda: page.all("dialog.large") == [])


def test_plain_notices_disappear_by_themselves(page, fast_timers, tmp_path):  # noqa: F811
    page.open()
    other = tmp_path / "notes.txt"
    other.write_text("words")
    page.one("#files").send_keys(str(other))
    until(lambda: "notes.txt" in page.do("return document.querySelector('#banner').textContent"))
    until(lambda: not page.one("#banner").is_displayed())


def test_the_notice_of_an_unreachable_server_can_be_closed_and_disappears(page, fast_timers):  # noqa: F811
    block = lambda *urls: page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": list(urls)})  # noqa: E731
    page.driver.execute_cdp_cmd("Network.enable", {})
    block("*/v1/models")
    for close in (True, False):
        page.driver.get(page.address)
        until(lambda: page.all("#banner button"))
        assert "does not respond" in page.one("#banner p").text
        if close:
            page.all("#banner button")[-1].click()
            assert not page.one("#banner").is_displayed()
    block()
    until(lambda: page.all("#model option"))
    assert not page.one("#banner").is_displayed()
    assert all("ERR_BLOCKED" in entry["message"] for entry in page.driver.get_log("browser"))


def test_a_phone_has_a_strip_of_thumbnails(page, script):  # noqa: F811
    page.open(390, 844)
    images = [PICTURES / f"{name}.png" for name in ("word", "shapes", "emoji")] * 2
    for file in images:
        page.one("#files").send_keys(str(file))
    until(lambda: len(page.all(".item")) == 6 and "\u2026" not in page.texts(".price"))
    tops = "return [...document.querySelectorAll(arguments[0])].map((one) => one.getBoundingClientRect().top)"
    assert len(set(page.do(tops, ".item"))) == 1
    assert page.one("#items").size["height"] < 150
    settings = page.all(".item .narrow")[0]
    assert not page.all(".knobs")[0].is_displayed()
    settings.click()
    assert page.all(".knobs")[0].is_displayed() and settings.get_attribute("aria-expanded") == "true"
    assert len(set(page.do(tops, ".item"))) == 1
    script.say("Six.")
    page.one("#question").send_keys("How many?")
    page.one("#send").click()
    assert page.answered() == "Six."
    assert len(set(page.do(tops, ".medium"))) == 1
    sideways = "const of = document.querySelector(arguments[0]); return of.scrollWidth - of.clientWidth"
    assert [page.do(sideways, selector) for selector in ("html", "#scroll")] == [0, 0]
    assert len(page.all(".medium img")) == 6
