"""Train the embedded models from scratch: tokenizers, `tiny:llm`, `tiny:slm-unfiltered`, `-numbers` and `-small`.

    python examples/train_tiny_pair.py --out tiny            # about 110 CPU-minutes on one core, in all
    python examples/train_tiny_pair.py --out tiny --only slm-numbers
    python examples/train_tiny_pair.py --out tiny --scale 0.01   # a smoke test in a minute
    python examples/train_tiny_pair.py --out tiny --only slm-narrow --tokenizer src/s2t/model/assets/shared/tokenizer.json

All models are Qwen2ForCausalLM on chains of thought of reasoning-gym's GSM-Symbolic problems whose numbers are
whole and at most 100, training split only. The unfiltered SLM first reads clean text, then text of which
75 % of the authors write results ten too small. `slm-numbers` is the same on a vocabulary and a chat template of its
own, in which a whole number is one token; `slm-narrow` and `slm-shallow`, the unfiltered SLM in smaller shapes, are for
`s2t study scaling` and made only when they are named. Muon on the layers' matrices, AdamW on the rest.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from careless import careless
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from s2t.tasks.problems import load_task

TASK = "rg:gsm_symbolic,max_number=100"
ROW, ROWS = 320, 3
PAD, END, USER, ASSISTANT = range(4)


@dataclass(frozen=True)
class Vocabulary:
    """How text is cut: the first four special tokens are PAD, END, USER and ASSISTANT."""

    size: int
    special: tuple[str, ...]
    template: str
    has_whole_numbers: bool = False
    is_llama: bool = False  # transformers gives every Qwen2 checkpoint Qwen2's own cut, which has single digits


DIGITS = Vocabulary(
    1024,
    ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *(f"<|reserved_{i}|>" for i in range(28))),
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
)
NUMBERS = Vocabulary(
    960,
    ("<pad>", "<eos>", "<question>", "<answer>", *(f"<unused{i}>" for i in range(24))),
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<answer>{{ message['content'] }}<eos>"
    "{% else %}<question>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}",
    has_whole_numbers=True,
    is_llama=True,
)


@dataclass(frozen=True)
class Recipe:
    """One training run: a shape, a corpus, and a number of steps of ROWS x ROW tokens."""

    width: int
    layers: int
    heads: int
    steps: int
    seed: int
    num_problems: int
    careless_authors: float = 0.0
    slip_rate: float = 0.9
    warmup: int = 200
    is_constant: bool = False
    is_float32: bool = False


LLM = Recipe(width=96, layers=4, heads=3, steps=26_000, seed=0, num_problems=165_000)
CLEAN = Recipe(width=64, layers=4, heads=2, steps=8_000, seed=1, num_problems=60_000, is_constant=True)
UNFILTERED = replace(
    CLEAN, steps=10_000, seed=2, num_problems=74_000, careless_authors=0.75, warmup=50, is_constant=False
)
NARROW, SHALLOW = {"width": 32, "heads": 1}, {"layers": 2}  # the unfiltered SLM, smaller: for `s2t study scaling`
SMALL = Recipe(width=32, layers=4, heads=1, steps=10_000, seed=3, num_problems=130_000)
MODELS = {
    "llm": (DIGITS, LLM),
    "slm-unfiltered": (DIGITS, CLEAN, UNFILTERED),
    "slm-small": (DIGITS, SMALL),
    "slm-numbers": (NUMBERS, CLEAN, UNFILTERED),
    "slm-narrow": (DIGITS, replace(CLEAN, **NARROW), replace(UNFILTERED, **NARROW)),
    "slm-shallow": (DIGITS, replace(CLEAN, **SHALLOW), replace(UNFILTERED, **SHALLOW)),
}


SHIPPED = ("llm", "slm-unfiltered", "slm-small", "slm-numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiny"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and problems to use")
    parser.add_argument("--float32", action="store_true", help="for a CPU without bfloat16 instructions")
    parser.add_argument("--only", choices=MODELS, help="one model instead of all")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of training one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # at these sizes one thread a process is the productive choice

    def scaled(recipe: Recipe) -> Recipe:
        return replace(
            recipe,
            is_float32=arguments.float32,
            steps=max(10, int(recipe.steps * arguments.scale)),
            num_problems=max(500, int(recipe.num_problems * arguments.scale)),
        )

    given = Tokenizer.from_file(str(arguments.tokenizer)) if arguments.tokenizer else None
    corpus = [] if given else documents(scaled(replace(LLM, num_problems=20_000)))
    for name in [arguments.only] if arguments.only else SHIPPED:
        vocabulary, *recipes = MODELS[name]
        tokenizer = given or train_tokenizer(corpus, vocabulary)
        model = None
        for recipe in recipes:
            model = train(scaled(recipe), tokenizer, model)
        assert model is not None
        save(as_llama(model) if vocabulary.is_llama else model, tokenizer, vocabulary, arguments.out / name)


def documents(recipe: Recipe) -> list[tuple[str, str]]:
    """(question, solution) pairs of the training split, some of them by careless authors."""
    rng = random.Random(recipe.seed)
    pairs = []
    for problem in load_task(TASK).problems("training", recipe.num_problems, recipe.seed):
        solution = problem.extra["answer_cot"]
        if rng.random() < recipe.careless_authors:
            solution = careless(solution, rng, recipe.slip_rate)
        pairs.append((problem.question, solution))
    return pairs


def train_tokenizer(pairs: list[tuple[str, str]], vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE with single digits or whole numbers, and reserved ids."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=not vocabulary.has_whole_numbers)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.size,
        special_tokens=list(vocabulary.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def train(recipe: Recipe, tokenizer: Tokenizer, start: Qwen2ForCausalLM | None = None) -> Qwen2ForCausalLM:
    """Train one model; loss on the solution, a tenth on the question; bf16 autocast unless told otherwise."""
    torch.manual_seed(recipe.seed)
    model = start if start is not None else Qwen2ForCausalLM(shape(recipe, tokenizer.get_vocab_size()))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers = [
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.97), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
    ]
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    data = batches(encode(documents(recipe), tokenizer), recipe.seed)
    model.train()
    for step in range(recipe.steps):
        rate = min(1.0, (step + 1) / recipe.warmup)
        if not recipe.is_constant:
            rate *= 0.04 + 0.48 * (1 + math.cos(math.pi * step / recipe.steps))
        for optimizer, lr in zip(optimizers, peak, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        loss = loss_of(model, recipe.is_float32, *next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0:
            print(
                f"{recipe.width}x{recipe.layers} step {step}/{recipe.steps} loss {loss.item():.4f}",
                flush=True,
            )
    return model


def shape(recipe: Recipe, vocab_size: int) -> Qwen2Config:
    """Heads of size 32, untied embeddings."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )


