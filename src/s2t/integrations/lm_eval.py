"""`s2t` as a model of lm-evaluation-harness: generation by a strategy, log-likelihoods of the base model.

lm-eval releases after 0.4.13 find it by an entry point: `lm_eval --model s2t --model_args slm=...,adapter=... --tasks ...`.
For earlier ones this module is the same command with the model registered: `python -m s2t.integrations.lm_eval --model
s2t ...`. Knows nothing of tasks or scores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from s2t.errors import ConfigError, ModelError, S2TError, missing_extra

try:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    raise missing_extra("lm_eval", "lm-eval") from error

from s2t.api import Generation, load
from s2t.config import MANY_SAMPLES, ChatConfig, ModelConfig
from s2t.model.chat import decode_ids, encode
from s2t.model.stops import cut
from s2t.model.template import render

NAME = "s2t"
_Base: Any = HFLM  # its decorator is untyped
_SAMPLED = ("sample", *MANY_SAMPLES)
_FILTERS = ("temperature", "top_p", "top_k", "min_p")
_PASSED_ON = (
    "max_length",
    "add_bos_token",
    "prefix_token_id",
    "chat_template_args",
    "enable_thinking",
    "think_end_token",
)
_DEFAULT_ROWS = 64
_BATCHES_AT_ONCE = 16  # between two updates of the progress bar and of lm-eval's cache


class S2TLM(_Base):
    """A model of `lm_eval --model s2t`; model arguments are the settings of `s2t.load` and `Reasoner.generate`.

    `loglikelihood` and `loglikelihood_rolling` are HFLM's own, on the base model (an adapter is off there).
    `generate_until` writes with the strategy, `batch_size` rows at once. A task that asks for sampling needs strategy
    sample, self-consistency or self-certainty. Raises ConfigError or ModelError, one line, for what does not fit.
    """

    def __init__(
        self,
        slm: str = "tiny:slm",
        strategy: str | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        passed_on = {name: settings.pop(name) for name in _PASSED_ON if name in settings}
        loading = {item.name for config in (ModelConfig, ChatConfig) for item in fields(config)} | {"adapter"}
        given = {name: value for name, value in settings.items() if name in loading}
        self.settings = {name: value for name, value in settings.items() if name not in loading}
        if self.settings.get("system") is not None:
            raise ConfigError("system is given to lm-eval: --system_instruction TEXT --apply_chat_template.")
        if device not in (None, "cuda:0"):  # what lm-eval passes when nobody asked for a device; ours is auto
            given["device"] = device
        self.reasoner = load(slm, **given)
        pair = self.reasoner.pair
        self.strategy = strategy or pair.default_strategy
        self.seed = seed
        self.reasoner.check(self.strategy, **self.settings)
        super().__init__(
            pretrained=pair.slm.model,
            tokenizer=pair.slm.tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size or _DEFAULT_ROWS,
            **passed_on,
        )
        self.pretrained, self.revision = slm, given.get("revision") or "main"
        self._is_templated = False

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self.reasoner.pair.adapter
        if adapter is not None:
            adapter.act(False)
        return super()._model_call(*args, **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the model's chat template writes them; a system message goes where the template takes it."""
        if self.tokenizer.chat_template is None:
            raise ModelError(f"{self.pretrained} has no chat template; run without --apply_chat_template.")
        self._is_templated = True
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        told = self.reasoner.pair.variables | self.chat_template_args
        return render(self.tokenizer, chat_history, **(told | options))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts for (context, generation arguments) pairs, in order; requests with the same arguments run together."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for places in self._together(requests):
                arguments = requests[places[0]].args[1]
                texts = self._generate([requests[i].args[0] for i in places], arguments)
                for i, text in zip(places, texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", (requests[i].args[0], arguments), text)
                bar.update(len(places))
        return answers

    def _together(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Places of requests that can be written in one go; samples of equal prompts have to be, to differ."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        for places in groups.values():
            size = len(places) if self.strategy in _SAMPLED else self._rows * _BATCHES_AT_ONCE
            yield from (places[at : at + size] for at in range(0, len(places), size))

    @property
    def _rows(self) -> int:
        return self.batch_size if isinstance(self.batch_size, int) else int(self.max_batch_size)

    def _generate(self, contexts: Sequence[str], arguments: dict[str, Any]) -> list[str]:
        settings = self._settings_of(arguments)
        room = self.max_length - settings["max_new_tokens"]
        if room < 1:
            raise ConfigError(
                f"max_gen_toks must be below {self.max_length} (the model's length); got {settings['max_new_tokens']}; "
                "pass --gen_kwargs max_gen_toks=N."
            )
        prompts = [self._context_ids(context)[-room:] for context in contexts]
        if self.think_end_token is None:
            return [
                answer.text for answer in self.reasoner.complete(prompts, self.strategy, seed=self.seed, **settings)
            ]
        stops = settings.pop("stop")  # they are the answer's, and must not end a thought
        done = self.reasoner.complete(prompts, self.strategy, seed=self.seed, **settings)
        return [cut(self._behind_thought(answer), stops) for answer in done]

    def _behind_thought(self, done: Generation) -> str:
        """What was written behind the last end of a thought; of thinking that was asked for and never ended, nothing."""
        mark: str | int | None = self.think_end_token
        pair, ids = self.reasoner.pair, done.token_ids
        tokenizer: Any = pair.tokenizer_of(self.strategy)
        named = tokenizer.get_added_vocab().get(mark) if isinstance(mark, str) else mark
        if named in ids:  # a special token is no text, so it is looked for by its id
            behind = ids[len(ids) - ids[::-1].index(named) :]
            is_ended = done.finish_reason == "stop" and behind[-1:] and behind[-1] in pair.stop_ids_of(self.strategy)
            return decode_ids(tokenizer, behind[:-1] if is_ended else behind).lstrip()
        _, found, answer = done.text.rpartition(mark) if isinstance(mark, str) else ("", "", done.text)
        if not found:
            return "" if self.enable_thinking else done.text
        return answer.lstrip()

    def _context_ids(self, context: str) -> list[int]:
        """Ids of a context; the BOS a tokenizer adds is added to plain text, and to nothing that has one or a template."""
        bos = self.tokenizer.bos_token
        adds = self.add_bos_token is not False and not (self._is_templated or (bos and context.startswith(bos)))
        return encode(self.tokenizer, context, add_special_tokens=adds) or [self.prefix_token_id]

    def _settings_of(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A task's generation arguments as settings of `Reasoner.complete`."""
        default = self.settings.get("max_new_tokens", self.max_gen_toks)
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(arguments, default))
        settings = self.settings | {"max_new_tokens": wanted["max_gen_toks"], "batch_size": self._rows}
        own = self.settings.get("stop", [])
        until = [text for text in wanted["until"] if text]
        settings["stop"] = [*until, *([own] if isinstance(own, str) else own)]
        if wanted["do_sample"] and wanted.get("temperature", 0) > 0:
            if self.strategy not in _SAMPLED:
                raise ConfigError(
                    f"the task samples at temperature {wanted['temperature']}, and strategy {self.strategy} does not; pass "
                    "--gen_kwargs do_sample=False,temperature=0, or strategy=sample in --model_args."
                )
            settings |= {name: wanted[name] for name in _FILTERS if name in wanted}
        return settings


def register() -> None:
    """Make `s2t` a model name of this process's lm-eval, where no entry point did so already."""
    import lm_eval.models  # noqa: F401  (lm-eval registers its own models only where it finds none)
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="s2t.integrations.lm_eval:S2TLM")


def main() -> int:
    """The `lm_eval` command with the model registered; an error of ours is one line."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except S2TError as error:
        print(f"s2t: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
