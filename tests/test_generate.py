"""The text of candidates, streams of pieces, and what a loaded directory promises."""

import codecs
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import byte_tokenizer, shake

from gptchat.console import UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.draw import Scored
from gptchat.inference.engine import Output, Request, generate
from gptchat.inference.generate import (
    CandidateText,
    TextGenerator,
    load_generator,
    prompt_room,
)
from gptchat.inference.pick import nearest_to_median, reply_logprobs, turns_of
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config

torch.set_num_threads(1)

N_CTX = 64
SAMPLING = Sampling(
    **pretrained.TRAINED_HERE.sampling | {"temperature": 1.0}, max_new_tokens=20, seed=1
)


def tokenizer_with(*words: str) -> Tokenizer:
    """The byte tokenizer, with each word as one token more."""
    backend = byte_tokenizer().backend
    backend.add_tokens(list(words))
    return Tokenizer(backend)


def take_all(candidate: CandidateText, ids: list[int], finish_reason: str = "length") -> list[str]:
    """The pieces of text when the engine gives these ids, and with the last one the reason."""
    reasons = [None] * (len(ids) - 1) + [finish_reason]
    return [
        candidate.take(Output(1, 0, Scored(id), reason))
        for id, reason in zip(ids, reasons, strict=True)
    ]


def small_model(vocab_size: int) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(
        GPT2Config(vocab_size=vocab_size, n_positions=N_CTX, n_embd=16, n_layer=2, n_head=2)
    )
    shake(model, 0)
    return model.train()


def small_generator(task: str, slots: int = 4) -> TextGenerator:
    tokenizer = byte_tokenizer()
    return TextGenerator(small_model(tokenizer.vocab_size), tokenizer, task, slots)


@pytest.fixture(params=["lm", "chatlm"])
def generator(request: pytest.FixtureRequest) -> TextGenerator:
    return small_generator(request.param)


def ask(generator: TextGenerator, text: str, n: int = 1, **settings: object) -> Request:
    turns = [(0, generator.tokenizer.encode(text))]
    return generator.request(turns, replace(SAMPLING, **settings), n)


