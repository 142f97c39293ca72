"""Draws ``docs/chat-page.png``: nano answers about a sample image on the chat page, in a headless Chromium.

    python scripts/docs/chat_page.py            # needs selenium, chromium and chromedriver

Run it again when the page changes.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.helpers.serving import running, until  # noqa: E402

SIZE = 1000, 720
QUESTIONS = "What is in this picture?", "What is to the left of the blue square?"


def main() -> None:
    """Ask, and keep what the page shows."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        with running() as live:
            size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(live.address)
            until(lambda: driver.find_elements(By.CSS_SELECTOR, "#model option"))
            driver.find_element(By.CSS_SELECTOR, "#new").click()
            picture = ROOT / "examples" / "pictures" / "shapes.png"
            driver.find_element(By.CSS_SELECTOR, "#files").send_keys(str(picture))
            until(lambda: [one for one in driver.find_elements(By.CSS_SELECTOR, ".price") if "tokens" in one.text])
            for number, question in enumerate(QUESTIONS, 1):
                driver.find_element(By.CSS_SELECTOR, "#question").send_keys(question, Keys.ENTER)
                until(lambda number=number: len(driver.find_elements(By.CSS_SELECTOR, ".hers")) == number)
                until(lambda: not driver.find_elements(By.CSS_SELECTOR, ".growing"))
            time.sleep(1)  # animations
            shown = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    finally:
        driver.quit()
    shown.quantize(256).save(ROOT / "docs" / "chat-page.png", optimize=True)


if __name__ == "__main__":
    main()
