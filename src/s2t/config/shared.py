"""What several commands share: models, servers, problems, steps and decoding; and the names that settings take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from s2t.config.checks import (
    Readers,
    check_at_least,
    check_choice,
    check_positive,
    check_range,
    read_variables,
    require,
)
from s2t.config.methods import MANY_SAMPLES, SAMPLED, STRATEGIES, TRIGGERED, TRIGGERS, unit_of

READOUTS = {"rank": ("step", "stream"), "bins": ("candidates", "always", "stream")}
"""How the selector reads candidates -> the scopes its LoRA may have, the default first."""
SCOPES = ("auto", "step", "candidates", "always", "stream")
CRITICALITY_READINGS = ("head", "reserved")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXECUTIONS = ("auto", "eager", "static", "compile")
ENGINES = ("auto", "torch", "llama.cpp")
QUANTIZATIONS = (
    *("q4_k_m", "q4_k_s", "q4_0", "q5_k_m", "q5_k_s", "q5_0", "q6_k", "q8_0", "q3_k_m", "q2_k", "f16", "bf16", "f32"),
)
"""That `s2t export` writes, as llama.cpp calls them."""
SUPPORTS = ("auto", "slm-top", "llm-top")
DIVERGENCES = ("llm-slm", "slm-llm", "js", "released-code")
TRACKERS = ("tensorboard", "wandb", "trackio")
DISTILLATIONS = ("sft", "kd", "on-policy-kd")

READERS: Readers = {
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"), SAMPLED),
    "num_samples": MANY_SAMPLES,
    "trigger": TRIGGERED,
    "threshold": tuple(name for name in STRATEGIES if unit_of(name) is not None),
}
"""Which strategies read a setting that not all of them do; with the others it would look as if it did something."""


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
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("execution", self.execution, EXECUTIONS)

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
class EngineConfig:
    """What runs GGUF files; shared by the commands that write answers and no more."""

    engine: str = "auto"
    """Of GGUF files: llama.cpp (their weights as they are), torch (unpacked), or auto (llama.cpp where it is installed)."""
    threads: int = 0
    """Of llama.cpp: 0 takes the physical cores that nothing else keeps busy when the model is loaded."""
    context: int = 0
    """Of llama.cpp: the longest prompt and answer together, in tokens; 0 takes what the model reads."""

    def check_engine(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        check_at_least(0, threads=self.threads, context=self.context)

    @property
    def engine_options(self) -> dict[str, Any]:
        """What `open_model` takes beside a name and the options of `load_model`."""
        return {"engine": self.engine, "threads": self.threads, "context": self.context}


@dataclass(frozen=True)
class ReadoutConfig:
    """What the selector reads of a prefix and its candidates; shared by train and bench."""

    readout: str = "rank"
    """rank (the SLM's own next-token logits under the LoRA rank the candidates) or bins (the paper's: every candidate is read,
    and reserved tokens behind it give its score)."""
    adapter_scope: str = "auto"
    """Where the LoRA acts: step (readout rank: on one more reading of the prefix's last token), candidates (bins: on
    the candidate tokens), always (bins: on every token, as in the paper), stream (on a reading of the whole prefix of its own,
    beside the base model's; for vLLM), or auto: step, and candidates for bins."""

    def check_readout(self) -> None:
        check_choice("readout", self.readout, tuple(READOUTS))
        check_choice("adapter_scope", self.adapter_scope, SCOPES)
        require(
            self.adapter_scope in ("auto", *READOUTS[self.readout]),
            f"readout {self.readout} has scope {' or '.join(READOUTS[self.readout])}; got {self.adapter_scope!r}.",
        )

    @property
    def scope(self) -> str:
        """The scope that `auto` stands for."""
        return READOUTS[self.readout][0] if self.adapter_scope == "auto" else self.adapter_scope


@dataclass(frozen=True)
class ChatConfig:
    """How prompts are written for the models; shared by every command that writes answers."""

    chat_template_kwargs: str | None = field(default=None, metadata={"json": True})
    """Variables of the models' chat templates, a JSON object such as {"enable_thinking": false}, which turns thinking off."""

    def check_chat(self) -> None:
        _ = self.template_variables

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables as a dict; ConfigError for what is no JSON object, and for names that are not the template's."""
        return read_variables(self.chat_template_kwargs)


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
        check_at_least(1, max_in_flight=self.max_in_flight)
        check_at_least(0, max_retries=self.max_retries, patience_s=self.patience_s)
        check_positive(timeout_s=self.timeout_s)
        check_at_least(0, prompt_price=self.prompt_price, completion_price=self.completion_price)
        if self.cached_price is not None:
            check_at_least(0, cached_price=self.cached_price)

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
        check_at_least(1, shards_in_flight=self.shards_in_flight)


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
HOW_IT_RUNS = (
    *PLACES,
    "slm_url",
    "threads",
    *(name for name in ShardConfig.__dataclass_fields__ if name != "llm_model"),
)


@dataclass(frozen=True)
class TaskConfig:
    """Which problems; shared by every command that reads problems."""

    task: str = "rg:gsm_symbolic,max_number=100"
    """`rg:NAME[,key=value]`, a named task such as gsm8k, `hub:OWNER/NAME`, or a .jsonl path."""
    limit: int = 500
    """Number of problems."""
    prompt: str = "auto"
    """plain, cot (step by step, boxed answer), auto (plain for the embedded pair, else cot), or a text of your own in which
    {question} stands for the question."""
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
        check_at_least(1, limit=self.limit, workers=self.workers)
        require(
            self.ray is None or self.workers == 1, "workers are local processes; pass --workers or --ray, not both."
        )
        if self.ray_actors is not None:
            check_at_least(1, ray_actors=self.ray_actors)
        check_at_least(0, ray_gpus=self.ray_gpus, seed=self.seed)
        require(
            self.prompt in ("auto", "plain", "cot") or "{question}" in self.prompt,
            f"prompt must be one of auto, plain, cot, or a text that holds {{question}}; got {self.prompt!r}.",
        )
        check_choice("split", getattr(self, "split", "train"), ("train", "training", "calibration", "test"))


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
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("support", self.support, SUPPORTS)
        check_at_least(1, support_size=self.support_size, max_new_tokens=self.max_new_tokens)
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True)
class DecodeConfig(StepConfig):
    """How tokens are chosen; shared by generate, eval and collect."""

    trigger: str = "auto"
    """never, random, entropy, divergence, criticality, router, step-score, step-confidence, step-entropy, call, critical, or
    auto: divergence for takeover and s2t, criticality for s2t-local, never for the others, but for those that have their own."""
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
    span_tokens: int | None = None
    """Tokens for which a place that fires holds, or to the end of the step where that comes first. None is 1 for takeover and
    s2t, 64 (also the longest step) for specreason and smart, the whole step for glimprouter, and for relay what is called for."""
    step_end: str | None = None
    """Text that ends a step; None is a line break for the embedded models, else a blank line."""
    router: str | None = None
    """Router written by `s2t train-router`, a folder; r2r and the trigger router need it."""
    forecast: str | None = None
    """Head written by `s2t train-router --method zip-rc`, a folder; zip-rc needs it."""
    lookahead: int | None = None
    """Tokens of each candidate that local-branch reads before it scores it: 0 none (readout rank), 1 the candidate itself (bins),
    more with the SLM's greedy continuation; None is the adapter's own, 0 or 1."""
    critical: str | None = None
    """critical.json written by `s2t study critical`; the oracle trigger critical fires at its places."""
    draft_tokens: int = 0
    """Of takeover and s2t: tokens drafted per LLM forward, with the same output; 0 adapts to the rate of flips, 1 is step
    by step."""
    system: str | None = None
    """System prompt; goes into the user message where the model's chat template takes none."""
    stop: list[str] = field(default_factory=list)
    """Text at which an answer ends; it is left out of the answer. May be given several times."""

    def check_decode(self) -> None:
        self.check_steps()
        check_choice("trigger", self.trigger, ("auto", *TRIGGERS))
        if self.num_candidates is not None:
            check_at_least(1, num_candidates=self.num_candidates)
        check_at_least(1, num_samples=self.num_samples)
        check_positive("; use greedy for 0", temperature=self.temperature)
        require(0 < self.top_p <= 1, f"top_p must be within (0, 1]; got {self.top_p}.")
        check_at_least(0, top_k=self.top_k, draft_tokens=self.draft_tokens)
        check_range("min_p", self.min_p, 0, 1)
        if self.lookahead is not None:
            check_at_least(0, lookahead=self.lookahead)
        if self.span_tokens is not None:
            check_at_least(1, span_tokens=self.span_tokens)
        require(self.step_end != "", "step_end must be text; an empty one would end every step at once.")
        require(all(self.stop), "stop must be text; an empty stop string would end every answer at once.")
