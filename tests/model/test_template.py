"""Chat templates as they come with models: the forms they want messages in, and what they must not do to us."""

from __future__ import annotations

import json
import os

import pytest

import s2t
from s2t.config import CollectConfig, DistillConfig, EvalConfig, GenerateConfig, StudyConfig, build_config
from s2t.decode.opening import note_unread, open_pair
from s2t.errors import ConfigError, ModelError
from s2t.model import template
from s2t.model.chat import prompt_ids
from s2t.model.load import load_model
from s2t.model.template import render
from s2t.model.tiny import embedded_path

USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief."}
TEXTS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
PARTS_BY_TYPE = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{% endfor %}"
)
STRICT_PARTS = "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] | trim }}{% endfor %}"
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}"
    "{% endif %}{% endfor %}"
)
MIXED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
DUMPING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content | tojson }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS_WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
)
FOLDED = "<user>Be brief.\n\nhi"


@pytest.fixture
def tokenizer():
    return load_model("tiny:slm").tokenizer


def written(tokenizer, source, turns, **variables):
    tokenizer.chat_template = source
    return render(tokenizer, turns, **variables)


# Forms


@pytest.mark.parametrize("source", [TEXTS, PARTS, PARTS_BY_TYPE, STRICT_PARTS, EITHER, MIXED])
def test_a_template_gets_content_in_the_form_it_reads(source, tokenizer):
    assert written(tokenizer, source, [USER]) == "<user>hi"
    assert written(tokenizer, source, [SYSTEM, USER]) == "<system>Be brief.<user>hi"


def test_parts_are_never_written_as_a_list(tokenizer):
    assert written(tokenizer, DUMPING, [SYSTEM, USER]) == '<system>"Be brief."<user>hi'
    turns = [SYSTEM, USER, {"role": "assistant", "content": "a"}, USER]
    assert written(tokenizer, PARTS, turns) == "<system>Be brief.<user>hi<assistant>a<user>hi"
    for role in ("user", "assistant"):
        mixed = MIXED.replace("'system'", f"'{role}'")
        assert written(tokenizer, mixed, turns[1:]) == "<user>hi<assistant>a<user>hi"


def test_a_template_may_leave_out_what_an_assistant_said(tokenizer):
    turns = [SYSTEM, USER, {"role": "assistant", "content": "a"}, USER]
    last = "{% for m in messages if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert written(tokenizer, last, turns) == "<system>Be brief.<user>hi<user>hi"


@pytest.mark.parametrize("source", [WITHOUT_SYSTEM, PARTS_WITHOUT_SYSTEM])
@pytest.mark.parametrize("word", ["hi", "user", "<", " ", "Be brief."])
def test_a_dropped_system_message_is_found_out_whatever_the_user_wrote(source, word, tokenizer):
    system, user = {"role": "system", "content": word}, {"role": "user", "content": word}
    assert written(tokenizer, source, [system, user]) == f"<user>{word}\n\n{word}"
    assert written(tokenizer, source, [SYSTEM, USER]) == FOLDED


@pytest.mark.parametrize("text", ["hi", "x" * 5, "{{ 1 }}", "7391000004826"])
def test_a_template_that_takes_the_system_message_gets_no_second_one(text, tokenizer):
    upper = "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
    system = {"role": "system", "content": text}
    assert written(tokenizer, upper, [system, USER]) == f"<system>{text.upper()}<user>HI"


@pytest.mark.parametrize(
    "turns",
    [[USER], [SYSTEM, {"role": "assistant", "content": "a"}], [USER, {"role": "assistant", "content": "a"}, USER]],
)
def test_a_message_that_a_template_leaves_out_is_an_error(turns, tokenizer):
    first = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match=r"leaves out the text of the (user|system) message"):
        written(tokenizer, first, turns)


