"""Between the event loop and the engine's thread: a plan becomes an answer in flight, events find the answer they belong to.

All methods but `_on_events` run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from s2t.config import ServeConfig
from s2t.model.stops import StoppingText, Stops
from s2t.serve.answers import Choice, WireTokens, Writer
from s2t.serve.backend import Backend, Event, Failed, WrittenToken
from s2t.serve.errors import ApiError, stopping
from s2t.serve.intake import Intake, Plan
from s2t.serve.metrics import Metrics
from s2t.serve.worker import Draining, QueueFull, Worker

T = TypeVar("T")
_STOP_S = 0.3  # for a thread that is about to end


class Service:
    """A backend with its thread, the plans made for it, and the answers in flight."""

    def __init__(self, config: ServeConfig, intake: Intake, backend: Backend) -> None:
        self.config, self.intake, self.backend = config, intake, backend
        self.metrics = Metrics()
        self.worker = Worker(backend, config.max_queue, self._on_events)
        self.metrics.watch(lambda: self.num_running, lambda: self.num_waiting)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="s2t-encode")
        self._encoding: set[asyncio.Future[Plan]] = set()  # requests whose plans are waited for
        self._is_draining = False
        self._answers: dict[int, Answer] = {}  # by job
        self._texts: dict[str, WireTokens] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_running(self) -> int:
        return max(0, self.worker.num_open - self.worker.num_waiting)

    @property
    def num_waiting(self) -> int:
        return self.worker.num_waiting + len(self._encoding)

    @property
    def status(self) -> str:
        """ok, draining (it is about to stop) or failed (the engine's thread is gone)."""
        if not self.worker.is_alive:
            return "failed"
        return "draining" if self._is_draining or self.worker.is_draining else "ok"

    async def health(self) -> str:
        """As `status`, or unreachable: the servers that run the model do not answer."""
        return "unreachable" if self.status == "ok" and not await self.backend.answers() else self.status

    def start(self) -> None:
        """Start the engine's thread; events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    async def drain(self, seconds: float, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Take nothing new; end what is left after so many seconds, or at once where somebody is in a hurry."""
        self._is_draining = True
        until = time.monotonic() + seconds
        while (self.worker.num_open or self._encoding) and time.monotonic() < until and not is_hurried():
            await asyncio.sleep(0.02)
        self.worker.drain()
        for waiting in list(self._encoding):
            waiting.cancel()
        self.worker.abort("the server is stopping", 503)

    async def stop(self) -> None:
        """Stop the threads; one that is in the middle of something long is left to end by itself."""
        self._encoder.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.worker.close, _STOP_S)

    async def answer(self, make: Callable[[T], Plan], body: T, writer: type[Writer]) -> Answer:
        """An answer to a body, from its plan on; the plan is made off the event loop, since prompts can be long.

        Requests whose plans are waited for count as waiting. Raises ApiError when there is no room.
        """
        if self._is_draining:
            raise stopping()
        self._check_cut_off()
        if self.worker.num_open + len(self._encoding) >= self.worker.capacity:
            raise _full(self.worker.retry_after())
        waiting = asyncio.wrap_future(self._encoder.submit(make, body))  # cancelled with whoever awaits it
        self._encoding.add(waiting)
        try:
            plan = await waiting
        except asyncio.CancelledError:
            if self.worker.is_draining:
                raise stopping() from None
            raise
        finally:
            self._encoding.discard(waiting)
        return self.open(plan, writer)

    def open(self, plan: Plan, writer: type[Writer]) -> Answer:
        """Hand a plan's jobs to the engine; raises ApiError when there is no room."""
        if len(plan.jobs) > self.worker.capacity:
            message = f"this server writes up to {self.worker.capacity} choices at a time, got {len(plan.jobs)}."
            raise ApiError(400, message, "n")
        self._check_cut_off()
        answer = Answer(self, plan, writer)
        for job in plan.jobs:
            self._answers[job.request.index] = answer
        try:
            self.worker.submit(plan.jobs)
        except QueueFull as full:
            self._drop(plan)
            raise _full(full.retry_after_s) from None
        except Draining:
            self._drop(plan)
            raise stopping() from None
        self.metrics.prompt_tokens.labels(plan.strategy).inc(plan.num_prompt_tokens)
        return answer

    def close(self, answer: Answer) -> None:
        """Free whatever an answer still holds."""
        self._drop(answer.plan)
        if cancelled := self.worker.cancel(answer.plan.jobs):
            self.metrics.cancelled.inc(cancelled)

    def token_texts(self, strategy: str) -> WireTokens:
        """Wire forms of the tokens that a strategy writes; made once per tokenizer."""
        which = "llm" if strategy == "llm" else "slm"
        if which not in self._texts:
            self._texts[which] = WireTokens(self.backend.tokenizer_of(strategy))
        return self._texts[which]

    def _check_cut_off(self) -> None:
        if self.backend.is_cut_off:
            message = "the servers that run the model do not answer; try again later."
            raise ApiError(503, message, code="unreachable", headers={"Retry-After": "5"})

    def _drop(self, plan: Plan) -> None:
        for job in plan.jobs:
            self._answers.pop(job.request.index, None)

    def _on_events(self, events: list[Event]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if (answer := self._answers.get(event.job.request.index)) is not None:
                answer.take(event)


class Answer:
    """One request's choices while they are written; whoever opened it must close it."""

    def __init__(self, service: Service, plan: Plan, writer: type[Writer]) -> None:
        self.service, self.plan = service, plan
        tokenizer = service.backend.tokenizer_of(plan.strategy)
        stop_ids = service.intake.pair.stop_ids_of(plan.strategy)
        choices = [
            Choice(i, job, StoppingText(tokenizer, job.stops), stop_ids | Stops(tokenizer, job.stops).ids)
            for i, job in enumerate(plan.jobs)
        ]
        self.writer = writer(plan, choices, service.token_texts(plan.strategy))
        self._choice_of = {choice.job: choice for choice in choices}
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._started, self._is_begun = time.monotonic(), False

    def take(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()

    async def pieces(self) -> AsyncIterator[tuple[Choice, str, list[WrittenToken]]]:
        """What was written of a choice since the last piece of it: text and tokens; until all choices are complete.

        Tokens that came while the reader was busy come in one piece. Raises ApiError when the engine gave up.
        """
        num_open = len(self.plan.jobs)
        while num_open:
            await self._news.wait()
            self._news.clear()
            events, self._events = self._events, []
            for choice, found in self._by_choice(events):
                text, kept = choice.push(found)
                self._count(found)
                num_open -= choice.finish_reason is not None
                yield choice, text, kept

    async def whole(self) -> dict:
        """The complete body, once it is written."""
        texts: list[list[str]] = [[] for _ in self.plan.jobs]
        kept: list[list[WrittenToken]] = [[] for _ in self.plan.jobs]
        async for choice, text, events in self.pieces():
            texts[choice.index].append(text)
            kept[choice.index] += events
        return self.writer.answer(["".join(parts) for parts in texts], kept)

    def close(self) -> None:
        """Free the rows of whatever is not complete."""
        self.service.close(self)

    def _by_choice(self, events: list[Event]) -> list[tuple[Choice, list[WrittenToken]]]:
        found: dict[Choice, list[WrittenToken]] = {}
        for event in events:
            if isinstance(event, Failed):
                raise ApiError(event.status, f"{event.message}.")
            found.setdefault(self._choice_of[event.job], []).append(event)
        return list(found.items())

    def _count(self, events: list[WrittenToken]) -> None:
        metrics, strategy = self.service.metrics, self.plan.strategy
        if not self._is_begun:
            self._is_begun = True
            metrics.first_token.observe(time.monotonic() - self._started)
        metrics.tokens.labels(strategy).inc(len(events))
        metrics.triggered.labels(strategy).inc(sum(event.step.fired for event in events))
        metrics.flips.labels(strategy).inc(sum(event.step.fired and event.step.flip for event in events))


def _full(retry_after_s: int) -> ApiError:
    message, headers = f"the queue is full; try again in {retry_after_s} s.", {"Retry-After": str(retry_after_s)}
    return ApiError(429, message, code="queue_full", headers=headers)
