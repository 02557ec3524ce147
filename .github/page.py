"""Take page.png, the chat page: `python .github/page.py URL` while `make serve` runs.

Types a conversation into the page in headless Chromium (packages chromium and chromium-driver).
"""

import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By

MESSAGES = ("Hi! How are you?", "What do you like to do on weekends?", "Do you like music?")
WIDTH, HEIGHT = 1040, 600
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--window-size={WIDTH},{HEIGHT}",
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2",  # as with a mouse
)


def main(url: str) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ARGUMENTS:
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(url)
        for message in MESSAGES:
            browser.find_element(By.ID, "text").send_keys(message + "\n")
            time.sleep(0.5)
            while browser.find_element(By.ID, "send").text != "Send":
                time.sleep(0.1)
        browser.save_screenshot(str(Path(__file__).with_name("page.png")))
    finally:
        browser.quit()


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "http://localhost:8080/predictions/chatlm")
