"""The chat page in a real browser: a page object, and fixtures for the driver, the server and the open page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.repository import CLIPS
from tests.helpers.serving import running, until

pytest.importorskip("selenium", reason="selenium drives the browser: pip install selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CLIP = CLIPS / "cut.mp4"
ANSWERS = ".hers .markdown"
# Records every text that the last answer has shown, so that tests see how it was streamed.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const said = [...document.querySelectorAll('.hers .markdown')].at(-1)?.textContent.trim();
  if (said && said !== window.seen.at(-1)) window.seen.push(said);
}).observe(document.querySelector('#turns'), {childList: true, subtree: true, characterData: true});
"""


class Page:
    """The page in a browser."""

    def __init__(self, driver: webdriver.Chrome, address: str):
        self.driver = driver
        self.address = address

    def open(self, width: int = 1280, height: int = 800) -> Page:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.address)
        until(lambda: self.all("#model option"))
        self.driver.execute_script(WATCH)
        return self

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent.trim())"
        return self.driver.execute_script(script, selector)

    def do(self, script: str, *given):
        return self.driver.execute_script(script, *given)

    def new(self) -> None:
        self.one("#new").click()

    def attach(self, *files: Path) -> list[str]:
        """Upload files; return the displayed token costs."""
        self.one("#files").send_keys("\n".join(str(file) for file in files))
        until(lambda: len(self.texts(".price")) == len(files) and "\u2026" not in self.texts(".price"))
        return self.texts(".price")

    def say(self, text: str) -> None:
        self.one("#question").send_keys(text, Keys.ENTER)

    def answered(self) -> str:
        """Wait for the last answer to complete, and return it."""
        until(lambda: self.all(".hers") and not self.all(".growing") and self.one("#send").is_displayed())
        return self.texts(ANSWERS)[-1]

    def requests(self) -> list[str]:
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


@pytest.fixture
def page(driver, live):
    """The open page; afterwards checks that nothing was loaded from other hosts and that the console is empty."""
    page = Page(driver, live.address)
    page.open().new()
    page.do("localStorage.setItem('aria-settings', JSON.stringify({temperature: 0, max_tokens: 64}))")
    yield page
    elsewhere = [url for url in page.requests() if not url.startswith((live.address, "data:", "blob:"))]
    assert elsewhere == []
    assert [entry["message"] for entry in driver.get_log("browser")] == []