def test_variables_reach_the_template(tokenizer):
    thinks = TEXTS + "{{ '<think></think>' if enable_thinking is defined and not enable_thinking }}"
    assert written(tokenizer, thinks, [USER]) == "<user>hi"
    assert written(tokenizer, thinks, [USER], enable_thinking=True) == "<user>hi"
    assert written(tokenizer, thinks, [USER], enable_thinking=False) == "<user>hi<think></think>"
    assert prompt_ids(tokenizer, "hi", None, {"enable_thinking": False}) != prompt_ids(tokenizer, "hi")


def test_a_template_sees_what_the_tokenizer_calls_its_tokens(tokenizer):
    assert written(tokenizer, "{{ eos_token }}" + TEXTS, [USER]) == f"{tokenizer.eos_token}<user>hi"


def test_a_tokenizer_that_writes_messages_itself_does(tokenizer):
    class Own(type(tokenizer)):
        def apply_chat_template(self, turns, **options):
            return "".join(f"[{turn['content']}]" for turn in turns) if "broken" not in options else 1 // 0

    own = Own.from_pretrained(embedded_path("tiny:slm"))
    assert written(own, TEXTS, [SYSTEM, USER]) == "[Be brief.][hi]"
    with pytest.raises(ModelError, match=r"Own does not write these messages: .*zero"):
        written(own, TEXTS, [USER], broken=True)


# What must not happen

BROKEN = {
    "wrong types": "{{ 1 + 'a' }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no such message": "{{ messages[9].content }}",
    "no such filter": "{{ messages | nofilter }}",
    "no such file": "{% include 'x' %}",
    "bad syntax": "{% if %}",
    "attributes of Python": "{{ ''.__class__.__mro__ }}",
    "its own words": "{{ raise_exception('only\n\ntools') }}",
    "division": "{{ 1 // 0 }}",
}
ENDLESS = {
    "silent loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "calls that double": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "one long operation": "{% set n = messages | length + 9 %}{{ (n ** (n ** 8)) % 7 }}",
}
TOO_MUCH = {
    "400 MB of output": TEXTS + "{% for a in range(40000) %}{{ 'x' * 10000 }}{% endfor %}",
    "one long text": "{{ 'x' * 400000000 }}" + TEXTS,
    "a wide format": "{{ '%0999999999d' % 1 }}",
    "a text that doubles": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a wide field": "{{ 'x' | center(10 ** 11) }}",
}


