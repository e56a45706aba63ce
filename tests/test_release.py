"""What is released: two archives that a stranger installs into an empty environment, and the pages that come with them.

`make release-check` runs all of it. The slow part builds the archives and installs the wheel, with every extra, where no file of
the repository can be seen; it asks the package index for what the wheel requires.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from s2t import __version__

ROOT = Path(__file__).parents[1]
NOT_RELEASED = shutil.ignore_patterns(
    *(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "site"),
)
EXTRAS = {
    "train": "import peft, accelerate, s2t.train.trainer",
    "eval": "import datasets, math_verify, reasoning_gym",
    "plots": "import matplotlib, jinja2; import s2t.report.plots",
    "lm-eval": "import lm_eval; from s2t.integrations.lm_eval import S2TLM",
    "ray": "import ray",
    "remote": "import httpx, s2t.decode.remote.client",
    "serve": "import fastapi, uvicorn, prometheus_client, s2t.serve.run",
    "tensorboard": "from torch.utils.tensorboard import SummaryWriter",
    "wandb": "import wandb",
    "trackio": "import trackio",
}
"""What each extra must let one import."""
EVERY_MODULE = """
import importlib, pkgutil, s2t
names = [found.name for found in pkgutil.walk_packages(s2t.__path__, "s2t.")]
programs = ("s2t.__main__", *(f"s2t.tasks.{name}" for name in ("_jail", "_judge", "_compare", "_algebra")))  # run by path
for name in names:
    if name not in programs and name != "s2t.integrations.vllm":  # of servers, in whose environment vLLM is
        importlib.import_module(name)
print(len(names))
"""


def settings() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*words: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program that sees neither this environment's packages nor the repository; its output, whatever came of it."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "S2T_DATA_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | more
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, check=False, capture_output=True, text=True
    )


def succeed(*words: str | Path, cwd: Path, **more: str) -> str:
    done = run(*words, cwd=cwd, **more)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# Pages


def test_the_changelog_is_by_the_book():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings[0] in ("Unreleased", released[0]), "what is not released yet stands first"
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+), (\d{4}-\d\d-\d\d)", heading) for heading in released]
    assert all(found), f"headings are Unreleased or VERSION, DATE; got {released}"
    versions = [tuple(int(part) for part in match.groups()[:3]) for match in found if match]
    dates = [datetime.date.fromisoformat(match[4]) for match in found if match]
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)
    assert __version__ == ".".join(map(str, versions[0])), "the newest released version is the package's own"
    if headings[0] == "Unreleased":
        section = text.split("## Unreleased\n")[1].split("\n## ")[0]
        groups = re.findall(r"^\*\*.*$", section, re.MULTILINE)
        assert groups and all(re.fullmatch(r"\*\*.+\*\* \(\d{4}-\d\d-\d\d\)", group) for group in groups), groups


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited), "what the format requires"
    assert cited["version"] == __version__
    assert f"## {__version__}, {cited['date-released']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert cited["license"] == settings()["project"]["license"]
    assert "2604.26940" in str(cited["preferred-citation"])


def test_what_is_trusted_is_said():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for subject in ("weights", "chat templates", "programs that a model wrote", "--trust-remote-code", "Report"):
        assert subject in text
    for name in re.findall(r"S2T_[A-Z_]+", text):
        sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
        assert any(name in source for source in sources), f"nothing reads {name}"


def test_every_extra_has_an_import_that_is_tried():
    extras = settings()["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"all", "dev", "gguf"}  # that one compiles for minutes: make test-gguf
    for code in EXTRAS.values():
        ast.parse(code)


# Archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """Folder with the wheel and the sdist, built from a copy without anything that was built before."""
    pytest.importorskip("build", reason="pip install 's2t[dev]'")
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_RELEASED)
    words = ("-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source"))
    done = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(archives) -> Path:
    [found] = archives.glob("*.whl")
    return found


@pytest.mark.slow
def test_twine_takes_both_archives(archives):
    pytest.importorskip("twine", reason="pip install 's2t[dev]'")
    files = sorted(str(path) for path in archives.iterdir())
    assert [Path(file).name for file in files] == [f"s2t-{__version__}-py3-none-any.whl", f"s2t-{__version__}.tar.gz"]
    words = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_every_file_once(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        contents = {name: archive.read(name) for name in names}
    sources = [path for path in (ROOT / "src" / "s2t").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert set(names) == {path.relative_to(ROOT / "src").as_posix() for path in sources}
    digests = Counter(hashlib.sha256(content).hexdigest() for content in contents.values() if content.strip())
    assert set(digests.values()) == {1}


@pytest.mark.slow
def test_the_sdist_is_the_whole_project(archives):
    [found] = archives.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("CHANGELOG.md", "CITATION.cff", "LICENSE", "SECURITY.md", "Makefile", "constraints.txt"):
        assert name in names
    tests = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    assert set(tests) <= names, "tests come whole or not at all"


# An empty environment


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Python of an environment with nothing in it but pip."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def install(python: Path, *what: str, cwd: Path) -> None:
    succeed(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *what, cwd=cwd)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, python, tmp_path):
    s2t = python.with_name("s2t")
    install(python, str(wheel), cwd=tmp_path)
    where = succeed(python, "-c", "import s2t; print(s2t.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(python.parents[1])
    assert succeed(s2t, "--version", cwd=tmp_path) == f"s2t {__version__}\n"
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    assert succeed(s2t, "generate", "What is 2 + 2?", "--max-new-tokens", "8", cwd=tmp_path, **offline).strip()
    bare = run(s2t, "demo", "--limit", "8", "--train-problems", "64", "--out", "bare", cwd=tmp_path, **offline)
    assert bare.returncode == 2
    assert re.fullmatch(
        r"s2t: error: .* is not installed; run: pip install 's2t\[\w+\]'\.", bare.stderr.splitlines()[-1]
    )

    install(python, f"{wheel}[{','.join(EXTRAS)}]", cwd=tmp_path)
    for code in EXTRAS.values():
        succeed(python, "-c", code, cwd=tmp_path, **offline)
    assert int(succeed(python, "-c", EVERY_MODULE, cwd=tmp_path, **offline)) > 100
    words = ("demo", "--limit", "8", "--train-problems", "64", "--out", "demo")
    shown = succeed(s2t, *words, cwd=tmp_path, **offline)
    assert "s2t-local" in shown
    assert (tmp_path / "demo" / "report.html").is_file()
    assert (tmp_path / "demo" / "train" / "adapter" / "README.md").is_file()
