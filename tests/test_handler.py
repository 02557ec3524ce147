"""TorchServe's face of the server: the contract of continuous batching, settings, metrics."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from serving import ROOT, ServiceClient
from ts.context import Context, RequestProcessor

from gptchat.config import ServerSettings, build_server_settings
from gptchat.console import UserError
from gptchat.inference.linear import DTYPES
from gptchat.inference.sampling import SETTINGS
from gptchat.settings import update_tables
from handlers import gptchat_handler
from handlers.gptchat_handler import GptchatHandler
from handlers.page import FOLDER as PAGE_FOLDER
from handlers.page import render_page
from handlers.routes import describe
from handlers.service import Chunk
from handlers.settings import tables

torch.set_num_threads(1)
yaml = pytest.importorskip("yaml")
# with these the model of the tests never ends by itself
LONG = {"temperature": 0, "repetition_penalty": 1}
CONFIG = yaml.safe_load((ROOT / "configs/serve/model-config.yaml").read_text())


class Metrics:
    """Stands in for TorchServe's cache of metrics: remembers what was recorded."""

    def __init__(self):
        self.seen = []

    def get_metric(self, name, kind):
        return SimpleNamespace(
            add_or_update=lambda value, labels: self.seen.append((kind.value, name, value, labels))
        )


class HandlerClient(ServiceClient):
    """TorchServe's half of continuous batching: bodies come in the first call only."""

    def start(self, folder, task, settings):
        config = CONFIG | {"gptchat": CONFIG["gptchat"] | {"dtype": "float32"} | settings}
        self.context = Context(
            task, str(folder), None, 64, None, "0.12", metrics=Metrics(), model_yaml_config=config
        )
        self.handler = GptchatHandler()
        self.handler.initialize(self.context)
        self.ends = []  # what the stopping criteria said

    def chunks(self):
        ids = list(self.live)
        self.context.request_ids = dict(enumerate(ids))
        self.context.request_processor = [RequestProcessor(dict(self.live[id])) for id in ids]
        data = [{"body": self.new.pop(id, bytearray())} for id in ids]
        texts = self.handler.handle(data, self.context)
        assert len(self.context.stopping_criteria) == len(ids) == len(texts)
        chunks = []
        for i, (id, text) in enumerate(zip(ids, texts, strict=True)):
            end = self.context.stopping_criteria[i](text)
            self.ends.append(end)
            status, reason = self.context.get_response_status(i)
            kind = self.context.get_response_content_type(i)
            assert reason == ""
            is_first = self.got[id].status is None
            chunks.append(Chunk(text, status, kind, is_first, end in (True, None)))
        return chunks


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return HandlerClient(tmp_path_factory.mktemp("chat"), "chatlm")


def test_answer_in_the_first_call_is_no_stream(chat):
    chat.ends.clear()
    page = render_page("chatlm", ["chatlm"], describe(chat.handler.service.model))
    assert chat.ask(bytearray()) == (200, page) and page.startswith("<!doctype html>")
    assert chat.ask({"context": 3})[0] == 400
    assert chat.ask(bytearray(b"{bad"))[0] == 400
    assert chat.ends == [None] * 3


def test_later_calls_go_on_until_the_answer_is_whole(chat):
    chat.ends.clear()
    status, answer = chat.ask({"context": "good morning", "n": 1, "max_tokens": 60} | LONG)
    assert status == 200 and answer["model_info"]["output"] == [answer["response"]]
    assert chat.ends[-1] is True and not any(chat.ends[:-1]) and None not in chat.ends


def test_stream_is_the_whole_answer_in_pieces(chat, monkeypatch):
    monkeypatch.setattr("handlers.loop.ROUND_SECONDS", 1e-3)  # hand over after each step
    body = {"context": "hello", "max_tokens": 20, "n": 1} | LONG
    whole = chat.ask(body)[1]
    chat.send("stream", body | {"stream": True})
    chat.finish("stream")
    got = chat.got["stream"]
    assert (got.status, got.kind) == (200, "text/event-stream") and got.chunks > 1
    *events, last = [json.loads(part[6:]) for part in got.text.split("\n\n")[:-2]]
    assert "".join(event["token"] for event in events) == whole["response"] == last["response"]


