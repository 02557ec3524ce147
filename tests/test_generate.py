"""The text of candidates, streams of pieces, and what a loaded directory promises."""

import codecs
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import byte_tokenizer, shake

from gptchat.console import UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.engine import Output, Request, generate
from gptchat.inference.generate import (
    CHAT_SAMPLING,
    CandidateText,
    TextGenerator,
    load_generator,
    prompt_room,
)
from gptchat.inference.rerank import CONTEXT_WEIGHT, pick_median
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config

torch.set_num_threads(1)

N_CTX = 64
SAMPLING = replace(CHAT_SAMPLING, temperature=1.0, max_new_tokens=20, seed=1)


def tokenizer_with(*words: str) -> Tokenizer:
    """The byte tokenizer, with each word as one token more."""
    backend = byte_tokenizer().backend
    backend.add_tokens(list(words))
    return Tokenizer(backend)


def take_all(candidate: CandidateText, ids: list[int], finish_reason: str = "length") -> list[str]:
    """The pieces of text when the engine gives these ids, and with the last one the reason."""
    reasons = [None] * (len(ids) - 1) + [finish_reason]
    return [
        candidate.take(Output(1, 0, id, finish_reason=reason))
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
    assert [candidate.take(Output(1, 0, id)) for id in ids] == ["one", " tw"]
    assert (candidate.text, candidate.finish_reason) == ("one tw", "stop")
    assert candidate.must_cancel  # the engine would go on
    assert candidate.take(Output(1, 0, *tokenizer.encode(" four"))) == ""
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


def test_a_stop_string_in_the_engines_last_token_needs_no_cancel():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer, stop=["END"])
    assert take_all(candidate, tokenizer.encode("a END")) == ["a", " ", "", "", ""]
    assert (candidate.text, candidate.finish_reason) == ("a ", "stop")
    assert not candidate.must_cancel


def test_the_end_of_a_candidate_may_come_without_a_token():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer, stop=["END"])
    take_all(candidate, tokenizer.encode("E") * 2, finish_reason="")
    assert (candidate.text, candidate.finish_reason) == ("E", "")
    assert candidate.take(Output(1, 0, finish_reason="stop")) == "E"
    assert (candidate.text, candidate.finish_reason, candidate.n_tokens) == ("EE", "stop", 2)


def test_the_beginning_of_an_answer_counts_as_its_text():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer, ["END"], beginning=tokenizer.encode("So E"))
    assert (candidate.text, candidate.n_tokens) == ("So ", 0)
    take_all(candidate, tokenizer.encode("ND."))
    assert (candidate.text, candidate.finish_reason, candidate.n_tokens) == ("So ", "stop", 2)

    ended = CandidateText(tokenizer, ["END"], beginning=tokenizer.encode("So END of"))
    assert (ended.text, ended.finish_reason) == ("So ", "")
    assert ended.take(Output(1, 0, *tokenizer.encode("x"))) == ""
    assert (ended.text, ended.finish_reason, ended.must_cancel) == ("So ", "stop", True)


def test_an_echoed_prompt_stands_before_the_text_and_has_no_stop_strings():
    tokenizer = byte_tokenizer()
    candidate = CandidateText(tokenizer, ["END"], echo="the END, EN")
    starts = []
    for id in tokenizer.encode("Dx"):
        starts.append(len(candidate.text))
        candidate.take(Output(1, 0, id))
    assert (candidate.text, candidate.finish_reason) == ("the END, ENDx", "")
    assert starts == [11, 12]  # each token's place in the text


# Settings that all share


def test_the_median_of_an_even_number_is_the_longer_one():
    assert pick_median(["333", "1", "22"]) == "22"
    assert pick_median(["4444", "333", "1", "22"]) == "333"


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


def test_an_id_without_a_token_may_stand_in_a_prompt():
    tokenizer = byte_tokenizer()
    model = GPT2(
        GPT2Config(tokenizer.vocab_size + 2, n_positions=N_CTX, n_embd=8, n_layer=1, n_head=2)
    )
    generator = TextGenerator(model.eval(), tokenizer, "lm")
    [[answer]] = generate(generator.engine, [Request([tokenizer.vocab_size + 1])])
    assert answer.ids


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


def test_an_answer_does_not_depend_on_the_others(generator):
    requests = [ask(generator, f"number {i}", n=1 + i % 3, seed=i) for i in range(6)]
    alone = [generator.complete([request])[0] for request in requests]
    assert generator.complete(requests) == alone


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
    assert last.last and last.text == pick_median(texts)


def logprob_of_reply(generator: TextGenerator, turns: list[list[int]], reply: list[int]) -> float:
    """The log-probability of a reply to alternating turns, by a plain pass over all of it."""
    model, sep = generator.engine.model, generator.tokenizer.sep_id
    ids, types = [], []
    for number, turn in enumerate([*turns, reply]):
        speaker = (len(turns) - number + 1) % 2
        piece = [sep, *turn] if ids else turn
        ids += piece
        types += [speaker] * len(piece)
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids]), torch.tensor([types]))
    logprobs = model.logits(hidden)[0].log_softmax(-1)
    first = len(ids) - len(reply)
    return sum(logprobs[first - 1 + i, id].item() for i, id in enumerate(reply))


