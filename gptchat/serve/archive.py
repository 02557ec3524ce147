"""Model directories -> TorchServe's archives, with this package and the handlers inside.

TorchServe's own archiver puts the parts into RUN/store: as a .mar file or, if the weights are
large, as a folder.
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

MOST_MAR_MB = 200  # of weights in a .mar file, which TorchServe unpacks at each start


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

    Returns the archive's name in RUN/store. Raises UserError.
    """
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; wanted a trained model: --model NAME=DIR")
    is_mar = weights.stat().st_size <= MOST_MAR_MB * 2**20
    store = options.run / "store"
    temporary = options.run / "tmp"  # the archiver, too, makes a copy there
    for stale in (temporary, store / name):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        store.mkdir(parents=True, exist_ok=True)
        (store / f"{name}.mar").unlink(missing_ok=True)
        (temporary / "parts").mkdir(parents=True)
        contents = {"gptchat": PACKAGE, "handlers": shipped("handlers"), "model": model}
        for part, source in contents.items():
            (temporary / "parts" / part).symlink_to(source.resolve())
    except OSError as error:
        raise UserError(f"--run {options.run}: cannot be written: {error}") from None
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += [
        f"--model-name={name}",
        "--version=1.0",
        f"--handler={shipped('handlers') / 'gptchat_handler.py'}",
        f"--extra-files={temporary / 'parts'}",
        f"--export-path={store}",
        f"--config-file={options.configs / 'model-config.yaml'}",
        f"--archive-format={'zip-store' if is_mar else 'no-archive'}",
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the launcher, which stops when this is done
    )
    shutil.rmtree(temporary, ignore_errors=True)
    if done.returncode:
        reason = done.stderr.strip() or "no reason given"
        raise UserError(f"{model}: cannot be archived: {reason.splitlines()[-1]}")
    return f"{name}.mar" if is_mar else name


def chat_models(models: Mapping[str, Path]) -> list[str]:
    """The names of the ChatLMs among model directories, which have a chat page.

    A config that cannot be read is passed over: the worker says what is wrong.
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
