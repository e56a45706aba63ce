"""The processor as vLLM drives it, with vLLM's interface stood in for; real servers are in tests/vllm."""

from __future__ import annotations

import enum
import importlib
import sys
import types
from dataclasses import replace

import pytest
import torch

from s2t.core.onserver import GROUP, RANKED, READING, ROOM, ROWS, SelectorSettings, read

V, STOP = 64, 5
HOW = SelectorSettings(tuple(range(40, 56)), (56, 57), 0.5, 0.5, 1.0, 4, (STOP,), ((40, 58),))


class Update:
    def __init__(self, added=(), removed=(), moved=()):
        self.added, self.removed, self.moved = added, removed, moved


class Params:
    def __init__(self, args):
        self.extra_args = args


@pytest.fixture
def plugin(monkeypatch):
    names = ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].LogitsProcessor = type("LogitsProcessor", (), {})
    modules[names[-1]].MoveDirectionality = enum.Enum("MoveDirectionality", "UNIDIRECTIONAL SWAP")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "s2t.integrations.vllm", raising=False)
    found = importlib.import_module("s2t.integrations.vllm")
    monkeypatch.delitem(sys.modules, "s2t.integrations.vllm")
    return found


def config():
    model = types.SimpleNamespace(get_vocab_size=lambda: V)
    return types.SimpleNamespace(model_config=model)


def logits_after(ids, fires=False):
    row = torch.randn(V, generator=torch.Generator().manual_seed(sum(ids) * 7 + len(ids)))
    row[56], row[57] = (9.0, 0.0) if fires else (0.0, 9.0)
    return row


def greedy(prompt, room):
    ids = []
    while len(ids) < room and STOP not in ids:
        row = logits_after([*prompt, *ids])
        row[40:58] = float("-inf")
        ids.append(int(row.argmax()))
    return ids


@pytest.mark.parametrize("knows", [True, False], ids=["tokens known", "placeholders"])
def test_a_row_writes_whether_or_not_vllm_knows_its_last_token(plugin, knows):
    processor, shown, out = plugin.SelectToThink(config(), "cpu", False), [], []
    processor.update_state(Update(added=[(0, Params({READING: HOW.to_json(), ROOM: 12}), [1, 2], shown)]))
    while not out or out[-1] not in HOW.marks:
        batch = torch.stack([logits_after([1, 2, *out]), logits_after([8])])
        untouched = batch[1].clone()
        processor.apply(batch)
        assert torch.equal(batch[1], untouched)
        out.append(int(batch[0].argmax()))
        shown.append(out[-1] if knows else -1)  # asynchronous scheduling shows what it has not read yet as -1
    told = read(out, HOW, 12)
    assert not told.is_lost and told.ids == greedy([1, 2], 12)


@pytest.mark.parametrize("knows", [True, False], ids=["tokens known", "placeholders"])
def test_a_row_under_the_lora_ranks_what_a_row_of_the_base_has_kept(plugin, knows):
    how = replace(HOW, ranks=True, temperature=1.0, prior_weight=0.0)
    processor = plugin.SelectToThink(config(), "cpu", False)

    def run(prompt, args, logits_of):
        out, shown = [], []
        params = Params({READING: how.to_json(), GROUP: "text"} | args)
        processor.update_state(Update(added=[(0, params, prompt, shown)]))
        while not out or out[-1] not in how.marks:
            batch = logits_of([*prompt, *out])[None].clone()
            processor.apply(batch)
            out.append(int(batch[0].argmax()))
            shown.append(out[-1] if knows else -1)
        processor.update_state(Update(removed=[0]))
        return out

    told = read(run([1, 2], {ROOM: 6}, lambda ids: logits_after(ids, len(ids) in (3, 5))), how, 6)
    assert told.ids == greedy([1, 2], 6) and told.passed == {1, 3}
    for place in sorted(told.passed):
        prefix = [1, 2, *told.ids[:place]]
        base, adapted = logits_after(prefix), logits_after([*prefix, 33])
        base[40:58] = float("-inf")
        candidates = base.topk(4).indices
        wanted = int(adapted[candidates].argmax())
        row = read(run(prefix, {ROOM: 1, RANKED: place}, lambda ids: logits_after([*ids, 33])), how, 1)
        assert (row.ids or [told.ids[place]]) == [int(candidates[wanted])] and max(0, row.num_rows - 1) == wanted
    assert read(run([1, 2], {ROOM: 1, RANKED: 0}, logits_after), how, 1).is_lost


def test_rows_follow_the_batch_and_leave_it(plugin):
    processor = plugin.SelectToThink(config(), "cpu", False)
    params = Params({READING: HOW.to_json(), ROOM: 12})
    processor.update_state(Update(added=[(0, params, [1], []), (2, params, [1], []), (1, Params(None), [1], [])]))
    assert set(processor.rows) == {0, 2}
    first, last = processor.rows[0], processor.rows[2]
    swap, one_way = plugin.MoveDirectionality.SWAP, plugin.MoveDirectionality.UNIDIRECTIONAL
    processor.update_state(Update(moved=[(0, 2, swap)]))
    assert processor.rows == {0: last, 2: first}
    processor.update_state(Update(removed=[0], moved=[(2, 0, one_way)]))
    assert processor.rows == {0: first}
    processor.update_state(None)
    again = plugin.SelectToThink(processor.config, "cpu", False)  # by entry point and by option
    again.update_state(Update(added=[(0, params, [1], [])]))
    assert again.rows == {}


def test_an_interrupted_row_is_lost(plugin):
    processor = plugin.SelectToThink(config(), "cpu", False)
    processor.update_state(Update(added=[(0, Params({READING: HOW.to_json(), ROOM: 12}), [1], [3, 4])]))
    batch = logits_after([1, 3, 4])[None]
    processor.apply(batch)
    assert int(batch.argmax()) == HOW.lost


@pytest.mark.parametrize(
    "changed", [{ROOM: 1e999}, {ROOM: "many"}, {ROOM: None}, {READING: "[]"}, {GROUP: "a", ROWS: 99}], ids=str
)
def test_a_malformed_request_is_refused(plugin, changed):
    plugin.SelectToThink.validate_params(Params(None))
    plugin.SelectToThink.validate_params(Params({READING: HOW.to_json(), ROOM: 4}))
    with pytest.raises(ValueError, match=r"s2t|invalid"):
        plugin.SelectToThink.validate_params(Params({READING: HOW.to_json(), ROOM: 4} | changed))