def test_mutual_information_picks_what_fits_the_context_and_what_the_context_fits():
    generator = small_generator("chatlm")
    encode = generator.tokenizer.encode
    contexts = [["Hello there"], ["Hello", "Hi! How are you?", "Well."], ["?"]]
    requests = []
    for context in contexts:
        speakers = [(len(context) - 1 - i) % 2 for i in range(len(context))]
        turns = [(speaker, encode(text)) for speaker, text in zip(speakers, context, strict=True)]
        requests.append(generator.request(turns, replace(SAMPLING, logprobs=0), 4))
    wanted = []
    for context, candidates in zip(contexts, generate(generator.engine, requests), strict=True):
        turns = [encode(text) for text in context]
        scores = {}
        for candidate in candidates:
            text = whole_text(generator.tokenizer, candidate.ids)
            scored = list(candidate.ids)
            if candidate[-1].finish_reason == "stop":
                scored += generator.stop_ids
            forwards = logprob_of_reply(generator, turns, scored) / len(scored)
            backwards = logprob_of_reply(generator, [encode(text)], turns[-1])
            scores[forwards + CONTEXT_WEIGHT * backwards] = text
        wanted.append(scores[max(scores)])
    pieces = list(generator.stream(requests, pick="mmi"))
    given = {piece.index: piece.text for piece in pieces if piece.last}
    assert [given[index] for index in range(len(requests))] == wanted
    assert sum(piece.last for piece in pieces) == len(requests)
    assert not any(piece.text for piece in pieces if not piece.last)
    medians = generator.complete(requests)
    assert medians != wanted  # so that the choice matters here


def test_mutual_information_scores_what_is_said_and_prefers_any_answer_to_none():
    generator = small_generator("chatlm")
    request = ask(generator, "Hello", n=4, logprobs=0)
    texts = [
        whole_text(generator.tokenizer, c.ids) for c in generate(generator.engine, [request])[0]
    ]
    stop = texts[0][:1]  # so that the first candidate says nothing
    assert not all(text.startswith(stop) for text in texts)
    [answer] = generator.complete([request], [stop], pick="mmi")
    assert answer and stop not in answer
    assert answer in {text.partition(stop)[0] for text in texts}
    everything = list(dict.fromkeys("".join(texts)))
    assert generator.complete([request], everything, pick="mmi") == [""]


def test_mutual_information_needs_a_context_and_log_probabilities():
    with pytest.raises(ValueError, match="mmi is for a ChatLM"):
        lm = small_generator("lm")
        lm.complete([ask(lm, "Hello", n=4, logprobs=0)], pick="mmi")
    with pytest.raises(ValueError, match="mmi needs log-probabilities"):
        chatlm = small_generator("chatlm")
        chatlm.complete([ask(chatlm, "Hello", n=4)], pick="mmi")


@pytest.mark.parametrize("text", ["", "x" * (N_CTX - 20 - 1)])
def test_mutual_information_takes_an_empty_context_and_one_that_fills_the_room(text):
    generator = small_generator("chatlm")
    request = ask(generator, text, n=4, logprobs=0, max_new_tokens=20)
    if text:
        assert len(request.input_ids) == prompt_room(N_CTX, 20)
    texts = [
        whole_text(generator.tokenizer, c.ids) for c in generate(generator.engine, [request])[0]
    ]
    assert generator.complete([request], pick="mmi")[0] in texts


def test_mutual_information_takes_answers_of_broken_characters():
    """The text of one has other ids than were drawn, three for each broken byte."""
    generator = small_generator("chatlm")
    settings = {"logprobs": 0, "max_new_tokens": 40, "whole_characters": 0, "min_tokens": 40}
    request = ask(generator, "x" * 23, n=4, **settings)
    length = len(request.input_ids)
    assert any(
        len(generator.tokenizer.encode(whole_text(generator.tokenizer, c.ids))) + length > N_CTX
        for c in generate(generator.engine, [request])[0]
    )
    assert generator.complete([request], pick="mmi") != [""]
    assert generator.engine.idle


def test_rows_are_scored_before_all_the_rows_behind_them_begin():
    generator = small_generator("chatlm")
    requests = [ask(generator, text, n=4, logprobs=0) for text in ("One", "Two", "Three")]
    order = list(generator.stream(requests, pick="mmi"))
    first_end = next(number for number, piece in enumerate(order) if piece.last)
    assert order[first_end].index == 0
    assert all(piece.index < 2 for piece in order[:first_end])


def test_a_stream_that_is_closed_while_candidates_are_scored_leaves_nothing():
    generator = small_generator("chatlm")
    request = ask(generator, "Hello", n=4, logprobs=0)
    stream = generator.stream([request], pick="mmi")
    n_generated = sum(1 for _ in generator.stream([request]))
    for _ in range(n_generated):
        next(stream)
    assert generator.engine.waiting
    stream.close()
    assert generator.engine.idle


def test_closing_a_stream_cancels_what_is_unfinished(generator):
    requests = [ask(generator, "hello", n=2)] * 4
    pieces = generator.stream(requests)
    next(pieces)
    assert generator.engine.live and generator.engine.queued
    pieces.close()
    assert generator.engine.idle
    assert len(generator.complete(requests)) == 4  # and it may be used again


def test_a_request_that_cannot_be_served_leaves_the_engine_idle(generator):
    request = ask(generator, "hello")
    with pytest.raises(ValueError, match="n is 5"):
        generator.complete([request, replace(request, n=5)])
    assert generator.engine.idle


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


def test_whole_characters_do_not_depend_on_the_neighbours(generator):
    request = ask(generator, "hello", temperature=3.0, top_k=0, top_p=1.0)
    requests = [
        replace(request, sampling=replace(request.sampling, seed=i, whole_characters=i % 2))
        for i in range(8)
    ]
    alone = [generator.complete([request])[0] for request in requests]
    assert generator.complete(requests) == alone


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


def test_a_model_that_generates_stays_fit_for_training():
    generator = small_generator("lm")
    tokenizer = byte_tokenizer()
    model = small_model(tokenizer.vocab_size)
    before = [parameter.clone() for parameter in model.parameters()]
    TextGenerator(model, tokenizer, "lm").complete([ask(generator, "hello")])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))
