"""The engine against plain forwards of the same model, whatever is cached, batched, branched or cropped."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config

from s2t.errors import ModelError
from s2t.model import engine as engines
from s2t.model.engine import Engine
from s2t.model.load import wrap_model
from s2t.model.slots import GROWTH, check_cacheable

FAMILIES = ("qwen2", "llama", "gemma", "gemma2-eager", "mistral", "qwen2-sliding")
every_family = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = (
    [5, 9, 12, 30, 7],
    [8, 40, 77, 21, 300, 301, 302, 19, 900, 33, 12],
    [99, 98, 97, 96, 500, 501, 7, 7],
)
ROWS = range(len(PROMPTS))
K = 6


@pytest.fixture(scope="module")
def models(random_model):
    return {family: random_model(family) for family in FAMILIES}


@pytest.fixture
def loaded(models, family):
    return models[family]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def plain(loaded, ids):
    """Next-token logits of one sequence by the model's own forward, no cache; [V]."""
    return loaded.model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()


def plain_hidden(loaded, ids):
    return loaded.model.get_decoder()(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0, -1]


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 6], ids=["no window", "window"])
def test_a_window_that_layers_keep_to_themselves_is_heeded(window, random_model):
    changes = {} if window is None else {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    loaded = random_model("qwen2-moe", **changes)
    engine = Engine(loaded, 3)
    close(engine.extend(ROWS, PROMPTS), torch.stack([plain_hidden(loaded, ids) for ids in PROMPTS]))


def test_positions_whose_scale_the_longest_row_decides_end_before_it_changes(random_model):
    assert random_model("phi3-longrope").context_length == 64
    assert random_model("qwen2").context_length == 512


def prefilled(loaded, prompts=PROMPTS, max_rows=None):
    engine = Engine(loaded, max_rows or len(prompts))
    hidden = engine.extend(range(len(prompts)), prompts)
    return engine, hidden


def candidates(num_rows, seed=0, k=K):
    return torch.randint(2, 900, (num_rows, k), generator=torch.Generator().manual_seed(seed))


# One forward against many


@every_family
def test_prefill_equals_an_uncached_forward_of_each_prompt(loaded):
    engine, hidden = prefilled(loaded)
    for row, prompt in enumerate(PROMPTS):
        close(engine.head(hidden[row]), plain(loaded, prompt))
        close(hidden[row], plain_hidden(loaded, prompt))


@every_family
def test_prefill_equals_a_left_padded_batch_of_transformers(loaded):
    engine, hidden = prefilled(loaded)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    reference = loaded.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    close(engine.head(hidden), reference)


@every_family
def test_a_tree_step_equals_one_uncached_forward_per_candidate(loaded):
    engine, _ = prefilled(loaded)
    ids = candidates(len(PROMPTS))
    hidden = engine.branch(ROWS, ids)  # [n, K, H]
    logits = engine.head(hidden)
    for row, prompt in enumerate(PROMPTS):
        for k in range(K):
            text = [*prompt, int(ids[row, k])]
            close(hidden[row, k], plain_hidden(loaded, text))
            close(logits[row, k], plain(loaded, text))


@every_family
def test_after_accept_the_cache_is_that_of_the_accepted_text(loaded):
    engine, _ = prefilled(loaded)
    texts = [list(prompt) for prompt in PROMPTS]
    for step in range(4):  # trees upon trees, so that a wrong column would be read again
        ids = candidates(len(PROMPTS), seed=step)
        engine.branch(ROWS, ids)
        index = torch.tensor([(row + 2 * step) % K for row in ROWS])
        engine.keep_branch(ROWS, index)
        for row, text in enumerate(texts):
            text.append(int(ids[row, index[row]]))
    assert engine.lengths == [len(text) for text in texts]
    more = [[11, 12, 13], [14], [15, 16]]
    hidden = engine.extend(ROWS, more)
    for row, text in enumerate(texts):
        close(engine.head(hidden[row]), plain(loaded, [*text, *more[row]]))


@every_family
def test_a_branch_that_is_not_accepted_leaves_no_trace(loaded):
    engine, _ = prefilled(loaded)
    engine.branch(ROWS, candidates(len(PROMPTS)))
    hidden = engine.extend(ROWS, [[50], [51], [52]])
    other, _ = prefilled(loaded)
    close(hidden, other.extend(ROWS, [[50], [51], [52]]))


@every_family
def test_only_some_rows_of_a_branch_may_be_accepted(loaded):
    engine, _ = prefilled(loaded)
    ids = candidates(len(PROMPTS))
    engine.branch(ROWS, ids)
    engine.keep_branch([2, 0], torch.tensor([4, 1]))
    hidden = engine.extend(ROWS, [[60], [61], [62]])
    for row, accepted in ((0, [int(ids[0, 1])]), (1, []), (2, [int(ids[2, 4])])):
        close(engine.head(hidden[row]), plain(loaded, [*PROMPTS[row], *accepted, 60 + row]))


# Rows


@every_family
def test_step_by_step_equals_all_at_once(loaded):
    engine = Engine(loaded, 1)
    for token in PROMPTS[1]:
        hidden = engine.extend([0], [[token]])
    close(engine.head(hidden[0]), plain(loaded, PROMPTS[1]))
    pieces = Engine(loaded, 1)
    pieces.extend([0], [PROMPTS[1][:4]])
    close(pieces.extend([0], [PROMPTS[1][4:]]), hidden)


@every_family
def test_a_batch_equals_its_rows_alone(loaded):
    engine, hidden = prefilled(loaded)
    ids = candidates(len(PROMPTS))
    branched = engine.branch(ROWS, ids)
    for row, prompt in enumerate(PROMPTS):
        single, alone = prefilled(loaded, [prompt])
        close(alone[0], hidden[row])
        close(single.branch([0], ids[row : row + 1])[0], branched[row])


@every_family
@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 2]])
def test_a_subset_of_rows_in_any_order_equals_all_rows(loaded, rows):
    whole, _ = prefilled(loaded)
    part, _ = prefilled(loaded)
    ids = candidates(len(PROMPTS))
    close(part.branch(rows, ids[rows]), whole.branch(ROWS, ids)[rows])
    tokens = [[70, 71], [72], [73, 74, 75]]
    close(part.extend(rows, [tokens[row] for row in rows]), whole.extend(ROWS, tokens)[rows])
    others = [row for row in ROWS if row not in rows]
    hidden = part.extend(others, [tokens[row] for row in others]) if others else torch.empty(0)
    for place, row in enumerate(others):  # rows left out were not touched
        close(part.head(hidden[place]), plain(loaded, [*PROMPTS[row], *tokens[row]]))


