"""Several training processes, on gloo and the CPU, do what one does: same batches, losses, weights, files, and one voice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from s2t.collect import collect
from s2t.config import CollectConfig, DistillConfig, TrainConfig
from s2t.errors import ConfigError
from s2t.files import read_json, read_jsonl
from s2t.train.distill import distill
from s2t.train.processes import Processes, open_processes
from s2t.train.trainer import train

ROOT = Path(__file__).parents[2]
COUNT = 2
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
NURSERY = """
import json, os, sys
import peft, torch
from torch.distributed.tensor import DTensor
from s2t.cli.main import main
from s2t.train.fit import Fit
torch.set_num_threads(1)
save, clip, seen = Fit._save, torch.nn.utils.clip_grad_norm_, {}
def stop(fit):
    save(fit)
    raise KeyboardInterrupt
def see(parameters, limit):
    norm = clip(parameters, limit)
    seen["norms"].append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
    seen["is_sharded"] = all(isinstance(parameter, DTensor) for parameter in parameters)
    return norm
torch.nn.utils.clip_grad_norm_ = see
for line in sys.stdin:
    job = json.loads(line)
    os.environ.update(job["environment"])
    Fit._save, seen["norms"] = stop if job["is_stopped"] else save, []
    print(json.dumps({"code": main(job["words"])} | seen), flush=True)
