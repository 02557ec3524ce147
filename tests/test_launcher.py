"""`gptchat serve` as a process: how it ends, and what it says when it cannot start."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from serving import ROOT, Server, free_ports, tiny_model

from gptchat.console import UserError
from gptchat.files import lock_folder
from gptchat.serve import torchserve
from gptchat.serve.options import Options, parse_models
from gptchat.serve.torchserve import TorchServe

torch.set_num_threads(1)
server_test = pytest.mark.server


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
        "key_minutes": 1,
        "run": run,
        "configs": ROOT / "configs" / "serve",
        "archive_only": False,
    }
    return Options(**chosen | values)


def run_launcher(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gptchat.serve", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@server_test
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


@server_test
def test_sighup_stops_the_server_like_sigterm(model, tmp_path):
    server = Server(tmp_path / "run", {"lm": model}).wait_until_ready()
    family = server.family()
    server.stop(signal.SIGHUP)
    assert server.process.returncode == 0
    assert psutil.wait_procs(family, 0)[1] == []


@server_test
def test_management_has_no_port(model, tmp_path):
    server = Server(tmp_path / "run", {"lm": model}).wait_until_ready()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port + 1), timeout=5)
    server.stop()


@server_test
@pytest.mark.parametrize("bad", ["first", "second"])
def test_the_one_of_two_models_that_cannot_start_is_named(model, tmp_path, bad):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            content = content[:-100]
        (damaged / file.name).write_bytes(content)
    models = {"first": model, "second": model} | {bad: damaged}
    server = Server(tmp_path / "run", models)
    assert server.process.wait(120) == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith(f"error: TorchServe cannot serve {bad}: ")
    assert "not a whole file of weights" in last


def started(run: Path, monkeypatch, lines=(), status=None) -> TorchServe:
    """A TorchServe of `chatlm`, which never answers, and `my-chatlm`, which does. Java has said
    these lines, and has ended if there is a status."""

    def ask(name, timeout):
        if name == "chatlm":
            raise OSError("refused")

    names = {"my-chatlm": run, "chatlm": run}
    server = TorchServe(options(run, models=names))
    monkeypatch.setattr(server, "ask", ask)
    monkeypatch.setattr(torchserve, "START_SECONDS", 5)
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


def test_model_that_does_not_answer_in_time_is_named(tmp_path, monkeypatch):
    server = started(tmp_path / "run", monkeypatch)
    monkeypatch.setattr(torchserve, "START_SECONDS", 0.5)
    with pytest.raises(UserError, match="^TorchServe cannot serve chatlm: no answer in "):
        server.wait_until_ready()


def test_models_that_wait_are_named_when_java_ends(tmp_path, monkeypatch):
    server = started(tmp_path / "run", monkeypatch, ["java.net.BindException: in use"])
    running = iter([None, None, 1])
    server.child.poll = lambda: next(running)
    monkeypatch.setattr(torchserve.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError) as error:
        server.wait_until_ready()
    assert re.fullmatch(r"TorchServe cannot serve chatlm: \S+ java.*: in use", str(error.value))


def test_model_directory_that_is_not_there_is_named_beside_one_that_is(model, tmp_path):
    models = ["--model", f"lm={model}", "--model", f"chatlm={tmp_path / 'none'}"]
    done = run_launcher(*models, "--run", tmp_path / "run", "--port", free_ports())
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(tmp_path / "none") in done.stderr and str(model) not in done.stderr


def test_run_that_is_a_file_is_one_line(model, tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run_launcher("--model", f"lm={model}", "--run", run, "--port", free_ports())
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: --run {run}: ")
        assert done.stderr.count("\n") == 1


def test_model_named_twice_is_refused():
    with pytest.raises(UserError, match="lm is given twice"):
        parse_models(["lm=a", "chatlm=b", "lm=c"])


def test_missing_model_is_no_reason_for_a_make_target_that_does_not_exist(tmp_path):
    done = run_launcher(
        "--model", f"mine={tmp_path / 'none'}", "--run", tmp_path / "run", "--port", free_ports()
    )
    assert done.returncode == 2 and "make mine" not in done.stderr
    assert "wanted a trained model: --model NAME=DIR" in done.stderr


def test_signal_while_java_starts_leaves_no_process(tmp_path, monkeypatch):
    real = subprocess.Popen
    started = []

    def popen(command, **settings):
        if command[0] == "java":
            command = ["sleep", "100"]
        process = real(command, **settings)
        started.append(psutil.Process(process.pid))
        if command[0] == "sleep":
            os.kill(os.getpid(), signal.SIGTERM)  # before the caller knows the process
        return process

    monkeypatch.setattr(torchserve.subprocess, "Popen", popen)
    monkeypatch.setattr(torchserve, "find_java", lambda: "java")
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    server = TorchServe(options(tmp_path / "run"))
    try:
        with pytest.raises(KeyboardInterrupt):
            server.start([])
    finally:
        server.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(started) == 2 and psutil.wait_procs(started, 5)[1] == []


def test_sigterm_before_the_server_runs_ends_the_launcher(model, tmp_path):
    slow = tmp_path / "sitecustomize.py"  # archiving takes long
    slow.write_text(
        "import sys, time\n"
        "if 'model_archiver.model_packaging' in ' '.join(sys.orig_argv): time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "gptchat.serve", "--model", f"lm={model}"]
    command += ["--run", str(tmp_path / "run"), "--port", str(free_ports())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    launcher = psutil.Process(process.pid)
    while not launcher.children():
        assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 130


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
        ('gptchat_live_requests{ModelName="lm",} 0.0\n', False),
        (
            'gptchat_live_requests{ModelName="a"} 0.0\ngptchat_live_requests{ModelName="b"} 2.0',
            True,
        ),
        ('gptchat_live_slots{ModelName="lm",} 3.0\n', False),
        ("", False),
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


def test_last_error_can_be_read_while_the_output_goes_on(tmp_path, monkeypatch):
    server = TorchServe(options(tmp_path / "run"))
    server.reader = SimpleNamespace(join=lambda timeout: None)

    def search(pattern, line):
        """Looking at a line lets the other thread add one."""
        server.last_lines.append("more")
        return re.search(pattern, line)

    monkeypatch.setattr(torchserve, "re", SimpleNamespace(search=search, escape=re.escape))
    server.last_lines += ["W-1-lm_1.0-stdout OSError: first", "x", "y"]
    for model in ("lm", ""):
        assert "first" in server.last_error(model)


def test_a_run_folder_in_which_another_launcher_works_is_refused(model, tmp_path):
    with lock_folder(tmp_path / "run", "another process works here"):
        done = run_launcher(
            "--model", f"lm={model}", "--run", tmp_path / "run", "--port", free_ports()
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path / 'run'}: another `gptchat serve` works here" in done.stderr
