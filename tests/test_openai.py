"""OpenAI's API without TorchServe: prompts, messages, streams, log-probabilities, other fields."""

import json

import pytest
import torch
from serving import ServiceClient
from test_service import CHAT, TEXT

from gptchat.inference.generate import load_generator
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.pretrained import TRAINED_HERE
from handlers.body import SYNONYMS
from handlers.unread import UNAVAILABLE

torch.set_num_threads(1)
ROUTES = {TEXT: {"prompt": "Hi"}, CHAT: {"messages": [{"role": "user", "content": "Hi"}]}}
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("chat"), "chatlm")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return ServiceClient(tmp_path_factory.mktemp("lm"), "lm")


def texts(client, body, path=TEXT):
    status, answer = client.ask(body, path)
    assert status == 200, answer
    choices = answer["choices"]
    return [choice["text"] if path == TEXT else choice["message"]["content"] for choice in choices]


def events_of(stream):
    *parts, end, nothing = stream.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


# --- a list of prompts


def test_each_prompt_of_a_list_is_answered_as_alone_with_the_seed_plus_its_number(lm):
    sampled = {"max_tokens": 12, "seed": 5}
    prompts = ["good morning"] * 6
    together = texts(lm, {"prompt": prompts} | sampled)
    alone = [
        texts(lm, {"prompt": prompt} | sampled | {"seed": 5 + number})[0]
        for number, prompt in enumerate(prompts)
    ]
    assert together == alone and len(set(together)) == 6
    assert len(set(texts(lm, {"prompt": prompts, "max_tokens": 12}))) == 6  # without a seed, too


