"""The server's side of S2T-LOCAL writes what the decoding loop's rules say, told so that a client can read it.

A server is simulated: rows come, go and wait as in a batch, and logits are a function of the tokens before.
"""

from __future__ import annotations

import json
import random

import pytest
import torch

from s2t.core.insampler import Plugin
from s2t.core.onserver import (
    AT,
    GROUP,
    MOST_PASSED,
    RANKED,
    READING,
    ROOM,
    ROWS,
    WARMUP,
    SelectorSettings,
    ranges,
    read,
)

V, STOP = 64, 5
BINS, YES_NO = tuple(range(40, 56)), (56, 57)
FORBIDDEN = (*BINS, *YES_NO, 62, 63)
PLAIN = {"temperature": 0.5, "prior_weight": 1.0, "num_candidates": 4, "stops": (STOP,)}


def reading(**settings):
    return SelectorSettings(BINS, YES_NO, **PLAIN | {"threshold": 0.6, "forbidden": ranges(FORBIDDEN)} | settings)


WRONG = (
    {"threshold": "0.7"},
    {"threshold": [1]},
    {"temperature": 0},
    {"temperature": None},
    {"scale": "x"},
    {"scale": 0},
    {"prior_weight": "a"},
    {"num_candidates": 4.5},
    {"num_candidates": True},
    {"bins": [[1]]},
    {"forbidden": [[1]]},
    {"version": 1},
    {"other": 1},
    {"adapter_weight": None},
    {"ranks": 1},
)


