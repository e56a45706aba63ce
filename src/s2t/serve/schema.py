"""The wire format: requests as the OpenAI API has them, checked, and the shapes of the answers.

What this server cannot do is refused, never ignored: an unknown field is an error, and so is a known one at a value that would
have to change the answer. Known fields that change no answer are taken, whatever they say. Extensions are `s2t`, in requests
and in answers, and `chat_template_kwargs`, as vLLM has it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_STOPS = 16

Text = Annotated[str, Field(max_length=2**20)]
StopText = Annotated[str, Field(max_length=256)]
Name = Annotated[str, Field(max_length=512)]
CacheOptions = Annotated[dict[str, Any], Field(max_length=16)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Zero = Annotated[float, Field(ge=0, le=0)]
NoItems = Annotated[list[Any], Field(max_length=0)]
NoKeys = Annotated[dict[str, Any], Field(max_length=0)]


class Strict(BaseModel):
    """A body, or a part of one, in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A piece of a message's content; text is the only kind there is."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: CacheOptions | None = None


class Message(Strict):
    """One turn of a chat. What an assistant's message holds beside its text must be empty; the text may be."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)] | None = None
    name: Name | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: NoItems | None = None
    annotations: NoItems | None = None

    @property
    def turn(self) -> dict[str, str]:
        """The message as the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        turn = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return turn if self.name is None else turn | {"name": self.name}

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content of a message of role {self.role} must be text or a list of text parts")
        return self


class StreamOptions(Strict):
    """What a stream says beside the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Pads chunks that leave for the network; here there is no padding either way."""


class Extension(Strict):
    """What only this server has."""

    strategy: Annotated[str, Field(max_length=64)] | None = None
    """greedy, sample, s2t-local, s2t, takeover or llm, as far as the server offers it."""
    details: bool = False
    """Say of every token what the small model offered, what its criticality was and what was taken."""


class Body(Strict):
    """What chat and plain completions share."""

    model: Annotated[str, Field(max_length=512)]
    """As listed under /v1/models; NAME:STRATEGY asks for a strategy."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Name | None = None
    s2t: Extension = Field(default_factory=Extension)
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: NoKeys | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; an empty one, which clients send for none, is none."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_top(self) -> int | None:
        """How many of the likeliest tokens to report with log-probabilities; None for no log-probabilities."""
        raise NotImplementedError


class TextFormat(Strict):
    """Plain text is the only format of an answer."""

    type: Literal["text"]


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: NoItems | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoItems | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    web_search_options: None = None
    moderation: None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, over those that the server was started with."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Goes to the chat template, of which few read it; `verbosity` likewise."""
    verbosity: Literal["low", "medium", "high"] | None = None
    # What changes no answer:
    store: bool | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    service_tier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None
    prompt_cache_options: CacheOptions | None = None
    safety_identifier: Name | None = None
    prediction: dict[str, Any] | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        hints = {"reasoning_effort": self.reasoning_effort, "verbosity": self.verbosity}
        given = {name: value for name, value in hints.items() if value is not None}
        return given | (self.chat_template_kwargs or {})

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    """POST /v1/completions; a prompt of text gets no chat template, one of token ids is used as it is."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, of which there may be one without a list around it."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


UNSUPPORTED = {
    "frequency_penalty": "leave it at 0",
    "presence_penalty": "leave it at 0",
    "logit_bias": "leave it empty",
    "tools": "leave it empty",
    "functions": "leave it empty",
    "tool_choice": "leave it out",
    "response_format": 'the only format is {"type": "text"}',
    "modalities": 'the only one is "text"',
    "audio": "leave it out",
    "function_call": "leave it out",
    "web_search_options": "leave it out",
    "moderation": "leave it out",
    "best_of": "leave it at 1, or ask for n choices",
    "echo": "leave it false",
    "suffix": "leave it out",
}
"""Fields of the OpenAI API that are known and not supported, and what to do instead."""

# Answers


class Candidate(TypedDict):
    """A token the small model offered. `score` is the selector's, `llm_prob` the large model's, where there is one."""

    token: str
    token_id: int
    logprob: float
    score: float | None
    llm_prob: float | None
    selected: bool


class TokenDetails(TypedDict):
    """One step: `value` is the trigger's reading in its own unit, `fired` whether it triggered, `flip` whether the accepted token
    is not the small model's greedy one (`greedy`). `criticality` is in [0, 1], where an adapter reads it."""

    token: str
    token_id: int
    greedy: str
    value: float | None
    criticality: float | None
    fired: bool
    flip: bool
    candidates: list[Candidate]


class Details(TypedDict):
    """The details of a choice's tokens, or of the new ones where it is streamed."""

    steps: list[TokenDetails]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Written(TypedDict):
    """How an answer was written: with these, the Python interface gives the same."""

    strategy: str
    seed: int | None


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    s2t: NotRequired[Details]


class ChatAnswer(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    s2t: Written


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str
    s2t: NotRequired[Details]


class TextAnswer(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    s2t: Written


class ModelEntry(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    engine: NotRequired[dict[str, Any]]
    """What runs it here: engine, quantization, context length and memory."""


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelEntry]


class Health(TypedDict):
    status: Literal["ok", "unreachable", "draining", "failed"]
    running: int
    waiting: int


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorFields
