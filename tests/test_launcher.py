"""`gptchat serve` as a process: how it ends, and what it says when it cannot start."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import wait_until
from serving import ROOT, Server, configs, free_ports, tiny_model

from gptchat.artifacts import lock_folder
from gptchat.console import UserError
from gptchat.serve import torchserve
from gptchat.serve.archive import check_settings
from gptchat.serve.options import Options, check_ports, parse_models
from gptchat.serve.torchserve import TorchServe

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "lm", "lm")


def options(run: Path, **values) -> Options:
    run.mkdir(exist_ok=True)
    chosen = {
        "models": {"lm": run, "chatlm": run},
        "host": "127.0.0.1",
        "port": free_ports(),
        "auth": False,
        "run": run,
        "configs": ROOT / "configs" / "serve",
        "archive_only": False,
    }
    return Options(**chosen | values)


def refused(*arguments: object) -> str:
    """The one line with which the launcher ends at once."""
    command = [sys.executable, "-m", "gptchat", "serve", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.server
def test_server_in_odd_folders_behind_a_proxy_logs_no_text_and_stops_on_sighup(short_folder):
    """TMPDIR has a short name, since TorchServe's sockets below it find room in 107 bytes.

    A sole client that has left delays no stop.
    """
    home = short_folder / "ü 漢 #%41"
    (home / "tmp").mkdir(parents=True)
    server = Server(
        home / "run",
        {"chatlm": tiny_model(home / "model", "chatlm", n_embd=256, n_layer=6, n_positions=1024)},
        f"--configs={configs(home / 'configs')}",
        environment={
            "TMPDIR": str(home / "tmp"),
            "LC_ALL": "C",
            "http_proxy": "http://127.0.0.1:9",  # nobody listens there
        },
    ).wait_until_ready(120)
    family = server.family()
    with pytest.raises(ConnectionRefusedError):  # management's port by default
        socket.create_connection(("127.0.0.1", server.port + 1), timeout=5)
    assert server.post("chatlm", {"context": "Zanzibar", "n": 1, "max_tokens": 3})[0] == 200
    assert server.post("chatlm", b'{"context": "Zanzibar')[0] == 400
    server.wait_for_log("chatlm original 200")
    leave_at_once(server)
    server.stop(signal.SIGHUP)
    assert server.process.returncode == 0
    assert psutil.wait_procs(family, 0)[1] == []
    log = server.log.read_text()
    assert "Zanzibar" not in log
    assert "chatlm original left" in log
    assert "MODEL_LOG" not in log and "log4j" not in log  # TorchServe's own configuration of logs


def leave_at_once(server):
    """Ask for a long stream, leave, and wait until the worker is at rest; nobody asks meanwhile."""
    settings = {"stream": True, "max_new_tokens": 1000, "temperature": 0, "repetition_penalty": 1}
    connection, response = server.open("chatlm", {"context": "good morning"} | settings)
    response.read1(10)
    response.close()
    connection.close()
    used = []

    def at_rest():
        used.append(sum(sum(worker.cpu_times()[:2]) for worker in server.workers()))
        time.sleep(0.2)
        return len(used) > 3 and used[-1] - used[-3] < 0.05

    wait_until(at_rest)


@pytest.mark.server
def test_launcher_that_is_killed_takes_java_workers_and_files_with_it(
    model, tmp_path, short_folder
):
    environment = {"TMPDIR": str(short_folder)}
    server = Server(tmp_path / "run", {"lm": model}, "--auth", environment=environment)
    server.wait_until_ready()
    family = server.family()
    assert len(server.workers()) == 1 and len(family) >= 3
    server.process.kill()
    server.process.wait(10)
    assert psutil.wait_procs(family, 10)[1] == []
    assert list(short_folder.glob("gptchat-*")) == []
    assert not (server.run / "key_file.json").exists()


@pytest.mark.server
def test_a_model_that_cannot_start_is_named(model, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            content = content[:-100]
        (damaged / file.name).write_bytes(content)
    server = Server(tmp_path / "run", {"second": damaged})
    assert server.process.wait(120) == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("error: TorchServe cannot serve second: ")
    assert "not a whole file of weights" in last
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(server.run) in command]


def started(run: Path, monkeypatch, lines=(), status=None) -> TorchServe:
    """A TorchServe of `chatlm`, which never answers, and `my-chatlm`, which does. Java has said
    these lines, and has ended if there is a status."""

    def ask(name, timeout):
        if name == "chatlm":
            raise OSError("refused")

    names = {"my-chatlm": run, "chatlm": run}
    server = TorchServe(options(run, models=names))
    monkeypatch.setattr(server, "ask", ask)
    monkeypatch.setattr(torchserve, "START_SECONDS", 0.5)
    output = [f"2026-01-01T00:00:00,000 {line}\n" for line in lines]
    server.child = SimpleNamespace(poll=lambda: status, stdout=output)
    server.reader.start()
    server.reader.join(60)
    return server


def test_model_that_dies_is_named_with_its_own_reason(tmp_path, monkeypatch):
    lines = [
        "W-2-my-chatlm_1.0-stdout ValueError: another's, before",
        "W-1-chatlm_1.0-stdout Backend worker process died.",
        "W-1-chatlm_1.0-stdout OSError: its own",
        "W-2-my-chatlm_1.0-stdout ValueError: another's, after",
        "W-2-my-chatlm_1.0-stdout Backend worker process died.",  # it stops because of the first
        "ERROR ModelServer RuntimeException: Java's",
    ]
    server = started(tmp_path / "run", monkeypatch, lines)
    with pytest.raises(UserError, match="^TorchServe cannot serve chatlm: .* OSError: its own$"):
        server.wait_until_ready()


def test_model_that_does_not_answer_in_time_is_named_and_no_success_is_its_reason(
    tmp_path, monkeypatch
):
    lines = ["W-2-my-chatlm_1.0-stdout 7f my-chatlm none 200: 0 + 0 tokens, first 0.000 s"]
    server = started(tmp_path / "run", monkeypatch, lines)
    with pytest.raises(UserError) as error:
        server.wait_until_ready()
    late = "TorchServe cannot serve chatlm: no answer in 0 s; no error was logged"
    assert str(error.value) == late


def test_models_that_wait_are_named_when_java_ends(tmp_path, monkeypatch):
    server = started(tmp_path / "run", monkeypatch, ["java.net.BindException: in use"], status=1)
    with pytest.raises(UserError) as error:
        server.wait_until_ready()
    wanted = r"TorchServe cannot serve my-chatlm, chatlm: \S+ java.*: in use"
    assert re.fullmatch(wanted, str(error.value))


def test_wrong_models_folders_and_ports_are_refused_in_one_line(model, tmp_path):
    port = free_ports()
    served = ["--model", f"lm={model}", "--port", port]
    none = tmp_path / "none"
    told = refused(*served, "--model", f"mine={none}", "--run", tmp_path / "run")
    assert str(none) in told and "wanted a trained model: --model NAME=DIR" in told
    assert "make mine" not in told and str(model) not in told
    (tmp_path / "file").write_text("")
    told = refused(*served, "--run", tmp_path / "file" / "below")
    assert told.startswith(f"error: {tmp_path / 'file' / 'below'}: ")
    told = refused("--model", f"lm={model}", "--run", tmp_path / "run", "--port", 0)
    assert told == "error: --port 0: wanted a number from 1 to 65525\n"
    with lock_folder(tmp_path / "run", "another process works here"):
        told = refused(*served, "--run", tmp_path / "run")
    assert f"{tmp_path / 'run'}: another `gptchat serve` works here" in told
    with pytest.raises(UserError, match="lm is given twice"):
        parse_models(["lm=a", "chatlm=b", "lm=c"])


def test_taken_port_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .*wanted another --port"):
            check_ports("127.0.0.1", port - 1)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("gptchat: {max_request: 3}", "[gptchat] max_request: unknown key; wanted one of dtype,"),
        ("gptchat: [", "not valid YAML"),
        ("a: 1", "no section gptchat"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(tmp_path, text, reason):
    path = tmp_path / "model-config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        check_settings(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_signal_while_java_starts_ends_all_processes(tmp_path, monkeypatch):
    real = subprocess.Popen
    started = []
    stops = []

    def popen(command, **settings):
        if command[0].endswith("/java"):
            command = ["sleep", "100"]
            stops.append(signal.SIGTERM)
        process = real(command, **settings)
        started.append(psutil.Process(process.pid))
        return process

    monkeypatch.setattr(torchserve.subprocess, "Popen", popen)
    server = TorchServe(options(tmp_path / "run"), stops)
    server.start([])
    server.wait_until_ready()
    server.wait()
    server.stop()
    assert len(started) == 2 and psutil.wait_procs(started, 5)[1] == []


def test_sigterm_while_archiving_ends_the_launcher(model, tmp_path):
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(
        "import sys, time\n"
        "if 'model_archiver.model_packaging' in ' '.join(sys.orig_argv): time.sleep(2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "gptchat", "serve", "--model", f"lm={model}"]
    command += ["--run", str(tmp_path / "run"), "--port", str(free_ports())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    launcher = psutil.Process(process.pid)
    while not launcher.children():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 130


def test_page_offers_the_models_that_chat(model, tmp_path):
    chat_model = tiny_model(tmp_path / "chatlm", "chatlm")
    models = {"lm": model, "a": chat_model, "none": tmp_path, "b": chat_model}
    server = TorchServe(options(tmp_path / "run", models=models))
    assert server._environment()["GPTCHAT_CHAT_MODELS"] == "a,b"


def test_answer_that_is_no_http_is_as_if_there_was_none(tmp_path):
    server = TorchServe(options(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0\r\n\r\n")

        threading.Thread(target=answer).start()
        with pytest.raises(OSError, match="BadStatusLine"):
            server.get(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=20)


@pytest.mark.parametrize(
    "metrics, live",
    [
        ('gptchat_live_requests{M="a"} 0.0\ngptchat_live_requests{M="b"} 2.0', True),
        ('gptchat_live_requests{M="a",} 0.0\ngptchat_live_slots{M="a",} 3.0\n', False),
        (OSError("refused"), True),  # nobody knows
    ],
)
def test_live_requests_are_read_from_the_metrics(tmp_path, monkeypatch, metrics, live):
    def get(url, timeout):
        if isinstance(metrics, OSError):
            raise metrics
        return metrics

    server = TorchServe(options(tmp_path / "run"))
    monkeypatch.setattr(server, "get", get)
    assert server.has_live_requests() is live


def test_half_written_keys_are_as_if_not_written_yet(tmp_path):
    server = TorchServe(options(tmp_path / "run", auth=True))
    for content in ('{"inference": {"k', "{}", "[]"):
        server.options.key_file.write_text(content)
        with pytest.raises(OSError, match="not a whole file of keys"):
            server.ask("lm", timeout=1)
