"""What a pair with its SLM on servers refuses before anything is asked, and what it knows without weights."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from s2t.decode.pair import Pair
from s2t.decode.remote.client import RemoteSettings
from s2t.decode.remote.selector import served_selector
from s2t.decode.remote.served import ServedSLM
from s2t.errors import ConfigError, ModelError, RemoteError
from s2t.model.adapter import AdapterConfig
from s2t.model.merged import MergedConfig


@pytest.mark.parametrize(
    ("readout", "scope", "advice"),
    [("rank", "step", "--adapter-scope stream"), ("bins", "candidates", "always or stream")],
)
def test_scopes_that_act_inside_a_forward_are_refused_by_name(readout, scope, advice, tiny_slm):
    config = AdapterConfig("tiny:slm", tiny_slm.fingerprint, readout=readout, scope=scope)
    merged = MergedConfig(asdict(config), tiny_slm.reserved, 1024, "float32", {})
    with pytest.raises(ConfigError, match=f"has scope {scope}, .*{advice} for a server"):
        served_selector(replace(tiny_slm, merged=merged), [], None)


def test_a_softcap_matters_where_reserved_ids_are_read(tiny_slm):
    models, found = [{"id": "s2t", "parent": "base"}], {}
    for readout in ("rank", "bins"):
        for criticality in ("head", "reserved"):
            config = AdapterConfig("m", "f", readout=readout, scope="stream", criticality=criticality)
            merged = MergedConfig(asdict(config), tiny_slm.reserved, 1024, "float32", {}, {"softcap": 30.0})
            try:
                found[readout, criticality] = served_selector(replace(tiny_slm, merged=merged), models, None).lora
            except ModelError:
                found[readout, criticality] = None
    assert [pair for pair, lora in found.items() if lora] == [("rank", "head")]


def test_a_server_that_is_not_there_is_one_clear_line(tiny_slm):
    settings = RemoteSettings(("http://127.0.0.1:9/v1",), max_retries=1, backoff_s=0.01, patience_s=0.1)
    with pytest.raises(RemoteError, match=r"http://127\.0\.0\.1:9"):
        ServedSLM.connect(tiny_slm, settings, None, False)


def test_an_unmerged_adapter_beside_a_server_is_one_clear_line():
    from s2t.api import load

    with pytest.raises(ConfigError, match="s2t merge --adapter some/adapter"):
        load("tiny:slm", adapter="some/adapter", slm_url=["http://127.0.0.1:9/v1"])


def test_a_session_without_weights_knows_what_one_with_weights_knows(tiny_slm):
    from s2t.model.load import load_without_weights

    bare = load_without_weights("tiny:slm")
    assert bare.device.type == "meta" and bare.num_params == tiny_slm.num_params
    assert (bare.vocab_size, bare.stop_ids, bare.reserved) == (
        tiny_slm.vocab_size,
        tiny_slm.stop_ids,
        tiny_slm.reserved,
    )
    assert Pair(bare).prompt("What is 1 + 1?") == Pair(tiny_slm).prompt("What is 1 + 1?")
    with pytest.raises(ModelError, match="does not exist"):
        load_without_weights("/no/such/folder")
