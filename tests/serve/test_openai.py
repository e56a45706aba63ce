"""The server as the official `openai` client meets it; its answers are those of the Python interface."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from s2t.decode.pair import Pair
from s2t.model.load import load_model

NAME = "tiny:slm"
QUESTIONS = [
    "A boy has 21 toys. His cousin has 5 fewer toys than he has. How many toys do they have together?",
    "Ava has 3 apples and buys 4 more. How many apples has she?",
    "Tom reads 15 pages a day. How many pages does he read in 6 days?",
    "2 + 2 = ?",
]
TOKENS = 48


def asked(question):
    return [{"role": "user", "content": question}]


def settings_of(strategy):
    return {"temperature": 1.3, "top_p": 0.9, "seed": 5} if strategy == "sample" else {}


def expected(server, question, strategy, **settings):
    settings = {"max_new_tokens": TOKENS} | settings
    if strategy in ("s2t", "takeover", "s2t-local"):
        settings["threshold"] = 0.5
    return server.reasoner.generate(asked(question), strategy, **settings)


def ask(client, question, strategy=None, **settings):
    extra = {"extra_body": {"s2t": {"strategy": strategy}}} if strategy else {}
    settings = {"max_tokens": TOKENS} | settings
    return client.chat.completions.create(model=NAME, messages=asked(question), **extra, **settings)


def streamed(chunks):
    """Texts and finish reasons by choice, and the usage, of a stream."""
    texts, reasons, usage = {}, {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


STRATEGIES = ["s2t-local", "greedy", "sample", "s2t", "takeover", "llm"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_served_answer_is_that_of_the_python_interface(server, strategy, is_streamed):
    settings = settings_of(strategy)
    whole = expected(server, QUESTIONS[0], strategy, **settings)
    if is_streamed:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        texts, reasons, usage = streamed(ask(server.client(), QUESTIONS[0], strategy, **settings, **options))
        assert texts == {0: whole.text}
        assert reasons == {0: whole.finish_reason}
    else:
        answer = ask(server.client(), QUESTIONS[0], strategy, **settings)
        usage = answer.usage
        assert answer.choices[0].message.content == whole.text
        assert answer.choices[0].finish_reason == whole.finish_reason
        assert answer.s2t == {"strategy": strategy, "seed": settings.get("seed")}
    assert usage.completion_tokens == len(whole.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("scope", ["step", "stream"])
def test_a_selector_of_readout_rank_is_served_as_any_other(scope, new_adapter, running):
    loaded = load_model(NAME)
    with running(Pair(loaded, None, new_adapter(loaded, scope, readout="rank")), threshold=0.5) as server:
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            answers = list(pool.map(lambda question: ask(server.client(), question, "s2t-local"), QUESTIONS))
        wholes = [expected(server, question, "s2t-local") for question in QUESTIONS]
        assert [answer.choices[0].message.content for answer in answers] == [whole.text for whole in wholes]
        assert sum(whole.num_flips for whole in wholes) > 0
        details = {"strategy": "s2t-local", "details": True}
        answer = server.client().chat.completions.create(
            model=NAME, messages=asked(QUESTIONS[0]), max_tokens=TOKENS, extra_body={"s2t": details}
        )
        for told, step in zip(answer.choices[0].s2t["steps"], wholes[0].steps, strict=False):
            assert (told["token_id"], told["fired"]) == (step.token_id, step.fired)
            if step.fired:
                assert [one["score"] for one in told["candidates"]] == pytest.approx(step.scores, abs=1e-3)


def test_whatever_runs_beside_it_an_answer_is_the_same(server):
    """Twenty requests of all strategies, lengths and seeds at once, on eight rows; some hang up."""
    work = [
        (QUESTIONS[i % 4], STRATEGIES[i % 6], 5 + 6 * (i % 7), {"seed": i % 3} if STRATEGIES[i % 6] == "sample" else {})
        for i in range(20)
    ]

    def one(place):
        question, strategy, length, more = work[place]
        more = settings_of(strategy) | more
        if place % 10 == 7:
            with ask(server.client(), question, strategy, max_tokens=length, stream=True, **more) as stream:
                next(iter(stream))
            return None
        return ask(server.client(), question, strategy, max_tokens=length, **more).choices[0].message.content

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    for (question, strategy, length, more), answer in zip(work, answers, strict=True):
        if answer is not None:
            settings = settings_of(strategy) | more
            assert answer == expected(server, question, strategy, max_new_tokens=length, **settings).text
    assert server.idle()


def test_choices_are_the_samples_of_one_call(server):
    alone = server.reasoner.generate(
        [asked(QUESTIONS[1])] * 4, "sample", max_new_tokens=TOKENS, temperature=1.5, seed=9
    )
    answer = ask(server.client(), QUESTIONS[1], n=4, temperature=1.5, top_p=0.95, seed=9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.message.content for choice in answer.choices] == [sample.text for sample in alone]
    assert len({choice.message.content for choice in answer.choices}) > 1
    chunks = ask(server.client(), QUESTIONS[1], n=4, temperature=1.5, top_p=0.95, seed=9, stream=True)
    assert streamed(chunks)[0] == {i: sample.text for i, sample in enumerate(alone)}


def test_a_prompt_that_comes_twice_is_sampled_twice(server):
    client, ids = server.client(), [5, 9, 12]
    answer = client.completions.create(
        model=NAME, prompt=[ids, ids], temperature=2.0, top_p=0.9, seed=3, max_tokens=TOKENS
    )
    alone = server.reasoner.complete([ids, ids], "sample", seed=3, temperature=2.0, top_p=0.9, max_new_tokens=TOKENS)
    assert answer.choices[0].text != answer.choices[1].text
    assert [choice.text for choice in answer.choices] == [one.text for one in alone]


def test_a_seed_repeats_an_answer_and_none_draws_one_that_is_told(server):
    client = server.client()
    drawn = ask(client, QUESTIONS[1], temperature=2.0)
    again = ask(client, QUESTIONS[1], temperature=2.0, seed=drawn.s2t["seed"])
    assert again.choices[0].message.content == drawn.choices[0].message.content
    assert len({ask(client, QUESTIONS[1], temperature=2.0).s2t["seed"] for _ in range(3)}) == 3


@pytest.mark.parametrize("stop", ["toys", ["zzz", "16 toys"], [" - "], "\n"])
def test_stop_strings_end_the_text_before_them(server, stop):
    whole = expected(server, QUESTIONS[0], "greedy", stop=stop)
    assert whole.finish_reason == "stop"
    answer = ask(server.client(), QUESTIONS[0], "greedy", stop=stop)
    assert answer.choices[0].message.content == whole.text
    assert answer.choices[0].finish_reason == "stop"
    chunks = ask(server.client(), QUESTIONS[0], "greedy", stop=stop, stream=True)
    assert streamed(chunks)[:2] == ({0: whole.text}, {0: "stop"})


@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("strategy", ["greedy", "s2t-local"])
def test_plain_completions_continue_texts_and_token_ids(server, strategy, is_text):
    tokenizer = server.reasoner.pair.slm.tokenizer
    texts = ["Ava has 3 apples and ", "Tom reads"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    threshold = {"threshold": 0.5} if strategy == "s2t-local" else {}
    alone = server.reasoner.complete(ids, strategy, max_new_tokens=16, **threshold)
    settings = {"model": f"{NAME}:{strategy}", "max_tokens": 16}
    client = server.client()
    answer = client.completions.create(prompt=texts if is_text else ids, **settings)
    assert [choice.text for choice in answer.choices] == [one.text for one in alone]
    single = client.completions.create(prompt=texts[0] if is_text else ids[0], **settings)
    assert single.choices[0].text == alone[0].text
    chunks = client.completions.create(prompt=texts if is_text else ids, stream=True, **settings)
    assert streamed(chunks)[0] == {i: one.text for i, one in enumerate(alone)}
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_parts_of_a_content_and_a_developer_message_are_text(server):
    parts = [{"type": "text", "text": "Ava has 3 apples"}, {"type": "text", "text": " and buys 4 more."}]
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    answer = server.client().chat.completions.create(model=NAME, messages=turns, max_tokens=12)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ava has 3 apples and buys 4 more."},
    ]
    alone = server.reasoner.generate(plain, "s2t-local", max_new_tokens=12, threshold=0.5)
    assert answer.choices[0].message.content == alone.text


def test_an_answer_goes_back_as_a_turn_of_the_next_request(server):
    client = server.client()
    turns = asked(QUESTIONS[1])
    first = client.chat.completions.create(model=NAME, messages=turns, max_tokens=12).choices[0].message
    turns = [*turns, first.model_dump(exclude_unset=True), *asked("And two more?")]
    assert client.chat.completions.create(model=NAME, messages=turns, max_tokens=4).usage.completion_tokens <= 4


@pytest.mark.parametrize("strategy", ["greedy", "sample", "s2t-local", "takeover", "llm"])
def test_logprobs_are_those_of_the_models_own_distribution(server, strategy):
    whole = expected(server, QUESTIONS[0], strategy, trace=True, max_new_tokens=16, **settings_of(strategy))
    settings = settings_of(strategy) | {"logprobs": True, "top_logprobs": 3, "max_tokens": 16}
    answer = ask(server.client(), QUESTIONS[0], strategy, **settings)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(item.bytes) for item in content).decode() == answer.choices[0].message.content
    for item, step in zip(content, whole.steps, strict=True):
        assert step.candidates is not None
        top = [entry.logprob for entry in item.top_logprobs]
        assert top == pytest.approx(step.candidates.logprobs[:3], abs=1e-4)
        assert sum(math.exp(value) for value in top) <= 1 + 1e-5
        if step.token_id in step.candidates.ids:
            place = step.candidates.ids.index(step.token_id)
            assert item.logprob == pytest.approx(step.candidates.logprobs[place], abs=1e-4)
    chunks = list(ask(server.client(), QUESTIONS[0], strategy, stream=True, **settings))
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices and c.choices[0].logprobs]
    assert [item.token for part in parts for item in part] == [item.token for item in content]


def test_logprobs_of_plain_completions(server):
    answer = server.client().completions.create(model=NAME, prompt="Ava has 3 apples", max_tokens=6, logprobs=2)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert [answer.choices[0].text[at:].startswith(t) for at, t in zip(found.text_offset, found.tokens, strict=True)]
    assert all(len(top) == 2 for top in found.top_logprobs)


def test_details_say_what_the_interface_traces(server):
    whole = expected(server, QUESTIONS[0], "s2t-local", trace=True)
    details = {"s2t": {"strategy": "s2t-local", "details": True}}
    client = server.client()
    answer = client.chat.completions.create(
        model=NAME, messages=asked(QUESTIONS[0]), max_tokens=TOKENS, extra_body=details
    )
    steps = answer.choices[0].s2t["steps"]
    assert len(steps) >= len(whole.steps) - 1
    assert any(step["flip"] for step in steps)
    for told, step in zip(steps, whole.steps, strict=False):
        assert (told["token_id"], told["fired"], told["flip"]) == (step.token_id, step.fired, step.flip)
        assert told["value"] == pytest.approx(step.value, abs=1e-5)
        assert told["criticality"] == pytest.approx(step.value, abs=1e-5)
        assert step.candidates is not None
        assert [c["token_id"] for c in told["candidates"]] == list(step.candidates.ids)
        assert [c["selected"] for c in told["candidates"]].count(True) == 1
        if step.fired:
            assert [c["score"] for c in told["candidates"]] == pytest.approx(step.scores, abs=1e-4)
    chunks = client.chat.completions.create(
        model=NAME, messages=asked(QUESTIONS[0]), max_tokens=TOKENS, extra_body=details, stream=True
    )
    parts = [c.choices[0].s2t["steps"] for c in chunks if c.choices and getattr(c.choices[0], "s2t", None)]
    assert [step["token_id"] for part in parts for step in part] == [step["token_id"] for step in steps]


def test_greedy_details_read_criticality_of_the_untouched_model(server):
    details = {"s2t": {"strategy": "greedy", "details": True}}
    answer = server.client().chat.completions.create(
        model=NAME, messages=asked(QUESTIONS[0]), max_tokens=8, extra_body=details
    )
    steps = answer.choices[0].s2t["steps"]
    assert all(0 <= step["criticality"] <= 1 and step["value"] is None for step in steps)
    assert not any(step["fired"] or step["flip"] for step in steps)


def test_the_models_are_listed_and_found(server):
    client = server.client()
    ids = [model.id for model in client.models.list()]
    assert ids[0] == NAME
    assert {f"{NAME}:{strategy}" for strategy in STRATEGIES} == set(ids[1:])
    assert client.models.retrieve(f"{NAME}:greedy").id == f"{NAME}:greedy"
    engine = client.models.retrieve(NAME).model_extra["engine"]
    assert engine["engine"] == "torch" and engine["weights_bytes"] > 0 and engine["context_length"] > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_the_models_name_chooses_a_strategy(server):
    answer = server.client().chat.completions.create(model=f"{NAME}:llm", messages=asked("2 + 2 = ?"), max_tokens=4)
    assert answer.s2t["strategy"] == "llm"
    assert ask(server.client(), "2 + 2 = ?").s2t["strategy"] == "s2t-local"
    assert ask(server.client(), "2 + 2 = ?", temperature=0).s2t["strategy"] == "s2t-local"
    assert ask(server.client(), "2 + 2 = ?", temperature=1).s2t["strategy"] == "sample"
