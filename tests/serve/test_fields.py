"""What clients send: every field of the official client's own schema, messages as they come, and what they get for it."""

from __future__ import annotations

import json
from typing import get_type_hints

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)

from s2t.serve.schema import UNSUPPORTED, ChatBody, CompletionBody, Message

NAME = "tiny:slm"
USER = [{"role": "user", "content": "Ava has 3 apples and buys 4 more. How many apples has she?"}]
CHAT = {"model": NAME, "messages": USER, "max_tokens": 6}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


def post(server, body, path=CHATS):
    return httpx.post(server.url + path, json=body, timeout=30)


def text_of(server, body):
    response = post(server, body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# The schema


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatBody),
        (completion_create_params.CompletionCreateParamsBase, CompletionBody),
        *(
            (message, Message)
            for message in (
                ChatCompletionAssistantMessageParam,
                ChatCompletionDeveloperMessageParam,
                ChatCompletionSystemMessageParam,
                ChatCompletionUserMessageParam,
            )
        ),
    ],
)
def test_every_field_of_the_official_client_is_known(theirs, ours):
    assert set(get_type_hints(theirs)) <= set(ours.model_fields)


def test_what_is_not_supported_is_a_field_and_has_advice():
    assert UNSUPPORTED.keys() <= ChatBody.model_fields.keys() | CompletionBody.model_fields.keys()


IGNORED = [
    {"prompt_cache_key": "thread-7", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"}},
    {"safety_identifier": "a1b2", "user": "someone", "metadata": {"run": "7", "of": "x"}},
    {"prediction": {"type": "content", "content": "7 apples"}, "modalities": ["text"], "store": True},
    *({"verbosity": verbosity} for verbosity in ("low", "medium", "high", None)),
    *({"service_tier": tier} for tier in ("auto", "default", "flex", "scale", "priority", "fast")),
    *({"reasoning_effort": effort} for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max", None)),
    {"function_call": "none", "tool_choice": "auto", "audio": None, "web_search_options": None, "moderation": None},
    *({"stop": stop} for stop in ("", [], [""], None)),
    {"chat_template_kwargs": {"enable_thinking": False}},
]


@pytest.mark.parametrize("change", IGNORED)
def test_fields_that_change_no_answer_are_taken(server, change):
    assert text_of(server, CHAT | change) == text_of(server, CHAT)


def test_an_empty_stop_string_among_others_is_none(server):
    body = CHAT | {"model": f"{NAME}:greedy", "max_tokens": 40}
    assert text_of(server, body | {"stop": ["", "toys"]}) == text_of(server, body | {"stop": ["toys"]})


# Messages


@pytest.mark.parametrize(
    "said",
    [
        {"content": None},
        {},
        {"content": ""},
        {"content": None, "tool_calls": [], "refusal": None},
        {"content": [{"type": "text", "text": ""}]},
    ],
)
def test_an_assistants_message_may_say_nothing(server, said):
    turns = [*USER, {"role": "assistant"} | said, {"role": "user", "content": "And now?"}]
    empty = [*USER, {"role": "assistant", "content": ""}, {"role": "user", "content": "And now?"}]
    assert text_of(server, CHAT | {"messages": turns}) == text_of(server, CHAT | {"messages": empty})


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_message_may_have_a_name(server, role):
    turns = [{"role": role, "content": "Be brief.", "name": "Ava"}, *USER]
    plain = [{"role": role, "content": "Be brief."}, *USER]
    assert text_of(server, CHAT | {"messages": turns}) == text_of(server, CHAT | {"messages": plain})


def test_a_part_may_carry_a_cache_mark(server):
    part = {"type": "text", "text": USER[0]["content"], "prompt_cache_breakpoint": {"mode": "explicit"}}
    body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
    assert text_of(server, body) == text_of(server, CHAT)


# Templates

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.name ~ ': ' if m.name }}{{ m.content }}{% endfor %}"
    "{{ ' 12 + 30 = ' if enable_thinking is defined and not enable_thinking }}{{ reasoning_effort }}{{ verbosity }}<|assistant|>"
)


@pytest.fixture
def templated(serve, monkeypatch):
    with serve(chat_template_kwargs='{"enable_thinking": true}') as found:
        pair = found.service.intake.pair
        pair.variables |= {"enable_thinking": True}  # as `s2t serve` loads them
        monkeypatch.setattr(pair.slm.tokenizer, "chat_template", TEMPLATE)
        monkeypatch.setattr(found.reasoner.pair.slm.tokenizer, "chat_template", TEMPLATE)
        yield found


def prompts(server, body):
    response = post(server, body)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens"]


def test_a_request_may_tell_the_chat_template(templated):
    plain = text_of(templated, CHAT)
    told = text_of(templated, CHAT | {"chat_template_kwargs": {"enable_thinking": False}})
    asked = [{"role": "user", "content": USER[0]["content"] + " 12 + 30 = "}]
    assert told == text_of(templated, CHAT | {"messages": asked}) != plain
    assert text_of(templated, CHAT | {"chat_template_kwargs": {"enable_thinking": True}}) == plain


