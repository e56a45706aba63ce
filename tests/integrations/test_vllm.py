"""The processor as vLLM drives it, with vLLM's interface stood in for; real servers are in tests/vllm."""

from __future__ import annotations

import enum
import importlib
import sys
import types

import pytest
import torch

from s2t.core.onserver import GROUP, READING, ROOM, ROWS, Reading, read

V, STOP = 64, 5
HOW = Reading(tuple(range(40, 56)), (56, 57), 0.5, 0.5, 1.0, 4, (STOP,), ((40, 58),))


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