def test_figures_reach_torchserves_metrics(chat):
    chat.context.metrics.seen.clear()
    chat.ask({"prompt": "hello", "user": "u"}, "v1/completions")
    chat.ask({"context": "hello", "n": 1, "max_tokens": 60} | LONG)
    seen = {(kind, name): labels for kind, name, _, labels in chat.context.metrics.seen}
    assert seen["counter", "gptchat_requests"] == ["chatlm", "original", "200"]
    declared = yaml.safe_load((ROOT / "configs/serve/metrics.yaml").read_text())["model_metrics"]
    assert set(seen) == {(kind, entry["name"]) for kind in declared for entry in declared[kind]}


def test_page_admits_its_own_styles_and_scripts_only_and_knows_every_setting(chat):
    names = ["chatlm", "</script><b>"]
    page = render_page("chatlm", names, describe(chat.handler.service.model))
    contents = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.S)
    assert len(contents) == 1 + len(list(PAGE_FOLDER.glob("*.js")))
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert "unsafe" not in policy and "default-src 'none'" in policy
    admitted = re.findall(r"'sha256-(.*?)'", policy)
    assert admitted == [b64encode(sha256(text.encode()).digest()).decode() for text in contents]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    assert not re.search(r"<[^>]* (?:style|on\w+)=", page)
    (data,) = re.findall(r'<script type="application/json" id="server">(.*?)</script>', page)
    server = json.loads(data)
    assert server["models"] == names
    assert server["settings"].keys() >= {*SETTINGS, "n", "seed", "stop", "bad_words"}


def test_handler_file_holds_exactly_one_class():
    classes = [
        value
        for value in vars(gptchat_handler).values()
        if isinstance(value, type) and value.__module__ == gptchat_handler.__name__
    ]
    assert classes == [GptchatHandler]


def test_shipped_settings_are_the_defaults():
    assert build_server_settings(CONFIG, "") == ServerSettings()
    assert CONFIG["gptchat"].keys() == vars(ServerSettings()).keys()
    choices = ServerSettings.__dataclass_fields__["dtype"].metadata["rules"]["choices"]
    assert choices == ("auto", *DTYPES)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"slotz": 3}, "model-config.yaml: [gptchat] slotz: unknown key; wanted one of dtype, slo"),
        ({"slots": 0}, "[gptchat] slots: found 0; wanted an integer, at least 1"),
    ],
)
def test_wrong_setting_refuses_to_start_with_one_line(tmp_path, settings, reason):
    with pytest.raises(UserError) as error:
        HandlerClient(tmp_path, "chatlm", **settings)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_the_readme_has_the_tables_that_python_m_handlers_settings_writes(tmp_path):
    path = tmp_path / "README.md"
    current = (ROOT / "handlers/README.md").read_text(encoding="utf-8")
    path.write_text(current, encoding="utf-8")
    update_tables(path, tables())
    assert path.read_text(encoding="utf-8") == current, "run `python -m handlers.settings`"


def test_readme_has_every_metric():
    text = (ROOT / "handlers" / "README.md").read_text()
    declared = yaml.safe_load((ROOT / "configs/serve/metrics.yaml").read_text())["model_metrics"]
    for kind, entries in declared.items():
        for entry in entries:
            table = [line for line in text.splitlines() if line.startswith("| `gptchat_")]
            rows = [line for line in table if f"`{entry['name']}`" in line]
            assert len(rows) == 1 and f"| {kind} |" in rows[0]


def test_full_queue_says_when_to_try_again(tmp_path):
    client = HandlerClient(tmp_path, "chatlm", max_requests=1)
    for id in ("first", "second"):
        client.send(id, {"context": "hello", "n": 1, "max_tokens": 60} | LONG)
    client.round()
    assert [client.got[id].status for id in ("first", "second")] == [200, 503]
    assert client.context.get_response_headers(1)["Retry-After"] == "1"
    assert "Retry-After" not in client.context.get_response_headers(0)
    client.finish("first")
