"""The real lm-eval on a local task: scores, generations as those of the API, log-likelihoods as those of HFLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="pip install 's2t[lm-eval]'")

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import s2t
from s2t.errors import ConfigError, ModelError
from s2t.integrations.lm_eval import NAME, S2TLM, main, register
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import load_model

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval and what it imports

PROBLEMS = [
    {"question": f"Ava has {n} apples and buys {n + 2} more. How many apples has she?", "answer": str(2 * n + 2)}
    for n in range(3, 11)
]
GREEDY = {"do_sample": False, "temperature": 0.0, "until": ["\n\n"], "max_gen_toks": 48}


def new_adapter(folder, **settings):
    """The folder of an adapter that acts strongly but has learned nothing."""
    loaded = load_model("tiny:slm")
    config = AdapterConfig(
        "tiny:slm", loaded.fingerprint, thresholds={"criticality": 0.0}, prior_weight=0.0, **settings
    )
    torch.manual_seed(0)
    selector = SelectorAdapter(loaded, config)
    with torch.no_grad():
        for name, parameter in selector.trainable().items():
            if "lora_B" in name or name.startswith("selector."):
                parameter.normal_(0, 0.3)
    selector.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return new_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder of two local tasks over one JSONL file: questions to answer, and choices to rank."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "problems.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    number = {"filter": [{"function": "regex", "regex_pattern": "#### (-?[0-9]+)"}, {"function": "take_first"}]}
    written = shared | {
        "task": "apples",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": GREEDY,
        "filter_list": [{"name": "number", **number}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = shared | {
        "task": "apple_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": ["3", "8", "20"],
        "doc_to_target": 1,
    }
    for task in (written, chosen):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return str(folder)


@pytest.fixture
def datasets_here(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base():
    return S2TLM("tiny:slm", batch_size=4)


@pytest.fixture(scope="module")
def local(adapter):
    return S2TLM("tiny:slm", adapter=adapter, batch_size=4)


def request_of(*args):
    return SimpleNamespace(args=args)


def generations(model, arguments=GREEDY, problems=PROBLEMS):
    return model.generate_until([request_of(problem["question"], arguments) for problem in problems], disable_tqdm=True)


# Generation


@pytest.mark.parametrize("name", ["greedy", "s2t-local"])
def test_a_task_is_scored_with_the_generations_of_the_api(name, adapter, tasks, datasets_here):
    register()
    results = simple_evaluate(
        model=NAME,
        model_args={"slm": "tiny:slm", "adapter": adapter, "strategy": name},
        tasks=["apples"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        apply_chat_template=True,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    assert results is not None
    reasoner = s2t.load("tiny:slm", adapter=adapter)
    answers = reasoner.generate([p["question"] for p in PROBLEMS], name, max_new_tokens=48, stop="\n\n")
    samples = sorted(results["samples"]["apples"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == [answer.text for answer in answers]
    right = [f"#### {p['answer']}" in answer.text for p, answer in zip(PROBLEMS, answers, strict=True)]
    assert results["results"]["apples"]["exact_match,number"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("fixture", ["base", "local"])
def test_batched_is_one_by_one(fixture, request):
    model = request.getfixturevalue(fixture)
    alone = [generations(model, problems=[problem])[0] for problem in PROBLEMS]
    assert generations(model) == alone
    assert len(set(alone)) > 1


def test_the_adapter_is_what_selects(base, local):
    assert local.strategy == "s2t-local" and base.strategy == "greedy"
    assert generations(base) != generations(local)


@pytest.mark.parametrize("scope", ["step", "stream"])
def test_a_selector_of_readout_rank_generates_as_in_the_api(scope, base, tmp_path):
    folder = new_adapter(tmp_path / "adapter", readout="rank", scope=scope)
    found = generations(S2TLM("tiny:slm", adapter=folder, batch_size=4), problems=PROBLEMS[:4])
    reasoner = s2t.load("tiny:slm", adapter=folder)
    ids = [base._context_ids(problem["question"]) for problem in PROBLEMS[:4]]
    wanted = reasoner.complete(ids, max_new_tokens=GREEDY["max_gen_toks"], stop="\n\n")
    assert found == [answer.text for answer in wanted] != generations(base, problems=PROBLEMS[:4])


def test_greedy_is_hflms_own_generation(base):
    reference = HFLM(pretrained=load_model("tiny:slm").model, tokenizer=base.tokenizer, batch_size=4)
    for until in (["\n\n"], [".", " = "], ["#### 1"]):
        arguments = GREEDY | {"until": until}
        assert generations(base, arguments) == generations(reference, arguments)


def test_requests_with_other_arguments_come_back_in_their_places(base):
    short = GREEDY | {"max_gen_toks": 5}
    mixed = [request_of(p["question"], short if i % 2 else GREEDY) for i, p in enumerate(PROBLEMS)]
    expected = [generations(base, short if i % 2 else GREEDY, [p])[0] for i, p in enumerate(PROBLEMS)]
    assert base.generate_until(mixed, disable_tqdm=True) == expected


def test_a_context_that_is_too_long_loses_its_beginning(adapter):
    model = S2TLM("tiny:slm", max_length=40)
    long, short = "x " * 100 + PROBLEMS[0]["question"], GREEDY | {"max_gen_toks": 8}
    cut = model._context_ids(long)[-32:]
    assert generations(model, short, [{"question": long}]) == [model.reasoner.complete([cut], max_new_tokens=8)[0].text]
    with pytest.raises(ConfigError, match="max_gen_toks"):
        generations(model, GREEDY | {"max_gen_toks": 40})


# Thinking


def whole(model):
    """Ids and texts of the problems as they are written without stop strings."""
    prompts = [model._context_ids(problem["question"]) for problem in PROBLEMS]
    return model.reasoner.complete(prompts, max_new_tokens=48)


def test_what_stands_before_the_end_of_a_thought_is_no_answer(base):
    answers = whole(base)
    mark = answers[0].token_ids[6]  # a token that comes in some of the answers
    model = S2TLM("tiny:slm", batch_size=4, think_end_token=mark)
    reference = HFLM(
        pretrained=load_model("tiny:slm").model, tokenizer=base.tokenizer, batch_size=4, think_end_token=mark
    )
    endless = GREEDY | {"until": []}
    assert generations(model, endless) == generations(reference, endless)
    assert generations(model, endless) != [answer.text for answer in answers]
    as_text = S2TLM("tiny:slm", batch_size=4, think_end_token=str(mark))  # digits: of --model_args
    assert generations(as_text, endless) == generations(model, endless)


def test_stops_of_a_task_do_not_end_a_thought(base):
    thought, mark, answer = whole(base)[0].text.partition("pages.")
    stop = "ha"
    assert mark and stop in thought and stop in answer
    model = S2TLM("tiny:slm", think_end_token=mark)
    found = generations(model, GREEDY | {"until": [stop]}, PROBLEMS[:1])
    assert found == [answer.lstrip().split(stop)[0]] != [""]


def test_a_special_token_ends_a_thought_though_it_is_no_text(base):
    class Written:
        text, finish_reason = "7 is the sum. 8", "length"

    tokenizer = base.tokenizer
    mark = "<|reserved_3|>"
    thought, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("7 is the sum.", " 8"))
    Written.token_ids = [*thought, tokenizer.convert_tokens_to_ids(mark), *answer]
    for name in (mark, tokenizer.convert_tokens_to_ids(mark)):
        assert S2TLM("tiny:slm", think_end_token=name)._behind_thought(Written) == "8"


def test_thinking_that_was_asked_for_and_never_ended_is_no_answer():
    model = S2TLM("tiny:slm", enable_thinking=True, think_end_token="</think>")
    assert generations(model, problems=PROBLEMS[:2]) == ["", ""]


@pytest.mark.parametrize(
    "given", [{"chat_template_kwargs": '{"mood": "calm"}'}, {"chat_template_args": {"mood": "calm"}}]
)
def test_the_chat_template_is_told_what_the_arguments_say(given):
    model = S2TLM("tiny:slm", **given)
    model.tokenizer.chat_template = "{{ mood }}: {{ messages[0]['content'] }}"
    assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == "calm: hi"


# Sampling


def test_a_task_that_samples_needs_a_strategy_that_does(base):
    sampled = GREEDY | {"do_sample": True, "temperature": 1.5, "top_p": 1.0}
    with pytest.raises(ConfigError, match="strategy=sample"):
        generations(base, sampled)
    model = S2TLM("tiny:slm", strategy="sample", batch_size=2)
    same = [PROBLEMS[0]] * 3
    assert len(set(generations(model, sampled, same))) > 1
    assert generations(model, sampled, same) == generations(model, sampled, same)
    assert generations(model, sampled, same) != generations(model, sampled | {"temperature": 0.4}, same)


# Log-likelihoods


@pytest.mark.parametrize("fixture", ["base", "local"])
def test_log_likelihoods_are_hflms_on_the_base_model(fixture, request):
    model = request.getfixturevalue(fixture)
    generations(model, problems=PROBLEMS[:2])  # leaves an adapter on
    reference = HFLM(pretrained=load_model("tiny:slm").model, tokenizer=model.tokenizer, batch_size=3)
    pairs = [request_of(p["question"], f" {n}") for p in PROBLEMS for n in (p["answer"], 7)] + [request_of("", "How")]
    texts = [request_of(p["question"]) for p in PROBLEMS]
    for ours, theirs in zip(model.loglikelihood(pairs, True), reference.loglikelihood(pairs, True), strict=True):
        assert ours == (pytest.approx(theirs[0]), theirs[1])
    ours, theirs = (m.loglikelihood_rolling(texts, disable_tqdm=True) for m in (model, reference))
    assert ours == pytest.approx(theirs)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"strategy": "magic"}, "magic"),
        ({"strategy": "s2t-local"}, "adapter"),
        ({"strategy": "llm"}, "needs the LLM"),
        ({"colour": "red"}, "colour"),
        ({"slm": "tiny:no"}, "tiny:no"),
        ({"system": "Be brief."}, "--system_instruction"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_once(arguments, named):
    with pytest.raises((ConfigError, ModelError), match=named) as raised:
        S2TLM(**arguments)
    assert len(str(raised.value).splitlines()) == 1


def test_a_collaborative_strategy_reads_its_llm():
    model = S2TLM("tiny:slm", llm="tiny:llm", strategy="s2t", threshold=1, batch_size=4)
    reasoner = s2t.load("tiny:slm", llm="tiny:llm")
    prompts = [model._context_ids(p["question"]) for p in PROBLEMS]
    answers = reasoner.complete(prompts, "s2t", threshold=1.0, max_new_tokens=48, stop="\n\n")
    assert generations(model) == [answer.text for answer in answers]


# The command


def test_the_entry_point_names_the_class():
    from importlib.metadata import EntryPoint

    point = EntryPoint(NAME, "s2t.integrations.lm_eval:S2TLM", "lm_eval.models")
    assert point.load() is S2TLM


def test_the_model_is_registered_beside_lm_evals_own():
    from lm_eval.api.registry import get_model

    register()
    register()
    assert get_model(NAME) is S2TLM
    assert get_model("hf") is HFLM


def test_our_errors_are_one_line_of_the_command(monkeypatch, capsys):
    def fail():
        raise ConfigError("this does not fit.")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    assert main() == 2
    assert capsys.readouterr().err == "s2t: error: this does not fit.\n"


@pytest.mark.slow
def test_the_command_line_scores_both_kinds_of_task(adapter, tasks, tmp_path):
    words = ["--model", NAME, "--model_args", f"slm=tiny:slm,adapter={adapter},strategy=s2t-local"]
    words += ["--tasks", "apples,apple_choice", "--include_path", tasks, "--apply_chat_template", "--limit", "4"]
    words += ["--batch_size", "4", "--output_path", str(tmp_path / "out.json")]
    env = os.environ | {"PYTHONPATH": str(Path(s2t.__file__).parents[1]), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "s2t.integrations.lm_eval"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "acc" in done.stdout
    words[3] = "slm=tiny:slm,strategy=s2t-local"
    failed = subprocess.run([*command, *words], capture_output=True, text=True, env=env, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("s2t: error: strategy s2t-local needs an adapter")
