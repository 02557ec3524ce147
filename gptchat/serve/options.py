"""The command line of `gptchat serve`, parsed into `Options`.

It checks the form of NAME=DIR and, unless only archives are wanted, that the ports are free.
"""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptchat.config import load_config
from gptchat.console import CommandParser, UserError
from gptchat.files import shipped

KEY_MINUTES = 60 * 24 * 30
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
# Ports, counted from the API's. Workers only need a number; management listens on a socket file.
METRICS_PORT = 2
GRPC_INFERENCE_PORT = 3
GRPC_MANAGEMENT_PORT = 4
WORKER_PORT = 10
LAST_PORT = 65535 - WORKER_PORT


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    models: dict[str, Path]  # name -> model directory
    host: str
    port: int  # of the API; metrics and gRPC have ports after it, on loopback
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
        return f"http://{LOOPBACK}:{self.port + METRICS_PORT}/metrics"


def read_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line. Raises UserError."""
    parser = CommandParser(
        "serve",
        "Archive models and serve them over HTTP with TorchServe.",
        "gptchat serve --model chatlm=out/chatlm/model --port 8080",
    )
    add = parser.add_argument
    add("--model", action="append", metavar="NAME=DIR", help="default: out/{chatlm,lm}/model")
    config_help = "of a run whose model is served, as NAME its task; may be repeated"
    add("--config", action="append", default=[], metavar="FILE", help=config_help)
    add("--host", default=LOOPBACK, help="where the API listens; 0.0.0.0 in a container")
    add("--port", type=int, default=8080, help="the next four are used on loopback")
    add("--auth", action="store_true", help="ask for a bearer token, kept in RUN/key_file.json")
    add("--key-minutes", type=int, default=KEY_MINUTES, help="how long the keys are valid")
    add("--run", default="out/serve", help="folder of archives and run-time files")
    add("--configs", default=shipped("configs") / "serve", help="TorchServe's configuration")
    add("--archive-only", action="store_true", help="make the archives and leave")
    args = parser.parse_args(argv)
    named = args.model or trained_models(args.config)
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


def trained_models(config_files: Sequence[str]) -> list[str]:
    """NAME=DIR of the models that have been trained from configs, by default from ours."""
    folders = {"chatlm": "out/chatlm", "lm": "out/lm"}
    if config_files:
        configs = map(load_config, config_files)
        folders = {config.task: config.run for config in configs}
    trained = []
    for name, folder in folders.items():
        if Path(folder, "model", "model.safetensors").is_file():
            trained.append(f"{name}={folder}/model")
    if not trained:
        names = " or ".join(folders.values())
        raise UserError(f"found no model in {names}; `gptchat train` makes them")
    return trained


def parse_models(named: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR arguments as a dictionary."""
    models: dict[str, Path] = {}
    for argument in named:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*=.+", argument):
            raise UserError(f"--model {argument}: wanted NAME=DIR")
        name, directory = argument.split("=", 1)
        if name in models:
            raise UserError(f"--model {argument}: {name} is given twice; wanted other names")
        models[name] = Path(directory)
    return models


def check_ports(host: str, port: int) -> None:
    """Raise UserError unless the API's port and the four after it are free."""
    if not 1 <= port <= LAST_PORT:
        raise UserError(f"--port {port}: wanted a number from 1 to {LAST_PORT}")
    for offset in range(5):
        address = (LOOPBACK if offset else host, port + offset)
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            message = f"port {port + offset}: {error}; wanted another --port (or --host)"
            raise UserError(message) from None
