"""README.md and the pages of docs/ run as they are printed, shell and Python, in the order of the page.

Each page runs in an empty folder, offline: the hub's models and tasks are replaced by the embedded ones, counts by small ones.
What an earlier page would have left in `runs/` is put there first. Shell blocks of nothing but `s2t` commands run them in the
page's own process, which spares the start of one for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from s2t.model.tiny import embedded_path

ROOT = Path(__file__).parents[1]
PAGES = [
    "README",
    *(
        f"docs/{page}"
        for page in (
            "evaluate",
            "generate",
            "lm_eval",
            "loading",
            "measure",
            "merge",
            "report",
            "serve",
            "start",
            "tools",
            "train",
        )
    ),
    "docs/distill",
]
LONG = {"docs/distill", "docs/lm_eval"}  # what they run is tried out in tests/train and tests/integrations as well
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = ("make ", "pip install ", "tensorboard ", "s2t push ")  # setting up, which is how the tests came here
PORT = 18_321
SERVE = (  # in the background, until the page is done
    r"\1 --port 8000 > serve.log 2>&1 & echo $! >> serve.pid\n"
    r"until curl -sf http://127.0.0.1:8000/health; do sleep 0.2; kill -0 $(tail -1 serve.pid); done"
)
SUBSTITUTES = [
    (r"^(s2t serve [^#]*?)(?: +#.*)?$", SERVE),
    (r"(127\.0\.0\.1:|--port )8000", rf"\g<1>{PORT}"),
    (r"Qwen/Qwen2\.5-1\.5B-Instruct", str(embedded_path("tiny:slm"))),
    (r"Qwen/Qwen2\.5-32B-Instruct", str(embedded_path("tiny:llm"))),
    (r"--task gsm8k", "--task rg:gsm_symbolic"),
    (r"--limit \d+", "--limit 12"),
    (r"^(s2t (?:measure|eval)(?!.*--limit).*)$", r"\1 --limit 12"),
    (r"^(s2t (?:measure|collect|eval)(?!.*--max-new-tokens).*)$", r"\1 --max-new-tokens 64"),
    (r"limit=\d+", "limit=12"),
    (r"max_new_tokens=\d+", "max_new_tokens=24"),
    (r"--max-new-tokens \d+", "--max-new-tokens 64"),
    (r', llm_quantization="bitsandbytes-4bit"', ""),  # the package is not a requirement
    *([] if find_spec("tensorboard") else [(r" --log-with tensorboard", "")]),  # of an extra
    (r"--tasks gsm8k", "--tasks apples --include_path tasks"),
    (
        r'tasks=\["gsm8k"\]',
        'tasks=["apples"], task_manager=__import__("lm_eval").tasks.TaskManager(include_path="tasks")',
    ),
]
TASK = {
    "task": "apples",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "tasks/apples.jsonl"}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "output_type": "generate_until",
    "generation_kwargs": {"do_sample": False, "until": ["\n\n"], "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def program(page: str) -> str:
    """The page as one Python program: its Python as it stands, its shell blocks as calls of `s2t` or of bash."""
    lines = ["import runpy, subprocess, sys", "from s2t.cli.main import main"]
    for language, printed in BLOCK.findall((ROOT / f"{page}.md").read_text(encoding="utf-8")):
        block = printed
        for pattern, substitute in [(r" *\\\n *", " "), *SUBSTITUTES]:
            block = re.sub(pattern, substitute, block, flags=re.MULTILINE)
        if language == "python":
            lines.append(block)
        elif commands := [line for line in block.splitlines() if line and not line.startswith(NOT_RUN)]:
            if all(map(is_plain, commands)):
                lines += [in_this_process(shlex.split(line, comments=True)) for line in commands]
                continue
            lines.append(
                f"subprocess.run(['bash', '-euc', {chr(10).join(commands)!r}], stdin=subprocess.DEVNULL, check=True)"
            )
    return "\n".join(lines).replace(str(PORT), str(PORT + PAGES.index(page)))  # pages may run at once


def in_this_process(words: list[str]) -> str:
    """Python for a call of `s2t` or of `python -m`."""
    if words[0] == "s2t":
        return f"assert main({words[1:]!r}) == 0"
    return (
        f"sys.argv = {words[2:]!r}\n"
        "try:\n    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as ended:\n    assert not ended.code"
    )


def is_plain(line: str) -> bool:
    """Whether a shell would make of a line what `shlex` does: one call of ours, nothing expanded, piped or put aside."""
    bare = re.sub(r"'[^']*'|\"[^\"$`\\]*\"", "", line.split(" #", maxsplit=1)[0])
    return line.startswith(("s2t ", "python -m s2t.")) and re.search(r"[^\w\s/.,:=@%+-]", bare) is None


def missing(code: str, made: Path) -> list[str]:
    """Runs of other pages that a page reads: it names them, and nothing on it writes them."""
    names = [str(path.relative_to(made)) for path in sorted(made.glob("runs/*")) if path.name != "demo"]
    written = re.findall(r"(?:--out |--out', '|out=\\?\")(runs/\w+)", code)
    return ["runs/demo", *(name for name in names if name in code and name not in written)]


def stop_servers(folder: Path) -> None:
    """End the servers that a page started."""
    started = folder / "serve.pid"
    for pid in started.read_text().split() if started.exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with the runs that pages refer to; the adapter is a new one, which selects as the SLM does."""
    from s2t import workflows
    from s2t.bench.decode import untrained_adapter
    from s2t.config import MergeConfig
    from s2t.merge import merge
    from s2t.model.load import load_model

    folder = tmp_path_factory.mktemp("made")
    runs = folder / "runs"
    adapter = untrained_adapter(load_model("tiny:slm"), "rank", "step")
    adapter.config = replace(adapter.config, thresholds={"criticality": 0.7})
    for name in ("train", "demo/train"):
        adapter.save(runs / name / "adapter")
    workflows.measure(slm="tiny:slm", llm="tiny:llm", limit=24, out=str(runs / "measure"))
    workflows.calibrate(run=str(runs / "measure"), out=str(runs / "calibrate"))
    merge(MergeConfig(adapter=str(runs / "train" / "adapter"), out=str(runs / "merged")))
    return folder


