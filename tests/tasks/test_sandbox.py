"""The sandbox: a program can compute; whatever else it tries fails, and nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t.errors import ConfigError
from s2t.tasks import _jail, sandbox
from s2t.tasks.sandbox import ALLOW, LAYERS, run_program

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="code is run on Linux only: there is nothing to test elsewhere"
)
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ALLOW, "1")


@pytest.fixture(params=["all layers", "seccomp alone"])
def layers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Every guarantee holds on a machine without namespaces and Landlock, too."""
    return LAYERS if request.param == "all layers" else ()


def test_running_code_must_be_allowed(monkeypatch: pytest.MonkeyPatch):
    for value in ("", "0", "yes"):
        monkeypatch.setenv(ALLOW, value)
        with pytest.raises(ConfigError, match=f"set {ALLOW}=1"):
            run_program("x = 1")


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "import math, re, json, random, heapq, hashlib, datetime, decimal, itertools, dataclasses\nrandom.random()",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\nasyncio.run(f())",
        "print('x' * 5_000_000)",
        "import numpy as np\nassert (np.ones((9, 9)) @ np.ones((9, 9))).sum() == 729",
        "open('/dev/null').read()",
        "assert __name__ == '__main__'",
        "import os\nassert 'HOME' not in os.environ and len(os.environ) < 8",
    ],
)
def test_a_computing_program_runs_to_its_end(program: str, layers: tuple[str, ...]):
    outcome = run_program(program, layers=layers)
    assert outcome.is_passed, outcome
    assert {"seccomp", "limits"} <= set(outcome.layers)


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("input()", "EOFError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
    ],
)
def test_a_failing_program_says_why(program: str, error: str):
    outcome = run_program(program)
    assert (outcome.status, outcome.error[: len(error)]) == ("failed", error)
    assert len(outcome.error) < 1000


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"status": "passed"}\')\n'
        "    except OSError: pass\nos._exit(0)",
    ],
)
def test_a_program_that_ends_its_process_has_not_passed(program: str):
    assert run_program(program).status == "died"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import threading\nthreading.Thread(target=print).start()",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ],
)
def test_no_process_and_no_thread_is_started(program: str, layers: tuple[str, ...]):
    before = len(os.listdir("/proc"))
    outcome = run_program(program, timeout_s=2, layers=layers)
    assert outcome.status in ("failed", "timeout"), outcome
    assert len(os.listdir("/proc")) < before + 50


def test_an_endless_loop_ends_in_time(layers: tuple[str, ...]):
    for program in (
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "10**10**10",
        "while True: print('x' * 10000)",
    ):
        start = time.monotonic()
        assert run_program(program, timeout_s=0.5, layers=layers).status == "timeout"
        assert time.monotonic() - start < 10


def test_a_program_that_takes_signals_in_its_hands_ends_in_time():
    program = (
        "import signal\nfor number in range(1, 64):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass"
    )
    start = time.monotonic()
    assert run_program(program, timeout_s=1).status == "timeout"
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10 << 30)",
        "x = [0] * (10 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 28))",
        "import mmap\nx = mmap.mmap(-1, 10 << 30)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))",
    ],
)
def test_memory_is_bounded(program: str, layers: tuple[str, ...]):
    outcome = run_program(program, layers=layers)
    assert outcome.status == "failed", outcome
    assert outcome.error.startswith(("MemoryError", "OSError", "ValueError"))


