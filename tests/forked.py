"""Processes of `python -m gptchat` that start in milliseconds, for tests that need many.

Each is a real process with its own pipes, signals and exit status. But it is forked from one that
has imported torch and gptchat before, which takes three seconds of a core. `serve` runs in that
one, of which each process of pytest has its own. A test that changes variables which are read at
the start of a process or of torch (READ_AT_START) gets no such process; nor does one that needs
more of Popen than its pipes.

The forked process runs `gptchat.__main__.main` and leaves by the interpreter's own end. It differs
from one that is started in what it has imported, in its parent, which is a keeper that waits for
its end, and in its strings' hashes, which all forked processes share. The tests of `make` and of
the wheel start every command of a training.
"""

import array
import atexit
import contextlib
import gc
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

ROOT = Path(__file__).parents[1]

READ_AT_START = re.compile(
    "(ATEN|CUDA|DNNL|GLIBC|GOMP|KMP|LANG|LC|LD|MALLOC|MKL|OMP|ONEDNN|OPENBLAS|PYTHON|TMPDIR|.*TORCH).*"
)
PRELOADED = [  # what a training imports; the other commands import less
    "gptchat.train",
    "gptchat.evaluate",
    "gptchat.data.shards",
    "torch._dynamo",
    "torch.utils.tensorboard",
]


def serve(number: int) -> None:
    """Start what the socket of file descriptor `number` asks for, until it is closed.

    Returns in the processes that were forked, to run their command.
    """
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # a collection in a forked process would copy every page
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest and the commands
    channel = socket.socket(fileno=number)
    for message, files in iter(lambda: receive(channel), (b"", [])):
        reap(os.WNOHANG)
        if os.fork() == 0:
            keep(channel.detach(), pickle.loads(message), files)
            return
        for file in files:
            os.close(file)
    reap(0)
    os._exit(0)


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its files; b"" and none when the channel is closed."""
    message, ancillary, _, _ = channel.recvmsg(1 << 20, socket.CMSG_SPACE(4 * 4))
    files = array.array("i")
    for _, _, numbers in ancillary:
        files.frombytes(numbers)
    return message, files.tolist()


def reap(options: int) -> None:
    """Collect the keepers that have ended, so that their time counts as that of the tests."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def keep(channel: int, task: tuple[list[str], str, dict[str, str]], files: list[int]) -> None:
    """Fork once more, tell the new process's number, and later how it ended.

    Returns in the new process, which has the command's arguments, folder, environment and files.
    """
    *standard, status = files
    pid = os.fork()
    if pid:
        os.write(channel, pickle.dumps(pid))
        for file in (channel, *standard):
            os.close(file)
        _, how = os.waitpid(pid, 0)
        os.write(status, pickle.dumps(how))
        os._exit(0)
    os.close(channel)
    os.close(status)
    arguments, folder, environment = task
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    for number, file in enumerate(standard):
        os.dup2(file, number)
    for file in standard:
        if file > 2:
            os.close(file)
    sys.argv = arguments
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, reopened(number, getattr(sys, f"__{name}__")))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.seed()  # a missing seed must show
    np.random.seed()


def reopened(number: int, at_start: TextIO) -> TextIO:
    """A standard file, with the encoding that the one of the server's start has."""
    file = open(
        number,
        "w" if number else "r",
        encoding=at_start.encoding,
        errors=at_start.errors,
        closefd=False,
    )
    file.reconfigure(line_buffering=number == 2 or file.isatty())
    return file


class Forked(subprocess.Popen):
    """A Popen whose process is forked by the one of `serve`, which this process starts once."""

    channel: socket.socket | None = None
    lock = threading.Lock()  # one request at a time
    environment: dict[str, str] = {}  # of the process of `serve`; set before the first test

    @classmethod
    def can_run(cls, arguments: list[str], options: dict[str, Any]) -> bool:
        """Whether it is a command of gptchat in this environment, with no special option."""
        if arguments[:3] != [sys.executable, "-m", "gptchat"]:
            return False
        if options.keys() - {"stdin", "stdout", "stderr", "env", "cwd", "text"}:
            return False
        environment = os.environ if options.get("env") is None else options["env"]
        return read_at_start(environment) == read_at_start(cls.environment)

    @classmethod
    def _start_server(cls) -> None:
        cls.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (
            f"from tests.forked import serve; serve({theirs.fileno()}); "
            "from gptchat.__main__ import main; main()"
        )
        server = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=cls.environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        cls.channel.settimeout(60)
        atexit.register(server.wait, 60)
        atexit.register(cls.channel.close)  # first

    def _execute_child(self, args: Any, *options: Any) -> None:  # called by Popen.__init__
        cwd, environment, pipes = options[4], options[5], options[9:15]
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        standard = [0, 1, 2]
        for number, file in enumerate((p2cread, c2pwrite, errwrite)):
            if file != -1:
                standard[number] = file
        self.ended, status = os.pipe()
        arguments = [f"{ROOT}/gptchat/__main__.py", *args[3:]]
        if environment is None:
            environment = os.environ
        task = pickle.dumps((arguments, str(cwd or os.getcwd()), dict(environment)))
        files = array.array("i", [*standard, status])
        with self.lock:
            if self.channel is None:
                self._start_server()
            assert self.channel
            self.channel.sendmsg([task], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            self.pid = pickle.loads(self.channel.recv(1024))
        self._child_created = True
        os.close(status)
        self._close_pipe_fds(*pipes)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """What `os.waitpid` returns; the process is the child of its keeper, which tells."""
        timeout = 0 if wait_flags & os.WNOHANG else None
        if not select.select([self.ended], [], [], timeout)[0]:
            return 0, 0
        how = pickle.loads(os.read(self.ended, 1024))
        os.close(self.ended)
        return self.pid, how

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self._waitpid_lock.acquire(False):  # else another thread waits
            try:
                if self.returncode is None:
                    pid, how = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(how)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if READ_AT_START.match(name)}
