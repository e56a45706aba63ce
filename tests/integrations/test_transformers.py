"""Inside transformers' `generate`: what comes back is what `generate` gives back, by our loop, on the caller's own model."""

from __future__ import annotations

import copy
import json
import shutil
from threading import Thread

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

import s2t
from s2t.config import MergeConfig
from s2t.errors import ConfigError, ModelError
from s2t.integrations.transformers import detach
from s2t.merge import merge
from s2t.model.adapter import ATTACHED, AdapterConfig, SelectorAdapter
from s2t.model.load import load_model
from s2t.model.tiny import embedded_path

torch.set_num_threads(1)

BASE = str(embedded_path("tiny:slm"))
QUESTIONS = ["Tom has 12 apples and buys 31 more. How many?", "What is 2 + 2?", "A boy has 21 toys."]
LENGTH = 24
RANKS = ("step", "rank-stream")
SCOPES = (*RANKS, "always", "candidates")
every_scope = pytest.mark.parametrize("scope", SCOPES)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """An adapter folder of each scope that triggers at most steps and flips at many."""
    folders = {}
    for scope in SCOPES:
        loaded = load_model("tiny:slm", "float32")
        settings = {"prior_weight": 0.0, "thresholds": {"criticality": 0.4}, "lora_rank": 2, "head_size": 6}
        settings |= {"readout": "rank" if scope in RANKS else "bins", "scope": scope.removeprefix("rank-")}
        config = AdapterConfig("tiny:slm", loaded.fingerprint, num_candidates=4, **settings)
        torch.manual_seed(1)
        adapter = SelectorAdapter(loaded, config)
        with torch.no_grad():
            for name, parameter in adapter.trainable().items():
                if "lora_B" in name or name == "selector.bins":
                    parameter.normal_(0.0, 0.2 if name == "selector.bins" or adapter.ranks else 0.05)
        folders[scope] = str(tmp_path_factory.mktemp(scope) / "adapter")
        adapter.save(folders[scope])
    return folders


@pytest.fixture(scope="module")
def merged(adapters, tmp_path_factory):
    folders = {scope: str(tmp_path_factory.mktemp(scope) / "merged") for scope in adapters}
    for scope, folder in folders.items():
        merge(MergeConfig(adapter=adapters[scope], out=folder, dtype="float32"))
    return folders


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture(scope="module")
def left():
    """The tokenizer, padding on the left."""
    return AutoTokenizer.from_pretrained(BASE, padding_side="left")


@pytest.fixture(scope="module")
def inputs(left):
    return prompts(left, QUESTIONS)


def prompts(tokenizer, questions):
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in questions
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def greedy():
    return s2t.custom_generate(strategy="greedy")


