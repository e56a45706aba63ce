"""One frozen dataclass per command: file and flags become one checked object; each default lives here once.

Flag beats file beats default. An unknown key is an error. The resolved config is saved in the run folder
and the same command accepts it back. Knows no model and reads no problem.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from s2t.errors import ConfigError

STRATEGIES = ("greedy", "sample", "self-consistency", "self-certainty", "llm", "takeover", "s2t", "s2t-local")
MANY_SAMPLES = ("self-consistency", "self-certainty")
TRIGGERS = ("never", "random", "entropy", "divergence", "criticality")
SCOPES = ("candidates", "always", "stream")
CRITICALITY_READINGS = ("head", "reserved")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXECUTIONS = ("auto", "eager", "static", "compile")
SUPPORTS = ("auto", "slm-top", "llm-top")
DIVERGENCES = ("llm-slm", "slm-llm", "js", "released-code")
DISTILLATIONS = ("sft", "kd", "on-policy-kd")

TRIGGERED = ("takeover", "s2t", "s2t-local")
NEEDS_LLM = frozenset({"llm", "takeover", "s2t"})
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ConfigError unless low <= value <= high."""
    _require(low <= value <= high, f"{name} must be within {low}..{high}; got {value}.")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def _at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        _require(value >= low, f"{name} must be at least {low}; got {value}.")


