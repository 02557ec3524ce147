"""The command line of `gptchat serve`, parsed into `Options`; the ports must be free."""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptchat.config import load_config
from gptchat.console import CommandParser, UserError
from gptchat.files import shipped

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
# Ports, counted from the API's. Workers only need a number; management has a socket file.
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
    add("--run", default="out/serve", help="folder of archives and run-time files")
    add("--configs", default=shipped("configs") / "serve", help="TorchServe's configuration")
    add("--archive-only", action="store_true", help="make the archives and leave")
    args = parser.parse_args(argv)
    models = parse_models(args.model or trained_models(args.config))
    if not args.archive_only:
        check_ports(args.host, args.port)
    run, configs = Path(args.run).resolve(), Path(args.configs).resolve()
    return Options(models, args.host, args.port, args.auth, run, configs, args.archive_only)


def trained_models(config_files: Sequence[str]) -> list[str]:
    """NAME=DIR of the models that have been trained from configs, by default from ours."""
    folders = {"chatlm": "out/chatlm", "lm": "out/lm"}
    if config_files:
        folders = {config.task: config.run for config in map(load_config, config_files)}
    trained = [
        f"{name}={folder}/model"
        for name, folder in folders.items()
        if Path(folder, "model", "model.safetensors").is_file()
    ]
    if not trained:
        names = " or ".join(folders.values())
        raise UserError(f"found no model in {names}; `gptchat train` makes them")
    return trained


def parse_models(named: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR arguments as a dictionary. Raises UserError."""
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
