"""The Python in README.md and docs/ runs as it is printed, page by page, in an empty folder that has the demo's adapter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
REFERENCE = {"api.md"}  # signatures, no programs


def code_of(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A new adapter of the embedded SLM, which selects as the SLM does."""
    from s2t.bench.decode import untrained_adapter
    from s2t.model.load import load_model

    folder = tmp_path_factory.mktemp("adapter")
    made = untrained_adapter(load_model("tiny:slm"), "candidates")
    made.config = replace(made.config, thresholds={"criticality": 0.7})
    made.save(folder)
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in REFERENCE and code_of(page)], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page, adapter, tmp_path):
    target = tmp_path / "runs" / "demo" / "train"
    target.mkdir(parents=True)
    (target / "adapter").symlink_to(adapter)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:s2t", "-c", code_of(page)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
