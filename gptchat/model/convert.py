"""`gptchat convert`: anyone's GPT-2 as a model directory that gptchat can fine-tune and serve.

Special tokens and token types that it lacks are appended; every other number stays as it is, in
float32. The command says what it read, left out, renamed and appended.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptchat.console import CommandParser, UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.model.gpt2 import GPT2
from gptchat.model.pretrained import adapt, answer_defaults, load_model, save_static
from gptchat.model.weight_files import (
    HEAD,
    OLD_CAUSAL_MASKS,
    PREFIX,
    StoredTensor,
    WeightFile,
    open_weights,
    save_weights,
)


def convert(source: Path, target: Path, task: str | None) -> Iterator[str]:
    """Read `source`, adapt it and write `target`, for the task that the source names if None.

    Yields what was done, line by line. Raises UserError for a source that is not a whole GPT-2.
    """
    model, tokenizer, source_task = load_model(source)
    yield f"{source}: {describe_size(model)}"
    yield from describe_weights(open_weights(source))
    added = adapt(model, tokenizer, seed=0)
    save_static(target, model.config, tokenizer, task or source_task, answer_defaults(source))
    save_weights(target, model)
    yield from describe_rows(tokenizer, added, model.config.type_rows)
    megabytes = (target / "model.safetensors").stat().st_size / 1e6
    yield (
        f"written: {target} for the task {task or source_task}, float32, {megabytes:,.1f} MB; "
        f"vocab_size is {model.config.vocab_size:,}"
    )


def describe_size(model: GPT2) -> str:
    config = model.config
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{config.n_layer} layers of width {config.n_embd:,}, {config.n_head} heads, "
        f"{config.n_positions:,} positions, {config.vocab_size:,} entries, "
        f"{n_parameters:,} parameters"
    )


def describe_weights(files: Sequence[WeightFile]) -> Iterator[str]:
    """What stands in the files of weights, and what of it is not kept under its name."""
    tensors = [tensor for file in files for tensor in file.tensors]
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    kinds = ", ".join(f"{number} of {dtype}" for dtype, number in dtypes.items())
    megabytes = sum(file.path.stat().st_size for file in files) / 1e6
    names = ", ".join(file.path.name for file in files)
    yield f"read: {kinds} from {names}, {megabytes:,.1f} MB; none is transposed"
    heads = [tensor for tensor in tensors if tensor.name == HEAD]
    masks = [tensor for tensor in tensors if tensor.name.endswith(OLD_CAUSAL_MASKS)]
    kept = [tensor for tensor in tensors if tensor not in heads and tensor not in masks]
    unprefixed = [tensor for tensor in kept if tensor.stored_name == tensor.name]
    yield from describe_some("left out", heads, f"equal to {PREFIX}wte.weight")
    yield from describe_some("left out", masks, "a causal mask is no weight")
    yield from describe_some("renamed", unprefixed, f"{PREFIX} is put before the name")


def describe_some(what: str, tensors: Sequence[StoredTensor], reason: str) -> Iterator[str]:
    """A line about these tensors, none if there are none."""
    if tensors:
        others = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        yield f"{what}: {tensors[0].stored_name}{others}: {reason}"


def describe_rows(
    tokenizer: Tokenizer, added: dict[str, int], type_rows: tuple[int, int]
) -> Iterator[str]:
    """Where the special tokens and the token types are, and which of them are new."""
    rows = ", ".join(f"{name} = row {row}" for name, row in added.items())
    yield f"appended: {rows or 'nothing, all was there'}"
    end = tokenizer.backend.id_to_token(tokenizer.eos_id)
    yield f"a document ends with {end}, row {tokenizer.eos_id}; types add the rows {[*type_rows]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "convert",
        "Make anyone's GPT-2, a directory in Hugging Face layout, ready for gptchat: add the "
        "special tokens and token types that it lacks.",
        "gptchat convert --from gpt2 --to models/gpt2 --task lm",
    )
    parser.add_argument("--from", dest="source", metavar="DIR", required=True, help="the model")
    parser.add_argument("--to", dest="target", metavar="DIR", required=True, help="a new directory")
    parser.add_argument(
        "--task", choices=("lm", "chatlm"), help="default: what the directory says, else lm"
    )
    arguments = parser.parse_args(argv)
    target = Path(arguments.target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: is there already; wanted a new or an empty folder")
    for line in convert(Path(arguments.source), target, arguments.task):
        print(line)