@every_family
def test_rows_may_be_prefilled_one_after_another_in_any_order(loaded):
    engine = Engine(loaded, 3)
    for row in (2, 0, 1):
        hidden = engine.extend([row], [PROMPTS[row]])
        close(engine.head(hidden[0]), plain(loaded, PROMPTS[row]))
    hidden = engine.extend(ROWS, [[80], [81], [82]])
    for row in ROWS:
        close(engine.head(hidden[row]), plain(loaded, [*PROMPTS[row], 80 + row]))


@every_family
def test_cropping_and_extending_equals_never_extended(loaded):
    engine, _ = prefilled(loaded)
    engine.extend(ROWS, [[200, 201, 202, 203], [204], [205, 206]])
    engine.crop(ROWS, [len(PROMPTS[0]), len(PROMPTS[1]) - 3, len(PROMPTS[2]) + 1])
    hidden = engine.extend(ROWS, [[90], [91], [92, 93]])
    texts = ([*PROMPTS[0], 90], [*PROMPTS[1][:-3], 91], [*PROMPTS[2], 205, 92, 93])
    for row, text in enumerate(texts):
        close(engine.head(hidden[row]), plain(loaded, text))


@every_family
def test_a_copied_row_goes_on_as_its_source_and_apart_from_it(loaded):
    engine, _ = prefilled(loaded, max_rows=5)
    engine.copy([1, 0], [4, 3])
    hidden = engine.extend([4, 1, 3], [[100], [101], [102]])
    for place, (row, token) in enumerate(((1, 100), (1, 101), (0, 102))):
        close(engine.head(hidden[place]), plain(loaded, [*PROMPTS[row], token]))