"""
"""A process of a group that runs command lines one after the other: importing the libraries takes longer than training."""


class Group:
    """`COUNT` processes as a launcher would start them; every run is a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.logs = [folder / f"stderr-{rank}" for rank in range(COUNT)]
        self.members = []
        for rank, log in enumerate(self.logs):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(COUNT)}
            environment |= {"LOCAL_WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
            environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with log.open("w") as stderr:
                words = [sys.executable, "-c", NURSERY]
                self.members.append(subprocess.Popen(words, stderr=stderr, env=os.environ | environment, **pipes))

    def run(
        self, command: str, config: Any, launcher: dict[str, str], is_stopped: bool = False
    ) -> list[dict[str, Any]]:
        """Run a command in all processes; what each printed before its exit code, and the code."""
        words = [command, *words_of(config)]
        unset = {name: "false" if name == "ACCELERATE_USE_FSDP" else "2" for name in FSDP}
        environment = unset | launcher | {"MASTER_PORT": str(free_port())}
        job = json.dumps({"words": words, "environment": environment, "is_stopped": is_stopped})
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write(job + "\n")
            member.stdin.flush()
        return [self._answer(rank) for rank in range(COUNT)]

    def _answer(self, rank: int) -> dict[str, Any]:
        printed: list[str] = []
        stdout = self.members[rank].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith('{"code"'):
                return json.loads(line) | {"printed": "".join(printed), "stderr": self.logs[rank].read_text()}
            printed.append(line)
        raise AssertionError(f"process {rank} ended: {self.logs[rank].read_text()[-3000:]}")

    def close(self) -> None:
        for member in self.members:
            assert member.stdin is not None and member.stdout is not None
            member.stdin.close()
            member.wait(timeout=60)
            member.stdout.close()


def words_of(config: Any) -> list[str]:
    words = []
    for item in fields(config):
        value = getattr(config, item.name)
        if value is not None and value != item.default:
            words += [f"--{item.name.replace('_', '-')}", str(value)]
    return words


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    group = Group(tmp_path_factory.mktemp("group"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"question": f"Tom has {n} apples and buys {n % 7} more. How many?", "answer": str(n)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def groups(problems, tmp_path_factory) -> str:
    """Trajectories with many groups, with few, and with none."""
    out = str(tmp_path_factory.mktemp("collect") / "run")
    collect(CollectConfig(task=problems, out=out, threshold=9.0, limit=14, max_new_tokens=24, batch_size=16))
    return out


def train_config(groups: str, out: Path, **changes: Any) -> TrainConfig:
    settings = {"epochs": 2.0, "lora_rank": 2, "lora_dropout": 0.0, "learning_rate": 1e-3, "batch_groups": 5}
    return TrainConfig(groups=groups, out=str(out), **settings | {"checkpoint_steps": 3} | changes)


def distill_config(problems: str, out: Path, **changes: Any) -> DistillConfig:
    settings = {"method": "kd", "limit": 10, "max_new_tokens": 24, "batch_size": 8, "batch_answers": 3, "shard_size": 3}
    fitted = {"epochs": 2.0, "lora_rank": 2, "lora_dropout": 0.0, "learning_rate": 1e-3}
    return DistillConfig(task=problems, out=str(out), **settings | fitted | changes)


def assert_same_run(one: Path, many: Path, tolerance: float = 1e-4) -> None:
    """Same losses at every step and same weights, within float32's rounding along the run."""
    logs = [read_jsonl(folder / "train_log.jsonl") for folder in (one, many)]
    assert len(logs[0]) == len(logs[1]) > 3
    for left, right in zip(*logs, strict=True):
        assert left.keys() == right.keys()
        assert right == pytest.approx(left, rel=tolerance, abs=tolerance)
    files = sorted(path.name for path in (one / "adapter").glob("*.safetensors"))
    assert files == sorted(path.name for path in (many / "adapter").glob("*.safetensors"))
    for name in files:
        left, right = load_file(one / "adapter" / name), load_file(many / "adapter" / name)
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(right[key], left[key], rtol=20 * tolerance, atol=20 * tolerance)


CANDIDATES = {"readout": "bins", "adapter_scope": "candidates"}
UNFROZEN = {"readout": "bins", "adapter_scope": "candidates", "prefix_cache_gib": 0.0, "criticality": "reserved"}
ALWAYS = {"readout": "bins", "adapter_scope": "always"}
ALONE = ALWAYS | {"batch_groups": 1, "epochs": 0.5}  # a batch of one trajectory leaves a process without a share


@pytest.fixture
def norms(monkeypatch) -> list[float]:
    """Norms of the gradients in this process, which AdamW would not show: its steps are the same for gradients twice as large."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: [found := clip(*a), seen.append(float(found))][0])
    return seen


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        pytest.param(FSDP, CANDIDATES, id="fsdp-candidates", marks=pytest.mark.slow),
        pytest.param(FSDP, ALWAYS, id="fsdp-always"),
        pytest.param({}, UNFROZEN, id="replicated-unfrozen", marks=pytest.mark.slow),
        pytest.param(FSDP, UNFROZEN, id="fsdp-unfrozen", marks=pytest.mark.slow),
        pytest.param(FSDP, ALONE, id="fsdp-alone", marks=pytest.mark.slow),
        pytest.param({}, CANDIDATES, id="replicated-candidates", marks=pytest.mark.slow),
        pytest.param({}, ALONE, id="replicated-alone", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(launcher, changes, group, groups, norms, tmp_path):
    train(train_config(groups, tmp_path / "one", **changes))
    answers = group.run("train", train_config(groups, tmp_path / "two", **changes), launcher)
    assert [answer["code"] for answer in answers] == [0, 0], answers[0]["stderr"][-2000:]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    for answer in answers:
        assert answer["norms"] == pytest.approx(norms, rel=1e-3)
        assert answer["is_sharded"] == (launcher == FSDP)
    results = [read_json(tmp_path / name / "train.json") for name in ("one", "two")]
    counts = ("num_trajectories", "num_groups", "num_steps", "num_trainable", "divergence_rate")
    assert [results[1][name] for name in counts] == [results[0][name] for name in counts]
    assert results[1]["trigger_rate"] == pytest.approx(results[0]["trigger_rate"], abs=0.01)
    assert answers[0]["printed"] and not answers[1]["printed"]
    assert "train: " in answers[0]["stderr"] and not answers[1]["stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [{}, FSDP], ids=["replicated", "fsdp"])
@pytest.mark.parametrize("method", ["sft", "kd"])
def test_two_processes_distil_as_one_does(launcher, method, group, problems, tmp_path):
    distill(distill_config(problems, tmp_path / "one", method=method))
    answers = group.run("distill", distill_config(problems, tmp_path / "two", method=method), launcher)
    assert [answer["code"] for answer in answers] == [0, 0], answers[0]["stderr"][-2000:]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert read_json(tmp_path / "two" / "distill.json")["final"] == pytest.approx(
        read_json(tmp_path / "one" / "distill.json")["final"], rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", ["two", "one"])
def test_a_sharded_run_resumes_from_its_checkpoint_with_two_processes_or_one(goes_on, group, groups, tmp_path):
    config = train_config(groups, tmp_path / "run", readout="bins", adapter_scope="always")
    train(train_config(groups, tmp_path / "calm", readout="bins", adapter_scope="always"))
    stopped = group.run("train", config, FSDP, is_stopped=True)
    assert [answer["code"] for answer in stopped] == [130, 130]
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert len(read_jsonl(tmp_path / "run" / "train_log.jsonl")) == 3
    if goes_on == "two":
        assert [answer["code"] for answer in group.run("train", config, FSDP)] == [0, 0]
    else:
        train(config)
    assert_same_run(tmp_path / "calm", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_a_sharded_base_of_half_precision_trains_a_float32_adapter(group, groups, tmp_path):
    changes = {"dtype": "bfloat16", "readout": "bins", "adapter_scope": "always"}
    train(train_config(groups, tmp_path / "one", **changes))
    answers = group.run("train", train_config(groups, tmp_path / "two", **changes), FSDP)
    assert [answer["code"] for answer in answers] == [0, 0], answers[0]["stderr"][-2000:]
    losses = [[line["loss"] for line in read_jsonl(tmp_path / name / "train_log.jsonl")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "two/adapter/adapter_model.safetensors").values())


@pytest.mark.slow
def test_accelerate_launches_sharded_training(groups, tmp_path):
    """The command line of docs/scale.md, two processes wide, killed once and run again."""
    config = ["--config_file", str(ROOT / "examples" / "accelerate-fsdp.yaml"), "--num_processes", str(COUNT)]
    words = words_of(train_config(groups, tmp_path / "two", checkpoint_steps=1, epochs=6.0))
    launch = [sys.executable, "-m", "accelerate.commands.launch", *config, "--main_process_port", str(free_port())]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [*launch, "-m", "s2t", "train", "--json", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as launched:
        deadline = time.monotonic() + 600
        while not (tmp_path / "two" / "checkpoint.safetensors").exists():
            assert launched.poll() is None and time.monotonic() < deadline, "the run ended before it wrote anything"
            time.sleep(0.01)
        launched.terminate()
    assert not (tmp_path / "two" / "train.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    train(train_config(groups, tmp_path / "one", checkpoint_steps=1, epochs=6.0))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert json.loads(done.stdout) == read_json(tmp_path / "two" / "train.json")


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision no"),
        (FSDP | {"FSDP_VERSION": "1"}, "--fsdp_version 2"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--fsdp_activation_checkpointing false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_fsdp in place of --use_deepspeed"),
    ],
)
def test_what_would_change_the_losses_is_refused(launcher, expected, monkeypatch):
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | launcher).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected), open_processes():
        pass


def test_quantized_weights_are_not_sharded_and_devices_are_the_launchers():
    sharded = Processes(0, 2, torch.device("cpu"), is_sharded=True)
    with pytest.raises(ConfigError, match="FSDP cannot shard quantized weights"):
        sharded.load_options(TrainConfig(quantization="bitsandbytes-4bit"))
    with pytest.raises(ConfigError, match="every process has a device of its own"):
        sharded.load_options(TrainConfig(device="cuda:1"))
    assert Processes().load_options(TrainConfig(device="cpu"))["device"] == "cpu"


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_the_whole_batch_and_about_the_same_size(count):
    sizes = [7, 3, 9, 1, 5, 5, 2, 8, 30]
    chosen = [8, 0, 3, 1, 2, 7, 4]
    shares = [Processes(index, count).share(chosen, sizes) for index in range(count)]
    assert sorted(index for share in shares for index in share) == sorted(chosen)
    assert all(share == [index for index in chosen if index in share] for share in shares)
    totals = [sum(sizes[index] for index in share) for share in shares]
    assert max(totals) - min(totals) <= max(sizes[index] for index in chosen)


@pytest.mark.parametrize("scope", ["candidates", "always"])
@pytest.mark.parametrize("count", [2, 6])
def test_parts_of_a_batch_add_up_to_its_losses_and_gradients(scope, count, data, new_adapter, new_trainer):
    """Unequal parts, one without a group, and (of 6) one without a trajectory."""
    bare, empty = data.trajectories[2], np.empty((0, data.trajectories[2].candidate_ids.shape[1]))
    data.trajectories[2] = replace(
        bare,
        group_steps=np.empty(0, np.int64),
        candidate_ids=empty.astype(np.int64),
        slm_logprobs=empty.astype(np.float32),
        llm_probs=empty.astype(np.float32),
    )
    trainer = new_trainer(new_adapter(scope))
    trainer.train_mode()
    parameters, chosen = list(trainer.parameters.values()), [3, 0, 2, 4, 1]
    whole = trainer.terms(chosen)
    gradients = torch.autograd.grad(torch.stack(list(whole.values())).sum(), parameters)
    parts, part_gradients = [], []
    for index in range(count):
        trainer.processes = Processes(index, count)
        parts.append(trainer.shared_terms(chosen))
        part_gradients.append(torch.autograd.grad(torch.stack(list(parts[-1].values())).sum(), parameters))
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(), value, rtol=1e-5, atol=1e-6)
    for value, *shares in zip(gradients, *part_gradients, strict=True):
        assert (
            torch.stack(shares).sum(0) - value
        ).norm() <= 1e-5 * value.norm()  # of the whole: entries near 0 only round
    assert len({float(part["ce"].detach()) for part in parts}) > 1