@pytest.mark.parametrize(
    "action",
    [
        "open(path, 'w').write('x')",
        "open(path, 'a').write('x')",
        "open(path, 'r+').write('x')",
        "os.open(path, os.O_RDONLY | os.O_CREAT)",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "os.truncate(path, 0)",
        "os.unlink(path)",
        "os.rename(path, path + '2')",
        "os.link(path, path + '2')",
        "os.symlink(path, path + '2')",
        "os.mkdir(path + '2')",
        "os.rmdir(os.path.dirname(path))",
        "os.chmod(path, 0)",
        "os.utime(path, (0, 0))",
        "os.mkfifo(path + '2')",
        "os.setxattr(path, 'user.a', b'x')",
        "tempfile.NamedTemporaryFile()",
        "os.memfd_create('x')",
        "ctypes.CDLL(None, use_errno=True).creat(path.encode(), 0o600) < 0 and 1 / 0",
    ],
)
def test_no_file_is_changed(action: str, layers: tuple[str, ...], tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("before")
    tmp_path.chmod(0o777)
    path.chmod(0o666)
    stood = path.stat()
    program = f"import ctypes, os, tempfile\npath = {str(path)!r}\n{action}"
    assert run_program(program, layers=layers).status == "failed"
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"
    assert (path.stat().st_mode, path.stat().st_mtime_ns) == (stood.st_mode, stood.st_mtime_ns)


@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1/')",
    ],
)
def test_no_socket_is_opened(program: str, layers: tuple[str, ...]):
    outcome = run_program(program, layers=layers)
    assert outcome.status == "failed"
    assert "not permitted" in outcome.error


def test_no_other_process_is_signalled(layers: tuple[str, ...]):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        for target in (other.pid, os.getpid(), -1, 0):
            outcome = run_program(f"import os\nos.kill({target}, 9)", layers=layers)
            assert outcome.status == "failed" and "not permitted" in outcome.error
        assert other.poll() is None
        other.kill()


def test_with_landlock_only_python_is_readable(tmp_path: Path):
    secret = tmp_path / "token"
    secret.write_text("secret")
    outcome = run_program("x = 1")
    if "landlock" not in outcome.layers:
        pytest.skip("this kernel has no Landlock")
    for path in (str(secret), "/etc/passwd", f"/proc/{os.getpid()}/environ", "/root", "/tmp"):
        outcome = run_program(f"import os\nos.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read()")
        assert outcome.status == "failed" and "Permission denied" in outcome.error, (path, outcome)


def test_a_filter_for_each_machine_refuses_what_is_not_listed():
    for place, arch in _jail._ARCHS.values():
        program = _jail._filter_program(place, arch, pid=7)
        assert len(program) % 8 == 0 and len(program) // 8 < 4096
        assert program[-8:] == _jail._op(_jail._RETURN, _jail._REFUSE | _jail._EPERM)
    forbidden = {56, 57, 58, 59, 322, 435, 41, 42, 62, 200, 82, 83, 84, 85, 86, 87, 90, 101, 165, 272, 308, 425}
    assert not forbidden & {numbers[0] for numbers in _jail._ALLOWED.values()}
    forbidden = {220, 221, 281, 435, 198, 203, 129, 130, 34, 35, 36, 37, 38, 276, 52, 53, 54, 117, 40, 97, 268, 425}
    assert not forbidden & {numbers[1] for numbers in _jail._ALLOWED.values()}


def test_another_machine_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = tmp_path / "jail.py"
    text = Path(_jail.__file__).read_text("utf-8").replace("platform.machine()", "'riscv64'")
    script.write_text(text)
    monkeypatch.setattr(sandbox, "_JAIL", script)
    with pytest.raises(ConfigError, match="cannot be run safely here: no filter of system calls for linux on riscv64"):
        run_program("x = 1")


needs_public_python = pytest.mark.skipif(
    os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists() or not _jail._is_public(SYSTEM_PYTHON),
    reason="needs root, and a Python that every user can read",
)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@needs_public_python
def test_root_becomes_nobody_where_nobody_can_read_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", SYSTEM_PYTHON)
    outcome = run_program("import os\nassert os.getresuid() == (65534,) * 3 and os.getgroups() == []")
    if "uid" not in outcome.layers:
        pytest.skip("this container may not change its user")
    assert outcome.is_passed, outcome


