"""The chat page in a real Chromium (Debian's packages chromium and chromium-driver).

Skipped where there is none.
"""

import json
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest
from conftest import run
from serving import Server, configs, tiny_model

from gptchat.data.dialogue_files import read_dialogues
from gptchat.inference.sampling import SETTINGS
from gptchat.model.pretrained import TRAINED_HERE, AnswerDefaults

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
    # An answer without a token would be no turn.
    settings = {"n_positions": 256, "ends": False}
    picks = AnswerDefaults(TRAINED_HERE.sampling, candidates=8, pick="mmi")
    server = Server(
        folder / "run",
        {
            "chatlm": tiny_model(folder / "chatlm", "chatlm", **settings),
            "second": tiny_model(folder / "second", "chatlm", **settings, defaults=picks),
        },
        f"--configs={configs(folder / 'configs')}",
    )
    server.models = folder
    yield server.wait_until_ready()
    server.stop()


class Proxy(ThreadingHTTPServer):
    """Stands before the server, as nginx does: asks for a key, refuses, breaks off, takes time."""

    daemon_threads = True

    def __init__(self, server):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.upstream = server
        self.port = self.server_address[1]
        self.key = ""  # that a POST must bring
        self.refusal = None  # (status, headers) of the next POST
        self.breaks_off = False  # the next POST's answer
        self.delay = 0.0  # seconds before each piece of an answer
        threading.Thread(target=self.serve_forever, daemon=True).start()


class ProxyHandler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.pass_on(None)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        proxy = self.server
        if proxy.key and self.headers["authorization"] != f"Bearer {proxy.key}":
            return self.refuse(401, {})
        if proxy.refusal:
            self.refuse(*proxy.refusal)
            proxy.refusal = None
            return None
        return self.pass_on(body)

    def refuse(self, status, headers):
        self.send_response(status)
        for name, value in {"content-length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def pass_on(self, body):
        proxy = self.server
        path = self.path.removeprefix("/predictions/")
        connection, response = proxy.upstream.open(path, body, method=self.command)
        self.send_response(response.status)
        self.send_header("content-type", response.headers["content-type"])
        self.end_headers()
        sent = b""
        with suppress(ConnectionError):  # the browser has left
            while chunk := response.read1(1000):
                if body:
                    time.sleep(proxy.delay)
                self.wfile.write(chunk)
                sent += chunk
                whole_events = sent[: sent.rfind(b"\n\n") + 1]
                if proxy.breaks_off and re.search(rb'"content": ?"[^"\\]*[a-z]', whole_events):
                    proxy.breaks_off = False
                    break
        connection.close()


@pytest.fixture(scope="module")
def proxy(server):
    proxy = Proxy(server)
    yield proxy
    proxy.shutdown()


@pytest.fixture
def slow(proxy):
    """The server with answers that take seconds to arrive."""
    proxy.delay = 0.1
    yield proxy
    proxy.delay = 0.0


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


def find_all(browser, selector):
    return browser.find_elements("css selector", selector)


def turns(browser):
    return [turn.text for turn in find_all(browser, ".turn")]


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def show(browser, server, size="desktop", dark=False):
    """The page as a newcomer sees it."""
    width, height = SIZES[size]
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
    )
    url = f"http://127.0.0.1:{server.port}"
    browser.get(f"{url}/predictions/chatlm")
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.get(f"{url}/predictions/chatlm")


def wait_for_the_answer(browser):
    eventually(lambda: find(browser, "#send").text == "Send" and not find_all(browser, ".live"))


def say(browser, words, wait=True):
    find(browser, "#text").send_keys(words + "\n")
    if wait:
        wait_for_the_answer(browser)


def press(browser, name):
    """Click the last visible button of this name."""
    buttons = find_all(browser, "button")
    [button for button in buttons if button.text == name][-1].click()


def problem(browser):
    """What is told of a failure, "" if nothing is."""
    return "".join(note.text for note in find_all(browser, ".note.bad"))


def messages(browser):
    """(role, content) of each message that the page holds."""
    pairs = browser.execute_script("return state.chat.messages.map(m => [m.role, m.content])")
    return [tuple(pair) for pair in pairs]


def kept_chats(browser):
    return browser.execute_script("return readChats().map(kept => kept.messages.length)")


def choose(browser, **settings):
    """Type values into the settings, which are closed before and after."""
    find(browser, "#tune").click()
    for name, value in settings.items():
        field = find(browser, f"#setting-{name}")
        field.clear()
        field.send_keys(str(value))
    find(browser, "#settings .close").click()


