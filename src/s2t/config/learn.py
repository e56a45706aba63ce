"""Settings from measuring to what is shared: measure, calibrate, collect, train, distill, push, merge."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from s2t.config.checks import check_at_least, check_choice, check_effects, check_positive, check_range, require
from s2t.config.shared import (
    CRITICALITY_READINGS,
    DISTILLATIONS,
    DTYPES,
    QUANTIZATIONS,
    TRACKERS,
    ChatConfig,
    ModelConfig,
    ReadoutConfig,
    ShardConfig,
    StepConfig,
    TaskConfig,
)
from s2t.errors import ConfigError


@dataclass(frozen=True)
class MeasureConfig(StepConfig, TaskConfig, ShardConfig, ChatConfig, ModelConfig):
    """`s2t measure`: local sufficiency of a pair on the SLM's own trajectories."""

    llm: str | None = "tiny:llm"
    """Hub id, folder, or `tiny:llm`: the reference the SLM is compared with."""
    out: str = "runs/measure"
    """Folder of this run; rerunning resumes it."""
    split: str = "calibration"
    """train, calibration or test."""
    quantile: float = 0.95
    """Steps above this quantile of divergence count as divergence points when no threshold is given."""
    threshold: float | None = None
    """Divergence, in nats, above which a step is a divergence point; None takes the quantile."""
    shard_size: int = 128
    """Problems per file; a killed run loses one shard at most."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_chat()
        self.check_shards()
        self.check_task()
        self.check_steps()
        check_range("quantile", self.quantile, 0, 1)
        check_at_least(1, shard_size=self.shard_size)


@dataclass(frozen=True)
class CalibrateConfig:
    """`s2t calibrate`: a measured run of the calibration split becomes thresholds."""

    run: str = "runs/measure"
    """Folder written by `s2t measure` on the calibration split."""
    out: str = "runs/calibrate"
    """Folder of this run."""
    quantile: float = 0.95
    """Thresholds stand at this quantile of the readings; 0.95 triggers at about 5 % of the steps."""

    def __post_init__(self) -> None:
        check_range("quantile", self.quantile, 0, 1)


@dataclass(frozen=True)
class CollectConfig(StepConfig, TaskConfig, ShardConfig, ChatConfig, ModelConfig):
    """`s2t collect`: problems of the train split become selection groups in parquet shards."""

    llm: str | None = "tiny:llm"
    """Hub id, folder, or `tiny:llm`: the reference that labels the groups."""
    out: str = "runs/collect"
    """Folder of this run; rerunning resumes it."""
    split: str = "train"
    """train, calibration or test."""
    policy: str = "s2t"
    """What writes the trajectories: greedy, sample, takeover, s2t, or s2t-local (with an adapter or a merged model)."""
    adapter: str | None = None
    """Adapter written by `s2t train`, for policy s2t-local."""
    calibration: str | None = None
    """calibration.json written by `s2t calibrate`, or its folder."""
    threshold: float | None = None
    """Divergence threshold; None takes the calibration file's."""
    heldout_templates: float = 0.25
    """Share of templates kept out of selector training."""
    num_candidates: int = 16
    """Candidates stored per group."""
    temperature: float = 1.0
    """Of policy sample; above 0."""
    shard_size: int = 256
    """Problems per file; a killed run loses one shard at most."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_chat()
        self.check_shards()
        self.check_task()
        self.check_steps()
        check_choice("policy", self.policy, ("greedy", "sample", "takeover", "s2t", "s2t-local"))
        is_here = self.slm.startswith("tiny:") or Path(self.slm).exists()  # else it may be a merged model on the hub
        is_plain = is_here and not (Path(self.slm) / "s2t_config.json").is_file()
        if self.policy == "s2t-local" and self.adapter is None and is_plain:
            raise ConfigError("policy s2t-local needs --adapter, a folder written by `s2t train`.")
        check_range("heldout_templates", self.heldout_templates, 0, 0.9)
        check_at_least(1, num_candidates=self.num_candidates, shard_size=self.shard_size)
        check_positive("; use policy greedy for 0", temperature=self.temperature)

    def check_given(self, names: Collection[str]) -> None:
        """Raise ConfigError where one of these settings has no effect on the policy."""
        check_effects(names, [self.policy], {"temperature": ("sample",), "adapter": ("s2t-local",)}, "policy")


@dataclass(frozen=True)
class FitConfig:
    """The LoRA and how it is fitted; shared by train and distill, so that the two can be compared on equal terms."""

    lora_rank: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """Scale of the LoRA, over its rank."""
    lora_dropout: float = 0.05
    """Dropout inside the LoRA while training."""
    learning_rate: float = 5e-5
    """Peak of the schedule: linear warm-up, then a cosine to a tenth."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    epochs: float = 3.0
    """Passes over the training data; may be a fraction."""
    max_steps: int | None = None
    """Optimizer steps, in place of --epochs."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    checkpoint_steps: int = 200
    """Optimizer steps between checkpoints; a killed run resumes from the last one."""
    log_with: str | None = None
    """tensorboard, wandb or trackio: where losses, the learning rate and what held-out groups say can be watched; extras of those
    names install them."""

    def check_fit(self) -> None:
        check_at_least(1, lora_rank=self.lora_rank, checkpoint_steps=self.checkpoint_steps)
        check_positive(epochs=self.epochs, lora_alpha=self.lora_alpha)
        if self.max_steps is not None:
            check_at_least(1, max_steps=self.max_steps)
        check_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        check_at_least(0, weight_decay=self.weight_decay)
        check_range("lora_dropout", self.lora_dropout, 0, 0.99)
        check_range("warmup_ratio", self.warmup_ratio, 0, 1)
        if self.log_with is not None:
            check_choice("log_with", self.log_with, TRACKERS)


@dataclass(frozen=True)
class TrainConfig(ReadoutConfig, FitConfig, ModelConfig):
    """`s2t train`: selection groups become an adapter."""

    groups: str = "runs/collect"
    """Folders written by `s2t collect`, comma-separated; of one pair and threshold, their tasks may differ."""
    out: str = "runs/train"
    """Folder of this run; the adapter goes into its `adapter` folder, and rerunning resumes."""
    criticality: str = "head"
    """head (a small MLP) or reserved (two reserved tokens): how criticality is read."""
    head_size: int = 64
    """Width of the criticality head."""
    num_candidates: int = 8
    """K, the candidates of a group that the selector is trained on."""
    num_bins: int = 16
    """R, the reserved tokens read as bins."""
    score_temperature: float = 0.1
    """The expected bin is divided by this in the score; above 0."""
    prior_weight: float = 1.0
    """Lambda: the weight of log p_S in the score."""
    criticality_threshold: float | None = None
    """Criticality above which a step triggers; stored in the adapter. None fires as often as the held-out groups' trajectories
    have divergence points."""
    heldout_problems: float = 0.1
    """Share of the problems whose groups are not trained on: they say when to stop, how much weight the adapter gets and where
    criticality triggers."""
    validation_steps: int = 100
    """Optimizer steps between two looks at the held-out groups; the best weights seen are kept."""
    patience: int = 8
    """Training ends after so many looks without a better one; 0 runs all steps."""
    batch_groups: int = 4
    """Selection groups per step, at least; whole trajectories are kept together."""
    kept_per_group: float | None = None
    """Steps, for each selection group, that are no divergence points but look like some (the highest criticality): there the
    selector learns to keep the SLM's order. None is 1 for rank and 0 for bins."""
    ce_weight: float | None = None
    """Weight of the cross-entropy against the LLM's choice among the candidates; None is 1 for bins and 0 for rank."""
    pairwise_weight: float | None = None
    """Weight of the pairwise margin loss of bins; None is 1."""
    pairwise_margin: float = 0.1
    """By how much the LLM's choice must lead in expected bin."""
    listwise_weight: float | None = None
    """Weight of KL(LLM on the candidates || softmax of the scores); None is 1 for rank and 0.1 for bins."""
    lm_weight: float = 0.1
    """Weight of KL(base LM || adapted LM) on prefix tokens; only scope `always` has use for it."""
    criticality_weight: float = 1.0
    """Weight of the criticality loss."""
    prefix_cache_gib: float = 4.0
    """Memory for the base model's prefixes, read once if all fit; 0 reads them at every step. Scope always has none."""
    seed: int = 0
    """Seed of the order of groups, of dropout and of new weights."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_fit()
        self.check_readout()
        require(
            self.readout == "bins" or not self.pairwise_weight,
            f"pairwise_weight is of readout bins; got {self.pairwise_weight} with readout {self.readout}.",
        )
        check_choice("criticality", self.criticality, CRITICALITY_READINGS)
        check_at_least(2, num_bins=self.num_bins)
        check_at_least(1, num_candidates=self.num_candidates, head_size=self.head_size, batch_groups=self.batch_groups)
        check_positive(score_temperature=self.score_temperature)
        weights = {name: value for name, value in vars(self).items() if name.endswith("_weight")}
        check_at_least(0, **{name: value for name, value in weights.items() if value is not None})
        check_at_least(0, pairwise_margin=self.pairwise_margin, prefix_cache_gib=self.prefix_cache_gib, seed=self.seed)
        check_at_least(0, patience=self.patience)
        if self.kept_per_group is not None:
            check_at_least(0, kept_per_group=self.kept_per_group)
        check_at_least(1, validation_steps=self.validation_steps)
        check_range("heldout_problems", self.heldout_problems, 0, 0.9)
        if self.criticality_threshold is not None:
            check_range("criticality_threshold", self.criticality_threshold, 0, 1)

    @property
    def kept(self) -> float:
        """Kept steps for each selection group."""
        return self.kept_per_group if self.kept_per_group is not None else float(self.readout == "rank")

    @property
    def selection_weights(self) -> dict[str, float]:
        """Weights of the losses over candidates, by name."""
        given = {"ce": self.ce_weight, "pairwise": self.pairwise_weight, "listwise": self.listwise_weight}
        default = (
            {"ce": 0.0, "listwise": 1.0} if self.readout == "rank" else {"ce": 1.0, "pairwise": 1.0, "listwise": 0.1}
        )
        return {name: value if given[name] is None else given[name] for name, value in default.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class DistillConfig(FitConfig, TaskConfig, ChatConfig, ModelConfig):
    """`s2t distill`: an ordinary LoRA of the SLM, fitted to the LLM's answers or distributions."""

    llm: str | None = "tiny:llm"
    """Hub id, folder, or `tiny:llm`: the reference that is distilled."""
    method: str = "sft"
    """sft (cross-entropy on the LLM's answers), kd (KL to the LLM on its answers) or on-policy-kd (KL on the SLM's own)."""
    out: str = "runs/distill"
    """Folder of this run; the adapter goes into its `adapter` folder, and rerunning resumes."""
    split: str = "train"
    """train or calibration."""
    heldout_templates: float = 0.25
    """Share of templates kept out of training."""
    only_correct: bool = False
    """Train on the answers that the task grades as right, only."""
    policy: str = "greedy"
    """Of on-policy-kd: how the SLM writes its answers, greedy or sample."""
    temperature: float = 1.0
    """Of policy sample; above 0."""
    kd_temperature: float = 1.0
    """Of kd and on-policy-kd: both distributions are softened by it; above 0."""
    support_size: int = 64
    """Of kd and on-policy-kd: the LLM's likeliest tokens whose probabilities are kept; all others are one bucket."""
    max_new_tokens: int = 256
    """Length limit of one answer, in tokens."""
    batch_size: int = 64
    """Sequences written at once."""
    batch_answers: int = 8
    """Answers per optimizer step."""
    shard_size: int = 256
    """Problems per file; a killed run loses one shard at most."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_chat()
        self.check_task()
        self.check_fit()
        check_choice("method", self.method, DISTILLATIONS)
        check_choice("split", self.split, ("train", "training", "calibration"))
        check_choice("policy", self.policy, ("greedy", "sample"))
        if self.policy != "greedy" and self.method != "on-policy-kd":
            raise ConfigError(f"policy {self.policy} is of method on-policy-kd; {self.method} reads the LLM's answers.")
        check_range("heldout_templates", self.heldout_templates, 0, 0.9)
        check_positive("; use policy greedy for 0", temperature=self.temperature)
        check_positive(kd_temperature=self.kd_temperature)
        check_at_least(
            1, support_size=self.support_size, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        check_at_least(1, batch_answers=self.batch_answers, shard_size=self.shard_size)

    def check_given(self, names: Collection[str]) -> None:
        """Raise ConfigError where one of these settings has no effect on the policy or the method."""
        check_effects(names, [self.policy], {"temperature": ("sample",)}, "policy")
        with_targets = ("kd", "on-policy-kd")
        check_effects(names, [self.method], {"kd_temperature": with_targets, "support_size": with_targets}, "method")


@dataclass(frozen=True)
class PushConfig:
    """`s2t push`: an adapter becomes a repository of the Hugging Face hub."""

    adapter: str = "runs/train/adapter"
    """Folder written by `s2t train`, with the accuracies of `s2t eval --card` in its card."""
    repo: str = ""
    """OWNER/NAME of the repository, which is made where there is none."""
    public: bool = False
    """Make a new repository public; one that exists stays as it is."""

    def __post_init__(self) -> None:
        is_one = re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) is not None
        require(is_one, f"repo must be OWNER/NAME; got {self.repo!r}; pass --repo OWNER/NAME.")


@dataclass(frozen=True)
class ExportConfig:
    """`s2t export`: an adapter and its base model become a folder of GGUF files for llama.cpp."""

    adapter: str = "runs/train/adapter"
    """Adapter written by `s2t train`, of scope step or candidates: a folder or a hub id."""
    slm: str | None = None
    """Its base model: hub id, folder or `tiny:slm`; None takes the one the adapter names."""
    base_gguf: str | None = None
    """A GGUF file of the base model (a path, or hub:OWNER/NAME/FILE.gguf) to take in place of making one."""
    out: str = "runs/gguf"
    """Folder to write; it must not exist, be empty, or be a previous export with --overwrite."""
    quantization: str | None = None
    """Of the file: q4_k_m, q5_k_m, q6_k, q8_0, f16, bf16, f32 and others; None is q4_k_m, or what --base-gguf has."""
    calibration_problems: int = 16
    """Problems of the adapter's task (calibration split) that the file answers so that criticality triggers as often as it did
    in training; 0 keeps the adapter's threshold."""
    calibration_tokens: int = 256
    """Longest of these answers, in tokens."""
    threads: int = 0
    """Of llama.cpp: 0 takes the physical cores that nothing else keeps busy."""
    overwrite: bool = False
    """Replace a previous export."""
    trust_remote_code: bool = False
    """Run modelling code that comes with a checkpoint."""

    def __post_init__(self) -> None:
        check_at_least(0, calibration_problems=self.calibration_problems, threads=self.threads)
        check_at_least(8, calibration_tokens=self.calibration_tokens)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        require(
            self.slm is None or self.base_gguf is None, "--slm and --base-gguf are two ways to say the base; pass one."
        )


@dataclass(frozen=True)
class MergeConfig:
    """`s2t merge`: an adapter and its base model become one folder that loads like any causal LM."""

    adapter: str = "runs/train/adapter"
    """Adapter written by `s2t train`: a folder or a hub id."""
    slm: str | None = None
    """Its base model: hub id, folder or `tiny:slm`; None takes the one the adapter names."""
    out: str = "runs/merged"
    """Folder to write; it must not exist, be empty, or be a previous merge with --overwrite."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16: of the weights written; auto keeps the checkpoint's."""
    eval: str | None = None
    """Folder written by `s2t eval` with this adapter; its accuracies go into the model card. None takes those of its own card."""
    overwrite: bool = False
    """Replace a previous merge."""
    trust_remote_code: bool = False
    """Run modelling code that comes with a checkpoint."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