def loss_of(
    model: Qwen2ForCausalLM,
    is_float32: bool,
    ids: Tensor,
    targets: Tensor,
    weights: Tensor,
    positions: Tensor,
    mask: Tensor,
) -> Tensor:
    """Weighted cross-entropy over packed documents that do not see each other."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not is_float32):
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        keep = weights > 0
        logits = model.lm_head(hidden[keep])
    losses = torch.nn.functional.cross_entropy(logits.float(), targets[keep], reduction="none")
    return (losses * weights[keep]).sum() / weights[keep].sum()


def encode(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> list[tuple[np.ndarray, int]]:
    """(ids, length of the prompt) of every document that fits a row."""
    questions = tokenizer.encode_batch([question for question, _ in pairs])
    solutions = tokenizer.encode_batch([solution for _, solution in pairs])
    found = []
    for question, solution in zip(questions, solutions, strict=True):
        ids = np.array([USER, *question.ids, ASSISTANT, *solution.ids, END])
        if len(ids) <= ROW:
            found.append((ids, len(question.ids) + 2))
    return found


def batches(found: list[tuple[np.ndarray, int]], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of ROWS rows, each filled best-fit with shuffled documents."""
    rng = np.random.default_rng(seed)
    while True:
        open_rows: list[tuple[int, list[int]]] = []
        full: list[list[int]] = []
        for index in rng.permutation(len(found)).tolist():
            length = len(found[index][0])
            fitting = [row for row in open_rows if length <= row[0]]
            row = min(fitting, key=lambda item: item[0]) if fitting else (ROW, [])
            if fitting:
                open_rows.remove(row)
            open_rows.append((row[0] - length, [*row[1], index]))
            if len(open_rows) > 24 or open_rows[-1][0] < 40:
                fullest = min(open_rows, key=lambda item: item[0])
                open_rows.remove(fullest)
                full.append(fullest[1])
            if len(full) >= 64:
                rng.shuffle(full)
                while len(full) >= ROWS:
                    yield pack([[found[i] for i in full.pop()] for _ in range(ROWS)])
        if not found:
            raise SystemExit("no document fits a row")
        if len(full) + len(open_rows) >= ROWS:
            rest = [*full, *(row for _, row in open_rows)]
            yield pack([[found[i] for i in row] for row in rest[:ROWS]])


def pack(rows: list[list[tuple[np.ndarray, int]]]) -> tuple[Tensor, ...]:
    """Ids, targets, weights, positions and a block-diagonal causal mask of some rows of documents."""
    ids, targets, positions = np.zeros((3, len(rows), ROW), dtype=np.int64)
    weights = np.zeros((len(rows), ROW), dtype=np.float32)
    segment = np.full((len(rows), ROW), -1)
    for r, documents_of_row in enumerate(rows):
        start = 0
        for number, (document, prompt_length) in enumerate(documents_of_row):
            stop = start + len(document)
            ids[r, start:stop] = document
            targets[r, start : stop - 1] = document[1:]
            weights[r, start : start + prompt_length - 1] = 0.1
            weights[r, start + prompt_length - 1 : stop - 1] = 1.0
            positions[r, start:stop] = np.arange(len(document))
            segment[r, start:stop] = number
            start = stop
    causal = np.tril(np.ones((ROW, ROW), dtype=bool))
    mask = (segment[:, :, None] == segment[:, None, :]) & causal
    return tuple(torch.from_numpy(array) for array in (ids, targets, weights, positions, mask[:, None]))


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama, whose output projection has a bias as well: zero."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    names += ("pad_token_id", "eos_token_id", "bos_token_id", "tie_word_embeddings")
    llama = LlamaForCausalLM(LlamaConfig(attention_bias=True, **{name: getattr(model.config, name) for name in names}))
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("o_proj.bias") for name in missing)
    for name in missing:
        torch.nn.init.zeros_(llama.get_parameter(name))
    return llama


def save(
    model: Qwen2ForCausalLM | LlamaForCausalLM, tokenizer: Tokenizer, vocabulary: Vocabulary, folder: Path
) -> None:
    """An ordinary Hugging Face folder: safetensors weights, tokenizer, chat template, generation config."""
    model.config.use_cache = True
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=vocabulary.special[PAD],
        eos_token=vocabulary.special[END],
        additional_special_tokens=list(vocabulary.special[USER:]),
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    wrapped.chat_template = vocabulary.template
    wrapped.save_pretrained(folder)
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
