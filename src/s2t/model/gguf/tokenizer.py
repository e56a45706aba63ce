"""The tokenizer and chat template that stand in a GGUF file, as transformers has them.

Byte-level BPE (Qwen, Llama 3, SmolLM, Mistral Nemo, GPT-2) is built here, in a second or two; other kinds by transformers' own
converter, which is slower. A file that carries the Hugging Face tokenizer itself gives that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from s2t.model.gguf.file import Header

WHOLE = "tokenizer.huggingface.json"  # the field of the GGUF format for a whole tokenizer.json
_CONTROL, _USER_DEFINED = 3, 4
_SPLITS = {
    "qwen2": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"""
    r"""\s+(?!\S)|\s+""",
    "llama-bpe": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"""
    r"""\s+(?!\S)|\s+""",
    "tekken": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"""
    r"""[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}
_SPLITS["deepseek-r1-qwen"] = _SPLITS["qwen2"]
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_PLAIN = ("gpt-2", "phi-2", "default", "olmo")
_IGNORE_MERGES = ("llama-bpe", "tekken")


def load_tokenizer(header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template; raises what transformers raises for a kind that it cannot read."""
    fields = header.fields
    if WHOLE in fields:
        return _wrapped(Tokenizer.from_str(fields[WHOLE]), fields)
    if fields.get("tokenizer.ggml.model") == "gpt2" and _pre_tokenizer(fields) is not None:
        return _wrapped(_byte_level(fields), fields)
    return AutoTokenizer.from_pretrained(str(header.path.parent), gguf_file=header.path.name)


def _pre_tokenizer(fields: dict[str, Any]) -> Callable[[], Any] | None:
    """What cuts a text before merges, by the name that the file gives it; None for a name that is not known here."""
    name = fields.get("tokenizer.ggml.pre", "default")
    level = pre_tokenizers.ByteLevel
    if name in _SPLITS:
        cut = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
        return lambda: pre_tokenizers.Sequence([cut, level(add_prefix_space=False, use_regex=False)])
    if name in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return lambda: pre_tokenizers.Sequence([digits, level(add_prefix_space=False, use_regex=True)])
    return (lambda: level(add_prefix_space=False, use_regex=True)) if name in _PLAIN else None


def name_of_pre_tokenizer(tokenizer: Any) -> str | None:
    """The name that a GGUF file gives to how this byte-level tokenizer cuts and normalizes a text; None where it has none."""
    own = json.loads(tokenizer.to_str())
    for name in (*_SPLITS, _DIGITS[0], _PLAIN[0]):
        made = _byte_level({"tokenizer.ggml.tokens": [], "tokenizer.ggml.merges": [], "tokenizer.ggml.pre": name})
        other = json.loads(made.to_str())
        if all(_plain(own.get(part)) == _plain(other.get(part)) for part in ("normalizer", "pre_tokenizer")):
            is_same = bool(own["model"].get("ignore_merges")) == bool(other["model"].get("ignore_merges"))
            return name if is_same else None
    return None


def _plain(part: Any) -> Any:
    """Without what changes no token: whether offsets are trimmed, and a sequence of one part."""
    if not isinstance(part, dict):
        return part
    inner = part.get("pretokenizers") or part.get("normalizers")
    if inner and len(inner) == 1:
        return _plain(inner[0])
    kept = {key: value for key, value in part.items() if key != "trim_offsets"}
    return kept | ({"pretokenizers": [_plain(item) for item in inner]} if inner else {})


def _byte_level(fields: dict[str, Any]) -> Tokenizer:
    split = _pre_tokenizer(fields)
    assert split is not None
    tokens, name = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.pre")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    model = BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=name in _IGNORE_MERGES)
    tokenizer: Any = Tokenizer(model)
    if name in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = split(), decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", ())
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            is_control = kind == _CONTROL
            added = [AddedToken(token, special=is_control, normalized=False)]
            _ = tokenizer.add_special_tokens(added) if is_control else tokenizer.add_tokens(added)
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token", name == "llama-bpe") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _wrapped(tokenizer: Tokenizer, fields: dict[str, Any]) -> PreTrainedTokenizerBase:
    """As transformers has it: with the names of its special tokens, and the chat template."""
    names = {"eos_token": "eos_token_id", "bos_token": "bos_token_id", "pad_token": "padding_token_id"}
    tokens = fields.get("tokenizer.ggml.tokens", ())
    found = {name: fields.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
    special = {name: tokens[i] for name, i in found.items() if i is not None and i < len(tokens)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def stop_ids_of(header: Header) -> list[int]:
    """Ids that end a text by the file's own word: its end of sequence, and of a turn where it names one."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [header.fields.get(f"tokenizer.ggml.{key}") for key in keys]
    return sorted({i for i in found if isinstance(i, int)})