def last_body(browser):
    """The JSON of the last request for an answer."""
    bodies = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            bodies.append(message["params"]["request"].get("postData"))
    return json.loads([body for body in bodies if body][-1])


def asked(browser):
    """The status of each request for an answer since the last look at the log, or None."""
    statuses = {}
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        params = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            if params["request"]["url"].endswith("/chat/completions"):
                statuses[params["requestId"]] = None
        elif message["method"] == "Network.responseReceived" and params["requestId"] in statuses:
            statuses[params["requestId"]] = params["response"]["status"]
    return list(statuses.values())


def picture(browser, name):
    """Kept where PAGE_PICTURES says, for people to look at."""
    if folder := os.environ.get("PAGE_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(f"{folder}/{name}.png")


@pytest.mark.parametrize("size, dark", [("desktop", False), ("phone", True)])
def test_several_turns_by_keyboard(browser, server, size, dark):
    browser.get_log("performance")
    show(browser, server, size, dark)
    picture(browser, f"{size}-empty")
    assert browser.title == "chatlm"
    assert browser.switch_to.active_element.get_attribute("id") == "text"
    say(browser, "Good morning, how are <b>you</b>?")
    say(browser, "שלום, מה שלומך?")
    said = turns(browser)
    assert len(said) == 4 and said[0] == "Good morning, how are <b>you</b>?"
    assert not find_all(browser, ".turn b")
    assert [role for role, _ in messages(browser)] == ["user", "assistant"] * 2
    mine = "[...talk.querySelectorAll('.mine')].map(turn => getComputedStyle(turn).direction)"
    assert browser.execute_script(f"return {mine}") == ["ltr", "rtl"]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, color[4:-1].split(","))) < 64) == dark
    find(browser, "#tune").click()
    picture(browser, f"{size}-talk")
    shown = (
        "button, input, select, textarea" if size == "desktop" else "#settings :is(button, input)"
    )
    for control in find_all(browser, shown):
        assert control.accessible_name or not control.is_displayed()
    for entry in browser.get_log("performance"):
        message = entry["message"]
        if '"Network.requestWillBeSent"' in message:
            assert f"127.0.0.1:{server.port}" in message or '"url":"data:' in message
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_answer_streams_and_can_be_stopped_and_tried_again(browser, slow):
    show(browser, slow)
    choose(browser, max_new_tokens=200, temperature=2, n=2)
    say(browser, "hello", wait=False)
    for _ in range(3):  # it grows
        before = turns(browser)[1:]
        eventually(lambda before=before: turns(browser)[1:] != before)
    assert find(browser, "#send").text == "Stop"
    find(browser, "#send").click()
    eventually(lambda: "Stopped." in find(browser, ".note").text)
    first = turns(browser)[1]
    assert 0 < len(first) and find(browser, "#send").text == "Send"
    role, content = messages(browser)[1]
    # A browser shows white space in its own way.
    assert role == "assistant" and content.split() == first.split()
    press(browser, "Regenerate")
    eventually(lambda: find(browser, "#send").text == "Stop")
    browser.switch_to.active_element.send_keys("\ue00c")  # Escape
    eventually(lambda: "Stopped." in find(browser, ".note").text)
    assert len(messages(browser)) == 2
    find(browser, "#fresh").click()
    assert turns(browser) == [] and find(browser, "#empty").is_displayed()


def go_offline(browser, is_offline):
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions", conditions | {"offline": is_offline}
    )


def test_errors_are_told_to_a_person(browser, server):
    show(browser, server, "phone")
    say(browser, "x " * 250)
    assert "too long" in problem(browser) and turns(browser) == []
    assert find(browser, "#text").get_attribute("value") == "x " * 249 + "x"
    find(browser, "#text").clear()
    go_offline(browser, True)
    say(browser, "hello")
    assert "cannot be reached" in problem(browser)
    picture(browser, "phone-light-error")
    go_offline(browser, False)
    press(browser, "Try again")
    wait_for_the_answer(browser)
    assert len(turns(browser)) == 2


MAX_BYTES = 1_000_000  # of messages in a request, as the page counts: JSON in UTF-8
LARGEST = MAX_BYTES - len('{"role":"assistant","content":""}')


