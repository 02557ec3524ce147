"""Requests that try to do harm, against a real server: what it answers, and what its log says."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving import ROOT, Server, configs, tiny_model

from gptchat.serve.options import GRPC_INFERENCE_PORT, GRPC_MANAGEMENT_PORT, METRICS_PORT

pytestmark = pytest.mark.server
torch.set_num_threads(1)
CANARY = "Zanzibar"
FORM = {"content-type": "application/x-www-form-urlencoded"}
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
ATTACKERS = 20
HONEST = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    models = {
        "chatlm": tiny_model(folder / "chatlm", "chatlm"),
        "lm": tiny_model(folder / "lm", "lm", n_positions=256),
    }
    server = Server(folder / "run", models).wait_until_ready()
    yield server
    server.stop()


def exchange(port, raw, seconds=20, silence=0.5):
    """Send bytes; what comes back until the server closes, or is silent for `silence` seconds."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(raw)
        try:
            while chunk := connection.recv(65536):
                received += chunk
                connection.settimeout(silence)
        except (TimeoutError, ConnectionResetError):
            pass
    return received


def request(path, body=b"", method="GET", **headers):
    lines = {"Host": "localhost", "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return head.encode("latin-1") + b"\r\n" + body


def ask(text, tokens=1):
    body = {"context": text, "response": text, "n": 1, "max_tokens": tokens}
    return request(
        "/predictions/chatlm", json.dumps(body).encode(), "POST", Content_Type="application/json"
    )


def send_canaries(server):
    """Requests whose text TorchServe's classes log, some of it decoded, and one good request."""
    evil = f"{CANARY}\n2026-01-01 00:00:00 {CANARY} forged\r\x1b[31m"
    bodies = [f"a={CANARY}%&b=%{CANARY}", f"%{CANARY}%zz&%&=&{evil}", f"{CANARY}=%0a%1b[31m{evil}"]
    for body in bodies:
        server.post("chatlm", body.encode(), headers=FORM, timeout=20)
        server.post("chatlm", body.encode(), headers=MULTIPART, timeout=20)
        server.post("chatlm", body.encode(), timeout=20)
        server.post("chatlm", b'{"context": "%s' % body.encode(), timeout=20)
    paths = [
        f"/predictions/chatlm/1.0/{CANARY}%0a{CANARY}%0d%1b%5b31m",
        f"/predictions/{CANARY}%0a{CANARY}%1b",
        f"/{CANARY}%0a%1b[31m",
        f"/predictions/chatlm?{CANARY}=%zz%",
        f"/predictions/chatlm/%zz{CANARY}%",
        f"/{CANARY}%",
        f"/models/{CANARY}%0a%1b",
    ]
    form = b"x=%&y=%" + CANARY.encode()
    for path in paths:
        for port in (server.port, server.port + METRICS_PORT):
            exchange(port, request(path), 0.5)
            sent = request(path, form, "POST", Content_Type=FORM["content-type"])
            exchange(port, sent, 0.5)
    raw = [
        f"{CANARY}\x1b[31m\r\n\r\n".encode(),
        f"GET /{CANARY} {CANARY}\r\n\r\n".encode(),
        f"GET /{CANARY}\x1b\x9b HTTP/9.9\r\n{CANARY}\x1b: a\r\n\r\n".encode("latin-1"),
        request("/predictions/chatlm", b"", "POST", Content_Length=f"-5{CANARY}"),
        request("/predictions/chatlm", b"", "POST", Transfer_Encoding="chunked") + CANARY.encode(),
        request("/predictions/chatlm", b"", "POST", Expect=CANARY, X=f"\x1b{CANARY}\x00"),
        request(f"/{CANARY * 1000}"),
    ]
    for sent in raw:
        exchange(server.port, sent, 1)
    for port in (server.port + GRPC_INFERENCE_PORT, server.port + GRPC_MANAGEMENT_PORT):
        exchange(port, request(f"/{CANARY}\x1b"), 1)
    assert server.post("chatlm", {"context": "hi", "n": 1, "max_tokens": 1})[0] == 200
    server.wait_for_log("chatlm original 200")  # the log comes a little later


def lines_with_text(log):
    return [line for line in log.split(b"\n") if CANARY.encode() in line]


def test_log_has_no_text_of_a_request_and_no_forged_line(server):
    send_canaries(server)
    log = server.log.read_bytes()
    assert lines_with_text(log) == []
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", log)
    assert b"\tat " not in log and b"at io." not in log
    assert not re.search(rb" (INFO|DEBUG|TRACE) ", log)


# The log's guards overlap: here the one for lines works without those for levels.


def serve_with_log(folder, changes, **options):
    """A server whose log4j2.xml is changed by regular expressions, each of which must be there."""
    changed = configs(folder / "configs")
    log4j = changed / "log4j2.xml"
    xml = log4j.read_text()
    for pattern, replacement in changes.items():
        xml, count = re.subn(pattern, replacement, xml)
        assert count, pattern
    log4j.write_text(xml)
    model = tiny_model(folder / "chatlm", "chatlm")
    server = Server(folder / "run", {"chatlm": model}, "--configs", str(changed), **options)
    return server.wait_until_ready()


def test_what_is_logged_is_one_line_without_control_characters_or_stack_trace(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'model_service_worker' in ' '.join(sys.orig_argv): print('worker\\x1b[31m\\x9b.')\n"
    )
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    server = serve_with_log(tmp_path, {'level="[a-z]+"': 'level="trace"'}, environment=path)
    try:
        send_canaries(server)
    finally:
        server.stop()
    log = server.log.read_bytes()
    assert f"GET /{CANARY}   HTTP/9.9".encode() in log  # the requests do reach the log
    assert b"worker [31m ." in log  # and so does what the worker prints
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", log.decode())
    assert re.search(rb"Torchserve version: .+ TS Home: ", log)  # a message of many lines
    assert b"\tat " not in log and b"at io." not in log and b"Exception" not in log


def test_pipelined_requests_never_get_each_others_answers(server):
    asked = [f"request {number}" for number in range(5)]
    for _ in range(5):
        sent = b"".join(ask(text, 20) for text in asked)
        received = exchange(server.port, sent, silence=20).decode()  # the server closes
        answered = re.findall(r'"request": {"context": "(request \d)"', received)
        assert answered == asked[: len(answered)]
        assert len(re.findall("HTTP/1.1 500", received)) == 1


def test_503_carries_retry_after(server):
    draining = server.run / "draining"
    draining.touch()
    connection, response = server.open("chatlm", {"context": "hello"})
    draining.unlink()
    assert response.status == 503 and response.headers["Retry-After"] == "1"
    assert json.loads(response.read())["error"]["type"] == "server_error"
    connection.close()


def test_another_host_is_refused(server):
    for path in ("/predictions/chatlm", "/predictions/chatlm/1.0/v1/models"):
        assert exchange(server.port, request(path, Host="evil.example")).startswith(b"HTTP/1.1 403")
        assert exchange(server.port, request(path)).startswith(b"HTTP/1.1 200")


def test_delete_is_answered_as_get_and_deletes_nothing(server):
    """As the README says: TorchServe tells the handler no method."""
    listed = "/predictions/chatlm/1.0/v1/models/chatlm"
    answers = [exchange(server.port, request(listed, method=m)) for m in ("GET", "DELETE", "PUT")]
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers]
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert json.loads(bodies[0])["id"] == "chatlm" and bodies[0] == bodies[1] == bodies[2]
    for path in ("/models/chatlm", "/models/chatlm/1.0"):
        for method in ("DELETE", "PUT", "POST", "GET"):
            refused = exchange(server.port, request(path, method=method))
            assert re.match(rb"HTTP/1.1 40[345]", refused), refused
    assert server.post("chatlm", {"context": "hi", "n": 1, "max_tokens": 1})[0] == 200


