"""Settings to models: `open_pair` is the only place where models are opened to be written with, and what they lack is said here.

It loads what some strategies need and no more: an LLM that none of them reads is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from s2t.config import METHODS, ChatConfig, EngineConfig, ModelConfig, RemoteConfig, ServedConfig, needs_of
from s2t.decode.pair import Pair
from s2t.decode.remote.llm import RemoteLLM, remote_settings
from s2t.decode.remote.selector import check_served
from s2t.decode.remote.served import ServedSLM
from s2t.errors import ConfigError
from s2t.model.gguf.opening import open_model, open_selector
from s2t.model.load import load_without_weights
from s2t.model.loaded import LoadedModel
from s2t.model.merged import is_merged, local_folder
from s2t.model.outline import load_outline
from s2t.progress import note

_ROWS = 64  # of commands that have no batch size


def open_pair(config: ModelConfig, strategies: Sequence[str] | None = None, with_llm: bool | None = None) -> Pair:
    """The models that some strategies need, loaded or found on their servers, and checked to fit together.

    Without strategies it is whatever the settings name. `with_llm` says whether the LLM is opened, whatever they need: to
    label, to teach. Adapter, batch size, servers and template variables are those of the settings where these have them.

    Raises ConfigError, ModelError or RemoteError, one line, for what is missing or does not fit; what can be told from the
    settings alone before anything is loaded.
    """
    names = tuple(strategies or ())
    needs = needs_by_name(config, names)
    needed = frozenset().union(*needs.values())
    is_read = with_llm is True or any("llm" in found for name, found in needs.items() if name != "llm")
    if with_llm is None:
        has_llm = config.llm is not None or (isinstance(config, RemoteConfig) and bool(config.llm_urls))
        with_llm = has_llm if strategies is None else "llm" in needed
    check_needs(config, names, with_llm)
    if isinstance(config, ServedConfig) and config.slm_urls:
        return _open_served(config, [name.partition("@")[0] for name in names])
    slm = open_model(config.slm, config.load_options, **_engine(config), adapter=_adapter(config))
    has_selector = strategies is None or "adapter" in needed
    adapter = open_selector(_adapter(config), slm) if has_selector else None
    llm = open_llm(config) if with_llm else None
    rows, variables = getattr(config, "batch_size", _ROWS), _variables(config)
    pair = Pair(slm, llm, adapter, rows, reads_bare="bare" in needed, variables=variables)
    _ = pair.vocabulary  # raises for two models that cannot be mapped
    if is_read:
        pair.check_tokens()
    note_unread(pair.variables, [slm, *([llm] if llm is not None else [])])
    return pair


def open_llm(config: ModelConfig) -> LoadedModel | RemoteLLM:
    """The LLM that the settings name: on its servers where it has some (no weights are loaded, and a line on stderr says what
    they can tell), else in this process.
    """
    assert config.llm is not None, "check_needs comes first"
    if not isinstance(config, RemoteConfig) or not config.llm_urls:
        return open_model(config.llm, config.llm_load_options, **_engine(config))
    outline = load_outline(config.llm, config.llm_revision, config.trust_remote_code)
    llm = RemoteLLM.open(outline, remote_settings(config))
    note(f"LLM {llm.name} at {', '.join(config.llm_urls)}: {llm.abilities.note()}")
    return llm


def _open_served(config: ServedConfig, strategies: Sequence[str]) -> Pair:
    """An SLM on servers, for `greedy` and `s2t-local`; loads no weights."""
    assert isinstance(config, ModelConfig)
    if (adapter := _adapter(config)) is not None:
        raise ConfigError(
            f"a server runs what `s2t merge` writes: s2t merge --adapter {adapter} --out FOLDER; serve it, pass it as --slm."
        )
    names = strategies or (["s2t-local"] if is_merged(local_folder(config.slm, config.revision)) else ["greedy"])
    check_served(names)
    slm = load_without_weights(config.slm, config.revision, config.trust_remote_code)
    served = ServedSLM.connect(slm, remote_settings(config, config.slm_urls), config.slm_lora, "s2t-local" in names)
    batch_size = getattr(config, "batch_size", _ROWS)
    return Pair(slm, batch_size=batch_size, served_slm=served, variables=_variables(config))


def _engine(config: ModelConfig) -> dict[str, Any]:
    """What runs GGUF files, where the settings say it; torch for commands that read more than llama.cpp tells."""
    return config.engine_options if isinstance(config, EngineConfig) else {}


def _adapter(config: ModelConfig) -> str | None:
    return getattr(config, "adapter", None)


def _variables(config: ModelConfig) -> dict[str, Any]:
    return config.template_variables if isinstance(config, ChatConfig) else {}


def note_unread(variables: Mapping[str, Any], models: Sequence[LoadedModel | RemoteLLM]) -> None:
    """Say on stderr which variables no chat template of these models reads: a slip in a name would change nothing."""
    templates = " ".join(str(model.tokenizer.chat_template or "") for model in models)
    if unread := [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", templates)]:
        note(f"the chat template of {models[0].name} does not read {', '.join(unread)}; the prompts are as without.")


def check_needs(config: ModelConfig, strategies: Sequence[str], with_llm: bool = False) -> None:
    """Raise ConfigError where strategies need an LLM or an adapter and the settings name none; loads nothing."""
    needs = needs_by_name(config, strategies)
    names = ", ".join(dict.fromkeys(_who(name, "llm") for name, found in needs.items() if "llm" in found))
    if config.llm is None and (names or with_llm):
        hint = " (its tokenizer, beside --llm-url)" if isinstance(config, RemoteConfig) and config.llm_urls else ""
        raise ConfigError(f"{f'strategy {names}' if names else 'this'} needs the LLM; pass --llm MODEL{hint}.")
    lacking = [_who(name, "adapter") for name, found in needs.items() if "adapter" in found]
    has_none = getattr(config, "adapter", None) is None
    if lacking and has_none and not is_merged(local_folder(config.slm, config.revision)):
        others = ",".join(name for name, found in needs.items() if "adapter" not in found) or "greedy"
        hint = f"; without one: --strategies {others}" if hasattr(config, "strategies") else ""
        raise ConfigError(f"strategy {', '.join(lacking)} needs --adapter, a folder written by `s2t train`{hint}.")


def needs_by_name(config: ModelConfig, strategies: Sequence[str]) -> dict[str, frozenset[str]]:
    """What each strategy, or strategy@trigger, reads beside the SLM, by name."""
    return {name: needs_of(name, str(getattr(config, "trigger", "auto"))) for name in strategies}


def _who(name: str, need: str) -> str:
    """Who needs something: the strategy, or the strategy with its trigger where it is the trigger that does."""
    base = name.partition("@")[0]
    return base if need in METHODS[base].needs else name
