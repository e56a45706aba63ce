"""The embedded models: whole folders made of files that stand in the package once, and weights that never change unseen."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from pathlib import Path

import pytest

from s2t.errors import ModelError
from s2t.model import tiny
from s2t.model.load import load_model

ASSETS = Path(str(resources.files("s2t.model") / "assets"))
FINGERPRINTS = {
    "slm": "7c09d80545cdd81c",
    "slm-unfiltered": "7c09d80545cdd81c",
    "slm-numbers": "8a63bf381dfde596",
    "slm-small": "96a789ebf4838900",
    "llm": "22ec2e1b231f0f09",
}
WHOLE = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def apart(monkeypatch, tmp_path):
    """Folders are put together anew, below tmp_path."""
    monkeypatch.setattr(tiny, "_whole", cache(tiny._whole.__wrapped__))
    monkeypatch.setattr(tiny, "_temporary", lambda: type("Folder", (), {"name": str(tmp_path)}))
    return tmp_path


def test_no_file_stands_in_the_package_twice():
    digests = Counter(hashlib.sha256(file.read_bytes()).hexdigest() for file in ASSETS.rglob("*") if file.is_file())
    assert digests and set(digests.values()) == {1}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_folder_is_whole_and_its_weights_are_the_ones_shipped(name):
    folder = tiny.embedded_path(f"tiny:{name}")
    assert {file.name for file in folder.iterdir()} == WHOLE | {"README.md", "chat_template.jinja"}
    assert load_model(f"tiny:{name}").fingerprint == load_model(str(folder)).fingerprint == FINGERPRINTS[name]


def test_a_models_own_file_goes_before_the_shared_one():
    own, shared = (tiny.embedded_path(f"tiny:{name}") / "tokenizer.json" for name in ("slm-numbers", "slm"))
    assert own.read_bytes() != shared.read_bytes()
    assert own.read_bytes() == (ASSETS / "slm-numbers" / "tokenizer.json").read_bytes()


def test_without_links_a_folder_has_copies(apart, monkeypatch):
    def refuse(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = tiny.embedded_path("tiny:slm-small")
    assert folder.parent == apart
    assert not any(file.is_symlink() for file in folder.iterdir())
    assert {file.name for file in folder.iterdir()} >= WHOLE
    assert (folder / "tokenizer.json").read_bytes() == (ASSETS / "shared" / "tokenizer.json").read_bytes()


def test_threads_that_ask_at_once_get_one_folder(apart):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(tiny.embedded_path, ["tiny:llm"] * 32))
    assert found == {apart / "llm"}


def test_nothing_is_left_behind_when_a_process_ends():
    code = "from s2t.model.tiny import embedded_path as e; p = e('tiny:slm'); print(p, (p / 'config.json').is_file())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    folder, was_there = done.stdout.split()
    assert was_there == "True"
    assert not Path(folder).parent.exists()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match="no embedded model 'tiny:big'; there are tiny:slm, "):
        tiny.embedded_path("tiny:big")
