"""The chat page in a real browser, on a real server with nano."""

# ruff: noqa: F811 (imported fixtures are arguments)
from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading

import pytest

from aria.serve.chat_page import FOLDER
from aria.serve.settings import ServerSettings
from tests.helpers.browser import CLIP, Keys, Page, driver, in_browser, live, page  # noqa: F401  (fixtures)
from tests.helpers.serving import PICTURES, engine, idle, running, until


@pytest.fixture
def slow(monkeypatch):
    """Answers that pause after their second token until the test sets the event or the client disconnects."""
    pieces, released = engine().pieces, threading.Event()

    async def slowly(*given, **named):
        count = 0
        async for piece in pieces(*given, **named):
            yield piece
            count += 1
            while count == 2 and not released.is_set():
                await asyncio.sleep(0.01)

    monkeypatch.setattr(engine(), "pieces", slowly)
    return released


def test_vendored_files_match_their_readme():
    sums = [line.split() for line in (FOLDER / "vendor" / "katex" / "SHA256SUMS").read_text().splitlines()]
    katex = FOLDER / "vendor" / "katex"
    files = {str(file.relative_to(katex)) for file in katex.rglob("*") if file.is_file()}
    assert files == {name for _, name in sums} | {"SHA256SUMS"}
    for digest, name in sums:
        assert hashlib.sha256((katex / name).read_bytes()).hexdigest() == digest
    rows = re.findall(
        r"^\| `(\S+?)` \|.*?`([0-9a-f]{64})`", (FOLDER / "vendor" / "README.md").read_text(), re.MULTILINE
    )
    assert {name for name, _ in rows} == {file.name for file in (FOLDER / "vendor").glob("*.js")}
    for name, digest in rows:
        assert hashlib.sha256((FOLDER / "vendor" / name).read_bytes()).hexdigest() == digest


def test_sample_images_are_the_examples():
    for sample in (FOLDER / "samples").iterdir():
        assert sample.read_bytes() == (PICTURES / sample.name).read_bytes()


@in_browser
def test_an_image_is_uploaded_and_the_answer_streams(page, slow):
    [cost] = page.attach(PICTURES / "word.png")
    assert re.fullmatch(r"\d+ tokens", cost)
    page.one(".item select").send_keys("low")
    until(lambda: page.texts(".price") == ["64 tokens"])
    page.say("What does it say?")
    until(lambda: page.do("return window.seen.length") >= 1)
    slow.set()
    assert page.answered() == "Welcome"
    seen = page.do("return window.seen")
    assert len(seen) > 1
    assert all("Welcome".startswith(text) for text in seen)
    assert re.search(
        r"[\d.]+ tokens/s · first token after [\d.]+ s · \d+ prompt tokens( \(\d+ cached\))?, 8 generated",
        page.texts(".stats")[0],
    )
    assert page.one(".shown img").get_attribute("alt") == "word.png"


@in_browser
def test_an_example_question_is_one_click(page):
    page.all(".example")[1].click()
    assert page.answered() == "A red circle."


