"""The config of a run as its checkpoint keeps it, and whether another start of the run may go on.

It is kept as JSON, with a section `text` beside the config's own: digests of the tokenizer and of
the data, and a fingerprint of the start model. `resolve_config` makes it, `compare_configs`
compares that of a checkpoint with that of a new start.

A resumed run must compute what the run computed before, so keys other than `FREE_KEYS` must have
the values that they had. Keys come and go between versions of gptchat: one that the checkpoint
lacks had its default, which means what was done before there was such a key; one that no longer
exists is passed over and named.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptchat.config import Config
from gptchat.console import UserError
from gptchat.files import atomic_write

# Keys that may change between two starts of a run: what the checkpoint holds means the same under
# any value.
FREE_KEYS = {
    "train.num_epochs",
    "train.num_steps",
    "train.learning_rate",
    "train.muon_learning_rate",
    "train.max_grad_norm",
    "train.embedding_learning_rate",
    "train.eval_interval",
    "train.log_interval",
    "train.patience",
    "train.precision",
    "train.tf32",
    "train.compile",
    "train.activation_checkpointing",
    "train.device",
    "data.test",
    "data.shards",
    "run",
}
# What the files of the config hold, as digests.
DATA_KEYS = {"text.tokenizer", "text.train", "text.valid"}


def resolve_config(config: Config, text: dict[str, Any]) -> dict[str, Any]:
    """The config, and in the section `text` what its files hold.

    It has gone through JSON, as the one in a checkpoint has.
    """
    return json.loads(json.dumps(dataclasses.asdict(config) | {"text": text}))


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Write a run's resolved config to its folder. Raises UserError where that cannot be."""
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def compare_configs(path: Path, saved: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What changed between the config in the checkpoint `path` and that of this start, in words.

    The start model's fingerprint (`text.init`), where it is None in `config` because the model is
    gone, is filled in there from the saved one.
    Raises UserError where other keys than `FREE_KEYS` differ.
    """
    if config["text"]["init"] is None:
        config["text"]["init"] = saved["text"]["init"]
    now = flatten(config)
    before = flatten(resolve_config(Config(), {})) | flatten(saved)
    changes: list[str] = []
    refused: dict[str, str] = {}  # key -> change
    for key in sorted(before.keys() | now.keys()):
        if key not in now:
            changes.append(f"{key} was {before[key]!r}, a key that no longer exists")
        elif before.get(key) != now[key]:
            change = f"{key} was {before.get(key)!r}, is {now[key]!r}"
            if key in FREE_KEYS:
                changes.append(change)
            else:
                refused[key] = change
    if refused:
        raise UserError(f"{path}: {_describe_refusal(refused, config['run'])}")
    return changes


def _describe_refusal(refused: dict[str, str], run: str) -> str:
    """What an error says of changed keys, and how to go on."""
    differences = "; ".join(refused.values())
    if refused.keys() <= DATA_KEYS:
        return (
            f"the data is no longer what this run began with: {differences}; put it back, or "
            f"remove {run} to train anew; `touch {run}/test.txt` lets make keep the run as it is"
        )
    return (
        f"made with another config: {differences}; change it back, or name another run folder; "
        f"only these keys may change: {', '.join(sorted(FREE_KEYS))}"
    )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables -> {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
