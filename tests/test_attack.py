"""Clients that ask for much and read nothing, against a real server."""

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving import Server, tiny_model

pytestmark = [pytest.mark.server, pytest.mark.slow]
torch.set_num_threads(1)
ATTACKERS = 40
HONEST = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    model = tiny_model(folder / "lm", "lm", n_positions=256)
    server = Server(folder / "run", {"lm": model}).wait_until_ready()
    yield server
    server.stop()


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


def test_many_large_answers_are_refused_together_while_honest_clients_go_on(server):
    body = {"prompt": [[7] * 250] * 15, "echo": True, "logprobs": 20, "max_tokens": 1}
    refused, statuses, before, after = attack(server, body)
    assert set(refused) <= {200, 503} and 503 in refused
    assert set(statuses) == {200}
    assert before == after and len(before) == 1