def test_message_too_large_to_be_read_is_not_sent_and_the_chat_goes_on(browser, server):
    words = "é" * (LARGEST // 2 + 1)
    show(browser, server)
    say(browser, "hello")
    before = turns(browser)
    asked(browser)
    browser.execute_script("text.value = arguments[0]; submit()", words)
    assert "too long" in problem(browser) and turns(browser) == before
    assert browser.execute_script("return text.value === arguments[0]", words)
    browser.execute_script(
        "text.value = ''; edit(0); state.editing.draft = arguments[0]; draw()", words
    )
    browser.execute_script("sendEdited()")
    assert "too long" in problem(browser) and messages(browser)[0] == ("user", "hello")
    assert browser.execute_script("return state.editing.draft === arguments[0]", words)
    assert asked(browser) == []
    browser.execute_script("stopEditing()")
    say(browser, "and now?")
    assert turns(browser)[:3] == [*before, "and now?"] and len(turns(browser)) == 4
    assert asked(browser) == [200] and not find_all(browser, ".note.bad")


def test_largest_message_is_read_by_the_server_and_comes_back_into_the_box(browser, server):
    show(browser, server)
    say(browser, "hello")  # an earlier message does not make it too large
    before = turns(browser)
    asked(browser)
    browser.execute_script("text.value = 'x'.repeat(arguments[0]); submit()", LARGEST)
    wait_for_the_answer(browser)
    assert asked(browser) == [400]  # not 413: it is longer than the context
    assert "too long" in problem(browser) and turns(browser) == before
    assert browser.execute_script("return text.value.length") == LARGEST


def test_earlier_messages_that_no_longer_fit_into_a_request_are_left_out(browser, server):
    show(browser, server)
    say(browser, "hello")
    browser.execute_script("for (const m of state.chat.messages) m.content = 'x '.repeat(300_000)")
    asked(browser)
    browser.execute_script("text.value = 'and now?'; submit()")
    wait_for_the_answer(browser)
    assert asked(browser) == [200] and len(messages(browser)) == 4


def test_reload_keeps_the_conversation_and_the_settings(browser, server):
    show(browser, server)
    choose(browser, temperature=1.3, stop="xyz\n\\n")
    say(browser, "hello")
    said = turns(browser)
    browser.refresh()
    assert turns(browser) == said and kept_chats(browser) == [2]
    browser.get_log("performance")
    say(browser, "and now?")
    assert turns(browser)[:3] == [*said, "and now?"]
    body = last_body(browser)
    assert body["temperature"] == 1.3 and body["stop"] == ["xyz", "\n"]
    sent = [(message["role"], message["content"]) for message in body["messages"]]
    assert sent == messages(browser)[:3]
    find(browser, "#tune").click()
    press(browser, "Back to the defaults")
    browser.refresh()
    assert find(browser, "#setting-temperature").get_attribute("value") == ""


def test_reload_keeps_what_was_typed_and_what_was_not_answered(browser, slow):
    show(browser, slow)
    choose(browser, max_new_tokens=60, temperature=2)
    say(browser, "hello", wait=False)
    eventually(lambda: find(browser, "#send").text == "Stop")
    browser.refresh()
    assert turns(browser) == ["hello"] and "No answer yet" in find(browser, ".note").text
    slow.delay = 0.0
    press(browser, "Try again")
    wait_for_the_answer(browser)
    assert len(turns(browser)) == 2
    find(browser, "#text").send_keys("half a thou")
    browser.execute_script("edit(0)")
    browser.switch_to.active_element.send_keys(" you")
    browser.refresh()
    assert find(browser, "#text").get_attribute("value") == "half a thou"
    assert find(browser, ".editor textarea").get_attribute("value") == "hello you"
    press(browser, "Cancel")
    find(browser, "#text").send_keys("ght\n")
    wait_for_the_answer(browser)
    browser.refresh()
    assert find(browser, "#text").get_attribute("value") == ""
    assert not find_all(browser, ".editor")
    assert turns(browser)[2] == "half a thought"


def test_conversations_are_listed_opened_and_deleted(browser, server):
    show(browser, server)
    for words in ("first", "second"):
        find(browser, "#fresh").click()
        say(browser, words)
    listed = [row.text for row in find_all(browser, "#list .open")]
    assert listed == ["second", "first"]
    press(browser, "first")
    assert turns(browser)[0] == "first"
    browser.back()
    eventually(lambda: turns(browser)[0] == "second")
    find(browser, "#list li:last-child .delete").click()
    browser.switch_to.alert.dismiss()
    assert len(kept_chats(browser)) == 2
    for left in (1, 0):
        find(browser, "#list li:last-child .delete").click()
        browser.switch_to.alert.accept()
        assert len(kept_chats(browser)) == left
        assert turns(browser)[:1] == ["second"][:left]


def test_export_is_read_by_training(browser, server, tmp_path):
    show(browser, server)
    choose(browser, temperature=2, repetition_penalty=2)
    conversations = [
        ["Good morning", "a\u0000b\tc \ud83d\ude00 \u2028 x"],
        ["おはよう"],
        ["no answer"],
    ]
    for mine in conversations:
        find(browser, "#fresh").click()
        for words in mine:
            browser.execute_script("text.value = arguments[0]; submit()", words)
            wait_for_the_answer(browser)
    browser.execute_script("state.chat.messages.pop(); keep(state.chat)")
    half = "state.chat.messages[1].content += '\\ud83d\\0'; writeChat(state.chat)"
    browser.execute_script(f"go(readChats()[1].id); {half}")
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    press(browser, "Export as JSONL")
    path = tmp_path / "chatlm.jsonl"
    eventually(path.exists)
    dialogues = list(read_dialogues(path))
    assert [len(turns) for turns in dialogues] == [4, 2]
    assert [speaker for speaker, _ in dialogues[0]] == [0, 1, 0, 1]
    assert dialogues[0][2][1] == "ab\tc 😀 \u2028 x" and dialogues[1][0][1] == "おはよう"
    assert dialogues[1][1][1].endswith("\ufffd")


def test_regenerate_shows_candidates_of_which_one_is_gone_on_with(browser, server):
    show(browser, server)
    choose(browser, temperature=2, max_new_tokens=12, n=3)
    say(browser, "hello")
    first = messages(browser)[1][1]
    press(browser, "Regenerate")
    wait_for_the_answer(browser)
    shown = [row.text for row in find_all(browser, ".candidate")]
    assert len(shown) == 4 and messages(browser)[1][1] != first
    find(browser, ".candidate:last-child input").click()
    assert messages(browser)[1][1] == first
    browser.switch_to.active_element.send_keys("\ue013")  # the arrow up: the one before it
    browser.refresh()
    assert [row.text for row in find_all(browser, ".candidate")] == shown
    third = messages(browser)[1][1]
    assert (
        third not in (first, "")
        and find(browser, ".candidate:nth-last-child(2) input").is_selected()
    )
    browser.get_log("performance")
    say(browser, "go on")
    assert last_body(browser)["messages"][1]["content"] == third
    assert find_all(browser, ".candidate") == [] and len(turns(browser)) == 4


def test_edited_message_replaces_what_followed(browser, server):
    show(browser, server)
    for words in ("one", "two"):
        say(browser, words)
    before = turns(browser)
    edit = "talk.querySelectorAll('.from-me')[0].querySelectorAll('button')[1].click()"
    browser.execute_script(edit)
    browser.switch_to.active_element.send_keys(" more\ue00c")  # Escape
    assert turns(browser) == before
    browser.execute_script(edit)
    browser.switch_to.active_element.send_keys(" more\n")
    wait_for_the_answer(browser)
    assert turns(browser)[0] == "one more" and len(messages(browser)) == 2
    browser.execute_script("edit(0); state.editing.draft = 'x '.repeat(400); sendEdited()")
    wait_for_the_answer(browser)
    assert "too long" in find(browser, ".note.bad").text and len(messages(browser)) == 2
    assert len(find(browser, ".editor textarea").get_attribute("value")) == 799


def test_settings_are_those_of_the_server_and_are_checked(browser, server):
    show(browser, server)
    find(browser, "#tune").click()
    fields = find_all(browser, "#fields [id^=setting-]:is(input, textarea)")
    names = {field.get_attribute("id").removeprefix("setting-") for field in fields}
    assert names >= {*SETTINGS, "n", "best_of", "seed", "stop", "bad_words"}
    for name, wrong in {"top_p": "2", "top_k": "1.5", "seed": "x"}.items():
        find(browser, f"#setting-{name}").send_keys(wrong)
        assert "wanted" in find(browser, f"#setting-{name}-help").text
    find(browser, "#setting-temperature").send_keys("0,7")
    browser.get_log("performance")
    say(browser, "hello")
    sent = last_body(browser).keys() - {"model", "messages", "n", "stream", "stream_options"}
    assert sent == {"temperature"}  # all else is the model's own


def test_tokens_and_seconds_are_told_and_an_answer_can_be_copied(browser, server):
    show(browser, server)
    choose(browser, max_new_tokens=8, temperature=2, seed=1)
    say(browser, "hello")
    assert re.fullmatch(r"\d+ tokens · [\d.]+ s( ·.*)?", find(browser, ".note").text)
    # A browser without focus, which a test cannot rule out, refuses to read its clipboard.
    browser.execute_script(
        "navigator.clipboard.writeText = async (words) => { window.copied = words }"
    )
    press(browser, "Copy")
    copied = eventually(lambda: browser.execute_script("return window.copied"))
    assert copied == messages(browser)[1][1]


def test_other_models_of_the_server_can_be_chosen_with_the_same_conversation(browser, server):
    show(browser, server)
    say(browser, "hello")
    said = turns(browser)
    assert [option.text for option in find_all(browser, "#model option")] == [
        "chatlm",
        "second",
    ]
    find(browser, "#model option:last-child").click()
    eventually(lambda: browser.title == "second")
    assert turns(browser) == said
    browser.get_log("performance")
    say(browser, "and you?")
    assert last_body(browser)["model"] == "second" and len(turns(browser)) == 4


def test_same_seed_gives_the_answer_of_the_terminal_and_of_openais_client(browser, server):
    """The model picks among candidates, and its own settings hold everywhere."""
    show(browser, server)
    choose(browser, seed=5)
    find(browser, "#model option:last-child").click()
    eventually(lambda: browser.title == "second")
    thinking = browser.execute_script(
        "text.value = 'good morning'; submit();"
        "return getComputedStyle(document.querySelector('.live'), '::before').content"
    )
    assert "thinking" in thinking
    wait_for_the_answer(browser)
    ((_, _), (_, answer)) = messages(browser)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/predictions/second/1.0/v1", api_key="-"
    )
    asked = [{"role": "user", "content": "good morning"}]
    choices = client.chat.completions.create(model="second", messages=asked, seed=5).choices
    assert [choice.message.content for choice in choices] == [answer]
    said = ["--prompt", "good morning", "--seed", 5, "--dtype", "float32"]
    assert run("chat", "--model", server.models / "second", *said).strip() == answer.strip()