def test_a_reset_row_starts_afresh(models):
    loaded = models["qwen2"]
    engine, _ = prefilled(loaded)
    engine.reset(1)
    hidden = engine.extend([1], [PROMPTS[2]])
    close(engine.head(hidden[0]), plain(loaded, PROMPTS[2]))
    assert engine.work[1].processed == len(PROMPTS[2])


@pytest.mark.parametrize("family", ["qwen2", "gemma2-eager", "qwen2-sliding"])
def test_the_cache_grows_past_its_first_allocation(loaded):
    engine = Engine(loaded, 2)
    long = torch.randint(2, 900, (GROWTH + 9,), generator=torch.Generator().manual_seed(1)).tolist()
    engine.extend([0, 1], [long[: GROWTH - 3], PROMPTS[0]])
    engine.branch([0, 1], candidates(2))  # across the border
    hidden = engine.extend([0, 1], [long[GROWTH - 3 :], [5]])
    close(engine.head(hidden[0]), plain(loaded, long))
    close(engine.head(hidden[1]), plain(loaded, [*PROMPTS[0], 5]))


@every_family
def test_reading_gives_the_state_of_every_token(loaded):
    engine = Engine(loaded, 3)
    counts = [len(prompt) for prompt in PROMPTS]
    hidden = engine.read(ROWS, PROMPTS, counts)
    for row, prompt in enumerate(PROMPTS):
        logits = loaded.model(torch.tensor([prompt]), use_cache=False).logits[0]
        close(engine.head(hidden[row]), logits)
    again = Engine(loaded, 3).read(ROWS, PROMPTS, [1, *counts[1:]])
    assert torch.equal(again[0], hidden[0][-1:])


# Precision


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_bfloat16_agrees_within_its_precision(random_model, family):
    loaded = random_model(family, dtype=torch.bfloat16)
    engine, hidden = prefilled(loaded)
    ids = candidates(len(PROMPTS))
    branched = engine.head(engine.branch(ROWS, ids))
    engine.keep_branch(ROWS, torch.tensor([1, 3, 5]))
    after = engine.head(engine.extend(ROWS, [[50], [51], [52]]))
    for row, prompt in enumerate(PROMPTS):
        winner = int(ids[row, (1, 3, 5)[row]])
        for ours, text in (
            (engine.head(hidden[row]), prompt),
            (branched[row, 2], [*prompt, int(ids[row, 2])]),
            (after[row], [*prompt, winner, 50 + row]),
        ):
            reference = plain(loaded, text)
            assert (ours - reference).abs().mean() < 0.03 * reference.std()


# The head, reserved ids, work


@every_family
def test_the_head_gives_the_logits_of_the_model(loaded):
    ids = torch.tensor([PROMPTS[1]])
    hidden = loaded.model.get_decoder()(ids).last_hidden_state
    close(Engine(loaded, 1).head(hidden), loaded.model(ids).logits.float())


def test_the_softcapping_of_gemma_2_is_part_of_the_head(models):
    engine = Engine(models["gemma2-eager"], 1)
    logits = engine.head(100 * torch.ones(1, 48))
    assert logits.abs().max() <= 3.0


def test_reserved_ids_and_padding_rows_are_masked(models):
    loaded = models["qwen2"]
    engine, hidden = prefilled(loaded)
    logits = engine.logits(hidden)
    assert logits.shape == (len(PROMPTS), loaded.vocab_size)
    masked = logits.isneginf()
    assert masked[:, list(loaded.reserved.all)].all()
    assert masked.sum() == len(PROMPTS) * len(loaded.reserved.all)