def logits_after(ids):
    """Random but fixed: peaked enough to have favourites, flat enough for close candidates."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    return torch.randn(V, generator=generator) * 1.5


def expected(logits):
    return float(logits[list(BINS)].softmax(-1) @ torch.linspace(0, 1, len(BINS)))


def by_the_rules(prompt, how, room, warmup=0, at=()):
    """Tokens, which of them triggered, and how often another candidate than the greedy one won."""
    ids, fired, flips = list(prompt), set(), 0
    for step in range(room):
        logits = logits_after(ids)
        value = float((logits[YES_NO[0]] - logits[YES_NO[1]]).sigmoid())
        allowed = logits.clone()
        allowed[list(FORBIDDEN)] = float("-inf")
        values, tokens = allowed.topk(how.num_candidates)
        token = int(tokens[0])
        if step >= warmup and (value > how.threshold if how.threshold is not None else step in at):
            fired.add(step)
            scores = [
                expected(logits_after([*ids, int(i)])) / how.temperature + how.prior_weight * float(v)
                for i, v in zip(tokens, values, strict=True)
            ]
            token = int(tokens[max(range(len(scores)), key=scores.__getitem__)])
            flips += token != int(tokens[0])
        ids.append(token)
        if token == STOP:
            break
    return ids[len(prompt) :], fired, flips


class Server:
    """A batch of rows, stepped together; others that ask for nothing are among them, and requests may come late."""

    def __init__(self, seed=0, lateness=0.0, tells=False):
        self.plugin, self.random, self.lateness, self.tells = Plugin(V), random.Random(seed), lateness, tells

    def answer(self, requests, marks):
        """Replies to requests (prompt, args, max_tokens), each of which joins the batch sooner or later."""
        waiting, running, replies = list(enumerate(requests)), [], {}
        bystander = [1, 2, 3]
        while waiting or running:
            while waiting and self.random.random() >= self.lateness:
                number, (prompt, args, most) = waiting.pop(0)
                running.append((number, list(prompt), self.plugin.new_row(args), most, []))
            self.random.shuffle(running)
            batch = torch.stack([logits_after([*r[1], *r[4]]) for r in running] + [logits_after(bystander)])
            untouched = batch[-1].clone()
            if self.tells:
                for _, _, row, _, out in running:
                    row.last = out[-1] if out else -1
            self.plugin.apply(batch, [(i, r[2], len(r[4])) for i, r in enumerate(running)], self.tells)
            assert torch.equal(batch[-1], untouched)
            for logits, (number, _, _, most, out) in zip(batch, running, strict=False):
                out.append(int(logits.argmax()))
                if out[-1] in marks or len(out) == most:
                    replies[number] = out
            running = [r for r in running if r[0] not in replies]
        return [replies[number] for number in range(len(requests))]


def write(server, prompt, how, room, warmup=0, at=()):
    """What a client would do; tokens, which of them triggered, requests."""
    ids, fired, rows, calls = list(prompt), set(), 1, 0
    while (done := len(ids) - len(prompt)) < room and not (done and ids[-1] == STOP):
        left = room - done
        args = {READING: how.to_json(), ROOM: left, WARMUP: max(0, warmup - done), AT: [i - done for i in at]}
        if rows > 1:
            args |= {GROUP: f"{calls} of {prompt}", ROWS: rows}
        replies = server.answer([(ids, args, left + how.num_extra(left) + 64)] * rows, how.marks)
        calls += 1
        found = [told for told in (read(reply, how, left) for reply in replies) if not told.is_lost]
        assert len(found) == 1
        fired |= {done + place for place in found[0].passed} | ({done} if rows > 1 else set())
        rows = max(1, found[0].num_rows)
        ids += found[0].ids[:-1] if rows > 1 else found[0].ids
    return ids[len(prompt) :], fired, calls


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("lateness", [0.0, 0.6])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_candidates": 12},
        {"threshold": 0.3},
        {"threshold": 0.9},
        {"prior_weight": 0.0},
        {"temperature": 0.1},
        {"temperature": 5.0},
    ],
    ids=str,
)
def test_a_server_with_the_plugin_writes_what_the_rules_say(settings, lateness, tells):
    how, server = reading(**settings), Server(1, lateness, tells)
    flips = 0
    for prompt in ([1], [2, 3], [9, 9, 9], [30, 4, 7]):
        wanted, fired, changed = by_the_rules(prompt, how, 25, 3)
        assert write(server, prompt, how, 25, 3)[:2] == (wanted, fired)
        flips += changed
    assert flips > 0 or settings.get("temperature") == 5.0


def test_steps_that_the_client_draws_trigger_where_it_says():
    how, at = reading(threshold=None), [0, 4, 5, 6, 17, 39]
    for prompt in ([1], [2, 3], [11, 12]):
        wanted, fired, _ = by_the_rules(prompt, how, 40, at=at)
        assert write(Server(), prompt, how, 40, at=at)[:2] == (wanted, fired)


def test_what_no_candidate_could_change_costs_no_request():
    how = reading(temperature=50.0, threshold=0.0)
    tokens, fired, calls = write(Server(), [3], how, 30)
    assert tokens == by_the_rules([3], how, 30)[0] and len(fired) == len(tokens)
    assert calls <= 1 + len(tokens) // MOST_PASSED


def test_reserved_ids_are_never_text():
    how = reading()
    tokens, _, _ = write(Server(), [1, 2], how, 60)
    assert not set(FORBIDDEN) & set(tokens)


def test_an_interrupted_request_is_lost_and_not_wrong():
    how, plugin = reading(), Plugin(V)
    row = plugin.new_row({READING: how.to_json(), ROOM: 8})
    logits = torch.randn(1, V)
    plugin.apply(logits, [(0, row, 3)])
    assert int(logits.argmax()) == how.lost
    for reply in ([7, how.lost], [7, 7], [7, how.digits[0], 3, how.end], [how.digits[1], how.trigger], []):
        assert read(reply, how, 8).is_lost


def test_rows_of_one_name_but_other_candidates_are_another_group():
    plugin, how, other = Plugin(V), reading(), reading(num_candidates=8)
    for found, count in ((how, 2), (other, 8)):
        for _ in range(2):
            row = plugin.new_row({READING: found.to_json(), ROOM: 8, GROUP: "a", ROWS: count})
            plugin.apply(logits_after([1])[None], [(0, row, 0)])
            assert row.group.num_rows == count and row.group.expected_firsts
    assert row.rank == 1


def test_a_trigger_inside_a_prompt_that_is_read_in_parts_is_none():
    plugin, how = Plugin(V), reading()
    row, quiet = plugin.new_row({READING: how.to_json(), ROOM: 8}), logits_after([1])
    quiet[list(YES_NO)] = torch.tensor([-9.0, 9.0])
    loud = quiet.clone()
    loud[list(YES_NO)] = torch.tensor([9.0, -9.0])
    for logits in (loud, quiet):
        plugin.apply(logits[None].clone(), [(0, row, 0)])
    plugin.apply(quiet[None].clone(), [(0, row, 1)])
    assert row.waits_since is None and not row.passed and row.num_text < 0


def test_the_first_row_of_a_group_begins_with_the_argmax_where_logits_tie():
    plugin, how = Plugin(V), reading()
    for trial in range(20):
        logits = logits_after([trial]).mul(2).round()
        row = plugin.new_row({READING: how.to_json(), ROOM: 8, GROUP: f"{trial}", ROWS: 2})
        allowed = logits.clone()
        allowed[list(FORBIDDEN)] = float("-inf")
        plugin.apply(logits[None], [(0, row, 0)])
        assert row.last == int(allowed.argmax())


def test_a_group_that_never_fills_gives_up():
    how, plugin = reading(), Plugin(V)
    row, out = plugin.new_row({READING: how.to_json(), ROOM: 200, GROUP: "a", ROWS: 2}), []
    while not out or out[-1] not in how.marks:
        logits = logits_after([1, *out])[None]
        plugin.apply(logits, [(0, row, len(out))])
        out.append(int(logits.argmax()))
    assert out[-1] == how.lost and len(out) < 100


# Readout rank


def adapted(ids):
    """The logits of the same prefix under a LoRA."""
    return logits_after([*ids, -1]) + logits_after(ids)


def ranked_by_the_rules(prompt, how, room, warmup=0, at=()):
    ids, chosen = list(prompt), {}
    for step in range(room):
        allowed = logits_after(ids)
        value = float((allowed[YES_NO[0]] - allowed[YES_NO[1]]).sigmoid())
        allowed[list(FORBIDDEN)] = float("-inf")
        values, tokens = allowed.topk(how.num_candidates)
        index = 0
        if step >= warmup and (value > how.threshold if how.threshold is not None else step in at):
            index = int((how.adapter_weight * adapted(ids)[tokens] + how.prior_weight * values).argmax())
            chosen[step] = index
        ids.append(int(tokens[index]))
        if ids[-1] == STOP:
            break
    return ids[len(prompt) :], chosen


def run_row(plugin, ids, args, how, logits_of, parts=0):
    """One request alone in its batch; its prompt is read in so many parts and a last one."""
    row, out = plugin.new_row(args), []
    for part in range(parts):
        plugin.apply(logits_of([*ids, 50 + part])[None].clone(), [(0, row, 0)])
    while not out or out[-1] not in how.marks:
        logits = logits_of([*ids, *out])[None].clone()
        plugin.apply(logits, [(0, row, len(out))])
        out.append(int(logits.argmax()))
    return out


def write_ranked(prompt, how, room, warmup=0, at=(), parts=0):
    """What a client would do: chunks, and a row under the adapter for every trigger; tokens and choices."""
    plugin, ids, chosen = Plugin(V), list(prompt), {}
    while (done := len(ids) - len(prompt)) < room and not (done and ids[-1] == STOP):
        left = min(12, room - done)
        args = {READING: how.to_json(), ROOM: left, WARMUP: max(0, warmup - done), AT: [i - done for i in at]}
        told = read(run_row(plugin, ids, args | {GROUP: f"text {done}"}, how, logits_after, parts), how, left)
        assert not told.is_lost and told.ids and told.num_rows == 0
        for place, greedy in enumerate(told.ids):
            token = greedy
            if place in told.passed:
                args = {READING: how.to_json(), ROOM: 1, GROUP: f"text {done}", RANKED: place}
                row = read(run_row(plugin, ids, args, how, adapted, parts), how, 1)
                assert not row.is_lost
                chosen[done + place] = max(0, row.num_rows - 1)
                token = row.ids[0] if row.ids else greedy
            ids.append(token)
            if token != greedy:
                break
    return ids[len(prompt) :], chosen


RANK = {"ranks": True, "temperature": 1.0, "prior_weight": 0.0}


@pytest.mark.parametrize("parts", [0, 2], ids=["prompts whole", "prompts in parts"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter_weight": 0.3, "prior_weight": 0.7},
        {"adapter_weight": 0.0, "prior_weight": 1.0},
        {"threshold": 0.05},
        {"num_candidates": 12},
        {"threshold": None},
    ],
    ids=str,
)
def test_rows_under_the_adapter_choose_what_the_rules_say(settings, parts):
    how, at, flips = reading(**RANK | settings), [0, 4, 5, 6, 17, 39], 0
    for prompt in ([1], [2, 3], [9, 9, 9], [30, 4, 7]):
        wanted = ranked_by_the_rules(prompt, how, 40, 3 if how.threshold is not None else 0, at)
        assert write_ranked(prompt, how, 40, 3 if how.threshold is not None else 0, at, parts) == wanted
        flips += sum(index > 0 for index in wanted[1].values())
    assert (flips > 0) == (how.adapter_weight > 0)


def test_a_row_whose_candidates_are_not_known_is_lost():
    how, plugin = reading(**RANK), Plugin(V)
    args = {READING: how.to_json(), ROOM: 1, GROUP: "elsewhere", RANKED: 3}
    assert read(run_row(plugin, [1], args, how, adapted), how, 1).is_lost
    logits = adapted([1])[None]
    plugin.apply(logits, [(0, plugin.new_row(args, written=1), 1)])  # one that was interrupted
    assert int(logits.argmax()) == how.lost


@pytest.mark.parametrize("changed", [{}, {GROUP: "a", RANKED: None}, {GROUP: "a", RANKED: "x"}], ids=str)
def test_candidates_need_a_name_and_a_step(changed):
    with pytest.raises(ValueError, match=r"s2t|invalid"):
        Plugin(V).new_row({READING: reading(**RANK).to_json(), ROOM: 4} | changed)


@pytest.mark.parametrize("number", [0, 1, 13, 14, 200, 4095])
def test_numbers_are_told_in_reserved_ids(number):
    how = reading()
    assert how.number(how.spell(number, 4095)) == number
    assert set(how.spell(number, 4095)) <= set(BINS)


@pytest.mark.parametrize(
    "args",
    [
        {READING: "nonsense", ROOM: 4},
        {READING: "{}", ROOM: 4},
        {READING: reading().to_json(), ROOM: 0},
        {READING: reading().to_json(), ROOM: 4, GROUP: "a", ROWS: 9},
        *({READING: json.dumps(json.loads(reading().to_json()) | wrong), ROOM: 4} for wrong in WRONG),
        {READING: reading().to_json(), ROOM: 1e999},
    ],
    ids=str,
)
def test_what_is_no_reading_is_refused(args):
    with pytest.raises(ValueError, match=r"s2t|Expecting|unpack"):
        Plugin(V).new_row(args)


def test_ids_outside_the_vocabulary_and_other_requests_are_left_alone():
    assert Plugin(50).new_row({READING: reading().to_json(), ROOM: 4}) is None
    assert Plugin(V).new_row(None) is None and Plugin(V).new_row({"other": 1}) is None


def test_too_few_reserved_ids_tell_nothing():
    with pytest.raises(ValueError, match="ids"):
        SelectorSettings((1, 2), (3, 4), 0.5, 0.1, 1.0, 4, (), ())