class Forbid(LogitsProcessor):
    """Forbids, in every row, the tokens it has already written at even places; depends on row and length."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(input_ids)):
            scores[row, input_ids[row, (row % 2) :: 2]] -= 3.0
        return scores


class Every(StoppingCriteria):
    """Ends a row at a length of its own; notes every call."""

    def __init__(self, start, lengths):
        self.start, self.lengths, self.seen = start, lengths, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        new = input_ids.shape[1] - self.start
        return torch.tensor([new >= length for length in self.lengths])


SETTINGS = {
    "plain": lambda start: {},
    "max_length": lambda start: {"max_new_tokens": None, "max_length": start + 9},
    "several eos": lambda start: {"eos_token_id": [1, 42, 300, 270]},
    "no eos": lambda start: {"eos_token_id": None},
    "repetition_penalty": lambda start: {"repetition_penalty": 1.4},
    "no_repeat_ngram": lambda start: {"no_repeat_ngram_size": 2},
    "min_new_tokens": lambda start: {"min_new_tokens": 20},
    "bad_words": lambda start: {"bad_words_ids": [[300], [40, 41]]},
    "processor": lambda start: {"logits_processor": LogitsProcessorList([Forbid()])},
    "rows by number": lambda start: {"prefix_allowed_tokens_fn": lambda row, ids: range(32 + 100 * row, 900)},
    "criteria": lambda start: {"stopping_criteria": StoppingCriteriaList([Every(start, (5, 12, 9))])},
    "criteria without eos": lambda start: {
        "stopping_criteria": StoppingCriteriaList([Every(start, (5, 12, 9))]),
        "eos_token_id": None,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_the_greedy_generate_of_transformers(name, model, inputs):
    start = inputs["input_ids"].shape[1]
    arguments = [{"max_new_tokens": LENGTH} | SETTINGS[name](start) for _ in range(2)]
    plain = model.generate(**inputs, **arguments[0])
    assert torch.equal(model.generate(**inputs, **arguments[1], custom_generate=greedy()), plain)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2-eager", "mistral"])
def test_greedy_agrees_for_other_families(family, random_model):
    loaded = random_model(family)
    ids = torch.randint(32, 1000, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    call = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 12, "repetition_penalty": 1.2}
    call |= {"suppress_tokens": list(loaded.reserved.all)}  # which we never write
    loop = s2t.custom_generate(tokenizer=loaded.tokenizer)
    assert torch.equal(loaded.model.generate(**call, custom_generate=loop), loaded.model.generate(**call))


def test_criteria_see_the_sequences_after_every_step(model, inputs):
    start = inputs["input_ids"].shape[1]
    ours, theirs = Every(start, (3, 6, 5)), Every(start, (3, 6, 5))
    model.generate(**inputs, max_new_tokens=9, stopping_criteria=[theirs])
    model.generate(**inputs, max_new_tokens=9, stopping_criteria=[ours], custom_generate=greedy())
    assert len(ours.seen) == len(theirs.seen) == 6
    assert all(torch.equal(*pair) for pair in zip(ours.seen, theirs.seen, strict=True))


# The selector


@every_scope
def test_an_adapter_selects_as_it_does_in_s2t(scope, model, left, inputs, adapters):
    reasoner = s2t.load("tiny:slm", adapter=adapters[scope], dtype="float32")
    wanted = [one.token_ids for one in reasoner.generate(QUESTIONS, max_new_tokens=LENGTH)]
    plain = model.generate(**inputs, max_new_tokens=LENGTH)
    ids = model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=s2t.custom_generate(adapters[scope]))
    assert new_tokens(ids, inputs, left) == wanted
    assert ids.dtype == torch.long and not torch.equal(ids[:, : plain.shape[1]], plain[:, : ids.shape[1]])
    one = prompts(left, QUESTIONS[:1])
    alone = model.generate(**one, max_new_tokens=LENGTH, custom_generate=s2t.custom_generate(adapters[scope]))
    assert new_tokens(alone, one, left) == wanted[:1]


def new_tokens(ids, inputs, tokenizer):
    """Each row's generated ids, its padding left out."""
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


@every_scope
def test_rows_that_step_together_write_what_they_write_freely(scope, model, inputs, adapters):
    """Processors make all rows wait for one another; nothing else may change by that."""
    loop = s2t.custom_generate(adapters[scope])
    free = model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=loop)
    together = model.generate(
        **inputs, max_new_tokens=LENGTH, custom_generate=loop, logits_processor=[lambda ids, scores: scores]
    )
    assert torch.equal(free, together)


@every_scope
def test_processors_act_before_candidates_are_proposed(scope, model, inputs, adapters):
    banned = list(range(300, 700))
    plain = model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=s2t.custom_generate(adapters[scope]))
    start = inputs["input_ids"].shape[1]
    assert set(plain[:, start:].flatten().tolist()) & set(banned)
    ids = model.generate(
        **inputs, max_new_tokens=LENGTH, suppress_tokens=banned, custom_generate=s2t.custom_generate(adapters[scope])
    )
    assert not set(ids[:, start:].flatten().tolist()) & set(banned)


@pytest.mark.parametrize("trigger", ["entropy", "random", "never", "criticality"])
def test_triggers_and_settings_are_those_of_s2t(trigger, model, left, inputs, adapters):
    settings = {"trigger": trigger, "threshold": 0.3, "num_candidates": 3, "warmup_steps": 1}
    reasoner = s2t.load("tiny:slm", adapter=adapters["candidates"], dtype="float32")
    loop = s2t.custom_generate(adapters["candidates"], seed=3, **settings)
    ids = model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=loop)
    if trigger != "random":  # whose numbers depend on the prompt's text in s2t
        wanted = [one.token_ids for one in reasoner.generate(QUESTIONS, max_new_tokens=LENGTH, **settings)]
        assert new_tokens(ids, inputs, left) == wanted
    again = model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=loop)
    assert torch.equal(ids, again)


# The caller's model