def is_one_line(error):
    text = str(error)
    return len(text.splitlines()) == 1 and len(text) < 500 and "chat template" in text


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_an_error_of_a_template_is_one_line(source, tokenizer):
    with pytest.raises(ModelError) as raised:
        written(tokenizer, source, [USER])
    assert is_one_line(raised.value)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_ended(source, tokenizer, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    with pytest.raises(ModelError, match=r"given up: it needs more than 0\.2 s") as raised:
        written(tokenizer, source, [USER])
    assert is_one_line(raised.value)
    assert written(tokenizer, TEXTS, [USER]) == "<user>hi"  # the next one is rendered as ever


@pytest.mark.parametrize("source", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_writes_or_holds_too_much_is_given_up(source, tokenizer):
    with pytest.raises(
        ModelError, match=r"given up: it needs more than (5\d\d MiB of memory|\d+ characters of output)"
    ) as raised:
        written(tokenizer, source, [USER])
    assert is_one_line(raised.value)


def test_a_long_message_is_no_long_output(tokenizer):
    text = "a" * 3_000_000
    assert written(tokenizer, TEXTS, [{"role": "user", "content": text}]) == f"<user>{text}"


def test_a_renderer_that_died_is_started_again(tokenizer):
    assert written(tokenizer, TEXTS, [USER]) == "<user>hi"
    process = template._RENDERER._process
    assert process is not None
    process.kill()
    process.wait()
    assert written(tokenizer, TEXTS + "!", [USER]) == "<user>hi!"


def test_a_slow_start_is_waited_for_longer_than_a_rendering(monkeypatch):
    monkeypatch.setattr(template, "_WALL_S", 0.0)
    renderer = template._Renderer()
    assert renderer._started().poll() is None
    renderer.close()
    monkeypatch.setattr(template, "_START_S", 0.0)
    with pytest.raises(ModelError, match="does not start"):
        renderer._started()


def test_the_packages_own_template_needs_no_process_and_is_written_the_same(tokenizer):
    template._RENDERER.close()
    turns = [{"role": "user", "content": "1 + 1 = {{ 2 }}"}, {"role": "assistant", "content": "2"}, USER]
    text = render(tokenizer, turns)
    assert template._RENDERER._process is None
    assert written(tokenizer, tokenizer.chat_template + "{# of somebody else #}", turns) == text
    assert template._RENDERER._process is not None


def test_any_text_survives_the_way_there_and_back(tokenizer):
    text = 'a"\\\n\u2028\u0000é🙂' + chr(0xD800)
    assert written(tokenizer, TEXTS, [{"role": "user", "content": text}]) == f"<user>{text}"


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="a system that forks")
def test_a_fork_has_a_renderer_of_its_own(tokenizer):
    renderer = template._Renderer()
    job = {"seconds": 5, "memory_bytes": 1 << 30, "max_chars": 100}
    job["options"] = {"conversations": [[USER]], "chat_template": TEXTS}
    assert renderer.ask(job) == {"text": "<user>hi"}
    first = renderer._process
    assert first is not None
    renderer.forget()  # what the child of a fork does
    assert renderer.ask(job) == {"text": "<user>hi"}
    assert renderer._process is not first and first.poll() is None
    renderer.close()
    renderer._process = first
    renderer.close()


# The setting


@pytest.mark.parametrize("cls", [GenerateConfig, EvalConfig, StudyConfig])
def test_variables_are_an_object_as_text_or_as_they_are(cls, tmp_path):
    for given in ('{"enable_thinking": false}', {"enable_thinking": False}):
        config = build_config(cls, flags={"chat_template_kwargs": given})
        assert config.template_variables == {"enable_thinking": False}
    saved = tmp_path / "c.json"
    saved.write_text(json.dumps({"chat_template_kwargs": {"enable_thinking": False}}))
    assert build_config(cls, saved) == config
    assert cls().template_variables == {}


@pytest.mark.parametrize("given", ["{", "[1]", "3", "null", "[" * 100_000, {"a": object()}, 3, {"messages": []}])
def test_variables_that_are_none_are_refused(given):
    with pytest.raises(ConfigError, match="chat_template_kwargs") as raised:
        build_config(GenerateConfig, flags={"chat_template_kwargs": given})
    assert len(str(raised.value).splitlines()) == 1


@pytest.fixture
def moody(tokenizer, monkeypatch):
    """Every model's template reads one variable."""
    source = TEXTS + "{{ mood }}"
    monkeypatch.setattr("s2t.model.gguf.opening.load_model", lambda name, **_: _with_template(load_model(name), source))


def _with_template(loaded, source):
    loaded.tokenizer.chat_template = source
    return loaded


@pytest.mark.parametrize("cls", [EvalConfig, CollectConfig, DistillConfig])
def test_every_command_that_writes_answers_tells_its_models(cls, moody, capsys):
    config = build_config(cls, flags={"chat_template_kwargs": {"mood": "calm"}, "llm": "tiny:llm"})
    pair = open_pair(config, ["greedy", "llm"])
    assert pair.slm.tokenizer.decode(pair.prompt("hi")).endswith("hicalm")
    assert pair.slm.tokenizer.decode(pair.prompt("hi", variables={"mood": "wild"})).endswith("hiwild")
    assert not capsys.readouterr().err


def test_a_loaded_model_tells_its_template(moody):
    plain, told = s2t.load("tiny:slm"), s2t.load("tiny:slm", chat_template_kwargs={"mood": " 12 + 30 = "})
    assert told.generate("hi").text == plain.generate("hi 12 + 30 = ").text != plain.generate("hi").text
    assert "".join(told.stream("hi")) == told.generate("hi").text


def test_a_variable_that_no_template_reads_is_said(tiny_slm, tiny_llm, capsys):
    note_unread({"enable_thinkin": False}, [tiny_slm, tiny_llm])
    assert "does not read enable_thinkin;" in capsys.readouterr().err
