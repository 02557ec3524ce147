"""Processes of `python -m gptchat` that start in milliseconds, for tests that need many.

Each is a real process with its own pipes, signals and exit status. But it is forked from one that
has imported torch and gptchat before, which takes three seconds of a core: `serve` is that one, a
process for each process of pytest. A test that changes variables which are read at the start of a
process or of torch (READ_AT_START) gets no such process; nor does one that needs more of Popen than
its pipes.

The forked process runs `gptchat.__main__.main` and leaves by the interpreter's own end.
"""

import array
import atexit
import contextlib
import gc
import os
import pickle
import re
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

READ_AT_START = re.compile("(ATEN|CUDA|DNNL|GOMP|KMP|LD|MALLOC|MKL|OMP|ONEDNN|PYTHON|.*TORCH).*")
PRELOADED = [  # what a training imports; the other commands import less
    "gptchat.train",
    "gptchat.evaluate",
    "gptchat.data.shard_writer",
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
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)
    sys.stderr.reconfigure(line_buffering=True)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())


class Forked(subprocess.Popen):
    """A Popen whose process is forked by the one of `serve`, which this process starts once."""

    channel: socket.socket | None = None
    environment: dict[str, str] = {}  # of the process of `serve`; set before the first test

    @classmethod
    def can_run(cls, arguments: list[str], options: dict[str, Any]) -> bool:
        """Whether it is a command of gptchat in this environment, with no special option."""
        if arguments[:3] != [sys.executable, "-m", "gptchat"]:
            return False
        if options.keys() - {"stdin", "stdout", "stderr", "env", "cwd", "text"}:
            return False
        environment = options.get("env") or os.environ
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
        task = (arguments, str(cwd or os.getcwd()), dict(environment or os.environ))
        files = array.array("i", [*standard, status])
        if self.channel is None:
            self._start_server()
        assert self.channel
        self.channel.sendmsg([pickle.dumps(task)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
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
        if self.returncode is None:
            with self._waitpid_lock:
                pid, how = self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(how)
        return self.returncode


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if READ_AT_START.match(name)}
