"""The engine: which requests take part in each step, and what becomes of their tokens.

**Admission.** A request gets all pages that it can ever need when it is admitted (its prompt and max_tokens for each of
its n samples, less what a known prefix already holds), and waits in order of arrival until they are there. So an admitted
request always finishes: none is preempted, no step finds the pool empty, and page tables, once written, do not change,
which keeps the host out of decode steps. The price is room that requests reserve and do not use when they stop early.
The other choice, preemption by recomputing, fills the pool better where max_tokens are far above what is generated.

**Steps.** Every running sequence decodes at each step; what remains of the token budget goes to prompts, in chunks, in
the same batch and plan. On a GPU a step is launched before the tokens of the one before it are read.

**Faults.** A step that raises is tried again for each of its requests alone. Those that fail alone end with an error;
the others go on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .models import end_tokens
from .pool import PagePool
from .runner import Launched, Runner, Step
from .sampling import GREEDY, SAMPLE, TOP_P

_NONE = np.zeros(0, np.int32)
_uids = itertools.count(1)


class Refused(RuntimeError):
    """A request that was not taken. ``busy``: the same request may be taken later; else it never will."""

    def __init__(self, message: str, busy: bool) -> None:
        super().__init__(message)
        self.busy = busy


class EngineLost(RuntimeError):
    """The device answers no more, or the engine's own books are wrong: this process cannot serve again."""


@dataclass(eq=False)
class Request:
    """What is asked.

    Args:
        prompt: token ids, at least one.
        max_tokens: new tokens of each sample, at most.
        n: samples; they share the prompt's pages.
        temperature, top_p: 0 is greedy; top_p 1 is off.
        seed: sample i draws from (seed, i); None: from any.
        ignore_eos: go on to max_tokens.
    """

    prompt: np.ndarray
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    tag: Any = None  # the caller's own
    samples: list[Sample] = field(default_factory=list, init=False)
    cached_tokens: int = field(default=0, init=False)  # of the prompt, found in the pool

    def __post_init__(self) -> None:
        self.prompt = np.asarray(self.prompt, np.int32)


@dataclass(eq=False)
class Sample:
    """One sequence of a request, from its admission on."""

    request: Request
    index: int
    slot: int
    pages: list[int]
    uid: int = field(default_factory=lambda: next(_uids))
    computed: int = 0  # tokens of the prompt whose keys and values are in the pages


@dataclass
class Outputs:
    """What a step gave: tokens[i] is the next of samples[i]."""

    samples: Sequence[Sample]
    tokens: np.ndarray  # int32
    finished: list[tuple[Sample, str]]  # with "stop" or "length", after the token above
    failed: list[tuple[Request, Exception]] = field(default_factory=list)


@dataclass
class Stats:
    """Counts since the start."""

    steps: int = 0
    decode_steps: int = 0  # of decodes alone
    generated_tokens: int = 0
    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of those, found in the pool
    finished_requests: int = 0
    cancelled_requests: int = 0
    failed_requests: int = 0
    refused_requests: int = 0
    failed_steps: int = 0
    device_seconds: float = 0.0  # where steps are timed
    host_seconds: float = 0.0  # of decode steps that a graph repeats, without its launch and without waiting for tokens
    host_steps: int = 0  # how many those are