def test_client_that_closes_its_sending_half_is_cut_off_and_disturbs_nobody(server):
    workers = server.workers()
    for worker in workers:  # so that no answer can come before
        worker.suspend()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(ask("hello", 100))
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(65536) == b""
    finally:
        for worker in workers:
            worker.resume()
    assert server.post("chatlm", {"context": "hi", "n": 1, "max_tokens": 1})[0] == 200


def test_ping_is_healthy_without_a_worker_and_the_probe_of_the_readme_is_not(server):
    workers = server.workers()
    for worker in workers:
        worker.suspend()
    try:
        assert b"Healthy" in exchange(server.port, request("/ping"))
        probe = request("/predictions/chatlm/1.0/v1/models")
        assert exchange(server.port, probe, seconds=3) == b""
    finally:
        for worker in workers:
            worker.resume()
    assert exchange(server.port, probe, seconds=30).startswith(b"HTTP/1.1 200")


def test_drawn_requests_are_answered_as_described(server, tmp_path):
    root = f"http://127.0.0.1:{server.port}"
    checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance")
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--url", root]
    command += ["--checks", ",".join([*checks, "response_schema_conformance"])]
    command += ["--phases", "fuzzing", "--mode", "all", "--max-examples", "20", "--seed", "1"]
    command += ["--suppress-health-check", "all", "--no-color", "--generation-database", "none"]
    command += [f"{root}/predictions/chatlm/1.0/v1/openapi.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]


# Clients that ask for much and read nothing.


def send_unread(server, body):
    """A connection with a small receive buffer that has sent a request and reads no answer."""
    raw = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    head = f"POST /predictions/lm/1.0/v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def status_of(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status


def ask_until(server, attacked):
    """The statuses that an honest client got, from before the attack to after it."""
    statuses = []
    while not attacked.is_set() or len(statuses) < 5:
        body = {"prompt": "good morning", "max_tokens": 20, "logprobs": 2}
        statuses.append(server.post("lm/1.0/v1/completions", body, timeout=60)[0])
    return statuses


def attack(server, body):
    """Statuses that attackers and honest clients got, and the workers before and after."""
    attacked = threading.Event()
    before = {worker.pid for worker in server.workers()}
    with ThreadPoolExecutor(HONEST) as pool:
        honest = [pool.submit(ask_until, server, attacked) for _ in range(HONEST)]
        connections = [send_unread(server, body) for _ in range(ATTACKERS)]
        try:
            refused = [status_of(connection) for connection in connections]
        finally:
            attacked.set()
            statuses = [status for client in honest for status in client.result(120)]
            for connection in connections:
                connection.close()
    return refused, statuses, before, {worker.pid for worker in server.workers()}


@pytest.mark.slow
def test_many_large_answers_are_refused_together_while_honest_clients_go_on(server):
    body = {"prompt": [[7] * 250] * 15, "echo": True, "logprobs": 20, "max_tokens": 1}
    refused, statuses, before, after = attack(server, body)
    assert set(refused) <= {200, 503} and 503 in refused
    assert set(statuses) == {200}
    assert before == after and len(before) == 2
