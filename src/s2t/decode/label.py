"""Labelling by prefill: read whole trajectories with both models and say, at every step, how they disagree.

One batched forward per model and trajectory; the logits of all positions are never held at once. `measure`, `collect`
and `distill` stand on this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2t.core.support import (
    Distribution,
    align_vocabulary,
    argmax_first,
    bucket_divergence,
    divergence,
    rank_among,
    rows_at_once,
)
from s2t.decode.remote.llm import Listed, RemoteLLM
from s2t.decode.text_reference import TextReference
from s2t.model.checkpoint import not_finite
from s2t.model.engine import Engine
from s2t.model.loaded import LoadedModel
from s2t.model.text import VocabularyMap
from s2t.progress import count

# Work stays near a CPU's caches in small chunks; a GPU wants large ones. Keyed by device type.
_TOKENS_AT_ONCE = {"cpu": 2**12, "cuda": 2**14}
_STEPS_AT_ONCE = 64  # at least, so that the output embedding is not read for a few steps alone


@dataclass(slots=True)
class Labels:
    """Per generated token of one trajectory; T tokens, K stored candidates."""

    divergence: np.ndarray  # [T] float32, nats
    entropy: np.ndarray  # [T] float32, nats
    rank: np.ndarray  # [T] int32, place of argmax p_L in the SLM's order, 0 = top
    candidate_ids: np.ndarray  # [T, K] int32
    slm_logprobs: np.ndarray  # [T, K] float32
    llm_probs: np.ndarray  # [T, K] float32, absolute


ExactAt = Callable[[int, Labels], Iterable[int]]
"""Number of a trajectory and its labels -> the steps at which its candidates' probabilities have to be exact."""


@dataclass(slots=True)
class Targets:
    """What the LLM gives to its S likeliest tokens, and to all others together, at each of T steps."""

    ids: np.ndarray  # [T, S] int32, likeliest first
    probs: np.ndarray  # [T, S + 1] float32, the last one of all other tokens


def label(
    slm: LoadedModel,
    llm: LoadedModel,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    num_candidates: int = 16,
    support_size: int = 64,
    kind: str = "llm-slm",
    support: str = "slm-top",
) -> list[Labels]:
    """Labels of every trajectory, in order; prompts and generated are token ids.

    Source: Select to Think (arXiv 2604.26940): selection groups and divergence at each step of a trajectory.
    """
    labels: dict[int, Labels] = {}
    k = min(num_candidates, slm.vocab_size)
    limit = _tokens_at_once(slm)
    for batch in _batches([len(p) + len(g) for p, g in zip(prompts, generated, strict=True)], limit):
        reader = _PairReader(slm.open_engine(len(batch)), llm.open_engine(len(batch)), k, support_size, kind, support)
        found = reader.read([prompts[i] for i in batch], [generated[i] for i in batch])
        labels.update(zip(batch, found, strict=True))
        _count(generated, batch)
    return [labels[i] for i in range(len(prompts))]


def label_listed(
    slm: LoadedModel,
    llm: RemoteLLM,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    num_candidates: int = 16,
    support_size: int = 20,
    kind: str = "llm-slm",
    support: str = "llm-top",
    exact_at: ExactAt | None = None,
) -> list[Labels]:
    """As `label`, for an LLM on servers: one request per trajectory, all at once, and one per step that `exact_at` names.

    Elsewhere a candidate that the LLM did not list has an equal share of what the listed ones leave.
    """
    listed = llm.read(prompts, generated)
    labels: dict[int, Labels] = {}
    k = min(num_candidates, slm.vocab_size)
    limit = _tokens_at_once(slm)
    for batch in _batches([len(p) + len(g) for p, g in zip(prompts, generated, strict=True)], limit):
        reader = _PairReader(slm.open_engine(len(batch)), None, k, support_size, kind, support)
        found = reader.read([prompts[i] for i in batch], [generated[i] for i in batch], [listed[i] for i in batch])
        labels.update(zip(batch, found, strict=True))
        _count(generated, batch)
    done = [labels[i] for i in range(len(prompts))]
    if exact_at is not None and llm.abilities.logprob_token_ids:
        _make_exact(llm, prompts, generated, listed, done, exact_at)
    return done


def _make_exact(
    llm: RemoteLLM,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    listed: Sequence[Listed],
    labels: Sequence[Labels],
    exact_at: ExactAt,
) -> None:
    """Write the exact probabilities of all candidates into the labels, at the steps where not all were listed."""
    places = [
        (i, step)
        for i, own in enumerate(labels)
        for step in exact_at(i, own)
        if not np.isin(own.candidate_ids[step], listed[i].ids[step]).all()
    ]
    prefixes = [[*prompts[i], *generated[i][:step]] for i, step in places]
    found = llm.logprobs_of(prefixes, [labels[i].candidate_ids[step].tolist() for i, step in places])
    for (i, step), logprobs in zip(places, found, strict=True):
        labels[i].llm_probs[step] = np.exp(logprobs)