def test_work_counts_forwards_and_tokens_of_each_row(models):
    engine, _ = prefilled(models["qwen2"])
    engine.branch([1, 2], candidates(2))
    engine.keep_branch([1, 2], torch.tensor([0, 1]))
    engine.extend([2], [[5]])
    assert [(work.forwards, work.processed) for work in engine.work] == [(1, 5), (2, 11 + K), (3, 8 + K + 1)]
    params = sum(p.numel() for p in engine.model.parameters())
    embedding = engine.model.get_input_embeddings().weight.numel()
    assert engine.work[0].flops >= 2 * 5 * (params - embedding)
    assert engine.work[0].flops <= 2 * 5 * params


# Models that cannot branch


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "mamba", "chunked_attention"])
def test_layers_whose_cache_cannot_be_branched_are_refused_by_name(kind):
    config = Qwen2Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", kind]
    with pytest.raises(ModelError, match=kind):
        check_cacheable(config)


@pytest.mark.parametrize("name", ["Mamba", "Rwkv"])
def test_state_space_models_are_refused(name, tokenizer):
    import transformers

    from s2t.model.load import wrap_model

    config = getattr(transformers, f"{name}Config")(vocab_size=1024, hidden_size=16, num_hidden_layers=2)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(ModelError, match="branched"):
        wrap_model("state-space", model, tokenizer)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("Bloom", {"n_layer": 1, "n_head": 2}), ("Falcon", {"num_attention_heads": 2, "alibi": True})],
)
def test_models_that_take_no_position_ids_are_refused(name, sizes, tokenizer):
    import transformers

    from s2t.model.load import wrap_model

    config = getattr(transformers, f"{name}Config")(vocab_size=1024, hidden_size=16, **{"num_hidden_layers": 1} | sizes)
    with pytest.raises(ModelError, match="position"):
        wrap_model("biased", getattr(transformers, f"{name}ForCausalLM")(config), tokenizer)


def test_encoder_decoders_are_refused():
    from transformers import T5Config

    with pytest.raises(ModelError, match="decoder-only"):
        check_cacheable(T5Config())


def test_the_models_own_attention_is_back_after_a_forward(random_model):
    loaded = random_model("qwen2")
    engine = Engine(loaded, 1)
    before = plain(loaded, PROMPTS[0])
    with pytest.raises(IndexError):
        engine.extend([0], [[10**6]])
    assert loaded.model.config._attn_implementation == "sdpa"
    assert torch.equal(plain(loaded, PROMPTS[0]), before)