def test_a_prompts_length_does_not_cut_the_answers_to_others(lm):
    prompts = [[7, 8], [7] * 126, [7] * 128]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 20, "logprobs": 0}
    body["logit_bias"] = {"3": -100}  # [EOS]
    choices = lm.ask(body, TEXT)[1]["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [20, 2, 0]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 3


# --- messages


def test_a_last_message_of_the_assistants_is_continued(chat):
    user, begun = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am"})
    original = chat.ask({"context": "hello", "response": "I am", "n": 1, "seed": 3, "top_k": 9})[1]
    for more in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        body = {"messages": [user, begun], "seed": 3, "max_tokens": 64, "top_k": 9} | more
        assert "I am" + texts(chat, body, CHAT)[0] == original["response"]
    silent = {"role": "assistant", "content": None}
    asked = [texts(chat, {"messages": m} | GREEDY, CHAT) for m in ([user], [user, silent])]
    assert asked[0] == asked[1]
    assert texts(chat, {"messages": [begun]} | GREEDY, CHAT)[0]


def test_content_may_come_in_parts(chat):
    parts = [{"type": "text", "text": "good "}, {"type": "text", "text": "morning"}]
    asked = [
        texts(chat, {"messages": [{"role": "user", "content": content}]} | GREEDY, CHAT)
        for content in (parts, "good morning")
    ]
    assert asked[0] == asked[1]


def test_an_old_turn_too_long_is_dropped_with_what_is_before_it(chat):
    said = ("user", "x" * 9000), ("assistant", "ok"), ("user", "hi")
    long = [{"role": role, "content": text} for role, text in said]
    asked = [chat.ask({"messages": turns} | GREEDY, CHAT)[1] for turns in (long, long[1:])]
    assert asked[0]["choices"] == asked[1]["choices"] and asked[0]["usage"] == asked[1]["usage"]


def test_lengths_are_cut_down_and_an_answer_that_large_gets_half_the_context(chat):
    n_ctx = chat.service.model.generator.n_ctx
    never_ends = {"temperature": 0, "logit_bias": {"4": -100}}  # [CLS]
    for path, body in ROUTES.items():
        answer = chat.ask(body | never_ends | {"max_completion_tokens": 10**5}, path)[1]
        assert answer["usage"]["total_tokens"] == n_ctx
        assert answer["choices"][0]["finish_reason"] == "length"
    said = ("good morning " * 5).strip()
    messages = [{"role": role, "content": said} for role in ("user", "assistant")] * 8
    answer = chat.ask({"messages": messages[:-1], "temperature": 0, "max_tokens": 300}, CHAT)[1]
    assert answer["usage"]["prompt_tokens"] <= n_ctx // 2


# --- streams and log-probabilities


def test_stream_is_the_whole_answer_in_pieces(chat):
    for path, body in ROUTES.items():
        body = body | {"seed": 5, "max_tokens": 20, "logprobs": 1, "echo": True}
        if path == CHAT:
            body |= {"logprobs": True, "top_logprobs": 1}
        whole = chat.ask(body, path)[1]["choices"][0]
        choices = [
            event["choices"][0] for event in events_of(chat.ask(body | {"stream": True}, path)[1])
        ]
        assert choices[-1]["finish_reason"] == whole["finish_reason"]
        if path == CHAT:
            assert choices[0]["delta"]["role"] == "assistant"
            pieces = [choice["delta"]["content"] for choice in choices]
            assert "".join(pieces) == whole["message"]["content"]
            tokens = [token for choice in choices for token in choice["logprobs"]["content"]]
            assert tokens == whole["logprobs"]["content"]
        else:
            assert "".join(choice["text"] for choice in choices) == whole["text"]
            for key, values in whole["logprobs"].items():
                assert [v for choice in choices for v in choice["logprobs"][key]] == values


def test_usage_comes_last_if_it_is_asked_for(lm):
    body = {"prompt": "good", "max_tokens": 2, "stream": True}
    assert all("usage" not in event for event in events_of(lm.ask(body, TEXT)[1]))
    options = {"stream_options": {"include_usage": True}}
    *events, last = events_of(lm.ask(body | options, TEXT)[1])
    assert [event["usage"] for event in events] == [None] * len(events)
    assert last["choices"] == [] and last["usage"]["prompt_tokens"] > 0


def test_text_offsets_count_text_that_a_stop_string_holds_back(lm):
    tokenizer = lm.service.model.generator.tokenizer
    (the,) = (
        tokenizer.encode(" the")
        if len(tokenizer.encode(" the")) == 1
        else (tokenizer.encode("you")[-1],)
    )
    name = tokenizer.decode([the])
    body = {"prompt": "A", "max_tokens": 4, "logprobs": 0, "temperature": 0}
    body |= {"logit_bias": {str(the): 100}, "stop": [name + "people"]}
    logprobs = lm.ask(body, TEXT)[1]["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [len(name) * number for number in range(4)]
    echoed = lm.ask(body | {"echo": True}, TEXT)[1]["choices"][0]["logprobs"]
    assert echoed["text_offset"] == [0, *(1 + len(name) * number for number in range(4))]


def test_echo_with_logprobs_scores_as_the_model_does(lm):
    model, tokenizer, _ = pretrained.load_model(lm.model)
    prompts = [tokenizer.encode("good morning 😀 you"), tokenizer.encode("where")]
    body = {"prompt": prompts, "echo": True, "logprobs": 2, "max_tokens": 0}
    for ids, choice in zip(prompts, lm.ask(body, TEXT)[1]["choices"], strict=True):
        scores = model.logits(model.hidden(torch.tensor([ids])))[0].log_softmax(-1)
        expected = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        got = choice["logprobs"]
        assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(torch.tensor(got["token_logprobs"][1:]), expected, **close)
        best = [max(top.values()) for top in got["top_logprobs"][1:]]
        torch.testing.assert_close(torch.tensor(best), scores[:-1].max(-1).values, **close)
        assert choice["text"] == tokenizer.decode(ids) and len(got["tokens"]) == len(ids)


def test_chat_log_probabilities_list_each_token_with_its_bytes_and_the_best(chat):
    body = {"max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = chat.ask(ROUTES[CHAT] | body | {"whole_characters": 0}, CHAT)[1]
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"] == 3
    raw = bytes(byte for token in content for byte in token["bytes"])
    assert raw.decode("utf-8", "replace").startswith(choice["message"]["content"].rstrip("\ufffd"))
    for token in content:
        best = token["top_logprobs"]
        assert len(best) == 2 and best[0]["logprob"] >= best[1]["logprob"]
        assert best[0] | {"top_logprobs": best} == token  # greedy


# --- candidates


@pytest.mark.parametrize("pick", ["median", "mmi"])
def test_the_best_of_several_are_given_as_they_are_ranked(chat, pick):
    """n of best_of candidates; a stream sends each at once."""
    generator = chat.service.model.generator
    asked = ROUTES[CHAT] | {"seed": 5, "max_tokens": 12, "temperature": 1.5, "pick": pick}
    all_six = texts(chat, asked | {"n": 6}, CHAT)
    assert texts(chat, asked | {"n": 6, "best_of": 6}, CHAT) == all_six
    one = texts(chat, asked | {"best_of": 6}, CHAT)
    two = texts(chat, asked | {"best_of": 6, "n": 2}, CHAT)
    assert two[0] == one[0] and set(two) <= set(all_six) and len(two) == 2
    sampling = Sampling(**generator_sampling(asked), max_new_tokens=12, seed=5, logprobs=0)
    request = generator.request([(0, generator.tokenizer.encode("Hi"))], sampling, n=6)
    assert one == offline(chat).complete([request], pick=pick)
    events = events_of(chat.ask(asked | {"best_of": 6, "n": 2, "stream": True}, CHAT)[1])
    choices = [event["choices"][0] for event in events]
    assert [choice["delta"]["content"] for choice in choices] == two
    assert [choice["index"] for choice in choices] == [0, 1]
    answer = chat.ask(asked | {"best_of": 6}, CHAT)[1]
    assert answer["usage"]["completion_tokens"] <= 12


def generator_sampling(asked):
    return TRAINED_HERE.sampling | {"temperature": asked["temperature"]}


def offline(client):
    """The same model with an engine of its own, whose steps are the caller's."""
    return load_generator(client.model, 16, "float32")


def test_a_model_that_picks_by_default_does_so_where_a_single_answer_is_drawn(chat, monkeypatch):
    generator = chat.service.model.generator
    monkeypatch.setattr(generator, "candidates", 7)
    monkeypatch.setattr(generator, "default_pick", "mmi")
    seed = {"seed": 3, "max_tokens": 9, "temperature": 1.5}

    def drawn(body, path=CHAT):
        generation = chat.service.routes.post(path, ROUTES[path] | seed | body, "", [])
        return generation.requests[0].n, generation.pick

    assert drawn({}) == drawn({"stream": True}) == (7, "mmi")
    assert [drawn(body)[0] for body in ({"n": 2}, {"temperature": 0}, {"pick": "first"})] == [
        2,
        1,
        1,
    ]
    assert drawn({"best_of": 3, "pick": "median"}) == (3, "median")
    assert drawn({}, TEXT)[0] == 1  # a completion answers no context
    assert texts(chat, ROUTES[CHAT] | seed, CHAT) == texts(
        chat, ROUTES[CHAT] | seed | {"best_of": 7, "pick": "mmi"}, CHAT
    )
    original = chat.service.routes.post("", {"context": "Hi"}, "", [])
    assert (original.requests[0].n, original.pick) == (5, "median")


def test_the_originals_response_is_picked_among_its_candidates(chat):
    asked = {"context": "Hi", "seed": 5, "max_tokens": 12, "temperature": 1.5}
    answers = [chat.ask(asked | {"pick": pick})[1] for pick in ("first", "median", "mmi")]
    outputs = [answer["model_info"]["output"] for answer in answers]
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) == 5
    assert answers[0]["response"] == outputs[0][0]
    message = {"messages": [{"role": "user", "content": "Hi"}], "best_of": 5, "pick": "mmi"}
    same = {key: value for key, value in asked.items() if key != "context"}
    assert texts(chat, message | same, CHAT) == [answers[2]["response"]]


@pytest.mark.parametrize(
    "path, body, field",
    [
        (CHAT, {"n": 3, "best_of": 2}, "best_of"),
        (CHAT, {"best_of": 33}, "best_of"),
        (CHAT, {"pick": "worst"}, "pick"),
        (TEXT, {"best_of": 2, "pick": "mmi"}, "pick"),
        (TEXT, {"prompt": ["a"] * 33, "best_of": 2}, "prompt"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(chat, path, body, field):
    status, answer = chat.ask(ROUTES[path] | body, path)
    assert (status, answer["error"]["param"]) == (400, field)


def test_an_answer_whose_ranking_fails_is_an_error_of_its_own(chat, monkeypatch):
    monkeypatch.setattr(chat.service.model.generator, "rank", lambda *_: 1 / 0)
    status, answer = chat.ask(ROUTES[CHAT] | {"best_of": 2}, CHAT)
    assert answer["error"]["message"] == "internal error"
    assert texts(chat, ROUTES[CHAT] | GREEDY, CHAT)


# --- settings and other fields


def test_penalties_bias_and_minimum_change_an_answer_as_they_should(chat):
    tokenizer = chat.service.model.generator.tokenizer
    cls = tokenizer.cls_id

    def ids_of(**settings):
        """The tokens of an answer, as bytes."""
        body = ROUTES[CHAT] | {"max_tokens": 30, "logprobs": True, "temperature": 0}
        answer = chat.ask(body | {"whole_characters": 0} | settings, CHAT)[1]
        return [tuple(token["bytes"]) for token in answer["choices"][0]["logprobs"]["content"]]

    plain = ids_of(logit_bias={str(cls): -100})
    assert len(plain) == 30 and len(set(plain)) < 20  # greedy: it repeats itself
    varied = ids_of(logit_bias={str(cls): -100}, presence_penalty=2, frequency_penalty=2)
    assert len(set(varied)) > len(set(plain))
    word = tokenizer.encode("Hi")[0]
    biases = {str(word): 100, str(cls): -100}
    assert set(ids_of(logit_bias=biases)) == {tuple(tokenizer.token_bytes[word])}
    ends = {str(cls): 100}
    assert [len(ids_of(logit_bias=ends, min_tokens=n)) for n in (0, 7, 70)] == [0, 7, 30]


@pytest.mark.parametrize("path", ROUTES)
def test_of_synonyms_the_first_counts(chat, path):
    values = {"max_new_tokens": (3, 30), "n": (2, 1), "min_tokens": (4, 0)}
    values |= {"repetition_penalty": (3, 1), "stop": (["a"], [])}
    for setting, names in SYNONYMS.items():
        first, other = values[setting]
        for name in names:
            later = {other_name: other for other_name in names[names.index(name) + 1 :]}
            generation = chat.service.routes.post(
                path, ROUTES[path] | {name: first} | later, "", []
            )
            assert getattr(generation.asked, setting) == first


@pytest.mark.parametrize("path", ROUTES)
def test_ignored_fields_change_nothing(chat, path):
    expected = texts(chat, ROUTES[path] | GREEDY, path)
    fields = {name: one.neutral[0] for name, one in UNAVAILABLE.items() if one.neutral}
    made_up = {"user": "u", "made up\n": 1, "stream_options": {"x\ny": 1}, "half \ud800": 1}
    assert texts(chat, ROUTES[path] | GREEDY | fields | made_up, path) == expected


def test_the_samplers_that_front_ends_offer_and_this_server_lacks_are_known():
    others = {"top_n_sigma", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "typical", "tfs"}
    assert others | {"ban_eos_token", "guidance_scale"} <= set(UNAVAILABLE)


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_what_would_change_the_answer_and_cannot_be_had_is_a_400_that_names_it(chat, name):
    for path, body in ROUTES.items():
        status, answer = chat.ask(body | GREEDY | {name: {"another": "value"}}, path)
        assert (status, answer["error"]["param"]) == (400, name)
    status, answer = chat.ask({"context": "a", name: 1})  # the original's API knows no such field
    assert status == 400 and "is unknown here" in answer["error"]["message"]


# --- conversations


def test_a_conversation_is_not_computed_again_and_can_be(tmp_path):
    said, cached = [], []
    for setting in (True, False):
        client = ServiceClient(tmp_path / str(setting), "chatlm", prefix_cache=setting)
        messages = []
        for text in ("good morning", "where do you live?", "in a small town"):
            messages.append({"role": "user", "content": text})
            body = {"messages": messages, "temperature": 0, "max_tokens": 12}
            messages.append({"role": "assistant", "content": texts(client, body, CHAT)[0]})
        said.append(messages)
        figures = [value for _, name, value, _ in client.figures if name.endswith("cached_tokens")]
        cached.append(sum(figures))
    assert said[0] == said[1]
    assert cached[0] > 15 and cached[1] == 0
