"""S2T-LOCAL inside a vLLM server: a logits processor that requests of `s2t` ask for, and that leaves all others alone.

    vllm serve FOLDER --logits-processors s2t.integrations.vllm:SelectToThink

Needs torch and vLLM alone, so that `s2t` may be on the path of vLLM's environment (PYTHONPATH) without its other requirements.
Where `s2t` is installed beside vLLM, the entry point (group vllm.logits_processors) loads it without the option. The work is
`core.insampler`'s; here are vLLM's two interfaces, that of the V1 model runner and that of the V2 one.
"""

# vLLM lives in an environment of its own.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from s2t.core.insampler import Plugin, SelectingRequest
from s2t.core.onserver import READING

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2
except ImportError:  # a vLLM that has no V2 runner, or whose V2 runner takes no processors

    class LogitsProcessorV2:
        """Nothing."""


if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class SelectToThink(LogitsProcessor, LogitsProcessorV2):
    """Ends requests at triggers, passes triggers that change nothing, and picks winners; see `core.insampler`.

    V1 keeps rows by their place in the batch, V2 by their slot: `where` is (device, is_pin_memory) or the runner's state.
    """

    _last: ClassVar[weakref.ref[SelectToThink] | None] = None

    def __init__(self, vllm_config: VllmConfig, *where: Any) -> None:
        last = SelectToThink._last() if SelectToThink._last is not None else None
        self.config = vllm_config
        self.is_spare = last is not None and last.config is vllm_config  # by entry point and by option
        SelectToThink._last = weakref.ref(self)
        self.plugin = Plugin(vllm_config.model_config.get_vocab_size())
        self.rows: dict[int, tuple[SelectingRequest, list[int]]] = {}
        self.prompt_lens = where[0].prompt_len if len(where) == 1 else None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what is no reading of a selector."""
        args = sampling_params.extra_args
        if args and READING in args:
            Plugin(2**31).new_row(args)

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """One step of the rows that ask."""
        if not self.rows:
            return logits
        if ctx is None:
            return self.plugin.apply(logits, self._places(), self._note_last())
        return self.plugin.apply(logits, list(self._places_of(ctx)))

    # V1

    def _places(self) -> list[tuple[int, SelectingRequest, int]]:
        return [(index, row, len(output)) for index, (row, output) in self.rows.items()]

    def _note_last(self) -> bool:
        """Tell the rows what was written last; False where vLLM does not know it yet."""
        lasts = [output[-1] for _, output in self.rows.values() if output]
        if not lasts or min(lasts) < 0:
            return False
        for row, output in self.rows.values():
            if output:
                row.last = output[-1]
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows through the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            self._add(index, params, output)
        for source, target, direction in batch_update.moved:
            moved, other = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = other

    def _add(self, index: int, params: SamplingParams, output: list[int]) -> bool:
        self.rows.pop(index, None)
        row = None if self.is_spare else self.plugin.new_row(params.extra_args, len(output))
        if row is not None:
            self.rows[index] = (row, output)
        return row is not None

    # V2

    def _places_of(self, ctx: Any) -> Iterable[tuple[int, SelectingRequest, int]]:
        assert self.prompt_lens is not None
        for index, slot in enumerate(ctx.idx_mapping_np.tolist()):
            if slot in self.rows:
                written = int(ctx.seq_lens_upper_bound_np[index]) - int(self.prompt_lens.np[slot])
                if written >= 0:  # else the prompt is still being read
                    yield index, self.rows[slot][0], written

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request enters a slot."""
        return self._add(req_idx, sampling_params, [])
