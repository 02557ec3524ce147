"""What the tests of the server share: tiny models, and a real TorchServe on free ports."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import yaml
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptchat.config import ServerSettings
from gptchat.data.tokenizer import SPECIAL, Tokenizer
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.pretrained import TRAINED_HERE, AnswerDefaults
from handlers.served_model import load_served_model
from handlers.service import Arrival, Chunk, Service

ROOT = Path(__file__).resolve().parent.parent
TEXT = [
    "good morning, how are you today? I am fine, thank you.",
    "where do you live? in a small town by the sea.",
    "おはよう 😀",
]


def tiny_model(
    folder: Path,
    task: str,
    n_embd: int = 32,
    n_layer: int = 2,
    n_positions: int = 128,
    seed: int = 0,
    ends: bool = True,
    defaults: AnswerDefaults = TRAINED_HERE,
) -> Path:
    """A model directory with random weights, wide enough that greedy answers vary, and about 300
    tokens. Without `ends`, its answers have all the tokens that were asked for."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = Tokenizer(backend)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=4,
    )
    model = GPT2(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    if not ends:
        with torch.no_grad():
            model.ln_f.weight[0], model.ln_f.bias[0] = 0, 1
            model.wte.weight[:, 0] = 0
            model.wte.weight[tokenizer.cls_id, 0] = -1000
    pretrained.save_static(folder, config, tokenizer, task, defaults)
    pretrained.save_weights(folder, model)
    return folder


class ServiceClient:
    """The caller of a `Service`: rounds over all live requests, with headers and body of the new
    ones."""

    def __init__(self, folder: Path, task: str, **settings: Any):
        self.model = tiny_model(folder / "model", task)
        self.figures: list[tuple[str, str, float, list[str]]] = []
        self.live: dict[str, dict[str, str]] = {}  # id -> headers
        self.new: dict[str, Any] = {}  # id -> body
        self.got: dict[str, SimpleNamespace] = {}
        self.start(folder, task, settings)

    def start(self, folder: Path, task: str, settings: dict[str, Any]) -> None:
        settings = {"dtype": "float32"} | settings
        model = load_served_model(self.model, task, ServerSettings(**settings))

        def record(*figure: Any) -> None:
            self.figures.append(figure)

        self.service = Service(model, "<p>page", folder / "draining", record)
        self.service.start()

    def chunks(self) -> list[Chunk]:
        arrivals = {id: Arrival(self.live[id], body) for id, body in self.new.items()}
        self.new.clear()
        return self.service.round(list(self.live), arrivals)

    def send(self, id: str, body: Any, path: str = "", **headers: str) -> None:
        self.new[id] = body
        self.live[id] = {"url_path": path, "content-type": "application/json"} | headers
        self.got[id] = SimpleNamespace(text="", chunks=0, status=None, kind=None, done=False)

    def round(self) -> None:
        ids = list(self.live)
        chunks = self.chunks()
        assert len(chunks) == len(ids)
        for id, chunk in zip(ids, chunks, strict=True):
            got = self.got[id]
            assert chunk.is_first == (got.status is None)
            got.status = got.status or chunk.status
            got.kind = got.kind or chunk.content_type
            got.text += chunk.text
            got.chunks += bool(chunk.text)
            if chunk.is_last:
                got.done = True
                del self.live[id]

    def finish(self, *ids: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while any(id in self.live for id in (ids or tuple(self.live))):
            assert time.monotonic() < deadline
            self.round()

    def ask(self, body: Any, path: str = "", **headers: str) -> tuple[int, Any]:
        id = f"ask {len(self.got)}"
        self.send(id, body, path, **headers)
        self.finish(id)
        got = self.got[id]
        return got.status, json.loads(got.text) if got.kind == "application/json" else got.text


def free_ports(count: int = 12) -> int:
    """The first of `count` free ports in a row; none that another worker of pytest-xdist tries."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    first = 20000 + 3000 * worker  # below 32768, from where on the kernel gives ports to clients
    for base in range(first + os.getpid() % 2000, first + 3000 - count, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise RuntimeError("no free ports")


def configs(folder: Path, **limits: object) -> Path:
    """A copy of configs/serve in float32, with other limits in model-config.yaml."""
    folder.mkdir()
    for source in (ROOT / "configs" / "serve").iterdir():
        (folder / source.name).write_text(source.read_text())
    path = folder / "model-config.yaml"
    values = yaml.safe_load(path.read_text())
    values["gptchat"] |= {"dtype": "float32"} | limits
    path.write_text(yaml.safe_dump(values))
    return folder


class Server:
    """The launcher in a process of its own; `url(path)` and `post` speak with the API."""

    def __init__(
        self,
        run: Path,
        named: dict[str, Path],
        *arguments: str,
        environment: dict[str, str] | None = None,
        cwd: Path = ROOT,
    ):
        self.run, self.port = run, free_ports()
        run.mkdir(parents=True, exist_ok=True)
        self.log = run / "launcher.log"
        models = [word for name, path in named.items() for word in ("--model", f"{name}={path}")]
        command = [
            sys.executable,
            "-m",
            "gptchat",
            "serve",
            *models,
            "--run",
            str(run),
            "--port",
            str(self.port),
            *arguments,
        ]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    def wait_until_ready(self, seconds: float = 300) -> "Server":
        deadline = time.monotonic() + seconds
        while "Ctrl-C stops" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(self.log.read_text())
            time.sleep(0.1)
        return self

    def wait_for_log(self, words: str, seconds: float = 20) -> None:
        """Wait until the launcher has printed these words."""
        deadline = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, words
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """The launcher, Java, and the workers."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        return [
            p for p in self.family() if any("model_service_worker" in word for word in p.cmdline())
        ]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20) -> float:
        """Send a signal; the seconds until the launcher is gone."""
        begin = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in self.family():
                process.kill()
            raise
        return time.monotonic() - begin

    def open(
        self,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        timeout: float = 120,
        method: str = "POST",
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """The connection and the answer's head, whose body is still to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(
            method,
            f"/predictions/{path}",
            data,
            {"content-type": "application/json"} | (headers or {}),
        )
        return connection, connection.getresponse()

    def post(self, path: str, body: object = None, **options: object) -> tuple[int, object]:
        """Status and body, parsed where it is JSON."""
        connection, response = self.open(path, body, **options)  # type: ignore[arg-type]
        raw = response.read()
        connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(raw) if is_json else raw.decode()

    def events(self, path: str, body: object) -> list[tuple[float, object]]:
        """(seconds since the request, event) of a stream, whose last event must be "[DONE]"."""
        begin = time.monotonic()
        connection, response = self.open(path, body)
        assert response.status == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream"
        events, raw = [], b""
        while chunk := response.read1(65536):
            chunk.decode()  # no chunk ends within a character
            raw += chunk
            *whole, raw = raw.split(b"\n\n")
            events += [(time.monotonic() - begin, part.decode()) for part in whole]
        connection.close()
        assert events[-1][1] == "data: [DONE]" and not raw
        return [(at, json.loads(text.removeprefix("data: "))) for at, text in events[:-1]]

    def metrics(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port + 2, timeout=10)
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()

    def is_busy(self) -> bool:
        """Whether some sequence is being decoded."""
        return any(
            line.startswith("gptchat_live_slots") and float(line.split()[-1]) > 0
            for line in self.metrics().splitlines()
        )
