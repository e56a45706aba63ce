"""CONTRIBUTING's recipe for a trigger and a selector, followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^ *```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A copy of package and tests with the recipe's files and lines in it."""
    root = tmp_path_factory.mktemp("recipe")
    for name in ("src/s2t", "tests/decode"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Add a trigger or a selector") : text.index("## Add a command")]
    blocks = list(map(dedent, BLOCK.findall(section)))
    lines = [block for block in blocks if not block.startswith("# ")]
    for block in (block for block in blocks if block.startswith("# ")):
        first, rest = block.split("\n", 1)
        assert not (root / first.removeprefix("# ")).exists(), "the recipe's names are taken"
        (root / first.removeprefix("# ")).write_text(rest, encoding="utf-8")
    registry, laws = root / "src/s2t/config/methods.py", root / "tests/decode/test_loop.py"
    ends = root / "tests/decode/test_extremes.py"
    places = ((registry, "TRIGGERS = {"), (registry, "METHODS = {"), (laws, "RUNS = {"))
    places += ((ends, "NEVER_OR_ALWAYS = {"), (ends, "MIDDLE = {"))
    for line, (path, table) in zip(lines, places, strict=True):
        append(path, table, line)
    return root


def append(path: Path, table: str, line: str) -> None:
    text = path.read_text(encoding="utf-8")
    end = text.index("\n}\n", text.index(table))
    path.write_text(f"{text[:end]}\n    {line.strip()}{text[end:]}", encoding="utf-8")


def run(root: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("strategy", ["product", "s2t"])
def test_a_new_trigger_and_a_new_selector_are_a_file_and_a_line_each(followed, strategy):
    options = ["--llm", "tiny:llm", "--strategy", strategy, "--trigger", "margin", "--threshold", "0.3", "--json"]
    found = json.loads(run(followed, "s2t", "generate", *options, "What is 17 + 25?"))
    assert found["num_triggered"] > 0
    assert found["cost"]["llm_forwards"] > 0


def test_the_new_ones_keep_the_laws_and_have_a_test_of_their_own(followed):
    files = [f"tests/decode/test_{name}.py" for name in ("loop", "margin", "extremes")]
    names = "product or test_margin or every_method"
    out = run(followed, "pytest", "-q", "-rA", "-p", "no:cacheprovider", *files, "-k", names)
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 9
    assert all(f"PASSED {file}" in out for file in files)