@needs_public_python
def test_an_ordinary_user_has_the_same_guarantees(open_folder: Path):
    programs = [
        "x = 1",
        "import os\nos.fork()",
        "open('{path}', 'w')",
        "import socket\nsocket.socket()",
        "x = bytearray(10 << 30)",
    ]
    folder = open_folder / "sources"
    for name in ("__init__.py", "errors.py", "tasks/sandbox.py", "tasks/_jail.py"):
        (folder / "s2t" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(sandbox.__file__).parents[1] / name, folder / "s2t" / name)
    (folder / "s2t" / "__init__.py").write_text("")
    path = folder / "written"
    script = (
        "import json, sys\nfrom s2t.tasks.sandbox import run_program\n"
        "print(*[run_program(p, layers=tuple(sys.argv[2:])).status for p in json.loads(sys.argv[1])])"
    )
    folder.chmod(0o777)  # only the sandbox stands between an ordinary user and this folder
    jobs = json.dumps([program.replace("{path}", str(path)) for program in programs])
    for layers in (LAYERS, ()):
        done = subprocess.run(
            [SYSTEM_PYTHON, "-c", script, jobs, *layers],
            env={"PYTHONPATH": str(folder), ALLOW: "1", "PYTHONDONTWRITEBYTECODE": "1"},
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == ["passed", "failed", "failed", "failed", "failed"], done.stderr
        assert not path.exists()


def test_a_busy_sandbox_leaves_no_process_behind():
    def pairs() -> int:
        count = 0
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                count += b"_jail.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
        return count

    before = pairs()
    for _ in range(5):
        run_program("while True: pass", timeout_s=0.3)
    assert pairs() <= before


def test_a_large_program_is_passed_whole():
    assert run_program("x = 0\n" * 20_000 + "assert x == 0").is_passed


WRITE = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, {data!r})\n    except OSError: pass\n"
REPLIES = [
    b"[" * 16_000,
    b"{" * 16_000,
    b"\n" * 16_000,
    b"9" * 16_000,
    b"null",
    b"\xff\xfe\x00",
    b'{"status": "unavailable", "error": "no", "layers": [], "nonce": ""}\n',
    b'{"status": "passed"}\n',
    b'\n{"nonce": {}, "status": [], "error": {}}\n',
    b"x" * 70_000,
]


@pytest.mark.parametrize("data", REPLIES)
def test_whatever_a_program_replies_it_fails_alone(data: bytes):
    for end in ("", "os._exit(0)", "raise ValueError", "os.close(fd)"):
        outcome = run_program(WRITE.format(data=data) + end, timeout_s=3)
        assert outcome.status in ("died", "timeout"), (data[:20], end, outcome)
    assert run_program("x = 1").is_passed


@pytest.mark.parametrize("status", ["unavailable", "ready", "timeout", "passed"])
def test_a_program_that_knows_the_secret_cannot_stop_the_others(status: str):
    program = (
        "import sys, os, json\nframe = sys._getframe()\nwhile 'job' not in frame.f_locals: frame = frame.f_back\n"
        f"reply = dict(nonce=frame.f_locals['job']['nonce'], status={status!r}, error='no', layers=[])\n"
        "os.write(frame.f_locals['answer'], json.dumps(reply).encode() + b'\\n')\nos._exit(0)\n"
    )
    outcome = run_program(program)
    assert outcome.status in ("died", "passed")


@given(
    reply=st.binary(max_size=200),
    first=st.booleans(),
    status=st.sampled_from(["passed", "failed", "unavailable", "x", None]),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_on_the_reply_pipe_are_an_outcome(reply: bytes, first: bool, status: str | None):
    ready = json.dumps({"nonce": "n", "status": "ready", "layers": ["seccomp"]}).encode() + b"\n"
    verdict = json.dumps({"nonce": "n", "status": status, "error": [status]}).encode() + b"\n"
    for text in (reply, ready + reply, ready + reply + verdict, ready + verdict + reply, ready + ready + reply):
        outcome = sandbox._read(text, "n")
        assert outcome.status in ("passed", "failed", "died")
        assert isinstance(outcome.error, str)
        assert outcome.status == "died" or text.startswith(ready)
    assert not sandbox._read((ready if first else b"") + reply, "n").is_passed


def test_an_answer_is_no_script_and_its_names_are_there_for_the_tests():
    answer = (
        "from __future__ import annotations\nassert __name__ != '__main__'\nx = 1\nif __name__ == '__main__': x = 2\n"
    )
    assert run_program("assert __name__ == '__main__' and x == 1", answer=answer).is_passed
    assert run_program("x = 1", answer="raise SystemExit(0)").status == "failed"