@every_scope
def test_the_model_is_as_it_was_afterwards(scope, model, inputs, adapters):
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = model(**inputs).logits
    plain = model.generate(**inputs, max_new_tokens=LENGTH)
    for _ in range(2):
        model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=s2t.custom_generate(adapters[scope]))
        assert torch.equal(model.generate(**inputs, max_new_tokens=LENGTH), plain)
        assert torch.equal(model(**inputs).logits, before)
    asleep = [name for name, module in model.named_modules() if not module.training]
    assert all(".lora_" in f".{name}" or name.endswith("_proj") for name in asleep), "only the adapter's own"
    now = {name.replace(".base_layer.", "."): parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: now[name] for name in grads} == grads
    detach(model)
    assert {name for name, _ in model.named_parameters()} == set(grads)
    assert torch.equal(model(**inputs).logits, before)


@every_scope
def test_a_model_is_saved_without_the_adapter_that_chose(scope, model, inputs, adapters, tmp_path):
    plain = model.generate(**inputs, max_new_tokens=LENGTH)
    loop = s2t.custom_generate(adapters[scope])
    chosen = model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=loop)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(**inputs, max_new_tokens=LENGTH), plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=loop), chosen)


def test_an_adapter_is_attached_once_and_another_takes_its_place(model, inputs, adapters):
    call = {"max_new_tokens": 4, **inputs}
    model.generate(**call, custom_generate=s2t.custom_generate(adapters["always"]))
    first = model.__dict__.get(ATTACHED)
    model.generate(**call, custom_generate=s2t.custom_generate(adapters["always"]))
    assert model.__dict__.get(ATTACHED) is first
    ids = model.generate(**call, custom_generate=s2t.custom_generate(adapters["candidates"]))
    assert model.__dict__.get(ATTACHED) is not first
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(first.layers)
    fresh = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert torch.equal(ids, fresh.generate(**call, custom_generate=s2t.custom_generate(adapters["candidates"])))


def test_a_failure_on_the_way_leaves_the_model_as_it_was(model, inputs, adapters):
    plain = model.generate(**inputs, max_new_tokens=8)

    def fails(ids, scores):
        raise RuntimeError("no")

    loop = s2t.custom_generate(adapters["always"])
    with pytest.raises(RuntimeError, match="no"):
        model.generate(**inputs, max_new_tokens=8, logits_processor=[fails], custom_generate=loop)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), plain)


# What comes back


def test_scores_and_logits_are_those_of_transformers(model, left):
    one = prompts(left, QUESTIONS[:1])
    call = {**one, "max_new_tokens": 8, "repetition_penalty": 1.3, "return_dict_in_generate": True}
    call |= {"output_scores": True, "output_logits": True}
    ours, theirs = model.generate(**call, custom_generate=greedy()), model.generate(**call)
    assert type(ours) is type(theirs) and torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name])
        for left_, right_ in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(left_, right_, rtol=1e-4, atol=1e-4)
    assert not ours.scores[0].is_inference()


def test_a_batch_gives_a_dict_of_sequences(model, inputs):
    ours = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, custom_generate=greedy())
    assert torch.equal(ours.sequences, model.generate(**inputs, max_new_tokens=8))
    assert ours.scores is None and ours.logits is None


@every_scope
def test_a_streamer_gets_the_prompt_and_then_the_tokens(scope, model, left, adapters):
    one = prompts(left, QUESTIONS[:1])
    loop = s2t.custom_generate(adapters[scope])
    ids = model.generate(**one, max_new_tokens=LENGTH, custom_generate=loop)
    streamer = TextIteratorStreamer(left, timeout=20, clean_up_tokenization_spaces=False)
    call = {**one, "max_new_tokens": LENGTH, "custom_generate": loop, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs=call)
    thread.start()
    assert "".join(streamer) == left.decode(ids[0], clean_up_tokenization_spaces=False)
    thread.join()


@pytest.mark.parametrize("scope", [None, "candidates"])
def test_sampling_follows_torch_seed_and_keeps_to_its_filters(scope, model, inputs, adapters):
    loop = s2t.custom_generate(adapters[scope]) if scope else greedy()
    call = {**inputs, "max_new_tokens": LENGTH, "do_sample": True, "custom_generate": loop}
    call |= {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "num_return_sequences": 2}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(**call))
    assert runs[0].shape[0] == 2 * len(QUESTIONS)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1]), "two samples of one prompt are alike"
    only_best = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=True, top_k=1, custom_generate=loop)
    assert torch.equal(only_best, model.generate(**inputs, max_new_tokens=LENGTH, custom_generate=loop))