def _positive(hint: str = "", /, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{name} must be above 0; got {value}{hint}.")


def _between(name: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, f"{name} must be within {low}..{high}; got {value}.")


@dataclass(frozen=True)
class ModelConfig:
    """Which models, and how they are loaded; shared by every command."""

    slm: str = "tiny:slm"
    """Hub id, folder, PEFT adapter (merged into its base), or `tiny:slm`, `tiny:slm-numbers` (other tokens), `tiny:slm-small`."""
    llm: str | None = None
    """Hub id, folder, PEFT adapter, or `tiny:llm`; None where the LLM is not needed."""
    revision: str | None = None
    """Branch, tag or commit of the SLM on the hub."""
    llm_revision: str | None = None
    """Branch, tag or commit of the LLM on the hub."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16; auto keeps the checkpoint's dtype."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps."""
    device_map: str | None = None
    """In place of a device: auto, sequential, balanced or a device, as transformers takes it; a model has to fit one device."""
    quantization: str | None = None
    """Of the SLM: bitsandbytes-4bit, bitsandbytes-8bit, or a JSON object or file with a quant_method that transformers knows."""
    llm_quantization: str | None = None
    """Of the LLM, likewise."""
    trust_remote_code: bool = False
    """Run modelling code that comes with a checkpoint."""
    execution: str = "auto"
    """How steps run: eager, static (fixed shapes; CUDA graphs on a GPU), compile (torch.compile as well: minutes at the
    start, for long jobs), or auto (static on a GPU, else eager)."""

    def check_model(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("execution", self.execution, EXECUTIONS)

    @property
    def load_options(self) -> dict[str, Any]:
        """What `load_model` takes beside the SLM's name."""
        names = ("dtype", "device", "trust_remote_code", "execution", "revision", "quantization", "device_map")
        return {name: getattr(self, name) for name in names}

    @property
    def llm_load_options(self) -> dict[str, Any]:
        """What `load_model` takes beside the LLM's name."""
        return self.load_options | {"revision": self.llm_revision, "quantization": self.llm_quantization}


@dataclass(frozen=True)
class RemoteConfig:
    """Where an LLM runs that is not loaded here: OpenAI-compatible servers; shared by what reads the LLM."""

    llm_url: list[str] = field(default_factory=list)
    """Base URL of an OpenAI-compatible server that runs the LLM, such as http://127.0.0.1:8000/v1; several share the requests.
    --llm is then the folder or hub id of its tokenizer, and no weights of it are loaded."""
    llm_model: str | None = None
    """Name under which the servers know the LLM; None takes the only one they serve."""
    llm_api_key_env: str = "S2T_LLM_API_KEY"
    """Environment variable that holds the servers' API key, if they want one."""
    max_in_flight: int = 128
    """Requests under way at any time, over all servers."""
    timeout_s: float = 120.0
    """Seconds within which one request must be answered."""
    max_retries: int = 10
    """How often a request is made again after 429, 5xx, a timeout, a broken connection or a garbled reply."""
    patience_s: float = 300.0
    """Seconds to wait for a server to come back when all have failed."""
    prompt_price: float = 0.0
    """Money per million prompt tokens, for the summary."""
    completion_price: float = 0.0
    """Money per million generated tokens, for the summary."""
    cached_price: float | None = None
    """Money per million prompt tokens that a server had cached; None is the prompt's price."""

    def check_remote(self) -> None:
        _at_least(1, max_in_flight=self.max_in_flight)
        _at_least(0, max_retries=self.max_retries, patience_s=self.patience_s)
        _positive(timeout_s=self.timeout_s)
        _at_least(0, prompt_price=self.prompt_price, completion_price=self.completion_price)
        if self.cached_price is not None:
            _at_least(0, cached_price=self.cached_price)

    @property
    def llm_urls(self) -> tuple[str, ...]:
        """The base URLs, each once."""
        return _urls(self.llm_url)


def _urls(texts: list[str]) -> tuple[str, ...]:
    urls = [url.strip() for text in texts for url in text.split(",")]
    return tuple(dict.fromkeys(url for url in urls if url))


@dataclass(frozen=True)
class ShardConfig(RemoteConfig):
    """How a workflow over many problems uses servers."""

    shards_in_flight: int = 4
    """Of an LLM on servers: files worked at once, so that one computes while others wait for answers; each holds --batch-size
    sequences."""

    def check_shards(self) -> None:
        self.check_remote()
        _at_least(1, shards_in_flight=self.shards_in_flight)


@dataclass(frozen=True)
class ServedConfig(RemoteConfig):
    """Where an SLM runs that is not loaded here; shared by generate, chat and eval."""

    slm_url: list[str] = field(default_factory=list)
    """Base URL of a vLLM server that runs the SLM, for greedy and s2t-local; several share the sequences. --slm is then the
    folder that is served."""
    slm_lora: str | None = None
    """Name of the selector's LoRA on those servers, for scope stream; None takes the only one there."""

    @property
    def slm_urls(self) -> tuple[str, ...]:
        """The base URLs, each once."""
        return _urls(self.slm_url)


# Settings that may differ when a run is resumed: they say where and how fast the work is done, not what it is.
PLACES = ("workers", "ray", "ray_actors", "ray_gpus")
HOW_IT_RUNS = (*PLACES, "slm_url", *(name for name in ShardConfig.__dataclass_fields__ if name != "llm_model"))


@dataclass(frozen=True)
class TaskConfig:
    """Which problems; shared by every command that reads problems."""

    task: str = "rg:gsm_symbolic,max_number=100"
    """`rg:NAME[,key=value]`, a named task such as gsm8k, `hub:OWNER/NAME`, or a .jsonl path."""
    limit: int = 500
    """Number of problems."""
    prompt: str = "auto"
    """plain, cot (step by step, boxed answer) or auto (plain for the embedded pair, else cot)."""
    seed: int = 0
    """Seed of problems, sampling and training."""
    workers: int = 1
    """Processes that share the problems, each with models of its own; more pay for small models on a CPU."""
    ray: str | None = None
    """Ray actors share the problems: local (of this machine), auto (of the cluster that runs here, else local) or HOST:PORT."""
    ray_actors: int | None = None
    """Of --ray: how many, each with models of its own; None is one per GPU of the cluster, or per CPU where it has none."""
    ray_gpus: float = 1.0
    """Of --ray: GPUs of each actor where the cluster has any; 0.5 puts two actors on one."""

    def check_task(self) -> None:
        _at_least(1, limit=self.limit, workers=self.workers)
        _require(
            self.ray is None or self.workers == 1, "workers are local processes; pass --workers or --ray, not both."
        )
        if self.ray_actors is not None:
            _at_least(1, ray_actors=self.ray_actors)
        _at_least(0, ray_gpus=self.ray_gpus)
        _choice("prompt", self.prompt, ("auto", "plain", "cot"))


@dataclass(frozen=True)
class StepConfig:
    """How sequences are written and read, by measure, collect and decoding alike."""

    support_size: int = 64
    """Tokens over which divergence is taken; a server tells 20 of its LLM's at most."""
    support: str = "auto"
    """Whose likeliest tokens these are: slm-top, llm-top, or auto: slm-top, and llm-top for an LLM on servers."""
    divergence: str = "llm-slm"
    """llm-slm, slm-llm, js or released-code: how the two distributions are compared."""
    max_new_tokens: int = 256
    """Length limit of one answer, in tokens."""
    batch_size: int = 64
    """Sequences written at once."""
    warmup_steps: int = 3
    """The first generated tokens that never trigger."""

    def check_steps(self) -> None:
        _choice("divergence", self.divergence, DIVERGENCES)
        _choice("support", self.support, SUPPORTS)
        _at_least(1, support_size=self.support_size, max_new_tokens=self.max_new_tokens)
        _at_least(1, batch_size=self.batch_size)
        _at_least(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True)
class DecodeConfig(StepConfig):
    """How tokens are chosen; shared by generate, eval and collect."""

    trigger: str = "auto"
    """never, random, entropy, divergence, criticality, or auto: divergence for takeover and s2t, criticality
    for s2t-local, never for the others."""
    threshold: float | None = None
    """In the trigger's own unit; None takes the adapter's or the calibration file's value."""
    calibration: str | None = None
    """calibration.json written by `s2t calibrate`, or its folder."""
    adapter: str | None = None
    """Adapter written by `s2t train`, a folder or a hub id; s2t-local needs it, unless the SLM was written by `s2t merge`."""
    num_candidates: int | None = None
    """K, the SLM's tokens offered for selection; None takes the adapter's value, else 8."""
    temperature: float = 0.7
    """Of sample, self-consistency and self-certainty; above 0."""
    top_p: float = 0.95
    """Of what samples: the share of probability kept; 1 keeps all."""
    top_k: int = 0
    """Of what samples: the number of tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Of what samples: drop tokens below this share of the best one; 0 keeps all."""
    num_samples: int = 8
    """N of self-consistency (majority vote) and self-certainty (the sample the model is surest of)."""
    draft_tokens: int = 0
    """Of takeover and s2t: tokens drafted per LLM forward, with the same output; 0 adapts to the rate of flips, 1 is step
    by step."""
    system: str | None = None
    """System prompt; goes into the user message where the model's chat template takes none."""
    stop: list[str] = field(default_factory=list)
    """Text at which an answer ends; it is left out of the answer. May be given several times."""

    def check_decode(self) -> None:
        self.check_steps()
        _choice("trigger", self.trigger, ("auto", *TRIGGERS))
        if self.num_candidates is not None:
            _at_least(1, num_candidates=self.num_candidates)
        _at_least(1, num_samples=self.num_samples)
        _positive("; use greedy for 0", temperature=self.temperature)
        _require(0 < self.top_p <= 1, f"top_p must be within (0, 1]; got {self.top_p}.")
        _at_least(0, top_k=self.top_k, draft_tokens=self.draft_tokens)
        _between("min_p", self.min_p, 0, 1)
        _require(all(self.stop), "stop must be text; an empty stop string would end every answer at once.")


@dataclass(frozen=True)
class GenerateConfig(DecodeConfig, ServedConfig, ModelConfig):
    """`s2t generate` and `s2t chat`."""

    strategy: str | None = None
    """greedy, sample, self-consistency, self-certainty, llm, takeover, s2t or s2t-local; None is s2t-local with an adapter or a
    merged model, else greedy."""
    seed: int = 0
    """Seed of sampling and of the random trigger."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_remote()
        self.check_decode()
        if self.strategy is not None:
            _choice("strategy", self.strategy, STRATEGIES)


@dataclass(frozen=True)
class ServeConfig(DecodeConfig, ServedConfig, ModelConfig):
    """`s2t serve`: an OpenAI-compatible server; decoding settings are those of requests that do not give their own."""

    strategy: str | None = None
    """Of requests that name none: greedy, s2t-local, s2t, takeover or llm; None is s2t-local with an adapter or a merged model,
    else greedy. A temperature above 0 means sample."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    served_name: str | None = None
    """Name of the model in requests and answers; None takes that of --slm."""
    batch_size: int = 32
    """Sequences written at once, for each strategy in use; with --slm-url in all."""
    patience_s: float = 10.0
    """Of an SLM on servers: seconds to wait for one to come back when all have failed, before requests end with 503."""
    max_queue: int = 256
    """Sequences that may wait for a free row beyond those; more are refused with 429."""
    max_length: int = 4096
    """Longest prompt and answer together, in tokens, if the model can read that many."""
    max_body_bytes: int = 2**20
    """Largest body of a request."""
    request_timeout_s: float = 600.0
    """Seconds from a request's arrival to the end of its answer."""
    drain_s: float = 30.0
    """Seconds that running requests get to finish when the server is asked to stop."""
    api_key_file: str | None = None
    """File with the key that clients must send; without it the variable S2T_API_KEY, and without that no key is asked for."""
    no_auth: bool = False
    """Allow an address that others can reach without a key."""

    num_samples: int = 1
    """Not for a server, and always 1: requests ask for n choices."""
    llm_url: list[str] = field(default_factory=list)
    """Not for a server, which runs the LLM in its own process."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_remote()
        self.check_decode()
        _require(not self.llm_urls, "s2t serve takes no llm_url: it runs the LLM in its own process; pass --llm MODEL.")
        _require(
            not (self.slm_urls and self.llm),
            "with slm_url the server writes with greedy and s2t-local, which need no LLM; drop --llm or --slm-url.",
        )
        _require(self.num_samples == 1, "a server takes no num_samples; let requests ask for n choices.")
        if self.strategy is not None:
            _choice(
                "strategy", self.strategy, tuple(name for name in STRATEGIES if name not in ("sample", *MANY_SAMPLES))
            )
        _between("port", self.port, 0, 65535)
        _at_least(0, max_queue=self.max_queue, drain_s=self.drain_s)
        _at_least(2, max_length=self.max_length)
        _at_least(64, max_body_bytes=self.max_body_bytes)
        _positive(request_timeout_s=self.request_timeout_s)


@dataclass(frozen=True)
class MeasureConfig(StepConfig, TaskConfig, ShardConfig, ModelConfig):
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
        self.check_shards()
        self.check_task()
        self.check_steps()
        _between("quantile", self.quantile, 0, 1)
        _at_least(1, shard_size=self.shard_size)


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
        _between("quantile", self.quantile, 0, 1)


@dataclass(frozen=True)
class CollectConfig(StepConfig, TaskConfig, ShardConfig, ModelConfig):
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
        self.check_shards()
        self.check_task()
        self.check_steps()
        _choice("policy", self.policy, ("greedy", "sample", "takeover", "s2t", "s2t-local"))
        if self.policy == "s2t-local" and self.adapter is None and not (Path(self.slm) / "s2t_config.json").is_file():
            raise ConfigError("policy s2t-local needs --adapter, a folder written by `s2t train`.")
        _between("heldout_templates", self.heldout_templates, 0, 0.9)
        _at_least(1, num_candidates=self.num_candidates, shard_size=self.shard_size)
        _positive("; use policy greedy for 0", temperature=self.temperature)


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
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    checkpoint_steps: int = 200
    """Optimizer steps between checkpoints; a killed run resumes from the last one."""

    def check_fit(self) -> None:
        _at_least(1, lora_rank=self.lora_rank, checkpoint_steps=self.checkpoint_steps)
        _positive(epochs=self.epochs, lora_alpha=self.lora_alpha)
        _positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        _at_least(0, weight_decay=self.weight_decay)
        _between("lora_dropout", self.lora_dropout, 0, 0.99)
        _between("warmup_ratio", self.warmup_ratio, 0, 1)


@dataclass(frozen=True)
class TrainConfig(FitConfig, ModelConfig):
    """`s2t train`: selection groups become an adapter."""

    groups: str = "runs/collect"
    """Folders written by `s2t collect`, comma-separated."""
    out: str = "runs/train"
    """Folder of this run; the adapter goes into its `adapter` folder, and rerunning resumes."""
    adapter_scope: str = "candidates"
    """candidates (the LoRA acts on candidate tokens alone), always (on every token, as in the paper) or stream (on the
    candidates and on a reading of the prefix of their own, beside the base model's; for vLLM)."""
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
    criticality_threshold: float = 0.7
    """Criticality above which a step triggers; stored in the adapter."""
    batch_groups: int = 4
    """Selection groups per step, at least; whole trajectories are kept together."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy against the LLM's choice among the candidates."""
    pairwise_weight: float = 1.0
    """Weight of the pairwise margin loss."""
    pairwise_margin: float = 0.1
    """By how much the LLM's choice must lead in expected bin."""
    listwise_weight: float = 0.1
    """Weight of KL(LLM on the candidates || softmax of the scores)."""
    lm_weight: float = 0.1
    """Weight of KL(base LM || adapted LM) on prefix tokens; only scope `always` has use for it."""
    criticality_weight: float = 1.0
    """Weight of the criticality loss."""
    prefix_cache_gib: float = 4.0
    """Memory for the frozen prefixes of scope candidates, read once if all fit; 0 reads them at every step."""
    seed: int = 0
    """Seed of the order of groups, of dropout and of new weights."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_fit()
        _choice("adapter_scope", self.adapter_scope, SCOPES)
        _choice("criticality", self.criticality, CRITICALITY_READINGS)
        _at_least(2, num_bins=self.num_bins)
        _at_least(1, num_candidates=self.num_candidates, head_size=self.head_size, batch_groups=self.batch_groups)
        _positive(score_temperature=self.score_temperature)
        _at_least(0, **{name: value for name, value in vars(self).items() if name.endswith("_weight")})
        _at_least(0, pairwise_margin=self.pairwise_margin, prefix_cache_gib=self.prefix_cache_gib)
        _between("criticality_threshold", self.criticality_threshold, 0, 1)


@dataclass(frozen=True)
class DistillConfig(FitConfig, TaskConfig, ModelConfig):
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
    max_steps: int | None = None
    """Optimizer steps, in place of --epochs."""
    shard_size: int = 256
    """Problems per file; a killed run loses one shard at most."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_task()
        self.check_fit()
        _choice("method", self.method, DISTILLATIONS)
        _choice("split", self.split, ("train", "training", "calibration"))
        _choice("policy", self.policy, ("greedy", "sample"))
        if self.policy != "greedy" and self.method != "on-policy-kd":
            raise ConfigError(f"policy {self.policy} is of method on-policy-kd; {self.method} reads the LLM's answers.")
        _between("heldout_templates", self.heldout_templates, 0, 0.9)
        _positive("; use policy greedy for 0", temperature=self.temperature)
        _positive(kd_temperature=self.kd_temperature)
        _at_least(1, support_size=self.support_size, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        _at_least(1, batch_answers=self.batch_answers, shard_size=self.shard_size)
        if self.max_steps is not None:
            _at_least(1, max_steps=self.max_steps)


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
        _choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class EvalConfig(DecodeConfig, TaskConfig, ServedConfig, ShardConfig, ModelConfig):
    """`s2t eval`: problems x strategies become graded results, scores with intervals and paired tests."""

    llm: str | None = None
    """Hub id, folder, or `tiny:llm`; needed by llm, takeover and s2t."""
    strategies: str = "greedy,s2t-local"
    """Comma-separated: greedy, sample, self-consistency, self-certainty, llm, takeover, s2t, s2t-local; the last three also
    with a trigger of their own, such as s2t@entropy."""
    out: str = "runs/eval"
    """Folder of this run; rerunning resumes it."""
    split: str = "test"
    """train, calibration or test."""
    heldout_templates: float = 0.25
    """Share of templates reported as unseen; the adapter's own list goes first."""
    shard_size: int = 128
    """Problems per file; a killed run loses one shard at most."""
    num_traces: int = 1000
    """Problems of which every token is kept, for the report to show; the first ones of the run."""
    num_seeds: int = 1
    """Seeds of whatever draws at random (samples and the trigger random); the problems are those of --seed."""
    card: bool = False
    """Put the accuracies into the model card (README.md) of the adapter's folder; `s2t merge` takes them from there."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_shards()
        self.check_task()
        self.check_decode()
        _require(
            not self.card or self.adapter is not None, "--card writes into an adapter's folder; pass --adapter FOLDER."
        )
        _between("heldout_templates", self.heldout_templates, 0, 0.9)
        _at_least(1, shard_size=self.shard_size, num_seeds=self.num_seeds)
        _at_least(0, num_traces=self.num_traces)
        names = self.strategy_names
        for name in names or ("",):
            base, mark, trigger = name.partition("@")
            _choice("strategies", base, STRATEGIES)
            if mark:
                _require(base in TRIGGERED, f"strategies: only {', '.join(TRIGGERED)} take a trigger; got {name!r}.")
                _choice(f"trigger of {base}", trigger, TRIGGERS)
            _require(names.count(name) == 1, f"strategies must differ; got {name} more than once.")

    @property
    def strategy_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.strategies.split(",") if name.strip())


@dataclass(frozen=True)
class StudyConfig(TaskConfig, ModelConfig):
    """`s2t study NAME`: one question about a pair or an adapter, answered with a table and a picture."""

    llm: str | None = "tiny:llm"
    """Hub id, folder, or `tiny:llm`: the reference."""
    name: str = field(default="sufficiency", metadata={"hidden": True})
    """baselines, sufficiency, positions, scaling, triggers, criticality, candidates, training, size, transfer, distillation,
    knowledge, slips or data."""
    out: str = "runs/study"
    """Folder of this study; rerunning resumes it."""
    base: str | None = None
    """Folder with the runs measure, calibrate, collect and train of this pair, such as runs/demo; None makes them below --out."""
    split: str = "test"
    """train, calibration or test: the problems that accuracies and hit rates are of."""
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
    num_seeds: int = 3
    """Seeds of what draws at random in baselines and triggers, and of the arms of distillation but METHOD+s2t-local."""
    max_new_tokens: int = 256
    """Length limit of one answer, in tokens."""
    batch_size: int = 64
    """Sequences written at once."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_task()
        _between("quantile", self.quantile, 0, 1)
        _at_least(1, calibration_limit=self.calibration_limit, train_limit=self.train_limit, num_seeds=self.num_seeds)
        _at_least(1, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        _require(self.llm is not None, "a study needs the LLM; pass --llm MODEL.")
        _require(self.split in ("calibration", "test"), f"split must be calibration or test; got {self.split!r}.")
        known = ("s2t-local", *DISTILLATIONS, *(f"{name}+s2t-local" for name in DISTILLATIONS))
        unknown = [name for name in self.arm_names if name not in known]
        _require(not unknown, f"arms must be of {', '.join(known)}; got {', '.join(unknown)}.")

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
        is_own = slm == self.slm
        return replace(self, slm=slm, slms=None, out=f"{self.out}/{folder}", base=self.base if is_own else None)


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
        _require(bool(self.out), "out must name a folder.")


@dataclass(frozen=True)
class BenchConfig(ModelConfig):
    """`s2t bench`; a model may also be `random:` and a shape, such as random:qwen2.5-0.5b or random:qwen2.5-1.5b,layers=4."""

    work: str = "decode"
    """decode (against transformers and our greedy; with --llm drafted s2t too), collect (labelling by prefill against step by
    step; needs --llm) or train (one optimizer step on shared prefixes)."""
    batch_size: int = 8
    """Sequences decoded at once."""
    prompt_tokens: int = 128
    """Length of every prompt, or of a training prefix."""
    max_new_tokens: int = 64
    """Tokens generated per sequence."""
    trigger_rates: str = "0.02"
    """Shares of steps at which s2t-local selects, comma-separated; the last one is that of collect and of s2t, too."""
    num_candidates: int = 8
    """K."""
    adapter_scope: str = "candidates"
    """candidates or always."""
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
        _choice("work", self.work, ("decode", "collect", "train"))
        _choice("adapter_scope", self.adapter_scope, SCOPES)
        _require(
            self.work != "collect" or self.llm is not None, "bench of collect compares two models; pass --llm MODEL."
        )
        for name in ("batch_size", "prompt_tokens", "max_new_tokens", "num_candidates", "groups", "limit", "repeats"):
            check_range(name, getattr(self, name), low=1)
        for rate in self.rates:
            check_range("trigger_rates", rate, low=0, high=1)

    @property
    def rates(self) -> tuple[float, ...]:
        try:
            rates = tuple(float(rate) for rate in self.trigger_rates.split(",") if rate.strip())
        except ValueError:
            rates = ()
        _require(
            bool(rates), f"trigger_rates must be numbers within 0..1, comma-separated; got {self.trigger_rates!r}."
        )
        return rates


C = TypeVar("C")


def build_config(cls: type[C], file: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> C:
    """Merge defaults, a JSON config file and flags (None = not given) into one checked config.

    Accepts a saved manifest.json too (its `config` object is read). Raises ConfigError for an unreadable
    file, an unknown key, a value of the wrong type, or one out of range.
    """
    values = _read_config_file(Path(file)) if file is not None else {}
    values |= {key: value for key, value in (flags or {}).items() if value is not None and value != []}
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    _require(not unknown, f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    hints = get_type_hints(cls)
    return cls(**{name: _typed(name, value, hints[name]) for name, value in values.items()})


def config_dict(config: Any) -> dict[str, Any]:
    """The config as JSON values, as saved in the manifest."""
    return asdict(config)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field has it (a whole number may stand for a float); ConfigError for another kind."""
    if get_origin(hint) is list:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{name} must be text or a list of texts; got {value!r}.")
        return list(texts)
    kinds = get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and math.isnan(value)):
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ConfigError(f"{name} must be {expected}; got {value!r}.")
    return value


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"config file {path} is not JSON: {error}.") from error
    if isinstance(data, dict) and isinstance(data.get("config"), dict):
        data = data["config"]
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold one JSON object; got {type(data).__name__}.")
    return data
