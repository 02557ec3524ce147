"""Model directories -> TorchServe's archives, with this package and the handlers inside.

`archive` links the parts into RUN/staging, from where TorchServe's own archiver puts them into
RUN/store: as a .mar file or, if the weights are large, as a folder.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import util
from pathlib import Path

from gptchat.config import build_server_settings
from gptchat.console import UserError
from gptchat.files import PACKAGE, shipped
from gptchat.serve.options import Options

# Weights above this are not put into a .mar file, which TorchServe would unpack at each start.
UNPACKED_MB = 200


def find_package(module: str, package: str) -> Path:
    """The folder of a package of the extra `serve`. Raises UserError if it is not installed."""
    spec = util.find_spec(module)
    if not spec:
        hint = "make serve, or an installation of gptchat with its extra [serve]"
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


def archive(name: str, model: Path, options: Options) -> str:
    """Archive a model directory, in place of an archive of the same name.

    Returns the archive's name in RUN/store.
    """
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; wanted a trained model: --model NAME=DIR")
    unpacked = weights.stat().st_size > UNPACKED_MB * 2**20
    staging = options.run / "staging" / name
    store = options.run / "store"
    temporary = options.run / "tmp"
    for stale in (staging, store / name):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        (store / f"{name}.mar").unlink(missing_ok=True)
        for folder in (staging, store, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        contents = {"gptchat": PACKAGE, "handlers": shipped("handlers"), "model": model}
        for part, source in contents.items():
            (staging / part).symlink_to(source.resolve())
    except OSError as error:
        raise UserError(f"--run {options.run}: cannot be written: {error}") from None
    try:
        run_archiver(name, model, options, unpacked)
    finally:
        for folder in (staging, temporary / name):  # the latter is the archiver's copy
            shutil.rmtree(folder, ignore_errors=True)
    return name if unpacked else f"{name}.mar"


def chat_models(models: Mapping[str, Path]) -> list[str]:
    """The names of the ChatLMs among model directories, which have a chat page.

    The task is in the config; `pretrained` would need torch, which the launcher does without. A
    config that cannot be read counts as no ChatLM's: the worker will say what is wrong.
    """
    names = []
    for name, directory in models.items():
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            if config["gptchat"]["task"] == "chatlm":
                names.append(name)
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return names


def run_archiver(name: str, model: Path, options: Options, unpacked: bool) -> None:
    """Put RUN/staging/NAME into RUN/store, with TorchServe's own program."""
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += [
        f"--model-name={name}",
        "--version=1.0",
        f"--handler={shipped('handlers') / 'gptchat_handler.py'}",
        f"--extra-files={options.run / 'staging' / name}",
        f"--export-path={options.run / 'store'}",
        f"--config-file={options.configs / 'model-config.yaml'}",
        f"--archive-format={'no-archive' if unpacked else 'zip-store'}",
    ]
    environment = {**os.environ, "TMPDIR": str(options.run / "tmp")}
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the launcher, which stops when this is done
    )
    if done.returncode:
        reason = done.stderr.strip() or "no reason given"
        raise UserError(f"{model}: cannot be archived: {reason.splitlines()[-1]}")