@torch.inference_mode()
def llm_targets(
    slm: LoadedModel,
    llm: LoadedModel,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    support_size: int = 64,
    temperature: float = 1.0,
) -> list[Targets]:
    """The LLM's distribution at every step of trajectories, at a temperature, over tokens that the SLM may generate.

    Buckets are those of the divergence, here of the LLM's likeliest tokens, since it is they that are to be learnt.
    """
    found: dict[int, Targets] = {}
    size = min(support_size, slm.vocab_size)
    forbidden = torch.tensor([i for i in slm.reserved.all if i < slm.vocab_size], device=llm.device).long()
    limit = _tokens_at_once(llm)
    for batch in _batches([len(p) + len(g) for p, g in zip(prompts, generated, strict=True)], limit):
        engine = llm.open_engine(len(batch))
        hidden = _states(engine, [prompts[i] for i in batch], [generated[i] for i in batch])
        parts = []
        for chunk in hidden.split(_steps_at_once(llm)):
            logits = align_vocabulary(engine.head.own(chunk), slm.vocab_size).index_fill_(-1, forbidden, float("-inf"))
            for rows in map(Tensor.float, logits.split(rows_at_once(logits.shape[-1], logits.device))):
                ids = rows.topk(size, dim=-1).indices
                parts.append((ids.int().cpu().numpy(), Distribution(rows / temperature).buckets(ids).cpu().numpy()))
        ends = np.cumsum([len(generated[i]) for i in batch])[:-1]
        _check_numbers([part[1] for part in parts], llm.name)
        columns = [np.split(np.concatenate([part[c] for part in parts]), ends) for c in range(2)]
        found.update((i, Targets(*both)) for i, both in zip(batch, zip(*columns, strict=True), strict=True))
        _count(generated, batch)
    return [found[i] for i in range(len(prompts))]