def test_samples_have_the_model_s_own_frequencies(model, left):
    one = left("12 + ", return_tensors="pt")
    torch.manual_seed(0)
    call = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.8, "top_k": 12, "num_return_sequences": 1000}
    ids = model.generate(**one, **call, custom_generate=greedy())[:, -1]
    logits = model(**one).logits[0, -1].detach() / 0.8
    logits[logits < logits.topk(12).values[-1]] = -torch.inf
    torch.testing.assert_close(torch.bincount(ids, minlength=1024) / 1000, logits.softmax(-1), rtol=0, atol=0.06)


# What is refused


UNSUPPORTED = {
    "num_beams": {"num_beams": 3},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "output_attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "output_hidden_states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "output_scores or output_logits of a batch": {"return_dict_in_generate": True, "output_scores": True},
    "guidance_scale": {"guidance_scale": 1.5},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "position_ids": {"position_ids": torch.zeros(3, 1, dtype=torch.long)},
    "token_type_ids": {"token_type_ids": torch.zeros(3, 1, dtype=torch.long)},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(name, model, inputs):
    call = dict(UNSUPPORTED[name])
    if name == "position_ids":
        call[name] = torch.zeros_like(inputs["input_ids"])
    word = "generation mode assisted" if name == "prompt_lookup" else name
    if name == "token_type_ids":  # Qwen2 knows none; transformers says so first
        word = "not used by the model"
    with pytest.raises(ValueError, match=word) as caught:
        model.generate(**inputs, max_new_tokens=4, custom_generate=greedy(), **call)
    assert "\n" not in str(caught.value)


def test_an_assistant_embeddings_and_a_filled_cache_are_refused(model, left):
    one = prompts(left, QUESTIONS[:1])
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(**one, max_new_tokens=4, assistant_model=copy.deepcopy(model), custom_generate=greedy())
    embeds = model.get_input_embeddings()(one["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, max_new_tokens=4, custom_generate=greedy())
    cache = model(one["input_ids"][:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(**one, past_key_values=cache, max_new_tokens=4, custom_generate=greedy())


def test_a_row_without_a_token_is_refused(model, inputs):
    mask = inputs["attention_mask"].clone()
    mask[1] = 0
    with pytest.raises(ValueError, match="row 1 of input_ids"):
        model.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=4, custom_generate=greedy())


def test_settings_that_are_unknown_or_lack_something(model, inputs, adapters, tmp_path):
    with pytest.raises(ConfigError, match="unknown setting magic; known"):
        s2t.custom_generate(magic=1)
    with pytest.raises(ConfigError, match="must be one of greedy, s2t-local"):
        s2t.custom_generate(strategy="s2t")
    with pytest.raises(ConfigError, match="num_candidates"):
        s2t.custom_generate(num_candidates=0)
    inputs = {**inputs, "max_new_tokens": 4}
    with pytest.raises(ConfigError, match="needs an adapter"):
        model.generate(**inputs, custom_generate=s2t.custom_generate(strategy="s2t-local"))
    with pytest.raises(ModelError, match="is no adapter folder"):
        model.generate(**inputs, custom_generate=s2t.custom_generate(tmp_path))
    random = s2t.custom_generate(adapters["candidates"], trigger="random", threshold=0.5)
    with pytest.raises(ValueError, match="trigger random"):
        model.generate(**inputs, do_sample=True, custom_generate=random)


def test_an_adapter_of_another_model_and_a_model_without_a_tokenizer(adapters, random_model):
    other = random_model()
    ids = torch.tensor([[40, 41, 42]])
    loop = s2t.custom_generate(adapters["always"], tokenizer=other.tokenizer)
    with pytest.raises(ModelError, match="was trained on tiny:slm"):
        other.model.generate(ids, max_new_tokens=4, custom_generate=loop)
    with pytest.raises(ModelError, match="no tokenizer was found"):
        other.model.generate(ids, max_new_tokens=4, custom_generate=s2t.custom_generate())


# Merged folders


@every_scope
def test_a_merged_folder_brings_its_own_generate(scope, left, inputs, adapters, merged):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    wanted = base.generate(**inputs, max_new_tokens=LENGTH, custom_generate=s2t.custom_generate(adapters[scope]))
    model = AutoModelForCausalLM.from_pretrained(merged[scope])
    call = {**inputs, "max_new_tokens": LENGTH}
    folder = {"custom_generate": merged[scope], "trust_remote_code": True}
    assert torch.equal(model.generate(**call, **folder), wanted)
    assert torch.equal(model.generate(**call, **folder, tokenizer=left), wanted)
    assert torch.equal(model.generate(**call, custom_generate=s2t.custom_generate()), wanted)
    trusted = AutoModelForCausalLM.from_pretrained(merged[scope], trust_remote_code=True)
    assert torch.equal(trusted.generate(**call), wanted)


@every_scope
def test_without_it_a_merged_folder_is_an_ordinary_model(scope, inputs, merged):
    model = AutoModelForCausalLM.from_pretrained(merged[scope])
    plain = model.generate(**inputs, max_new_tokens=LENGTH)
    call = {**inputs, "max_new_tokens": LENGTH, "custom_generate": merged[scope], "trust_remote_code": True}
    assert torch.equal(model.generate(**call, strategy="greedy"), plain)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).generate(**inputs, max_new_tokens=LENGTH)
    assert torch.equal(base, plain) == (scope != "always")


def test_a_merged_folder_takes_streamers_stop_strings_and_settings(left, merged):
    model = AutoModelForCausalLM.from_pretrained(merged["candidates"])
    one = prompts(left, QUESTIONS[:1])
    call = {**one, "max_new_tokens": LENGTH, "custom_generate": merged["candidates"], "trust_remote_code": True}
    ids = model.generate(**call)
    words = left.decode(ids[0, one["input_ids"].shape[1] :])
    stop = words[8:11]
    criteria = StoppingCriteriaList([StopStringCriteria(left, [stop])])
    wanted = model.generate(
        **one, max_new_tokens=LENGTH, stopping_criteria=criteria, custom_generate=s2t.custom_generate()
    )
    assert torch.equal(model.generate(**call, stop_strings=[stop], tokenizer=left), wanted)
    assert wanted.shape[1] < ids.shape[1]
    streamer = TextIteratorStreamer(left, timeout=20)
    model.generate(**call, streamer=streamer)
    assert "".join(streamer).endswith(words)
    with pytest.raises(ConfigError, match="num_candidates"):
        model.generate(**call, num_candidates=0)


@pytest.mark.parametrize(("scope", "revision"), [("always", "main"), ("candidates", "main"), ("candidates", "v1")])
def test_a_merged_model_of_the_hub_is_found_in_its_cache(scope, revision, inputs, merged, tmp_path, monkeypatch):
    place, commit = tmp_path / "models--somebody--merged", "a" * 40
    shutil.copytree(merged[scope], place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "somebody/merged"
    if revision == "main":  # a model does not say which revision it came from
        model = AutoModelForCausalLM.from_pretrained(name)
        call = {**inputs, "max_new_tokens": LENGTH}
        folder = AutoModelForCausalLM.from_pretrained(merged[scope])
        wanted = folder.generate(**call, custom_generate=s2t.custom_generate())
        assert torch.equal(model.generate(**call, custom_generate=s2t.custom_generate()), wanted)
        assert torch.equal(model.generate(**call, custom_generate=name, trust_remote_code=True), wanted)
    loaded = s2t.load(name, revision=revision), s2t.load(merged[scope])
    left_, right_ = (one.generate(QUESTIONS[0], max_new_tokens=LENGTH) for one in loaded)
    assert left_.token_ids == right_.token_ids and left_.num_triggered > 0


def test_code_of_a_merged_folder_on_another_model_is_refused(model, inputs, merged):
    model.generate(**inputs, max_new_tokens=2, custom_generate=greedy())
    with pytest.raises(ModelError, match="nothing `s2t merge` wrote"):
        model.generate(**inputs, custom_generate=merged["always"], trust_remote_code=True)


def test_the_folder_s_code_needs_consent(model, inputs, merged):
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**inputs, custom_generate=merged["always"], trust_remote_code=False)


def test_a_damaged_merged_folder_is_refused(inputs, merged, tmp_path):
    folder = shutil.copytree(merged["always"], tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "s2t_config.json").read_text())
    config["weights"]["model.safetensors"] = "0" * 64
    (folder / "s2t_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="damaged"):
        model.generate(**inputs, max_new_tokens=4, custom_generate=str(folder), trust_remote_code=True)