class Engine:
    """Continuous batching over one model.

    Args:
        model: loaded by `models.load`.
        backend: attention, a name of `attention.BACKENDS`; ``options`` are its own.
        page_size: tokens of a page. num_pages: of the pool; default as many as max_slots of max_len need, half of it.
        max_slots: sequences that run at once. max_waiting: requests that wait; more are refused.
        max_len: tokens of a sequence, prompt and new ones; default the model's.
        max_chunk: tokens of prompts in a step: more of them read prompts faster and delay decodes more.
        graphs: numbers of decodes to capture CUDA graphs for; None: a ladder up to max_slots, (): none.
        lag: steps that run ahead of the tokens that are read; default 1 on a GPU, 0 on the CPU.
        timed: measure the device's time of each step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        backend: str = "attngen",
        page_size: int = 16,
        num_pages: int | None = None,
        max_slots: int = 64,
        max_waiting: int = 256,
        max_len: int | None = None,
        max_chunk: int = 512,
        graphs: Sequence[int] | None = None,
        lag: int | None = None,
        timed: bool = False,
        **options: Any,
    ) -> None:
        config = model.config.get_text_config()
        self.max_len = min(max_len or config.max_position_embeddings, config.max_position_embeddings)
        if num_pages is None:
            num_pages = 1 + max(-(-self.max_len // page_size), max_slots * self.max_len // page_size // 2)
        self.max_slots, self.max_waiting, self.max_chunk, self.page_size = max_slots, max_waiting, max_chunk, page_size
        self.vocab_size = config.vocab_size
        self.pool, self.stats, self._timed = PagePool(num_pages, page_size), Stats(), timed
        self.runner = Runner(
            model, backend, num_pages=num_pages, page_size=page_size, max_slots=max_slots, max_chunk=max_chunk,
            max_len=self.max_len, graphs=graphs, **options,
        )  # fmt: skip
        self.lag = (1 if model.device.type == "cuda" else 0) if lag is None else lag
        self._is_end = np.zeros(self.vocab_size, bool)
        self._is_end[end_tokens(model)] = True
        self.waiting: deque[Request] = deque()
        self._queue = threading.Lock()  # of `waiting`: requests come from any thread, all else happens in one
        self._reading: deque[Sample] = deque()  # whose prompt is not in the pages yet
        self._pending: deque[tuple[Launched, np.ndarray, np.ndarray]] = deque()  # with slots and uids of its samples
        # By slot: what the host knows of a sequence. A step touches all of them as arrays.
        self._free = list(range(max_slots - 1, -1, -1))
        self._sample_at = np.full(max_slots, None, object)
        self._uid = np.zeros(max_slots, np.int64)  # 0: nobody's
        self._tokens = np.zeros((max_slots, self.max_len), np.int32)  # prompt and new ones
        self._received = np.zeros(max_slots, np.int32)  # tokens known to the host
        self._launched = np.zeros(max_slots, np.int32)  # and those that the device has or is about to have
        self._limit = np.zeros(max_slots, np.int32)  # of both
        self._ends = np.zeros(max_slots, bool)  # whether an end token ends it
        self._mode = np.zeros(max_slots, np.int8)  # index into _MODES
        self._decoding: list[int] = []  # slots that take part in each step
        self._decode_slots = _NONE
        self._changed = True  # whether _decoding is other than _decode_slots
        self._step_mode = GREEDY
        self._waited = 0.0  # for tokens, in this step
        self._may_admit = True  # whether anything changed since admission last failed

    # ---- requests
    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none, from any thread. Raises Refused with what was required and found."""
        for request in requests:
            self.check(request)
        with self._queue:
            if len(self.waiting) + len(requests) > self.max_waiting:
                self.stats.refused_requests += len(requests)
                raise Refused(
                    f"{len(self.waiting)} requests wait for pages already, and at most {self.max_waiting} may: try again later", busy=True
                )
            self.waiting += requests

    def check(self, request: Request) -> None:
        """Raises Refused for a request that could never be served."""
        length, problem = len(request.prompt) + request.max_tokens, None
        if not len(request.prompt):
            problem = "the prompt is empty: at least one token required"
        elif request.max_tokens < 1:
            problem = f"max_tokens {request.max_tokens}: at least 1 required"
        elif length > self.max_len:
            problem = (
                f"a prompt of {len(request.prompt)} tokens and max_tokens {request.max_tokens} make {length}: at most {self.max_len} "
                "required; shorten the prompt, or lower max_tokens"
            )
        elif not 1 <= request.n <= self.max_slots:
            problem = f"n {request.n}: from 1 to {self.max_slots} required"
        elif int(request.prompt.min()) < 0 or int(request.prompt.max()) >= self.vocab_size:
            problem = f"token {int(request.prompt.max())} or {int(request.prompt.min())} of the prompt: from 0 to {self.vocab_size - 1} required"
        elif (pages := sum(self._pages_of(request))) > self.pool.capacity:
            problem = f"{pages} pages of {self.page_size} tokens needed, and the pool has {self.pool.capacity}: lower max_tokens or n"
        if problem:
            self.stats.refused_requests += 1
            raise Refused(problem, busy=False)

    def cancel(self, request: Request, index: int | None = None) -> None:
        """End a request, or one of its samples that has all that is wanted, and return its pages. What is over stays so."""
        with self._queue:
            waits = request in self.waiting
            if waits:
                self.waiting.remove(request)
                self._may_admit = True
        ended = [sample for sample in request.samples if index is None or sample.index == index]
        for sample in ended:
            self._retire(sample)
        if waits or ended and not request.samples:
            self.stats.cancelled_requests += index is None
            self.stats.finished_requests += index is not None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._reading or self._decoding or self._pending)

    @property
    def running(self) -> int:
        """Sequences that hold pages."""
        return self.max_slots - len(self._free)

    # ---- a step
    def step(self) -> list[Outputs]:
        """Admit, launch, and read what the step before (on a GPU) or this one (on the CPU) gave. Raises EngineLost only."""
        begin, self._waited = time.perf_counter(), 0.0
        self._admit()
        chunks = self._next_chunks()
        if self._changed:
            self._decode_slots = np.array(self._decoding, np.int32)
        slots = self._decode_slots
        if not len(slots) and not chunks:
            return self._collect_until(0)
        step = self._build(slots, chunks, repeats=not self._changed and not chunks)
        try:
            launched = self.runner.launch(step, self._timed)
        except Exception as error:
            return self._alone(slots, chunks, error)
        self._note(step, chunks, launched)
        outputs = self._collect_until(self.lag)
        if step.repeats and self.runner.replay_seconds:
            self.stats.host_seconds += time.perf_counter() - begin - self.runner.replay_seconds - self._waited
            self.stats.host_steps += 1
        return outputs

    def _admit(self) -> None:
        while self._may_admit and self.waiting:
            with self._queue:
                request = self.waiting.popleft()
            if not self._place(request):
                with self._queue:
                    self.waiting.appendleft(request)
                self._may_admit = False

    def _pages_of(self, request: Request) -> tuple[int, int]:
        """Pages that are full of prompt, and those that the samples need besides."""
        whole = len(request.prompt) // self.page_size
        return whole, request.n * (-(-(len(request.prompt) + request.max_tokens) // self.page_size) - whole)

    def _place(self, request: Request) -> bool:
        """Give a request its slots and pages, if they are there."""
        if len(self._free) < request.n:
            return False
        prompt, size = request.prompt, self.page_size
        found = self.pool.match(prompt[: len(prompt) - 1])  # one token is left to compute: its logits are wanted
        self.pool.share(found)
        whole, own = self._pages_of(request)
        missing = whole - len(found) + own
        if missing > self.pool.available:
            self.pool.release(found)
            return False
        new = self.pool.allocate(missing)
        shared, rest = found + new[: whole - len(found)], new[whole - len(found) :]
        each = own // request.n
        request.cached_tokens = len(found) * size
        seed = request.seed if request.seed is not None else int(torch.randint(2**31, ()))
        length = len(prompt)
        for index in range(request.n):
            if index:
                self.pool.share(shared)
            slot = self._free.pop()
            sample = Sample(request, index, slot, shared + rest[index * each : (index + 1) * each], computed=request.cached_tokens)
            request.samples.append(sample)
            self._sample_at[slot], self._uid[slot] = sample, sample.uid
            self._tokens[slot, :length] = prompt
            self._received[slot] = self._launched[slot] = length
            self._limit[slot] = length + request.max_tokens
            self._ends[slot] = not request.ignore_eos
            self._mode[slot] = 0 if request.temperature == 0 else 1 if request.top_p >= 1 else 2
            self.runner.admit(slot, sample.pages, request.temperature, request.top_p, seed + 0x9E3779B1 * index)
        self._reading.append(request.samples[0])  # the others fork from it when it has read the prompt
        self.stats.prompt_tokens += length
        self.stats.cached_tokens += request.cached_tokens
        return True

    def _next_chunks(self) -> list[tuple[Sample, int]]:
        """What to read of which prompts: first come, first served."""
        chunks, left = [], self.max_chunk
        for sample in self._reading:
            if not left:
                break
            count = min(left, len(sample.request.prompt) - sample.computed)
            chunks.append((sample, count))
            left -= count
        return chunks

    def _build(self, decode_slots: np.ndarray, chunks: Sequence[tuple[Sample, int]], repeats: bool = False) -> Step:
        positions = self._launched[decode_slots] - 1
        if not chunks:
            mode = self._step_mode if repeats else self._most(decode_slots)
            return Step(decode_slots, positions, _NONE, _NONE, _NONE, _NONE, _NONE, decode_slots, mode, repeats)
        n = len(decode_slots)
        rows, slots, end = [*range(n)], [*decode_slots], n
        for sample, count in chunks:
            end += count
            if sample.computed + count == len(sample.request.prompt):  # its last row gives the first token of every sample
                rows += [end - 1] * len(sample.request.samples)
                slots += [other.slot for other in sample.request.samples]
        columns = [(sample.slot, sample.computed, count) for sample, count in chunks]
        chunk_slots, starts, counts = np.array(columns, np.int32).T
        ids = np.concatenate([sample.request.prompt[sample.computed : sample.computed + count] for sample, count in chunks])
        sample_slots = np.array(slots, np.int32)
        return Step(
            decode_slots, positions, chunk_slots, starts, counts, ids, np.array(rows, np.int32), sample_slots, self._most(sample_slots)
        )

    def _most(self, slots: np.ndarray) -> str:
        """The sampling that serves all of these."""
        return _MODES[int(self._mode[slots].max())] if len(slots) else GREEDY

    def _note(self, step: Step, chunks: Sequence[tuple[Sample, int]], launched: Launched) -> None:
        """Take note of what a step does that has been launched."""
        slots = step.sample_slots
        self._pending.append((launched, slots, self._uid[slots]))
        self.stats.steps += 1
        self.stats.decode_steps += not chunks
        self._changed, self._step_mode = bool(chunks), step.mode
        self._launched[slots] += 1
        for sample, count in chunks:
            sample.computed += count
            if sample.computed == len(sample.request.prompt):
                self._reading.remove(sample)
                self._fork(sample)
        full = self._launched[slots] >= self._limit[slots]
        if full.any():  # their last token is on its way
            over = set(slots[full].tolist())
            self._decoding = [slot for slot in self._decoding if slot not in over]
            self._changed = True

    def _fork(self, first: Sample) -> None:
        """A prompt has been read: others may find it, and all samples go on from it, each in a last page of its own."""
        request, size = first.request, self.page_size
        self.pool.publish(request.prompt, first.pages)
        at = len(request.prompt) // size
        others = [sample for sample in request.samples if sample is not first]
        if len(request.prompt) % size:
            self.runner.copy_pages([first.pages[at]] * len(others), [other.pages[at] for other in others])
        self._decoding += [sample.slot for sample in request.samples]

    def _collect_until(self, left: int) -> list[Outputs]:
        """The tokens of all steps but the last ``left``. Raises EngineLost: a launch that fails is one step's matter, a device
        that fails later is everybody's."""
        try:
            return [self._collect() for _ in range(len(self._pending) - left)]
        except Exception as error:
            raise EngineLost(f"a step failed on the device ({error!r}): start the server again") from error

    def _collect(self) -> Outputs:
        """The tokens of the oldest step that is still out."""
        launched, slots, uids = self._pending.popleft()
        begin = time.perf_counter()
        tokens = launched.tokens()
        self._waited += time.perf_counter() - begin
        if self._timed:
            self.stats.device_seconds += launched.device_seconds()
        alive = self._uid[slots] == uids
        if not alive.all():  # cancelled, or ended by the token before, since this was launched
            slots, tokens = slots[alive], tokens[alive]
        received = self._received[slots]
        self._tokens[slots, received] = tokens
        received += 1
        self._received[slots] = received
        self.stats.generated_tokens += len(slots)
        outputs = Outputs(self._sample_at[slots], tokens.copy(), [])
        ended = self._is_end[tokens] & self._ends[slots]
        for i in np.nonzero(ended | (received >= self._limit[slots]))[0]:
            sample = outputs.samples[i]
            self._retire(sample)
            outputs.finished.append((sample, "stop" if ended[i] else "length"))
            if not sample.request.samples:
                self.stats.finished_requests += 1
        return outputs

    def _retire(self, sample: Sample) -> None:
        """A sequence is over: its pages and its slot go back. Its text stays known as a prefix as long as there is room."""
        slot, request, size = sample.slot, sample.request, self.page_size
        request.samples.remove(sample)
        if sample in self._reading:
            at = self._reading.index(sample)
            self._reading.remove(sample)
            if request.samples:  # another one reads on, from the last page that they share
                heir = request.samples[0]
                heir.computed = min(sample.computed, len(request.prompt) // size * size)
                self._reading.insert(at, heir)
        elif self._received[slot] > len(request.prompt):  # the newest token is in no page yet
            self.pool.publish(self._tokens[slot, : self._received[slot] - 1], sample.pages)
        self.pool.release(sample.pages)
        self._uid[slot], self._sample_at[slot] = 0, None
        self._free.append(slot)
        if slot in self._decoding:
            self._decoding.remove(slot)
            self._changed = True
        self._may_admit = True

    # ---- faults
    def _alone(self, decode_slots: np.ndarray, chunks: Sequence[tuple[Sample, int]], error: Exception) -> list[Outputs]:
        """Run the requests of a step that raised one by one: those that raise again end with what they raised."""
        self.stats.failed_steps += 1
        outputs = self._collect_until(0)
        if self.runner.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.runner.device)
            except Exception as lost:
                raise EngineLost(f"the device answers no more ({lost!r}): start the server again") from error
        parts: dict[Request, tuple[list[int], list[tuple[Sample, int]]]] = {}
        still = set(self._decoding)
        for slot in decode_slots.tolist():
            if slot in still:  # the tokens just read may have ended it
                parts.setdefault(self._sample_at[slot].request, ([], []))[0].append(slot)
        for sample, count in chunks:
            parts.setdefault(sample.request, ([], []))[1].append((sample, count))
        for request, (slots, own) in parts.items():
            step = self._build(np.array(slots, np.int32), own)
            try:
                launched = self.runner.launch(step, self._timed)
            except Exception as again:
                while request.samples:
                    self._retire(request.samples[-1])
                self.stats.failed_requests += 1
                outputs.append(Outputs([], _NONE, [], [(request, again)]))
                continue
            self._note(step, own, launched)
            outputs += self._collect_until(0)
        self._changed = True
        return outputs


_MODES = (GREEDY, SAMPLE, TOP_P)
Observer = Callable[[Outputs, float], None]


def run(engine: Engine, requests: Sequence[Request], observe: Observer | None = None) -> None:
    """All requests at once, to their end; ``observe(outputs, seconds)`` sees each step's. For scripts and tests."""
    engine.submit(*requests)
    while engine.has_work:
        for outputs in engine.step():
            if observe:
                observe(outputs, time.perf_counter())
            for _, error in outputs.failed:
                raise error