def whole_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids` without the character that is unfinished at its end."""
    data = b"".join(tokenizer.token_bytes[id] for id in ids)
    return codecs.utf_8_decode(data, "replace", False)[0]


# The text of one candidate


def test_a_stop_string_in_the_middle_of_a_token_ends_the_text_there():
    tokenizer = tokenizer_with("one", " two three", " four")
    candidate = CandidateText(tokenizer, stop=["o th"])
    ids = tokenizer.encode("one two three")
    assert len(ids) == 2
    assert [candidate.take(Output(1, 0, Scored(id))) for id in ids] == ["one", " tw"]
    assert (candidate.text, candidate.finish_reason) == ("one tw", "stop")
    assert candidate.must_cancel  # the engine would go on
    assert candidate.take(Output(1, 0, Scored(*tokenizer.encode(" four")))) == ""
    assert (candidate.text, candidate.n_tokens) == ("one tw", 2)


def test_what_may_become_a_stop_string_is_held_back_until_it_is_certain():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer, stop=["END"])
    assert take_all(candidate, tokenizer.encode("aENbEN")) == ["a", "", "", "ENb", "", "EN"]
    assert (candidate.text, candidate.finish_reason) == ("aENbEN", "length")
    assert candidate.n_tokens == 6 and not candidate.must_cancel


def test_half_a_character_is_held_back_and_left_out_at_the_end():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer)
    ids = tokenizer.encode("é日")
    assert take_all(candidate, ids[:-1]) == ["", "é", "", ""]
    assert candidate.text == "é"


def test_the_beginning_of_an_answer_counts_as_its_text():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer, ["END"], beginning=tokenizer.encode("So E"))
    assert (candidate.text, candidate.n_tokens) == ("So ", 0)
    take_all(candidate, tokenizer.encode("ND."))
    assert (candidate.text, candidate.finish_reason, candidate.n_tokens) == ("So ", "stop", 2)

    ended = CandidateText(tokenizer, ["END"], beginning=tokenizer.encode("So END of"))
    assert (ended.text, ended.finish_reason) == ("So ", "")
    assert ended.take(Output(1, 0, Scored(*tokenizer.encode("x")))) == ""
    assert (ended.text, ended.finish_reason, ended.must_cancel) == ("So ", "stop", True)


def test_an_echoed_prompt_stands_before_the_text_and_has_no_stop_strings():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer, ["END"], echo="the END, EN")
    starts = []
    for id in tokenizer.encode("Dx"):
        starts.append(len(candidate.text))
        candidate.take(Output(1, 0, Scored(id)))
    assert (candidate.text, candidate.finish_reason) == ("the END, ENDx", "")
    assert starts == [11, 12]  # each token's place in the text


def test_a_prompt_has_what_the_answer_leaves_but_at_least_half():
    assert [prompt_room(64, new) for new in (0, 10, 32, 100)] == [64, 54, 32, 32]


# Requests


def test_an_lm_whose_vocabulary_ends_no_text_goes_on_to_the_length():
    tokenizer = byte_tokenizer(("</s>",))
    model = GPT2(
        GPT2Config(tokenizer.vocab_size + 2, n_positions=N_CTX, n_embd=8, n_layer=1, n_head=2)
    )
    generator = TextGenerator(model.eval(), tokenizer, "lm")
    sampling = replace(SAMPLING, min_tokens=2, max_new_tokens=5, whole_characters=0)
    request = generator.request([(0, tokenizer.encode("Hello"))], sampling)
    assert request.stop_ids == ()
    [[answer]] = generate(generator.engine, [request])
    assert len(answer.ids) == 5 and answer[-1].finish_reason == "length"
    with pytest.raises(UserError, match=r"the text is empty; wanted some, since .* no \[EOS\]"):
        generator.request([], sampling)


def test_an_lm_continues_all_turns_as_one_text():
    generator = small_generator("lm")
    encode = generator.tokenizer.encode
    turns = [(0, encode("one ")), (1, encode("two "))]
    request = generator.request(turns, SAMPLING, beginning=encode("three"))
    assert generator.tokenizer.decode(request.input_ids) == "one two three"
    assert request.token_type_ids is None
    assert request.stop_ids == (generator.tokenizer.eos_id,)
    assert generator.request([], SAMPLING).input_ids == [generator.tokenizer.eos_id]
    assert len(ask(generator, "x" * 44).input_ids) == 44
    with pytest.raises(UserError, match="the text takes 45 tokens; wanted 44 at most"):
        ask(generator, "x" * 45)


def test_a_chatlm_drops_the_oldest_turns_and_refuses_a_last_one_that_is_too_long():
    generator = small_generator("chatlm")
    tokenizer = generator.tokenizer
    turns = [(1, tokenizer.encode("old " * 6)), (0, tokenizer.encode("x" * 20))]
    request = generator.request(turns, SAMPLING, n=3, beginning=tokenizer.encode("So"))
    assert tokenizer.decode(request.input_ids) == "x" * 20 + "So"
    assert request.token_type_ids == [0] * 20 + [1] * 3  # [SEP] and the beginning
    assert (request.n, request.stop_ids) == (3, (tokenizer.cls_id,))
    with pytest.raises(UserError, match="the last turn takes"):
        ask(generator, "x" * 60)


def test_a_chatlm_needs_all_special_tokens():
    tokenizer = byte_tokenizer(("<|endoftext|>",))
    model = small_model(tokenizer.vocab_size)
    assert TextGenerator(model, tokenizer, "lm").stop_ids == (tokenizer.eos_id,)
    with pytest.raises(UserError, match="found no .*SEP"):
        TextGenerator(model, tokenizer, "chatlm")


# Streams


def test_pieces_add_up_to_the_text_of_the_engines_ids(generator):
    requests = [ask(generator, f"number {i}", seed=i) for i in range(6)]
    expected = [
        whole_text(generator.tokenizer, candidate.ids)
        for (candidate,) in generate(generator.engine, requests)
    ]
    texts = [""] * 6
    ends = []
    for piece in generator.stream(requests):
        texts[piece.index] += piece.text
        if piece.last:
            ends.append(piece.index)
    assert texts == expected == generator.complete(requests)
    assert len(set(texts)) == 6 and sorted(ends) == list(range(6))


def test_a_stop_string_ends_an_answer_and_frees_its_slot(generator):
    request = ask(generator, "hello")
    (whole,) = generator.complete([request])
    stop = whole[4:6]
    assert generator.complete([request], [stop]) == [whole[: whole.index(stop)]]
    assert generator.engine.idle
    *_, last = generator.stream([request], [stop])
    assert last.last


def test_several_candidates_give_the_one_of_median_length_when_all_have_ended(generator):
    request = ask(generator, "hello", n=3, seed=3)
    (candidates,) = generate(generator.engine, [request])
    stop = "e"
    texts = [whole_text(generator.tokenizer, c.ids).partition(stop)[0] for c in candidates]
    *earlier, last = generator.stream([request], [stop])
    assert earlier and not any(piece.text or piece.last for piece in earlier)
    assert last.last and last.text == texts[nearest_to_median(texts)[0]]


def logprob_of_reply(generator: TextGenerator, turn: list[int], reply: list[int]) -> float:
    """The log-probability of a reply to one turn, by a plain pass over both."""
    ids = [*turn, generator.tokenizer.sep_id, *reply]
    types = [0] * len(turn) + [1] * (1 + len(reply))
    model = generator.engine.model
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids]), torch.tensor([types]))
    logprobs = model.logits(hidden)[0].log_softmax(-1)
    first = len(turn) + 1
    return sum(logprobs[first - 1 + i, id].item() for i, id in enumerate(reply))


def test_mmi_picks_by_the_formula_of_its_docstring():
    generator = small_generator("chatlm")
    encode = generator.tokenizer.encode
    contexts = [["Hello there"], ["Hello", "Hi! How are you?", "Well."], [""], ["x" * 43]]
    requests = []
    for context in contexts:
        turns = [((len(context) - 1 - i) % 2, encode(text)) for i, text in enumerate(context)]
        requests.append(generator.request(turns, replace(SAMPLING, logprobs=0), 4))
    wanted = []
    for context, candidates in zip(contexts, generate(generator.engine, requests), strict=True):
        scores = {}
        for candidate in candidates:
            answer = list(candidate.ids)
            if candidate[-1].finish_reason == "stop":
                answer += generator.stop_ids
            forward = sum(output.scored.logprob for output in candidate if output.scored)
            prior = logprob_of_reply(generator, [], answer)
            backward = logprob_of_reply(generator, answer, encode(context[-1]))
            score = (forward - 0.7 * prior) / (len(answer) + 5) + 0.1 * backward
            scores[score] = whole_text(generator.tokenizer, candidate.ids)
        wanted.append(scores[max(scores)])
    assert generator.complete(requests, pick="mmi") == wanted
    assert generator.complete(requests, pick="median") != wanted  # so the choice matters here


def test_mmi_prefers_any_answer_to_none():
    generator = small_generator("chatlm")
    request = ask(generator, "Hello", n=4, logprobs=0)
    answers = [
        whole_text(generator.tokenizer, c.ids) for c in generate(generator.engine, [request])[0]
    ]
    firsts = [text[:1] for text in answers]
    others = [first for first in firsts if first != firsts[-1]]
    assert others  # so that only the last kind of answer says something
    assert generator.complete([request], others, pick="mmi")[0].startswith(firsts[-1])
    assert generator.complete([request], list(set(firsts)), pick="mmi") == [""]


def test_replies_are_scored_alike_in_one_batch_and_in_several(monkeypatch):
    generator = small_generator("chatlm")
    turns = [[9] * length for length in (0, 3, 20)]
    replies = [[7, 8], [], [10] * 30]
    wanted = [logprob_of_reply(generator, *pair) for pair in zip(turns, replies, strict=True)]
    for tokens_at_once in (1, 4096):
        monkeypatch.setattr("gptchat.inference.pick.TOKENS_AT_ONCE", tokens_at_once)
        found = reply_logprobs(generator.engine.model, generator.tokenizer.sep_id, turns, replies)
        assert found == pytest.approx(wanted, abs=1e-4)


def test_mmi_does_not_say_again_what_a_turn_has_said():
    generator = small_generator("chatlm")
    sep_id = generator.tokenizer.sep_id
    request = ask(generator, "Hello", n=4, logprobs=0)
    candidates = [CandidateText(generator.tokenizer) for _ in range(4)]
    for candidate, completion in zip(
        candidates, generate(generator.engine, [request])[0], strict=True
    ):
        for output in completion:
            candidate.take(output)
    best, *others = generator.rank("mmi", request, candidates)
    said = [scored.token for scored in candidates[best].drawn[: candidates[best].n_tokens]]
    again = replace(request, input_ids=[*said, sep_id, *request.input_ids], token_type_ids=None)
    assert generator.rank("mmi", again, candidates) == [*others, best]
    # An answer that begins with what the request gave is compared as a whole.
    begun = replace(again, input_ids=[*again.input_ids, 9])
    assert generator.rank("mmi", begun, candidates) == [best, *others]


def test_the_turns_of_a_prompt_end_with_the_beginning_of_its_answer():
    assert turns_of([1, 5, 2, 3, 5], sep_id=5) == [[1], [2, 3], []]
    assert turns_of([1, 5, 2, 3, 5, 7, 8], sep_id=5) == [[1], [2, 3], [7, 8]]
    assert turns_of([5], sep_id=5) == [[], []]


def test_a_pick_that_cannot_be_is_refused():
    lm, chatlm = small_generator("lm"), small_generator("chatlm")
    with pytest.raises(ValueError, match="pick mmi: found an LM; wanted a ChatLM"):
        lm.complete([ask(lm, "Hello", n=4, logprobs=0)], pick="mmi")
    with pytest.raises(ValueError, match="mmi needs log-probabilities"):
        chatlm.complete([ask(chatlm, "Hello", n=4)], pick="mmi")
    with pytest.raises(ValueError, match="pick: found 'best'; wanted one of first, median, mmi"):
        chatlm.complete([ask(chatlm, "Hello")], pick="best")


def test_a_model_brings_its_own_defaults():
    tokenizer = byte_tokenizer()
    model = small_model(tokenizer.vocab_size)
    defaults = pretrained.AnswerDefaults({"temperature": 0.3, "top_k": 7}, 20, "mmi")
    generator = TextGenerator(model, tokenizer, "chatlm", 4, defaults=defaults)
    assert (generator.sampling.temperature, generator.sampling.top_k) == (0.3, 7)
    assert (generator.candidates, generator.default_pick, generator.engine.slots) == (20, "mmi", 20)
    for wrong in ({"sampling": {"top_p": 7}}, {"pick": "best"}):
        with pytest.raises(UserError, match=r"generation_config\.json: .*wanted"):
            TextGenerator(model, tokenizer, "chatlm", defaults=replace(defaults, **wrong))


def test_closing_a_stream_cancels_what_is_unfinished(generator):
    requests = [ask(generator, "hello", n=2)] * 4
    pieces = generator.stream(requests)
    next(pieces)
    assert generator.engine.live and generator.engine.queued
    pieces.close()
    assert generator.engine.idle
    assert len(generator.complete(requests)) == 4  # and it may be used again


def test_answers_are_the_same_each_time_and_each_has_its_own_noise(generator):
    dialogues = [[(0, generator.tokenizer.encode("Hi, how are you?"))]] * 20
    answers = generator.sample_answers(dialogues)
    assert answers == small_generator(generator.task, slots=16).sample_answers(dialogues)
    assert len(set(answers)) == 20
    assert generator.sample_answers([]) == []


def test_sampled_answers_cut_long_turns_at_their_front(generator):
    ids = generator.tokenizer.encode("".join(chr(97 + i % 26) for i in range(200)))
    room = N_CTX // 2
    if generator.task == "chatlm":
        room -= 1  # for the [SEP] before the answer
    long, cut = [(0, ids)], [(0, ids[-room:])]
    assert generator.cut_to_fit(long, N_CTX) == (cut, True)
    assert generator.cut_to_fit(cut, N_CTX) == (cut, False)
    assert generator.sample_answers([long]) == generator.sample_answers([cut])


# Whole characters


def halves(generator: TextGenerator, whole_characters: int, **settings: object) -> list[str]:
    """Answers of a model that likes nothing better than single bytes, and ends of text."""
    requests = [
        ask(generator, "hello", top_k=0, top_p=1.0, temperature=3.0, seed=seed,
            max_new_tokens=1 + seed % 30, whole_characters=whole_characters, **settings)
        for seed in range(60)
    ]  # fmt: skip
    return generator.complete(requests)


def test_no_answer_holds_a_broken_character_however_hot_it_is_drawn(generator):
    answers = halves(generator, 1)
    assert not any("\ufffd" in answer for answer in answers)
    long = "".join(answers)
    assert any(ord(character) >= 0x80 for character in long)
    assert any("\ufffd" in answer for answer in halves(generator, 0))


def test_a_greedy_answer_is_the_same_unless_it_would_break_a_character():
    class Wanted:
        """Forbids all ids but the next one of a text, and one that breaks every character."""

        def __init__(self, tokenizer, text):
            self.wanted = tokenizer.encode(text)
            self.n_prompt = len(tokenizer.encode("hello"))
            self.rest = set(range(tokenizer.vocab_size)) - {tokenizer.token_bytes.index(b"\xff")}

        def banned(self, ids):
            return list(self.rest - {self.wanted[len(ids) - self.n_prompt]})

    generator = small_generator("lm")
    text = "日本語é😀!"
    request = ask(
        generator, "hello", temperature=0, max_new_tokens=len(text.encode()),
        word_filter=Wanted(generator.tokenizer, text),
    )  # fmt: skip
    sampling = replace(request.sampling, whole_characters=0)
    unfiltered, filtered = generator.complete([replace(request, sampling=sampling), request])
    assert filtered == text and "\ufffd" in unfiltered


# Directories


@pytest.mark.parametrize("task", ["lm", "chatlm"])
def test_a_loaded_directory_generates_text_only(tmp_path: Path, task: str):
    tokenizer = byte_tokenizer()
    model = small_model(tokenizer.vocab_size + 30)  # rows without a token
    with torch.no_grad():
        model.wte.weight[[0, 3, 4, 5, -1]] *= 5  # the specials are likely
    pretrained.save_static(tmp_path, model.config, tokenizer, task)
    pretrained.save_weights(tmp_path, model)
    generator = load_generator(tmp_path, slots=3, dtype="float32")
    assert (generator.task, generator.n_ctx, generator.engine.slots) == (task, N_CTX, 3)
    assert generator.n_parameters == sum(p.numel() for p in model.parameters())
    requests = [ask(generator, "hello", top_k=0, top_p=1, seed=seed) for seed in range(30)]
    ids = {id for (answer,) in generate(generator.engine, requests) for id in answer.ids}
    assert len(ids) > 50 and all(tokenizer.token_bytes[id] for id in ids)


def test_a_missing_directory_is_a_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="no such directory"):
        load_generator(tmp_path / "nowhere")
