"""configs/cluster/nginx.conf: a real nginx with TLS before two real servers, and clients."""

import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serving import ROOT, Server, free_ports, tiny_model

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed"),
]
KEY = "Secret-Key"
LOGIN = "Basic YW5uOnBhc3N3b3Jk"  # ann:password
LONG = {"prompt": "good morning", "max_tokens": 900, "min_tokens": 900, "seed": 1}


class Nginx:
    """The shipped nginx.conf on a free port, for `localhost`, and the replicas on these ports.

    `changes` are replacements in the file besides.
    """

    def __init__(self, folder: Path, replicas: list[int], changes: dict[str, str]):
        folder.mkdir()
        self.port = free_ports()
        text = (ROOT / "configs/cluster/nginx.conf").read_text()
        places = {
            "listen 443": f"listen 127.0.0.1:{self.port}",
            "listen 80": f"listen 127.0.0.1:{self.port + 1}",
            "chat.example.org": "localhost",
            "        server 127.0.0.1:8080;\n": "".join(
                f"        server 127.0.0.1:{port};\n" for port in replicas
            ),
            "        server 127.0.0.1:8090;\n": "",
            "http {\n": f"http {{\n    access_log {folder}/access.log;\n",
        }
        if os.getuid():
            places["http {\n"] += "".join(
                f"    {kind}_temp_path {folder}/{kind};\n"
                for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
        for old, new in (places | changes).items():
            assert old in text, old
            text = text.replace(old, new)
        (folder / "nginx.conf").write_text(text)
        self.tls = write_secrets(folder)
        options = f"daemon off; pid {folder}/nginx.pid; worker_processes 2;"
        if not os.getuid():
            options += " user root;"  # nobody else can read what pytest writes
        command = ["nginx", "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf"]
        self.log = folder / "error.log"
        self.process = subprocess.Popen([*map(str, command), "-g", options])
        deadline = time.monotonic() + 30
        while not (folder / "nginx.pid").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def open(
        self, path: str, body: object = None, authorization: str | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        """The head of the answer: POST with a body, else GET."""
        connection = http.client.HTTPSConnection(
            "localhost", self.port, context=self.tls, timeout=120
        )
        if authorization:
            headers["authorization"] = authorization
        if body is not None:
            headers["content-type"] = "application/json"
        data = json.dumps(body).encode() if body is not None else None
        connection.request("POST" if data else "GET", path, data, headers)
        return connection.getresponse()

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"https://localhost:{self.port}/v1",
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=self.tls),
        )


def openssl(*arguments: object) -> str:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def write_secrets(folder: Path) -> ssl.SSLContext:
    """The four files beside nginx.conf, made as configs/cluster/README.md says."""
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    files = ("-keyout", folder / "tls.key", "-out", folder / "tls.crt")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", 1, *name, *files)
    (folder / "users").write_text("ann:" + openssl("passwd", "-6", "password"))
    (folder / "keys").write_text(f'"~^Bearer {KEY}$" off;\n')
    return ssl.create_default_context(cafile=str(folder / "tls.crt"))


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    model = tiny_model(folder / "chatlm", "chatlm", n_embd=128, n_layer=4, n_positions=1024)
    servers = []
    try:
        for number in range(2):  # one after the other, since each looks for free ports
            servers.append(Server(folder / str(number), {"chatlm": model}).wait_until_ready())
        yield servers
    finally:
        for server in servers:
            server.stop()


def behind_nginx(folder, replicas, changes):
    nginx = Nginx(folder / "nginx", [server.port for server in replicas], changes)
    try:
        yield nginx
    finally:
        nginx.stop()


@pytest.fixture(scope="module")
def nginx(replicas, tmp_path_factory):
    """Without the rate limit, since all tests have one address."""
    yield from behind_nginx(
        tmp_path_factory.mktemp("proxy"), replicas, {"rate=10r/s": "rate=10000r/s"}
    )


@pytest.fixture
def strict_nginx(replicas, tmp_path):
    """The file as it is."""
    yield from behind_nginx(tmp_path, replicas, {})


def requests(server, result):
    """How many completions have ended at a replica with this result."""
    return sum(
        float(line.split()[-1])
        for line in server.metrics().splitlines()
        if line.startswith("gptchat_requests") and f'Result="{result}"' in line
    )