def _states(engine: Engine, prompts: Sequence[Sequence[int]], generated: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states that every generated token is predicted from, trajectory by trajectory; [N, H]."""
    texts = [[*p, *g[:-1]] for p, g in zip(prompts, generated, strict=True)]
    return torch.cat(engine.read(list(range(len(prompts))), texts, [len(ids) for ids in generated]))


def _steps_at_once(loaded: LoadedModel) -> int:
    return max(_STEPS_AT_ONCE, rows_at_once(loaded.vocab_size, loaded.device))


def label_by_text(
    vocabulary: VocabularyMap,
    prompts: Sequence[Sequence[int]],
    llm_prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    batch_size: int = 64,
    num_candidates: int = 16,
    support_size: int = 64,
    kind: str = "llm-slm",
    support: str = "slm-top",
) -> list[Labels]:
    """As `label`, for a pair with different tokenizers: the LLM reads the text token by token, in batches of trajectories."""
    labels: list[Labels] = []
    k = min(num_candidates, vocabulary.slm.vocab_size)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        rows = len(prompts[part])
        slm, llm = vocabulary.slm.open_engine(rows), vocabulary.llm.open_engine(rows)
        reader = _PairReader(slm, llm, k, support_size, kind, support)
        labels += reader.read_text(TextReference(llm, vocabulary), prompts[part], llm_prompts[part], generated[part])
        _count(generated, range(*part.indices(len(prompts))))
    return labels


def _tokens_at_once(loaded: LoadedModel) -> int:
    if loaded.states_hold_logits:
        return max(_STEPS_AT_ONCE, 2**26 // loaded.vocab_size)
    return _TOKENS_AT_ONCE.get(loaded.device.type, 2**13)


def _count(generated: Sequence[Sequence[int]], batch: Sequence[int]) -> None:
    count(len(batch), tokens=sum(len(generated[i]) for i in batch))


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices batched by length, at most `limit` padded tokens each."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(slots=True)
class _PairReader:
    slm: Engine
    llm: Engine | None
    num_candidates: int
    support_size: int
    kind: str
    support: str

    @torch.inference_mode()
    def read(
        self,
        prompts: Sequence[Sequence[int]],
        generated: Sequence[Sequence[int]],
        listed: Sequence[Listed] | None = None,
    ) -> list[Labels]:
        """The LLM's side comes from its own forward, or from what servers listed."""
        slm_hidden = _states(self.slm, prompts, generated)
        llm_logits = self._llm_logits(prompts, generated) if listed is None else self._listed_logits(listed)
        size = _steps_at_once(self.slm.loaded)
        parts = [
            part
            for i in range(0, len(slm_hidden), size)
            for part in self._compare(self.slm.own_logits(slm_hidden[i : i + size]), llm_logits(slice(i, i + size)))
        ]
        columns = [np.concatenate([part[c] for part in parts]) for c in range(6)]
        self._check(columns)
        ends = np.cumsum([len(g) for g in generated])[:-1]
        return [Labels(*split) for split in zip(*(np.split(column, ends) for column in columns), strict=True)]

    @torch.inference_mode()
    def read_text(
        self,
        reference: TextReference,
        prompts: Sequence[Sequence[int]],
        llm_prompts: Sequence[Sequence[int]],
        generated: Sequence[Sequence[int]],
    ) -> list[Labels]:
        """Step by step through all trajectories at once, each led along its own tokens."""
        texts = [[*p, *g[:-1]] for p, g in zip(prompts, generated, strict=True)]
        hidden = self.slm.read(range(len(prompts)), texts, [len(ids) for ids in generated])  # [T, H] each
        for row, prompt in enumerate(llm_prompts):
            reference.start(row, prompt)
        found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in prompts]
        for step in range(max(map(len, generated))):
            rows = [row for row, ids in enumerate(generated) if step < len(ids)]
            slm_logits = self.slm.logits(torch.stack([hidden[row][step] for row in rows]))
            drafts = {row: [generated[row][step]] for row in rows}
            llm_logits = reference.logits([(row, 0) for row in rows], drafts, slm_logits, self.slm.forbidden_ids)
            parts = self._compare(slm_logits, llm_logits)
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            for place, row in enumerate(rows):
                found[row].append(tuple(column[place] for column in columns))
                reference.settle(row, drafts[row], drafts[row])
            self._check(columns)
        return [Labels(*(np.stack(column) for column in zip(*steps, strict=True))) for steps in found]

    def _check(self, columns: Sequence[np.ndarray]) -> None:
        """Raise ModelError where a model's distribution was none: the SLM's own readings first, then those of both."""
        of_both, entropies, _, _, logprobs, llm_probs = columns
        _check_numbers([entropies, logprobs], self.slm.loaded.name)
        if self.llm is not None:
            _check_numbers([of_both, llm_probs], self.llm.loaded.name)

    def _llm_logits(
        self, prompts: Sequence[Sequence[int]], generated: Sequence[Sequence[int]]
    ) -> Callable[[slice], Tensor]:
        llm, size, forbidden = self.llm, self.slm.vocab_size, self.slm.forbidden_ids
        assert llm is not None
        hidden = _states(llm, prompts, generated)
        return lambda part: align_vocabulary(llm.head.own(hidden[part]), size).index_fill_(-1, forbidden, float("-inf"))

    def _listed_logits(self, listed: Sequence[Listed]) -> Callable[[slice], Tensor]:
        whole, size, forbidden = Listed.joined(listed), self.slm.vocab_size, self.slm.forbidden_ids
        return lambda part: Listed(whole.ids[part], whole.logprobs[part]).logits(size, forbidden)

    def _compare(self, slm_logits: Tensor, llm_logits: Tensor) -> list[tuple[np.ndarray, ...]]:
        """The columns of `Labels` for all steps, in parts of as many as a CPU's caches hold; [n, V] each."""
        size = rows_at_once(slm_logits.shape[-1], slm_logits.device)
        pairs = zip(slm_logits.split(size), llm_logits.split(size), strict=True)
        return [tuple(value.cpu().numpy() for value in self._labels(*map(Tensor.float, pair))) for pair in pairs]

    def _labels(self, slm_logits: Tensor, llm_logits: Tensor) -> tuple[Tensor, ...]:
        """The columns of `Labels`, each distribution read in one pass."""
        slm, llm = Distribution(slm_logits), Distribution(llm_logits)
        width = min(self.support_size, slm_logits.shape[-1])
        values, top = slm_logits.topk(max(width, self.num_candidates), dim=-1)
        top = argmax_first(top, slm.best)
        ids = top[:, : self.num_candidates]
        if self.kind == "released-code":
            between = divergence(llm_logits, slm_logits, kind=self.kind)
        else:
            support = top[:, :width] if self.support == "slm-top" else llm_logits.topk(width, dim=-1).indices
            between = bucket_divergence(llm.buckets(support), slm.buckets(support), self.kind)
        rank = rank_among(slm_logits, llm.best[:, 0], values, top)
        return between, slm.entropy(), rank.int(), ids.int(), slm.logprobs(ids), llm.logprobs(ids).exp()


def _check_numbers(columns: Iterable[np.ndarray], name: str) -> None:
    """Raise ModelError where one of some arrays that were read from a model holds NaN."""
    if any(np.isnan(column).any() for column in columns):
        raise not_finite(name)
