"""Settings of studies, of the paper's recipes and of benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from s2t.config.build import build_config, parse_settings
from s2t.config.checks import check_at_least, check_choice, check_range, require
from s2t.config.learn import TrainConfig
from s2t.config.shared import DISTILLATIONS, ChatConfig, ModelConfig, ReadoutConfig, TaskConfig
from s2t.errors import ConfigError

_GIVEN_BY_STUDY = ("slm", "groups", "out")  # of what `s2t train` takes


@dataclass(frozen=True)
class StudyConfig(TaskConfig, ChatConfig, ModelConfig):
    """`s2t study NAME`: one question about a pair or an adapter, answered with a table and a picture."""

    llm: str | None = "tiny:llm"
    """Hub id, folder, or `tiny:llm`: the reference."""
    name: str = field(default="", metadata={"hidden": True})
    """baselines, sufficiency, positions, scaling, triggers, criticality, candidates, training, size, transfer, distillation,
    knowledge, slips, data, critical or rivals."""
    out: str = "runs/study"
    """Folder of this study; rerunning resumes it."""
    base: str | None = None
    """Folder with the runs measure, calibrate, collect and train of this pair, such as runs/demo; None makes them below --out."""
    split: str = "test"
    """calibration or test: the problems that accuracies and hit rates are of."""
    limit: int = 1000
    """Number of problems."""
    calibration_limit: int = 1000
    """Calibration problems that thresholds come from."""
    train_limit: int = 6000
    """Problems that selectors are trained on."""
    quantile: float = 0.97
    """Quantile of divergence above which a step is a divergence point."""
    training: str | None = None
    """Settings of `s2t train` as name=value,name=value; None takes the demo's for embedded models, else the defaults."""
    slms: str | None = None
    """SLMs of sufficiency and scaling, comma-separated; None takes --slm alone."""
    tasks: str | None = None
    """Tasks of sufficiency and transfer, separated by semicolons; None takes --task alone."""
    distilled: str | None = None
    """Distilled SLMs that knowledge compares with selection, comma-separated folders of `s2t distill`; None is without."""
    arms: str | None = None
    """Arms of distillation beside greedy and s2t-local, comma-separated: methods of `s2t distill`, and METHOD+s2t-local, a
    selector trained on that SLM; s2t-local alone adds none. None takes sft, kd, on-policy-kd and sft+s2t-local."""
    methods: str | None = None
    """Methods of rivals, comma-separated names as of `s2t eval` (greedy is always among them); None takes all."""
    shares: str | None = None
    """Shares of LLM tokens that rivals asks for, comma-separated, within 0..1; None takes 0.02,0.05,0.1,0.2."""
    adapter: str | None = None
    """Adapter of rivals, a folder written by `s2t train`; None trains one on this study's groups."""
    num_seeds: int = 3
    """Seeds of what draws at random in baselines and triggers, and of the arms of distillation but METHOD+s2t-local."""
    max_new_tokens: int = 256
    """Length limit of one answer, in tokens."""
    batch_size: int = 64
    """Sequences written at once."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_chat()
        self.check_task()
        check_range("quantile", self.quantile, 0, 1)
        check_at_least(
            1, calibration_limit=self.calibration_limit, train_limit=self.train_limit, num_seeds=self.num_seeds
        )
        check_at_least(1, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        for share in self.token_shares:
            check_range("shares", share, 0, 1)
        require(self.llm is not None, "a study needs the LLM; pass --llm MODEL.")
        require(self.split in ("calibration", "test"), f"split must be calibration or test; got {self.split!r}.")
        self._check_training()
        known = ("s2t-local", *DISTILLATIONS, *(f"{name}+s2t-local" for name in DISTILLATIONS))
        unknown = [name for name in self.arm_names if name not in known]
        require(not unknown, f"arms must be of {', '.join(known)}; got {', '.join(unknown)}.")

    def _check_training(self) -> None:
        """Raise ConfigError where `s2t train` would refuse the settings, or they are the study's own to give."""
        given = parse_settings(self.training or "")
        own = [name for name in _GIVEN_BY_STUDY if name in given]
        require(not own, f"training takes no {', '.join(own)}, which the study gives; leave it out.")
        try:
            build_config(TrainConfig, flags=given)
        except ConfigError as error:
            raise ConfigError(f"training: {error}") from error

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods of rivals; () for all."""
        return tuple(name.strip() for name in (self.methods or "").split(",") if name.strip())

    @property
    def token_shares(self) -> tuple[float, ...]:
        """The shares of LLM tokens that rivals asks for; () for its own."""
        return _listed(float, self.shares, "shares must be numbers within 0..1") if self.shares is not None else ()

    @property
    def arm_names(self) -> tuple[str, ...]:
        names = ",".join((*DISTILLATIONS, "sft+s2t-local")) if self.arms is None else self.arms
        return tuple(name.strip() for name in names.split(",") if name.strip())

    @property
    def slm_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.slms or self.slm).split(",") if name.strip())

    @property
    def distilled_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.distilled or "").split(",") if name.strip())

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.tasks or self.task).split(";") if name.strip())

    def for_slm(self, slm: str) -> StudyConfig:
        """The same study of another SLM, with runs of its own."""
        folder = "".join(c if c.isalnum() else "-" for c in slm).strip("-")
        others = {} if slm == self.slm else {"base": None, "revision": None}
        return replace(self, slm=slm, slms=None, out=f"{self.out}/{folder}", **others)


@dataclass(frozen=True)
class ReproduceConfig:
    """`s2t reproduce RECIPE`: the stages of a recipe, one after the other."""

    recipe: str = field(default="", metadata={"hidden": True})
    """TOML file with the stages."""
    out: str = "runs/reproduce"
    """Folder below which every stage has its own; rerunning goes on."""
    override: list[str] = field(default_factory=list)
    """name=value, in place of the recipe's wherever the recipe gives that setting; one that it never gives goes to every
    stage that knows it. May be given several times."""
    dry_run: bool = False
    """Check the recipe and print its commands; run nothing."""

    def __post_init__(self) -> None:
        require(bool(self.out), "out must name a folder.")


@dataclass(frozen=True)
class BenchConfig(ReadoutConfig, ModelConfig):
    """`s2t bench`; a model may also be `random:` and a shape, such as random:qwen2.5-0.5b or random:qwen2.5-1.5b,layers=4."""

    work: str = "decode"
    """decode (against transformers and our greedy; with --llm drafted s2t too), collect (labelling by prefill against step by
    step; needs --llm), train (one optimizer step on shared prefixes) or limit (every stage against its own matrix products)."""
    batch_size: int = 8
    """Sequences decoded at once."""
    batch_sizes: str = "1,8,64"
    """The same of limit, comma-separated; drafts and labels take the largest."""
    prompt_tokens: int = 128
    """Length of every prompt, or of a training prefix."""
    max_new_tokens: int = 64
    """Tokens generated per sequence."""
    trigger_rates: str = "0.02"
    """Shares of steps at which s2t-local selects, comma-separated; the last one is that of collect and of s2t, too."""
    num_candidates: int = 8
    """K."""
    with_transformers: bool = True
    """Time greedy generate of transformers as well."""
    groups: int = 1
    """Selection groups of a training step, all on one prefix."""
    task: str = "rg:gsm_symbolic,max_number=100"
    """Problems to collect on."""
    limit: int = 256
    """Number of problems to collect on."""
    repeats: int = 3
    """Measured rounds after one to warm up; in each, all contestants run in turns."""
    seed: int = 0
    """Seed of the prompts, of the trigger and of random weights."""

    def __post_init__(self) -> None:
        self.check_model()
        check_choice("work", self.work, ("decode", "collect", "train", "limit"))
        self.check_readout()
        require(
            self.work != "collect" or self.llm is not None, "bench of collect compares two models; pass --llm MODEL."
        )
        for name in ("batch_size", "prompt_tokens", "max_new_tokens", "num_candidates", "groups", "limit", "repeats"):
            check_range(name, getattr(self, name), low=1)
        check_at_least(0, seed=self.seed)
        for rate in self.rates:
            check_range("trigger_rates", rate, low=0, high=1)
        for size in self.batches:
            check_range("batch_sizes", size, low=1)

    @property
    def rates(self) -> tuple[float, ...]:
        return _listed(float, self.trigger_rates, "trigger_rates must be numbers within 0..1")

    @property
    def batches(self) -> tuple[int, ...]:
        return _listed(int, self.batch_sizes, "batch_sizes must be whole numbers from 1 on")


def _listed(kind: type[Any], text: str, expected: str) -> tuple[Any, ...]:
    """Comma-separated numbers; raises ConfigError where they are none."""
    try:
        found = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    require(bool(found), f"{expected}, comma-separated; got {text!r}.")
    return found