def test_each_tool_is_shown_in_at_most_five_lines():
    page = (ROOT / "docs/tools.md").read_text(encoding="utf-8")
    blocks = [block for _, block in BLOCK.findall(page)]
    for tool in ("s2t merge", "s2t.custom_generate(", 'custom_generate="runs/merged"', "s2t.integrations.lm_eval"):
        assert any(tool in block for block in blocks), f"{tool} is not shown"
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 5, block


def test_the_readme_is_short_with_one_picture_and_six_lines_of_python():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) < 650
    assert readme.count("<img ") == 1
    (python,) = [block for language, block in BLOCK.findall(readme) if language == "python"]
    assert len([line for line in python.splitlines() if line.strip()]) <= 6
    assert "docs/tools.md" in readme


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_pictures_of_pages_outside_the_site_are_there(page):
    text = re.sub(r"`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    gone = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not gone


def test_the_reference_of_the_command_line_is_current():
    make_cli = runpy.run_path(str(ROOT / "docs/make_cli.py"))
    assert make_cli["reference"]() == (ROOT / "docs/cli.md").read_text(encoding="utf-8"), "run python docs/make_cli.py"


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in LONG else []) for page in PAGES]
)
def test_a_page_runs(page, made, tmp_path):
    code = program(page)
    for name in missing(code, made):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "apples.yaml").write_text(yaml.safe_dump(TASK))
    problems = [{"question": f"Ava has {n} apples and eats 2. How many has she?", "answer": str(n - 2)} for n in (3, 4)]
    (tmp_path / "tasks" / "apples.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:s2t", "-c", code],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=420,
        )
    finally:
        stop_servers(tmp_path)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    assert done.stdout