def test_openais_client_gets_a_replicas_answer_over_tls_with_a_key(nginx, replicas):
    asked = {"model": "chatlm", "messages": [{"role": "user", "content": "good morning"}]}
    asked |= {"seed": 3, "max_tokens": 20}
    status, direct = replicas[0].post("chatlm/1.0/v1/chat/completions", asked)
    whole = nginx.client().chat.completions.create(**asked)
    stream = nginx.client().chat.completions.create(**asked, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert status == 200
    assert whole.choices[0].message.content == direct["choices"][0]["message"]["content"]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [model.id for model in nginx.client().models.list()] == ["chatlm"]


def test_requests_are_divided_among_the_replicas(nginx, replicas):
    before = [requests(server, "200") for server in replicas]
    client = nginx.client()
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(
            lambda seed: client.completions.create(model="chatlm", prompt="good", seed=seed),
            range(16),
        )
        assert len(list(answers)) == 16
    after = [requests(server, "200") for server in replicas]
    gained = [new - old for new, old in zip(after, before, strict=True)]
    assert sum(gained) == 16 and min(gained) >= 4, gained


@pytest.mark.parametrize(
    "status, path, size, authorization, reason",
    [
        (401, "/v1/models", 0, f"Bearer {KEY.lower()}", "no valid key and no login"),
        (404, "/ping", 0, f"Bearer {KEY}", "nothing here"),
        (404, "/metrics", 0, f"Bearer {KEY}", "nothing here"),
        (413, "/v1/completions", 1_100_000, LOGIN, "the body is larger than 1 MB"),
    ],
)
def test_what_nginx_refuses_has_openais_shape(nginx, status, path, size, authorization, reason):
    body = {"prompt": "x" * size} if size else None
    response = nginx.open(path, body, authorization)
    assert response.status == status
    assert reason in json.loads(response.read())["error"]["message"]


def test_the_page_is_behind_a_login_and_asks_with_it(nginx):
    page = "/predictions/chatlm"
    refused = nginx.open(page)
    assert refused.status == 401
    assert refused.headers["www-authenticate"] == 'Basic realm="gptchat"'
    wrong = nginx.open(page, authorization="Basic YW5uOndyb25n")
    assert wrong.status == 401
    assert b"<html" in nginx.open(page, authorization=LOGIN).read()
    body = {"context": "good morning", "n": 1}
    assert nginx.open(page, body).status == 401
    assert nginx.open(page, body, LOGIN).status == 200
    start = nginx.open("/", authorization=LOGIN)
    assert start.status == 302 and start.headers["location"].endswith(page)


def test_plain_http_is_sent_to_https(nginx):
    connection = http.client.HTTPConnection("localhost", nginx.port + 1, timeout=30)
    connection.request("GET", "/predictions/chatlm")
    response = connection.getresponse()
    assert response.status == 301 and response.headers["location"].startswith("https://localhost")


def test_another_name_gets_no_answer(nginx):
    with pytest.raises(http.client.RemoteDisconnected):
        nginx.open("/predictions/chatlm", authorization=LOGIN, host="elsewhere.example")


def test_too_many_requests_are_openais_rate_limit_error(strict_nginx):
    client = strict_nginx.client()
    with pytest.raises(openai.RateLimitError, match="too many requests") as caught:
        for _ in range(2000):
            client.models.list()
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_stream_comes_in_pieces_and_a_client_that_leaves_frees_its_slot(nginx, replicas):
    """Where it buffers, nginx sends nothing before it has 1,460 bytes (`postpone_output`)."""
    before = sum(requests(server, "left") for server in replicas)
    path = "/v1/completions"
    response = nginx.open(path, LONG | {"stream": True}, f"Bearer {KEY}")
    assert response.headers["content-type"] == "text/event-stream"
    pieces = [response.read1(65536) for _ in range(20)]
    assert pieces[0].startswith(b"data: {")
    assert min(map(len, pieces)) < 1000  # of a slow reader the first ones hold more
    response.close()
    deadline = time.monotonic() + 60
    while sum(requests(server, "left") for server in replicas) == before:
        assert time.monotonic() < deadline
        for server in replicas:  # a server notices it with its next request
            server.post("chatlm/1.0/v1/models")
        time.sleep(0.05)


def test_openais_client_asks_again_when_its_replica_dies(nginx, replicas):
    """The last test, since it ends one."""
    client = nginx.client().with_options(max_retries=1)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(lambda: client.post("/completions", body=LONG, cast_to=object))
        deadline = time.monotonic() + 60
        while not (busy := [server for server in replicas if server.is_busy()]):
            assert time.monotonic() < deadline and not answer.done()
            time.sleep(0.02)
        for process in busy[0].family():
            process.kill()
        assert answer.result(120)["usage"]["completion_tokens"] == 900
    for _ in range(8):
        assert [model.id for model in nginx.client().models.list()] == ["chatlm"]
