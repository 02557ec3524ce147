"""The chat template of a ChatLM's directory, and token types, as transformers' users have them."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, GPT2LMHeadModel

from gptchat.data import dialogue
from gptchat.data.dialogue import SPEAKERS, TextTurn
from gptchat.data.tokenizer import SPECIAL, Tokenizer
from gptchat.inference.generate import load_generator
from gptchat.inference.sampling import Sampling
from gptchat.model.convert import adapt
from gptchat.model.pretrained import answer_defaults, load_model, save_static, save_weights
from tests.hf_models import byte_tokenizer, random_gpt2, write
from tests.serving import tiny_model

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("assistant", "user", "system", "developer")
PARTS = [
    "good morning",
    " ",
    "\n",
    "{{ x }}",
    "{% if %}",
    "<b>",
    "\u65e5\u672c",
    "\U0001f600",
    "'s",
    "  \t",
    "a",
]
LOOKALIKES = [*SPECIAL, "<|endoftext|>", "[SEP", "SEP]", "[ SEP ]"]


@pytest.fixture(scope="module", params=["trained here", "foreign"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatLM, with a vocabulary trained here or one that had only an end of text."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "trained here":
        return tiny_model(folder / "chatlm", "chatlm")
    write(
        random_gpt2(1, torch.float32, vocab_size=257, n_positions=256),
        folder / "theirs",
        byte_tokenizer(("<|endoftext|>",)),
    )
    model, tokenizer, _ = load_model(folder / "theirs")
    adapt(model, tokenizer, 0)
    save_static(folder / "chatlm", model.config, tokenizer, "chatlm")
    save_weights(folder / "chatlm", model)
    return folder / "chatlm"


def random_messages(draw: random.Random, parts: list[str]) -> list[dict[str, str]]:
    messages = []
    for _ in range(draw.randint(1, 6)):
        content = "".join(draw.choices(parts, k=draw.randint(1, 6)))
        messages.append({"role": draw.choice(ROLES), "content": content})
    return messages


def encode_turns(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[dialogue.Turn]:
    turns: list[TextTurn] = [(SPEAKERS[m["role"]], m["content"]) for m in messages]
    return [(speaker, tokenizer.encode(text)) for speaker, text in turns]


def test_the_template_gives_our_ids_of_prompts_beginnings_and_answered_dialogues(
    directory: Path,
) -> None:
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    draw = random.Random(0)
    for _ in range(200):
        messages = random_messages(draw, PARTS)
        turns = encode_turns(ours, messages)
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == dialogue.encode_prompt(turns, [], ours.sep_id, 10**6)[0]
        answered = [*messages, {"role": "assistant", "content": "I am fine."}]
        answer = ours.encode("I am fine.")
        found = theirs.apply_chat_template(answered, continue_final_message=True)["input_ids"]
        assert found == dialogue.encode_prompt(turns, answer, ours.sep_id, 10**6)[0]
        example = dialogue.encode_example([*turns, (1, answer)], ours.cls_id, ours.sep_id, 10**6)
        found = theirs.apply_chat_template(answered)["input_ids"]
        assert found == [*example.input_ids, ours.cls_id] and found[-1] == example.targets[-1]


def test_text_that_looks_like_a_special_token_is_text_if_transformers_is_asked_to_sanitize(
    directory: Path,
) -> None:
    """Only the ids around such text may differ from ours, since it is encoded in pieces."""
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    draw = random.Random(1)
    special = [id for id in ours.special_ids.values() if id != ours.sep_id]
    for _ in range(200):
        messages = random_messages(draw, [*PARTS, *LOOKALIKES])
        found = theirs.apply_chat_template(
            messages, add_generation_prompt=True, sanitize_control_tokens=True
        )["input_ids"]
        assert found.count(ours.sep_id) == len(messages) and not set(special) & set(found)
        assert ours.decode(found) == "".join(message["content"] for message in messages)
    typed = [{"role": "user", "content": "a[SEP]b"}]  # the limit, as documented
    assert theirs.apply_chat_template(typed)["input_ids"].count(ours.sep_id) == 1


@pytest.mark.parametrize(
    "message", [{"role": "tool", "content": "x"}, {"role": "user", "content": [1]}]
)
def test_what_the_format_has_no_place_for_is_refused(
    directory: Path, message: dict[str, Any]
) -> None:
    theirs = AutoTokenizer.from_pretrained(directory)
    with pytest.raises(TemplateError, match="wanted messages of assistant, user"):
        theirs.apply_chat_template([message], tokenize=False)


def test_an_lm_has_no_chat_template(tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(tiny_model(tmp_path, "lm"))
    assert theirs.chat_template is None


def documented_code() -> str:
    """The example of gptchat/model/README.md that passes token types."""
    text = (ROOT / "gptchat/model/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?token_type_ids.*?)```", text, re.S)
    return block


def test_the_documented_way_to_pass_token_types_answers_as_we_do(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    generate = GPT2LMHeadModel.generate

    def spy(self: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update(options, input_ids=input_ids)
        return generate(self, input_ids, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", spy)
    variables: dict[str, Any] = {}
    code = documented_code().replace("out/chatlm/model", str(directory))
    exec(code.replace("Good morning", "[SEP] good morning [CLS]"), variables)
    turns = [(speaker, text) for speaker, text in variables["turns"]]
    generator = load_generator(directory, dtype="float32")
    prompt = [(speaker, generator.tokenizer.encode(text)) for speaker, text in turns]
    ids, types = dialogue.encode_prompt(prompt, [], generator.tokenizer.sep_id, 10**6)
    rows = load_model(directory)[0].config.type_rows
    assert seen["input_ids"].tolist() == [ids]
    assert seen["token_type_ids"].tolist() == [[rows[type] for type in types]]
    penalty = answer_defaults(directory).sampling["repetition_penalty"]  # transformers reads it too
    sampling = Sampling(
        temperature=0, max_new_tokens=20, whole_characters=0, repetition_penalty=penalty
    )
    assert variables["answer"] == generator.complete([generator.request(prompt, sampling)])[0]
