"""The chat page in a real Chromium (Debian's packages chromium and chromium-driver).

Skipped where there is none.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from serving import Server, tiny_model

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip(
        "found no chromium and chromedriver: apt-get install chromium chromium-driver",
        allow_module_level=True,
    )
pytestmark = pytest.mark.browser
SIZES = {"desktop": (1100, 760), "phone": (375, 700)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    server = Server(
        folder / "run",
        {"chatlm": tiny_model(folder / "chatlm", "chatlm", n_embd=256, n_layer=6, n_positions=256)},
    )
    yield server.wait_until_ready()
    server.stop()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    yield browser
    browser.quit()


def find(browser, selector):
    return browser.find_element("css selector", selector)


def turns(browser):
    return [turn.text for turn in browser.find_elements("css selector", ".turn")]


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def show(browser, server, size="desktop", dark=False):
    width, height = SIZES[size]
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
    )
    browser.get(f"http://127.0.0.1:{server.port}/predictions/chatlm")


def say(browser, words, wait=True):
    find(browser, "#text").send_keys(words + "\n")
    if wait:
        eventually(
            lambda: (
                find(browser, "#send").text == "Send"
                and not browser.find_elements("css selector", ".live")
            )
        )


def picture(browser, name):
    """Kept where PAGE_PICTURES says, for people to look at."""
    if folder := os.environ.get("PAGE_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(f"{folder}/{name}.png")


@pytest.mark.parametrize(
    "size, dark", [("desktop", False), ("phone", True), ("desktop", True), ("phone", False)]
)
def test_several_turns_by_keyboard(browser, server, size, dark):
    show(browser, server, size, dark)
    picture(browser, f"{size}-{'dark' if dark else 'light'}-empty")
    assert (
        browser.title == "chatlm" and browser.switch_to.active_element.get_attribute("id") == "text"
    )
    say(browser, "Good morning, how are <b>you</b>?")
    say(browser, "Tell me more.")
    said = turns(browser)
    assert (
        said[0] == "Good morning, how are <b>you</b>?"
        and said[2] == "Tell me more."
        and len(said) == 4
    )
    assert not browser.find_elements("css selector", ".turn b")
    assert len(browser.execute_script("return turns")) == 4
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, color[4:-1].split(","))) < 64) == dark
    find(browser, "#tune").click()
    picture(browser, f"{size}-{'dark' if dark else 'light'}-talk")


def test_answer_streams_and_can_be_stopped_and_tried_again(browser, server):
    show(browser, server)
    find(browser, "#tune").click()
    browser.execute_script(
        "const values = [['length', 200], ['temperature', 2]];"
        "for (const [id, value] of values) { $(id).value = value; $(id).oninput() }"
    )
    say(browser, "hello", wait=False)
    lengths = set()
    eventually(
        lambda: (
            len(lengths.add(len(find(browser, ".theirs").text)) or lengths) > 3
            if len(turns(browser)) > 1
            else False
        )
    )
    assert find(browser, "#send").text == "Stop"
    find(browser, "#send").click()
    eventually(lambda: "Stopped." in find(browser, ".note").text)
    first = turns(browser)[1]
    assert 0 < len(first) and find(browser, "#send").text == "Send"
    find(browser, ".note button").click()
    eventually(lambda: find(browser, "#send").text == "Stop")
    browser.switch_to.active_element.send_keys("\ue00c")  # Escape
    eventually(lambda: "Stopped." in find(browser, ".note").text)
    assert len(turns(browser)) <= 2 and len(browser.execute_script("return turns")) <= 2
    find(browser, "#fresh").click()
    assert turns(browser) == [] and find(browser, "#empty").is_displayed()


def test_errors_are_told_to_a_person(browser, server):
    show(browser, server, "phone")
    say(browser, "x " * 250)
    note = eventually(lambda: find(browser, ".note.bad"))
    assert (
        "too long" in note.text
        and turns(browser) == []
        and find(browser, "#text").get_attribute("value") == "x " * 249 + "x"
    )
    find(browser, "#text").clear()
    picture(browser, "phone-light-error")
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    find(browser, "#fresh").click()
    say(browser, "hello")
    assert "cannot be reached" in find(browser, ".note.bad").text
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    find(browser, ".note button").click()
    eventually(lambda: len(turns(browser)) == 2 and find(browser, "#send").text == "Send")


def test_message_too_large_comes_back_into_the_box_and_the_chat_goes_on(browser, server):
    show(browser, server)
    for letters in (1_500_000, 999_900):
        browser.execute_script("$('text').value = 'x'.repeat(arguments[0]); submit()", letters)
        (note,) = eventually(lambda: browser.find_elements("css selector", ".note.bad"))
        assert "too long" in note.text and turns(browser) == []
        browser.execute_script("text.value = ''; refresh()")
        say(browser, "hello")
        assert len(turns(browser)) == 2 and turns(browser)[0] == "hello"
        find(browser, "#fresh").click()


def test_page_asks_nothing_of_other_hosts_and_has_names_for_everything(browser, server):
    browser.get_log("performance")
    show(browser, server)
    say(browser, "hello")
    asked = [
        entry["message"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert asked and all(
        f"127.0.0.1:{server.port}" in message or '"url":"data:' in message for message in asked
    )
    assert not [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE"
        and "404" not in entry["message"]
        and "400" not in entry["message"]
        and "INTERNET_DISCONNECTED" not in entry["message"]
    ]
    find(browser, "#tune").click()
    for control in browser.find_elements("css selector", "button, input, textarea"):
        assert control.accessible_name