def test_key_is_asked_for_and_kept_for_the_tab_unless_ticked(browser, proxy):
    show(browser, proxy)
    proxy.key = "secret"
    say(browser, "hello")
    assert "asks for a key" in find(browser, ".note.bad").text
    press(browser, "Enter the key")
    browser.switch_to.active_element.send_keys("wrong")
    press(browser, "Try again")
    eventually(lambda: "does not take this key" in problem(browser))
    find(browser, "#key").clear()
    find(browser, "#key").send_keys("secret")
    press(browser, "Try again")
    wait_for_the_answer(browser)
    assert len(turns(browser)) == 2
    in_local_storage = "return JSON.stringify({...localStorage}).includes('secret')"
    assert not browser.execute_script(in_local_storage)
    find(browser, "#keep-key").click()
    assert browser.execute_script(in_local_storage)
    browser.refresh()
    say(browser, "again")
    assert len(turns(browser)) == 4
    proxy.key = ""


def test_busy_server_and_lost_connection_can_be_tried_again(browser, proxy):
    show(browser, proxy)
    choose(browser, temperature=2, max_new_tokens=100)
    proxy.refusal = (503, {"retry-after": "7"})
    say(browser, "hello")
    assert "busy" in problem(browser) and "in 7 seconds" in problem(browser)
    proxy.breaks_off = True
    press(browser, "Try again")
    eventually(lambda: "lost in the middle" in problem(browser))
    (_, (_, part)) = messages(browser)
    proxy.refusal = (503, {})
    press(browser, "Try again")
    eventually(lambda: "busy" in problem(browser))
    assert messages(browser)[1][1] == part
    press(browser, "Try again")
    wait_for_the_answer(browser)
    shown = [row.text for row in find_all(browser, ".candidate")]
    assert len(shown) == 2 and len(messages(browser)) == 2
    assert shown[1].split() == part.split() != messages(browser)[1][1].split()
    assert not find_all(browser, ".note.bad")


def test_enter_that_ends_a_composition_does_not_send(browser, server):
    show(browser, server)
    find(browser, "#text").click()
    compose = {"text": "おはよう", "selectionStart": 4, "selectionEnd": 4}
    browser.execute_cdp_cmd("Input.imeSetComposition", compose)
    enter = {"type": "keyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    browser.execute_cdp_cmd("Input.dispatchKeyEvent", enter)
    browser.execute_cdp_cmd("Input.insertText", {"text": "おはよう"})
    assert turns(browser) == [] and "おはよう" in find(browser, "#text").get_attribute("value")
    say(browser, "")
    assert turns(browser)[0] == "おはよう"


def test_full_storage_is_told_and_the_conversation_goes_on(browser, server):
    show(browser, server)
    browser.execute_script(
        "for (let size = 1 << 22; size; size >>= 1) {"
        "  try { localStorage.setItem('x' + size, 'x'.repeat(size)) } catch {}"
        "}"
    )
    say(browser, "hello")
    assert find(browser, "#full").is_displayed() and len(turns(browser)) == 2
    browser.execute_script("localStorage.clear()")
    say(browser, "more")
    assert not find(browser, "#full").is_displayed() and kept_chats(browser) == [4]
