"""The Python interface: what it returns, what it refuses, and the laws of the strategies as a user meets them."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import BitsAndBytesConfig

import s2t
from s2t import api
from s2t.cli import main as cli
from s2t.config import MANY_SAMPLES, METHODS, NEEDS_LLM, WRITERS
from s2t.decode.pair import Pair
from s2t.errors import ConfigError, S2TError
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.chat import prompt_ids
from s2t.model.load import load_model
from s2t.model.quantization import quantization_config
from s2t.records import Cost, Generated

PROMPT = "Ava has 3 apples and buys 4 more. How many apples has she?"
PROMPTS = [PROMPT, "Tom reads 5 pages a day. How many pages does he read in 6 days?", "2 + 2 = ?"]
SHORT = {"max_new_tokens": 16}
FIRES = {"trigger": "random", "threshold": 0.5}


@pytest.fixture(scope="module")
def reasoner(tiny_slm, tiny_llm):
    return api.Reasoner(Pair(tiny_slm, tiny_llm))


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """An adapter that acts strongly but has learned nothing."""
    loaded = load_model("tiny:slm")
    config = AdapterConfig(
        "tiny:slm", loaded.fingerprint, num_candidates=5, thresholds={"criticality": 0.0}, lora_rank=4
    )
    torch.manual_seed(0)
    adapter = SelectorAdapter(loaded, config)
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            if "lora_B" in name or name.startswith("selector."):
                parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("adapter")
    adapter.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def local(adapter_folder):
    """An SLM with its adapter and no LLM anywhere."""
    return s2t.load("tiny:slm", adapter=adapter_folder)


def settings_of(name):
    """Settings under which a strategy has everything it needs on the embedded pair."""
    own = {"threshold": 0.5} if takes_threshold(name) else {}
    return {**SHORT, **own, **({"num_samples": 3} if name in MANY_SAMPLES else {})}


def takes_threshold(name):
    return METHODS[name].selector is not None and name != "s2t-local"  # whose adapter has one


STRATEGIES = [
    name for name in WRITERS if name not in ("r2r", "released", "forecast", "local-branch")
]  # these need more than the pair and an adapter
COLLABORATIVE = [name for name in STRATEGIES if name != "s2t-local"]


# What comes back


def test_public_names_are_those_of_this_module():
    assert (s2t.load, s2t.generate, s2t.stream) == (api.load, api.generate, api.stream)


@pytest.mark.parametrize("name", COLLABORATIVE)
def test_every_strategy_answers(name, reasoner):
    done = reasoner.generate(PROMPT, name, **settings_of(name))
    assert done.text
    assert 0 < len(done.token_ids) <= 16
    assert [step.token_id for step in done.steps] == done.token_ids
    assert done.finish_reason == done.steps[-1].finish_reason
    assert done.cost.generated >= len(done.token_ids)


def test_a_list_of_prompts_gives_a_list_in_its_order(reasoner):
    assert reasoner.generate([], "greedy") == []
    done = reasoner.generate(PROMPTS, "greedy", **SHORT)
    assert [answer.text for answer in done] == [reasoner.generate(p, "greedy", **SHORT).text for p in PROMPTS]


@pytest.mark.parametrize("name", ["sample", "s2t"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_answer_does_not_depend_on_the_batch(name, batch_size, reasoner):
    settings = {**settings_of(name), "batch_size": batch_size}
    together = reasoner.generate(PROMPTS, name, **settings)
    alone = [reasoner.generate(prompt, name, **settings_of(name)) for prompt in reversed(PROMPTS)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in reversed(alone)]


def test_greedy_is_the_greedy_generate_of_transformers(reasoner, tiny_slm):
    ids = prompt_ids(tiny_slm.tokenizer, PROMPT)
    reference = tiny_slm.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=40,
        suppress_tokens=list(tiny_slm.reserved.all),
    )
    assert reasoner.generate(PROMPT, "greedy", max_new_tokens=40).token_ids == reference[0, len(ids) :].tolist()


def test_the_stop_token_is_kept_as_an_id_and_left_out_of_the_text(reasoner, tiny_slm):
    done = reasoner.generate(PROMPTS, "greedy", max_new_tokens=256)
    stopped = [answer for answer in done if answer.finish_reason == "stop"]
    assert stopped, "the embedded model should end some answer by itself"
    for answer in stopped:
        assert answer.token_ids[-1] in tiny_slm.stop_ids
        assert "<|" not in answer.text


def test_a_stop_id_that_the_tokenizer_shows_is_no_text_either(tiny_slm):
    shown = tiny_slm.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    others = set(range(tiny_slm.vocab_size)) - {shown}
    loaded = type(tiny_slm)("x", tiny_slm.model, tiny_slm.tokenizer, tiny_slm.vocab_size, frozenset(others))
    answer = api.Reasoner(Pair(loaded)).generate(PROMPT)
    assert (len(answer.token_ids), answer.finish_reason, answer.text) == (1, "stop", "")
    assert list(api.Reasoner(Pair(loaded)).stream(PROMPT)) == []


@pytest.mark.parametrize("name", COLLABORATIVE)
def test_streamed_pieces_join_to_the_text(name, reasoner):
    pieces = list(reasoner.stream(PROMPT, name, seed=3, **settings_of(name)))
    assert "".join(pieces) == reasoner.generate(PROMPT, name, seed=3, **settings_of(name)).text
    assert all(pieces)
    assert len(pieces) == 1 if name in MANY_SAMPLES else len(pieces) > 1


def test_a_trace_has_candidates_at_every_step(reasoner):
    settings = {**SHORT, "threshold": 0.5, "num_candidates": 4}
    traced = reasoner.generate(PROMPT, "s2t", trace=True, **settings)
    plain = reasoner.generate(PROMPT, "s2t", **settings)
    assert traced.token_ids == plain.token_ids
    assert all(step.candidates and len(step.candidates.ids) == 4 for step in traced.steps)
    assert [step.candidates is not None for step in plain.steps] == [step.fired for step in plain.steps]
    assert plain.num_triggered == sum(step.fired for step in plain.steps) > 0
    assert plain.num_flips == sum(step.fired and step.flip for step in plain.steps)


# Stop strings


def stopping(name, reasoner, local):
    """Who answers under a strategy, and with which settings."""
    settings = settings_of(name) | {"max_new_tokens": 48}
    return (local if name == "s2t-local" else reasoner), settings


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in MANY_SAMPLES])
@pytest.mark.parametrize("draft_tokens", [0, 1, 7])
def test_an_answer_ends_before_a_stop_string_and_is_otherwise_the_same(name, draft_tokens, reasoner, local):
    speaker, settings = stopping(name, reasoner, local)
    settings["draft_tokens"] = draft_tokens
    whole = speaker.generate(PROMPTS, name, **settings)
    stops = [answer.text[len(answer.text) // 2 :][:3] for answer in whole[:2]]
    for answer, full in zip(speaker.generate(PROMPTS, name, stop=stops, **settings), whole, strict=True):
        places = [at for stop in stops if (at := full.text.find(stop)) >= 0]
        assert answer.text == full.text[: min(places, default=None)]
        assert answer.token_ids == full.token_ids[: len(answer.token_ids)]
        assert answer.cost.generated == len(answer.token_ids)
        if places:
            assert answer.finish_reason == "stop"
            assert len(answer.token_ids) <= len(full.token_ids)


@pytest.mark.parametrize("name", ["greedy", "sample", "s2t", "s2t-local", "self-consistency"])
def test_streaming_shows_no_piece_of_a_stop_string(name, reasoner, local):
    speaker, settings = stopping(name, reasoner, local)
    full = speaker.generate(PROMPT, name, **settings).text
    stop = full[len(full) // 2 :][:4]
    pieces = list(speaker.stream(PROMPT, name, stop=[stop], **settings))
    assert "".join(pieces) == speaker.generate(PROMPT, name, stop=stop, **settings).text
    if name != "self-consistency":
        assert "".join(pieces) == full[: full.find(stop)]


def test_a_stop_string_saves_the_work_behind_it(reasoner):
    whole = reasoner.generate(PROMPT, "greedy", max_new_tokens=64)
    early = reasoner.generate(PROMPT, "greedy", max_new_tokens=64, stop=whole.text[:6])
    assert early.text == ""
    assert early.cost.slm_forwards < whole.cost.slm_forwards / 2


# Chat


def test_a_list_of_messages_is_one_prompt(reasoner):
    messages = [{"role": "user", "content": PROMPT}]
    expected = reasoner.generate(PROMPT, "greedy", **SHORT)
    assert reasoner.generate(messages, "greedy", **SHORT).text == expected.text
    assert [done.text for done in reasoner.generate([messages, PROMPT], "greedy", **SHORT)] == [expected.text] * 2
    assert "".join(reasoner.stream(messages, "greedy", **SHORT)) == expected.text
    longer = [*messages, {"role": "assistant", "content": "7"}, {"role": "user", "content": PROMPTS[1]}]
    assert reasoner.generate(longer, "greedy", **SHORT).text != expected.text


def test_a_system_prompt_is_read(reasoner):
    spoken = reasoner.generate(PROMPTS, "greedy", system="Tom has 5 fewer toys.", **SHORT)
    assert [a.text for a in spoken] != [a.text for a in reasoner.generate(PROMPTS, "greedy", **SHORT)]
    messages = [{"role": "system", "content": "Tom has 5 fewer toys."}, {"role": "user", "content": PROMPT}]
    assert reasoner.generate(messages, "greedy", **SHORT).text == spoken[0].text


def test_prompts_may_be_given_as_ids(reasoner, tiny_slm):
    ids = [prompt_ids(tiny_slm.tokenizer, prompt) for prompt in PROMPTS]
    answers = reasoner.generate(PROMPTS, "greedy", **SHORT)
    assert [a.token_ids for a in reasoner.complete(ids, "greedy", **SHORT)] == [a.token_ids for a in answers]
    with pytest.raises(ConfigError, match="token ids"):
        reasoner.complete(ids, "greedy", system="Be brief.")
    with pytest.raises(S2TError, match="empty"):
        reasoner.complete([[]], "greedy")


def test_a_token_that_the_model_has_no_row_for_is_refused(tiny_slm):
    tokenizer = copy.deepcopy(tiny_slm.tokenizer)
    tokenizer.add_tokens(["<|outside|>"])
    with pytest.raises(S2TError, match="outside"):
        api.Reasoner(Pair(replace(tiny_slm, tokenizer=tokenizer))).generate("see <|outside|>", "greedy")


def test_reserved_tokens_spelled_in_a_prompt_are_text(reasoner, tiny_slm):
    ids = tiny_slm.reserved.all
    assert not set(reasoner.pair.prompt("the <|reserved_27|> and <|reserved_20|>")) & set(ids)


# Randomness


def test_a_seed_gives_one_answer_and_another_seed_another(reasoner):
    def answer(seed):
        return reasoner.generate(PROMPT, "sample", seed=seed, temperature=1.5, **SHORT).token_ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_the_same_prompt_twice_in_a_list_is_sampled_twice(reasoner):
    first, second = reasoner.generate([PROMPT, PROMPT], "sample", temperature=1.5, **SHORT)
    assert first.token_ids != second.token_ids
    assert first.token_ids == reasoner.generate(PROMPT, "sample", temperature=1.5, **SHORT).token_ids


def test_self_consistency_keeps_its_samples_and_counts_them_all(reasoner):
    done = reasoner.generate(PROMPT, "self-consistency", num_samples=4, temperature=1.2, max_new_tokens=60)
    assert len(done.samples) == 4
    assert len({sample.text for sample in done.samples}) > 1
    assert done.text in [sample.text for sample in done.samples]
    assert done.cost == sum((sample.cost for sample in done.samples), Cost())


@pytest.mark.parametrize(
    ("texts", "winner"),
    [
        (["so 5\n#### 7", "#### 8", "it is 3, then\n#### 8.0"], 1),
        ([r"\boxed{x+1}", "no idea", r"thus \boxed{x + 1}"], 0),
        (["", "Paris", "London", "Paris"], 1),
        (["", ""], 0),
    ],
)
def test_samples_vote_on_their_answers(texts, winner, reasoner, monkeypatch):
    made = iter(texts)
    monkeypatch.setattr(type(reasoner.pair), "text", lambda self, *asked: next(made))
    plan = reasoner._plan("self-consistency", 0, {"num_samples": len(texts)})
    [answer] = reasoner._answers(plan, [Generated() for _ in texts])
    assert answer.text == texts[winner] and len(answer.samples) == len(texts)


# Laws of the strategies


def test_one_candidate_is_greedy(reasoner):
    greedy = reasoner.generate(PROMPTS, "greedy", **SHORT)
    one = reasoner.generate(PROMPTS, "s2t", num_candidates=1, threshold=0.0, **SHORT)
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in greedy]
    assert all(answer.num_triggered for answer in one)


@pytest.mark.parametrize("name", ["takeover", "s2t"])
def test_never_triggering_is_greedy(name, reasoner):
    never = reasoner.generate(PROMPTS, name, trigger="never", **SHORT)
    assert [a.token_ids for a in never] == [a.token_ids for a in reasoner.generate(PROMPTS, "greedy", **SHORT)]
    assert not any(answer.num_triggered for answer in never)


def test_all_tokens_as_candidates_is_takeover(reasoner, tiny_slm):
    everything = reasoner.generate(PROMPTS, "s2t", threshold=0.5, num_candidates=tiny_slm.vocab_size, **SHORT)
    takeover = reasoner.generate(PROMPTS, "takeover", threshold=0.5, **SHORT)
    assert [answer.token_ids for answer in everything] == [answer.token_ids for answer in takeover]
    assert sum(answer.num_flips for answer in takeover) > 0


def test_a_model_as_its_own_llm_never_triggers_and_never_flips(tiny_slm):
    alone = api.Reasoner(Pair(tiny_slm, tiny_slm))
    for answer in alone.generate(PROMPTS, "s2t", threshold=1e-4, **SHORT):
        assert answer.num_triggered == 0
    for answer in alone.generate(PROMPTS, "takeover", **FIRES, **SHORT):
        assert answer.num_triggered > 0
        assert answer.num_flips == 0


def test_the_llm_alone_is_the_llms_own_greedy(reasoner, tiny_llm):
    alone = api.Reasoner(Pair(tiny_llm)).generate(PROMPT, "greedy", **SHORT)
    done = reasoner.generate(PROMPT, "llm", **SHORT)
    assert done.token_ids == alone.token_ids
    assert (done.cost.slm_forwards, done.cost.llm_forwards) == (0, alone.cost.slm_forwards)


# Adapters


def test_with_an_adapter_s2t_local_is_the_default_and_reads_the_adapters_settings(local):
    assert local.pair.llm is None
    done = local.generate(PROMPT, **SHORT)
    assert done.token_ids == local.generate(PROMPT, "s2t-local", **SHORT).token_ids
    fired = done.steps[3:]  # the adapter's threshold is 0: all but the warm-up
    assert [step.fired for step in done.steps] == [False] * 3 + [True] * len(fired)
    for step in fired:
        assert step.value is not None and 0 < step.value < 1
        assert step.candidates is not None and len(step.candidates.ids) == 5
        assert step.scores is not None and len(step.scores) == 5
    assert done.cost.llm_forwards == 0


def test_settings_of_the_call_beat_the_adapters(local):
    done = local.generate(PROMPT, num_candidates=3, threshold=0.0, warmup_steps=0, **SHORT)
    assert done.num_triggered == len(done.token_ids)
    assert all(step.candidates is not None and len(step.candidates.ids) == 3 for step in done.steps)


def test_an_adapter_whose_trigger_never_fires_leaves_greedy_as_it_was(local, reasoner):
    for settings in ({"trigger": "never"}, {"threshold": 1.0}, {"num_candidates": 1}):
        assert local.generate(PROMPT, **settings, **SHORT).token_ids == (
            reasoner.generate(PROMPT, "greedy", **SHORT).token_ids
        )


def test_greedy_beside_an_adapter_is_the_base_models(local, reasoner):
    local.generate(PROMPT, **SHORT)
    assert local.generate(PROMPT, "greedy", **SHORT).token_ids == (
        reasoner.generate(PROMPT, "greedy", **SHORT).token_ids
    )


def test_streaming_with_an_adapter_joins_to_the_text(local):
    assert "".join(local.stream(PROMPT, **SHORT)) == local.generate(PROMPT, **SHORT).text


def test_a_calibration_file_gives_the_threshold(reasoner, tmp_path):
    (tmp_path / "calibration.json").write_text('{"thresholds": {"divergence": 0.5}}')
    for path in (tmp_path, tmp_path / "calibration.json"):
        done = reasoner.generate(PROMPT, "s2t", calibration=str(path), **SHORT)
        assert done.token_ids == reasoner.generate(PROMPT, "s2t", threshold=0.5, **SHORT).token_ids


def test_settings_that_come_again_are_not_checked_again_unless_something_may_have_changed(
    reasoner, tmp_path, monkeypatch
):
    checked = []
    own = type(reasoner)._checked
    monkeypatch.setattr(type(reasoner), "_checked", lambda self, *asked: checked.append(asked) or own(self, *asked))
    stops = ["7"]
    first = reasoner.generate(PROMPT, "s2t", threshold=0.5, stop=stops, **SHORT)
    assert reasoner.generate(PROMPT, "s2t", threshold=0.5, stop=["7"], **SHORT) == first and len(checked) == 1
    stops[0] = "no such text"
    later = reasoner.generate(PROMPT, "s2t", threshold=0.5, stop=stops, **SHORT)
    assert later == reasoner.generate(PROMPT, "s2t", threshold=0.5, **SHORT) and len(checked) == 3
    with pytest.raises(ConfigError, match="max_new_tokens must be"):
        [reasoner.generate(PROMPT, "greedy", max_new_tokens=count) for count in (1, True)]

    other = type(reasoner)(reasoner.pair)
    with pytest.raises(ConfigError, match="needs the LLM"):
        for pair in (reasoner.pair, Pair(reasoner.pair.slm)):
            other.pair = pair
            other.generate(PROMPT, "s2t", threshold=0.5, **SHORT)

    file = tmp_path / "calibration.json"
    for threshold in (0.5, 50.0):
        file.write_text(f'{{"thresholds": {{"divergence": {threshold}}}}}')
        done = reasoner.generate(PROMPT, "s2t", calibration=str(file), **SHORT)
        assert done.num_triggered == reasoner.generate(PROMPT, "s2t", threshold=threshold, **SHORT).num_triggered


def test_an_adapter_that_a_pair_is_given_later_is_heeded(local):
    reasoner = type(local)(replace(local.pair, adapter=None))
    assert reasoner.generate(PROMPT, **SHORT) == local.generate(PROMPT, "greedy", **SHORT)
    reasoner.pair.adapter = local.pair.adapter
    assert reasoner.generate(PROMPT, **SHORT) == local.generate(PROMPT, "s2t-local", **SHORT)


# Refusals


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"strategy": "magic"}, "magic"),
        ({"max_tokens": 5}, "unknown setting max_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"temperature": 0.0}, "greedy"),
        ({"trigger": "magic"}, "trigger"),
        ({"strategy": "s2t", "trigger": "criticality", "threshold": 0.5}, "needs an adapter"),
        ({"strategy": "s2t"}, "threshold"),
        ({"strategy": "s2t", "threshold": 1.0, "num_candidates": 5000}, "1024"),
        ({"strategy": "s2t", "calibration": "/no/such/file.json"}, "/no/such/file.json"),
        ({"strategy": "s2t-local"}, "adapter"),
        ({"adapter": "runs/train/adapter"}, r"s2t\.load\(adapter=\.\.\.\)"),
        ({"slm": "tiny:slm"}, r"s2t\.load\(slm=\.\.\.\)"),
        ({"stop": ""}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"system": 3}, "system"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_settings_that_do_not_fit_are_one_line(method, settings, named, reasoner):
    with pytest.raises(S2TError, match=named) as raised:
        getattr(reasoner, method)(PROMPT, **settings)  # for stream: before the first piece
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", sorted(NEEDS_LLM))
def test_a_strategy_that_reads_the_llm_is_refused_where_there_is_none(name, tiny_slm):
    with pytest.raises(ConfigError, match="needs the LLM"):
        api.Reasoner(Pair(tiny_slm)).generate(PROMPT, name)


@pytest.mark.parametrize("prompt", [3, [PROMPT, 3], [[PROMPT]]])
def test_a_prompt_that_is_no_text_is_refused(prompt, reasoner):
    with pytest.raises(ConfigError, match="prompt must be text"):
        reasoner.generate(prompt)


@pytest.mark.parametrize(
    "values", [{"slm": "tiny:no"}, {"llm": "tiny:no"}, {"dtype": "int3"}, {"device": "gpu"}, {"adapter": "/no"}]
)
def test_what_cannot_be_loaded_is_one_line(values):
    with pytest.raises(S2TError) as raised:
        s2t.load(**values)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="needs bitsandbytes to be missing")
def test_a_quantization_may_be_a_name_a_dict_or_a_config_of_transformers():
    config = BitsAndBytesConfig(load_in_4bit=True)
    for asked in ("bitsandbytes-4bit", config.to_dict(), config):
        with pytest.raises(S2TError, match="pip install -U 'bitsandbytes"):
            s2t.load(llm_quantization=asked, llm="tiny:llm")
    assert quantization_config(api._as_text(config)).to_dict() == config.to_dict()
    with pytest.raises(S2TError, match="a name, a dict or a config of transformers; got '4'"):
        s2t.load(quantization=4)


# Module functions and the command line


def test_the_module_functions_load_and_answer(reasoner):
    expected = reasoner.generate(PROMPT, "greedy", **SHORT).text
    assert s2t.generate(PROMPT, "tiny:slm", dtype="float32", **SHORT).text == expected
    assert "".join(s2t.stream(PROMPT, **SHORT)) == expected
    collaborative = reasoner.generate(PROMPT, "s2t", threshold=0.5, **SHORT)
    again = s2t.generate(PROMPT, llm="tiny:llm", strategy="s2t", threshold=0.5, **SHORT)
    assert again.token_ids == collaborative.token_ids


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_command_line_prints_what_the_interface_answers(name, reasoner, local, adapter_folder, capsys):
    words = ["--llm", "tiny:llm", "--strategy", name, "--max-new-tokens", "16"]
    if name in MANY_SAMPLES:
        words += ["--num-samples", "3"]
    if takes_threshold(name):
        words += ["--threshold", "0.5"]
    if name == "s2t-local":
        words += ["--adapter", adapter_folder]
    assert cli.main(["generate", PROMPT, *words]) == 0
    speaker = local if name == "s2t-local" else reasoner
    assert capsys.readouterr().out == speaker.generate(PROMPT, name, **settings_of(name)).text + "\n"