def test_attention_outside_the_interface_of_transformers_is_refused(random_model, monkeypatch):
    loaded = random_model("qwen2")
    monkeypatch.setattr(type(loaded.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ModelError, match="attention interface") as caught:
        wrap_model("own", loaded.model, loaded.tokenizer)
    assert "\n" not in str(caught.value)


# Everything in one forward


@every_family
def test_a_mixed_forward_equals_separate_ones(loaded):
    """Steps, a branch of a row that steps, a branch of one that does not, a longer text and a new prompt at once."""
    engine = Engine(loaded, 6)
    engine.extend(range(3), PROMPTS)
    engine.extend([3], [PROMPTS[0][:3]])
    ids = candidates(2)
    hidden, branch = engine.step([0, 2, 3, 4], [[11], [12], [13, 14, 15], [5, 6, 7, 8]], [0, 1], ids)
    texts = [[*PROMPTS[0], 11], [*PROMPTS[2], 12], [*PROMPTS[0][:3], 13, 14, 15], [5, 6, 7, 8]]
    for state, text in zip(hidden, texts, strict=True):
        close(engine.head(state), plain(loaded, text))
    for i, row in enumerate((0, 1)):
        for k in range(K):
            close(engine.head(branch[i, k]), plain(loaded, [*PROMPTS[row], int(ids[i, k])]))
    assert engine.lengths[:5] == [len(PROMPTS[0]) + 1, len(PROMPTS[1]), len(PROMPTS[2]) + 1, 6, 4]
    engine.keep_branch([0, 1], torch.tensor([4, 2]))  # row 0: in place of the token it ran
    hidden = engine.extend(range(5), [[20], [21], [22], [23], [24]])
    texts = [[*PROMPTS[0], int(ids[0, 4])], [*PROMPTS[1], int(ids[1, 2])], *texts[1:]]
    for row, (state, text) in enumerate(zip(hidden, texts, strict=True)):
        close(engine.head(state), plain(loaded, [*text, 20 + row]))


def test_rows_may_come_in_any_order_and_with_gaps(random_model):
    loaded = random_model("qwen2")
    engine = Engine(loaded, 12)
    rows = [11, 0, 7]
    engine.extend(rows, PROMPTS)
    hidden = engine.extend([7, 11, 0], [[30], [31], [32]])
    for state, place, token in zip(hidden, (2, 0, 1), (30, 31, 32), strict=True):
        close(engine.head(state), plain(loaded, [*PROMPTS[place], token]))
    assert engine.work[7].forwards == 2
    assert engine.work[3].forwards == 0


# Prompts in parts


@every_family
def test_prompts_that_run_in_parts_give_what_they_give_at_once(loaded, monkeypatch):
    whole, wanted = prefilled(loaded, max_rows=5)
    monkeypatch.setitem(engines._PROMPT_TOKENS, "cpu", 14)
    engine, hidden = prefilled(loaded, max_rows=5)
    close(hidden, wanted)
    assert engine.lengths == whole.lengths and engine.work == whole.work
    rows, tokens = [0, 1, 2, 3, 4], [[11], [12], [13], PROMPTS[1], PROMPTS[0]]  # 19 tokens: steps and two prompts
    ids = candidates(2)
    for one, other in zip(engine.step(rows, tokens, [0, 2], ids), whole.step(rows, tokens, [0, 2], ids), strict=True):
        close(one, other)
    assert engine.lengths == whole.lengths == [6, 12, 9, 11, 5]
    for row in rows:
        close(engine.head(engine.extend([row], [[17]])), whole.head(whole.extend([row], [[17]])))


@every_family
def test_states_that_are_read_in_parts_are_the_same(loaded, monkeypatch):
    last = [3, 5, 1]
    wanted = Engine(loaded, 3).read(ROWS, PROMPTS, last)
    monkeypatch.setitem(engines._PROMPT_TOKENS, "cpu", 9)
    found = Engine(loaded, 3).read(ROWS, PROMPTS, last)
    assert [len(states) for states in found] == last
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def test_no_part_holds_more_than_the_limit_but_for_a_prompt_that_does_alone(models, monkeypatch):
    engine = Engine(models["qwen2"], 6)
    monkeypatch.setitem(engines._PROMPT_TOKENS, "cpu", 10)
    assert engine._parts([[1] * 4, [1], [1] * 6, [1] * 30, [1] * 2, [1]]) == [[0, 2], [3], [4], [1, 5]]
    assert engine._parts([[1]] * 10) == [list(range(10))]


def test_logits_in_the_models_own_dtype_are_those_that_are_cast(random_model):
    for family in ("qwen2", "gemma2-eager"):  # one caps its logits, in float32
        loaded = random_model(family)
        loaded.model.to(torch.bfloat16)
        engine = Engine(loaded, 1)
        hidden = engine.extend([0], [PROMPTS[0]])
        own = engine.own_logits(hidden)
        assert own.dtype == (torch.bfloat16 if family == "qwen2" else torch.float32)
        assert torch.equal(own.float(), engine.logits(hidden)) and engine.logits(hidden).dtype == torch.float32