def test_effort_and_names_reach_a_template_that_reads_them(templated):
    plain = prompts(templated, CHAT)
    assert prompts(templated, CHAT | {"reasoning_effort": "high"}) > plain
    assert prompts(templated, CHAT | {"verbosity": "low"}) > plain
    assert prompts(templated, CHAT | {"messages": [USER[0] | {"name": "Ava"}]}) > plain


@pytest.mark.parametrize("given", [{"a": float("nan")}, {"a": "\ud800"}, {"a": [[[{}]]]}, {"conversations": 1}])
def test_odd_variables_of_a_template_are_an_answer_or_a_line(templated, given):
    body = json.dumps(CHAT | {"chat_template_kwargs": given | {"reasoning_effort": given.get("a")}})
    response = httpx.post(templated.url + CHATS, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        assert "\n" not in response.json()["error"]["message"]


# Temperature


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-6, 1e-9, 1e-300, 5e-324])
def test_a_temperature_that_is_as_good_as_none_keeps_the_adapter(server, temperature):
    response = post(server, CHAT | {"temperature": temperature}).json()
    assert response["s2t"] == {"strategy": "s2t-local", "seed": None}
    assert response["choices"][0]["message"]["content"] == text_of(server, CHAT)
    named = post(server, CHAT | {"temperature": temperature, "model": f"{NAME}:s2t-local"})
    assert named.status_code == 200


def test_a_small_temperature_still_samples(server):
    assert post(server, CHAT | {"temperature": 0.01}).json()["s2t"]["strategy"] == "sample"
    tiny = post(server, CHAT | {"temperature": 1e-300, "model": f"{NAME}:sample"}).json()
    assert tiny["choices"][0]["message"]["content"] == text_of(server, CHAT | {"model": f"{NAME}:greedy"})


# Stop strings and log-probabilities

QUESTION = "A boy has 21 toys. His cousin has 5 fewer toys than he has. How many toys do they have together?"
STOPS = ["toys", "16 toys", " - ", "\n", "oy", "ogether, th", ["zzz", "ave 2"]]


def told(server, stop, **settings):
    body = CHAT | {"model": f"{NAME}:greedy", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40}
    return post(server, body | {"stop": stop, "logprobs": True} | settings).json()["choices"][0]


@pytest.mark.parametrize("stop", STOPS)
def test_log_probabilities_end_where_the_text_ends(server, stop):
    choice = told(server, stop, s2t={"details": True})
    text, tokens = choice["message"]["content"], [item["token"] for item in choice["logprobs"]["content"]]
    joined = "".join(tokens)
    assert choice["finish_reason"] == "stop" and joined.startswith(text)
    assert len("".join(tokens[:-1])) < len(text) or not tokens  # the last one is shown, at least in part
    assert [step["token"] for step in choice["s2t"]["steps"]] == tokens
    whole = [item["token"] for item in told(server, None)["logprobs"]["content"]]
    assert tokens == whole[: len(tokens)] and len(tokens) < len(whole)


@pytest.mark.parametrize("stop", [*STOPS, "zzz", None])
def test_streamed_log_probabilities_are_those_of_the_whole_answer(server, stop):
    choice = told(server, stop)
    chunks = server.client().chat.completions.create(
        model=f"{NAME}:greedy",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        stop=stop,
        logprobs=True,
        stream=True,
    )
    text, tokens = "", []
    for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs is not None:
            tokens += [item.token for item in chunk.choices[0].logprobs.content]
        assert not stop or len("".join(tokens[:-1])) <= len(text)  # none comes before its text
    assert text == choice["message"]["content"]
    assert tokens == [item["token"] for item in choice["logprobs"]["content"]]


def test_a_stop_string_at_once_leaves_nothing(server):
    first = told(server, None)["message"]["content"][:3]
    choice = told(server, first)
    assert choice["message"]["content"] == "" and choice["logprobs"]["content"] == []


@pytest.mark.parametrize("stop", ["toys", "16 toys"])
def test_log_probabilities_of_plain_completions_end_there_too(server, stop):
    body = {"model": f"{NAME}:greedy", "prompt": QUESTION, "max_tokens": 40, "stop": stop, "logprobs": 1}
    choice = post(server, body, TEXTS).json()["choices"][0]
    text, found = choice["text"], choice["logprobs"]
    shown = [(at, token) for at, token in zip(found["text_offset"], found["tokens"], strict=True) if token[:2] != "<|"]
    assert all(at < len(text) and token.startswith(text[at:][: len(token)]) for at, token in shown)
    assert "".join(token for _, token in shown).startswith(text)
    assert len({len(values) for values in found.values()}) == 1
