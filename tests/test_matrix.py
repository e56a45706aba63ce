"""The whole chain on tiny random models of the real classes, each under a tokenizer and a chat template of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import s2t
from s2t.collect import collect
from s2t.config import CollectConfig, MeasureConfig, MergeConfig, TrainConfig
from s2t.errors import ModelError
from s2t.files import read_json
from s2t.measure import measure
from s2t.merge import merge
from s2t.model.engine import Engine
from s2t.model.load import load_model, wrap_model
from s2t.train.trainer import train

TEXTS = [
    f"Ann has {a} apples and buys {b} more. How many has she? {a} + {b} = {a + b}" for a in range(12) for b in (3, 7)
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = "{{ bos_token }}{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# kind -> special tokens, chat template, bos, eos, spare tokens
KINDS = {
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, None, "<|im_end|>", None),
    "llama": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        LLAMA,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|reserved_special_token_{}|>",
    ),
    "gemma": (["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], GEMMA, "<bos>", "<eos>", "<unused{}>"),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], MISTRAL, "<s>", "</s>", "[control_{}]"),
    "phi": (["<unk>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], PHI, None, "<|end|>", None),
    "smol": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, None, "<|im_end|>", None),
}
# family -> class, kind of tokenizer, rows of the embedding past the tokens, settings
FAMILIES = {
    "Qwen2": ("Qwen2", "qwen", 64, {}),
    "Qwen3": ("Qwen3", "qwen", 64, {"head_dim": 16, "tie_word_embeddings": True}),
    "Llama": ("Llama", "llama", 0, {"tie_word_embeddings": False}),
    "Gemma 2": (
        "Gemma2",
        "gemma",
        0,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "Gemma 3": (
        "Gemma3Text",
        "gemma",
        0,
        {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Mistral": ("Mistral", "mistral", 0, {"head_dim": 16, "sliding_window": 24}),
    "Phi-3": ("Phi3", "phi", 0, {"pad_token_id": 0}),
    "SmolLM": ("Llama", "smol", 0, {"tie_word_embeddings": True}),
}
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    special, template, bos, eos, spare = KINDS[kind]
    spares = [spare.format(i) for i in range(20)] if spare else []
    if kind in ("qwen", "llama", "smol"):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=360, special_tokens=special + spares, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token=special[0]))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "mistral" else "never")
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=special + spares)
    core.train_from_iterator(TEXTS, trainer)
    if kind not in ("qwen", "llama", "smol"):
        data = json.loads(core.to_str())
        vocab = data["model"]["vocab"]
        for byte in (f"<0x{i:02X}>" for i in range(256)):
            vocab[byte] = len(vocab)
        core = Tokenizer.from_str(json.dumps(data))
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=special[0],
        additional_special_tokens=[AddedToken(token, special=True) for token in special],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_folder(family: str, folder: Path, seed: int) -> str:
    """An ordinary checkpoint folder of a family with random weights."""
    name, kind, padding, settings = FAMILIES[family]
    tokenizer = make_tokenizer(kind)
    size = len(tokenizer)
    config = getattr(transformers, f"{name}Config")(
        **SIZES | {"vocab_size": size + padding, "bos_token_id": tokenizer.bos_token_id} | settings,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id], pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    lines = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(9) for b in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run_chain(slm: str, llm: str, problems: str, folder: Path, scope: str) -> str:
    """measure, collect and two steps of training; returns the adapter's folder."""
    common = {"slm": slm, "llm": llm, "task": problems, "limit": 6, "max_new_tokens": 16, "batch_size": 3}
    found = measure(MeasureConfig(**common, out=str(folder / "measure"), quantile=0.6))
    assert found["num_divergence_points"] > 0
    collect(CollectConfig(**common, out=str(folder / "collect"), threshold=found["threshold"]))
    trained = train(
        TrainConfig(
            slm=slm,
            groups=str(folder / "collect"),
            out=str(folder / "train"),
            readout="bins",
            heldout_problems=0.0,
            adapter_scope=scope,
            batch_groups=max(1, read_json(folder / "collect" / "collect.json")["num_groups"] // 2),
            epochs=1.0,
            learning_rate=1e-2,
        )
    )
    assert trained["num_steps"] >= 2
    return str(folder / "train" / "adapter")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_goes_through_the_whole_chain(family, problems, tmp_path):
    slm, llm = (make_folder(family, tmp_path / name, seed) for name, seed in (("slm", 0), ("llm", 1)))
    scope = "always" if list(FAMILIES).index(family) % 2 else "candidates"
    adapter = run_chain(slm, llm, problems, tmp_path, scope)
    model = s2t.load(slm, adapter=adapter)
    settings = {"threshold": 0.0, "trigger": "entropy", "max_new_tokens": 16}
    answers = model.generate(["What is 3 + 4?", "Ann has 2."], **settings)
    assert any(answer.num_triggered for answer in answers)
    reserved = set(model.pair.adapter.reserved.all)
    assert not any(reserved & set(answer.token_ids) for answer in answers)
    merge(MergeConfig(adapter=adapter, out=str(tmp_path / "merged")))
    again = s2t.load(str(tmp_path / "merged"))
    for reloaded in (s2t.load(slm, adapter=adapter), again):
        same = reloaded.generate(["What is 3 + 4?", "Ann has 2."], **settings)
        assert [answer.token_ids for answer in same] == [answer.token_ids for answer in answers]
    prompt = torch.tensor([again.pair.request(0, "What is 3 + 4?").prompt_ids])
    plain, base = (
        AutoModelForCausalLM.from_pretrained(folder).generate(prompt, do_sample=False, max_new_tokens=16)[0].tolist()
        for folder in (tmp_path / "merged", slm)
    )
    if scope == "candidates":  # its weights are the base model's
        assert plain == base
    else:
        assert plain != base
        assert not reserved & set(plain)


@pytest.mark.parametrize(("slm", "llm"), [("Gemma 2", "Qwen3"), ("Qwen2", "Mistral"), ("Phi-3", "Llama")])
def test_pairs_across_families_go_through_the_chain(slm, llm, problems, tmp_path):
    small, large = make_folder(slm, tmp_path / "slm", 0), make_folder(llm, tmp_path / "llm", 1)
    adapter = run_chain(small, large, problems, tmp_path, "candidates")
    model = s2t.load(small, llm=large, adapter=adapter)
    assert model.pair.vocabulary is not None
    for strategy in ("s2t", "takeover", "llm", "s2t-local"):
        threshold = {} if strategy == "llm" else {"threshold": 0.0, "trigger": "entropy"}
        done = model.generate("What is 3 + 4?", strategy, max_new_tokens=12, **threshold)
        assert 1 <= len(done.token_ids) <= 12


def test_attention_with_sinks_is_refused_when_it_is_loaded(tokenizer):
    config = transformers.GptOssConfig(
        **SIZES | {"vocab_size": 1024, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    )
    model = transformers.GptOssForCausalLM(config)
    with pytest.raises(ModelError, match=r"gpt_oss.*sinks"):
        wrap_model("sinks", model, tokenizer)


SMALL = SIZES | {"vocab_size": 1024, "head_dim": 16, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LINEAR = {f"linear_{name}": size for name, size in (("num_value_heads", 2), ("num_key_heads", 2), ("key_head_dim", 16))}
REFUSED = {
    "qwen3_5_text": (LINEAR | {"linear_value_head_dim": 16, "num_hidden_layers": 4}, "linear_attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "falcon_h1": ({"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64}, "hybrid"),
    "recurrent_gemma": ({"lru_width": 32}, "cannot be branched"),
    "mamba": ({}, "cannot be branched"),
    "rwkv": ({"attention_hidden_size": 32}, "can be branched"),
    "llama4_text": ({"attention_chunk_size": 32, "num_local_experts": 2}, "chunked_attention"),
    "bloom": ({}, "biased by distance"),
    "gptj": ({"rotary_dim": 8}, "in its own way"),
}
SLIDING = {
    "olmo3": {"sliding_window": 8, "num_hidden_layers": 4},
    "cohere2": {"sliding_window": 8, "num_hidden_layers": 4},
    "exaone4": {"sliding_window": 8, "num_hidden_layers": 4},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
}


def tiny_model(kind, changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | changes))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_cache_that_cannot_be_branched_is_refused_when_it_is_loaded(kind, tokenizer):
    changes, why = REFUSED[kind]
    with pytest.raises(ModelError, match=why) as caught:
        wrap_model(kind, tiny_model(kind, changes), tokenizer)
    assert kind in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SLIDING)
def test_candidates_past_a_sliding_window_are_read_as_separate_forwards_would(kind, tokenizer):
    model = tiny_model(kind, SLIDING[kind])
    engine = Engine(wrap_model(kind, model, tokenizer), 2)
    prompts = [list(range(40, 60)), [5, 6, 7]]  # past the window, and not
    candidates = torch.tensor([[10, 11, 12], [20, 21, 22]])
    with torch.inference_mode():
        engine.extend([0, 1], prompts)
        found = engine.head(engine.branch([0, 1], candidates))
        for prompt, ids, logits in zip(prompts, candidates.tolist(), found, strict=True):
            plain = model(torch.tensor([[*prompt, token_id] for token_id in ids]), use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, plain.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma 2", "Mistral"])
def test_a_folder_loads_with_its_stop_ids_and_reserved_ids(family, tmp_path):
    loaded = load_model(make_folder(family, tmp_path / "slm", 0), "float32")
    kind = {"Qwen2": "padding rows", "Gemma 2": "gemma spare tokens", "Mistral": "mistral spare tokens"}[family]
    assert loaded.reserved.kind == kind
    assert loaded.tokenizer.eos_token_id in loaded.stop_ids