@in_browser
def test_videos_and_unsupported_files(page, tmp_path):
    assert page.attach(CLIP) == ["8 frames, 512 tokens"]
    frames = page.one(".item input[type=number]")
    frames.clear()
    frames.send_keys("3")
    until(lambda: page.texts(".price") == ["3 frames, 192 tokens"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    other = tmp_path / "notes.txt"
    other.write_text("words")
    page.one("#files").send_keys(str(other))
    until(lambda: "notes.txt" in page.one("#banner").text)
    page.one(".item button").click()
    assert page.all(".item") == []


@in_browser
@pytest.mark.parametrize(
    "event", ["DragEvent('drop', {dataTransfer: held,", "ClipboardEvent('paste', {clipboardData: held,"]
)
def test_files_are_dropped_and_pasted(page, event):
    page.driver.execute_async_script(
        "fetch('samples/word.png').then((response) => response.blob()).then((blob) => {"
        "  const held = new DataTransfer();"
        "  held.items.add(new File([blob], 'word.png', {type: 'image/png'}));"
        f"  document.dispatchEvent(new {event} bubbles: true, cancelable: true}}));"
        "}).then(arguments[0])"
    )
    until(lambda: page.texts(".price") and re.fullmatch(r"\d+ tokens", page.texts(".price")[0]))
    until(lambda: page.all(".thumb img"))


@in_browser
def test_a_refused_question_does_not_affect_later_ones(page):
    page.attach(PICTURES / "word.png")
    page.do("localStorage.setItem('aria-settings', JSON.stringify({temperature: 9}))")
    page.say("What is it?")
    until(lambda: page.all(".trouble"))
    page.do("localStorage.setItem('aria-settings', JSON.stringify({temperature: 0, max_tokens: 64}))")
    page.say("hello")
    assert page.answered()
    assert len(page.all(".trouble")) == 1
    read = int(re.search(r"(\d+) prompt tokens", page.texts(".stats")[-1])[1])
    assert read < 128, "the image was not sent again"
    # The browser itself logs the refused request.
    assert all("status of 400" in entry["message"] for entry in page.driver.get_log("browser"))


@in_browser
def test_an_answer_is_stopped_and_regenerated(page, slow):
    page.say("hello")
    until(lambda: page.do("return window.seen.length") >= 1)
    page.one("#question").send_keys(Keys.ESCAPE)
    until(lambda: "Stopped." in page.texts(".hers .note"))
    until(idle)
    until(lambda: re.search(r"first token after .* tokens generated", page.texts(".stats")[0]))
    page.one(".hers .retry").click()
    until(lambda: page.all(".growing"))
    page.one("#stop").click()
    until(lambda: "Stopped." in page.texts(".hers .note"))
    assert len(page.all(".turn")) == 2


@in_browser
def test_conversations_survive_a_reload_and_interrupted_answers_are_marked(page, slow):
    page.say("hello there")
    until(lambda: page.do("return window.seen.length") >= 1)
    page.driver.refresh()
    until(lambda: page.texts(".hers .note") and "Interrupted" in page.texts(".hers .note")[0])
    assert page.texts(".mine .text") == ["hello there"]
    until(idle)


@in_browser
def test_a_message_is_edited_and_sent_again(page):
    page.say("hi")
    first = page.answered()
    page.one("#question").send_keys(Keys.ARROW_UP)
    until(lambda: page.one("#question").get_attribute("value") == "hi")
    page.say(" there")
    until(lambda: page.texts(".mine .text") == ["hi there"])
    assert page.answered() and first
    assert len(page.all(".turn")) == 2


@in_browser
def test_conversations_are_searched_renamed_exported_imported_and_deleted(page, tmp_path):
    page.do("""
        window.saved = null;
        const original = URL.createObjectURL;
        URL.createObjectURL = (blob) => {
            if (blob.type === 'application/json') window.saved = blob;
            return original(blob);
        };
        HTMLAnchorElement.prototype.click = () => {};
    """)
    page.attach(PICTURES / "emoji.png")
    page.say("Which emoji is this?")
    page.answered()
    page.one(".entry:has([aria-current]) summary").click()
    rename, as_json = page.all(".entry:has([aria-current]) .choices button")[:2]
    as_json.click()
    until(lambda: page.do("return window.saved !== null"))
    text = page.driver.execute_async_script("window.saved.text().then(arguments[0])")
    exported = json.loads(text)["conversations"][0]
    assert [turn["role"] for turn in exported["turns"]] == ["user", "assistant"]
    rename.click()
    page.one("#ask input").clear()
    page.one("#ask input").send_keys("An animal", Keys.ENTER)
    until(lambda: "An animal" in page.texts(".entry .title"))
    page.one("#search").send_keys("animal")
    assert page.texts(".entry .title") == ["An animal"]
    page.one("summary").click()
    page.all(".choices button")[-1].click()
    page.one("#ask-yes").click()
    until(lambda: page.texts(".entry .title") == [])
    page.one("#search").clear()
    file = tmp_path / "one.json"
    file.write_text(text)
    page.one("#import-file").send_keys(str(file))
    until(lambda: page.texts(".mine .text") == ["Which emoji is this?"])
    page.one(".medium").click()
    until(lambda: page.do("return document.querySelector('dialog.large img')?.naturalWidth") == 448)


@in_browser
def test_answers_are_markdown_without_scripts(page, tmp_path):
    answer = (
        "**bold** [bad](javascript:alert(1)) <img src=x onerror=alert(1)><script>alert(1)</script> "
        "![x](//elsewhere.example/x)"
        "\n\n```python\nprint('x')\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |"
    )
    turns = [{"role": "user", "text": "<b>?</b>", "media": []}, {"role": "assistant", "state": "done", "text": answer}]
    complete = {
        "format": "aria-conversations",
        "version": 1,
        "media": {},
        "conversations": [{"title": "t", "turns": turns}],
    }
    file = tmp_path / "one.json"
    file.write_text(json.dumps(complete))
    page.one("#import-file").send_keys(str(file))
    until(lambda: page.texts(".hers strong") == ["bold"])
    assert page.all(".markdown img, .markdown script, .markdown a[href], .mine b") == []
    assert page.texts(".mine .text") == ["<b>?</b>"]
    until(lambda: page.all(".hljs-built_in"))
    assert page.one(".markdown td[align=right]").text == "2"


@in_browser
def test_theme_is_switched_and_kept(page):
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.do(ground)
    page.one("#theme").click()
    dark = page.do(ground)
    assert dark != light
    page.open()
    assert page.do(ground) == dark
    page.one("#theme").click()
    assert page.do(ground) == light
    assert page.do("return localStorage.getItem('aria-theme')") is None


@in_browser
def test_a_phone_has_no_sideways_scroll(page):
    page.open(390, 844)
    page.one("#open-sidebar").click()
    until(lambda: page.one("#sidebar").is_displayed())
    page.one("#new").click()
    page.attach(PICTURES / "word.png", PICTURES / "shapes.png")
    page.say("What does it say? " + "x" * 200)
    page.answered()
    sideways = "const of = document.querySelector(arguments[0]); return of.scrollWidth - of.clientWidth"
    assert [page.do(sideways, selector) for selector in ("html", "#scroll", "#composer")] == [0, 0, 0]


@in_browser
def test_settings_are_sent_and_refusals_are_read_in_place(page):
    page.one("#settings-open").click()
    page.one("#settings input[name=max_tokens]").clear()
    page.one("#settings input[name=max_tokens]").send_keys("2")
    page.one("#settings button.strong").click()
    page.say("hello")
    page.answered()
    assert "2 generated" in page.texts(".stats")[0]
    assert any("token limit" in note for note in page.texts(".hers .note"))
    page.do("localStorage.setItem('aria-settings', JSON.stringify({temperature: 9}))")
    page.new()
    page.say("hello")
    until(lambda: page.all(".trouble"))
    assert "temperature" in page.one(".trouble p").text
    page.do("localStorage.removeItem('aria-settings')")
    page.one(".trouble button").click()
    assert page.answered()
    # The browser itself logs the refused request.
    assert all("status of 400" in entry["message"] for entry in page.driver.get_log("browser"))


@in_browser
def test_the_page_asks_for_a_key_and_uses_it(driver):
    with running(ServerSettings(api_keys=("right",)), key="right") as locked:
        page = Page(driver, locked.address)
        driver.get(locked.address)
        for said, key in (("", "wrong"), ("The server says: the API key is wrong.", "right")):
            until(
                lambda said=said: page.do("return document.querySelector('#locked[open] .note')?.textContent") == said
            )
            page.one("#locked input").send_keys(key, Keys.ENTER)
        until(lambda: page.texts("#model option") == ["aria-nano"])
        assert page.do("return [sessionStorage.getItem('aria-key'), localStorage.getItem('aria-key')]") == [
            "right",
            None,
        ]


@in_browser
def test_an_unreachable_server_is_reported(driver):
    with running() as live:
        page = Page(driver, live.address).open()
    page.say("hello")
    until(lambda: page.all(".trouble"))
    assert "does not respond" in page.one(".trouble p").text
