"""One step on the device: what is copied there, the forward pass, the tokens that come back.

What the device knows of a sequence is one row of `state` (its page table and how it is sampled), written once when it is
admitted, and its last token, which never has to visit the host. So a step of decodes that repeats the last one's requests
copies nothing: on a GPU it is one graph's launch, which advances positions, plans, runs the model, samples, and leaves the
tokens where the next launch reads them.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from .attention import Backend, Batch, Sizes, make
from .models import layers_of
from .sampling import GREEDY, sample

_EXTRA = 3  # columns of state after the page table: temperature, top_p, seed


@dataclass
class Step:
    """What runs together. Slots number sequences; all arrays are int32."""

    decode_slots: np.ndarray  # [decodes], of sequences that take part with their last token
    decode_positions: np.ndarray  # [decodes], of that token
    chunk_slots: np.ndarray  # [chunks], of sequences whose prompt is being read
    chunk_starts: np.ndarray  # [chunks], position of a chunk's first token
    chunk_lens: np.ndarray  # [chunks]
    chunk_ids: np.ndarray  # [tokens of all chunks]
    sample_rows: np.ndarray  # [samples], a token row of the step whose logits are sampled
    sample_slots: np.ndarray  # [samples], the sequence that gets the token
    mode: str  # sampling.GREEDY, SAMPLE or TOP_P
    repeats: bool = False  # decodes alone, of the same sequences as the launch before this one


class Launched:
    """Tokens on their way from the device."""

    def __init__(self, tokens: torch.Tensor, start: torch.cuda.Event | None, end: torch.cuda.Event | None) -> None:
        self._tokens, self._start, self._end = tokens, start, end

    def tokens(self) -> np.ndarray:
        """int32 [samples]; waits. Raises what went wrong on the device."""
        if self._end is not None:
            self._end.synchronize()
        return self._tokens.numpy()

    def device_seconds(self) -> float:
        """From the step's first kernel to its last, once `tokens` has waited; 0 on the CPU."""
        return 0.0 if self._start is None else self._start.elapsed_time(self._end) * 1e-3


class _Staging:
    """Pinned buffers that take turns on the way to the device; one is reused when its copy has been made."""

    def __init__(self, size: int, device: torch.device, turns: int = 64) -> None:
        self.pinned = device.type == "cuda"
        self._buffers = [torch.empty(size, dtype=torch.int32, pin_memory=self.pinned) for _ in range(turns)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [torch.cuda.Event() for _ in range(turns)] if self.pinned else []
        self._turn = 0

    def send(self, parts: Sequence[np.ndarray], to: torch.Tensor) -> None:
        """Copy int32 parts, one after another, to the start of a device tensor."""
        self._turn = turn = (self._turn + 1) % len(self._buffers)
        if self.pinned:
            self._copied[turn].synchronize()
        size = sum(map(len, parts))
        np.concatenate(parts, out=self._arrays[turn][:size])
        to[:size].copy_(self._buffers[turn][:size], non_blocking=True)
        if self.pinned:
            self._copied[turn].record()


class Runner:
    """A model, its cache and a backend.

    Args:
        model: in eval mode, loaded by `models.load`.
        backend: a name of `attention.BACKENDS`.
        num_pages, page_size: of the cache, page 0 included, which is padding's.
        max_slots: sequences at once.
        max_chunk: tokens of prompts in a step.
        max_len: tokens of a sequence.
        graphs: numbers of decodes to capture graphs for, on CUDA; a step is padded to the next. Empty: none.
        options: the backend's own.

    Raises:
        attention.BackendError, models.ModelError: what is required, what was found, what to do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backend: str,
        *,
        num_pages: int,
        page_size: int,
        max_slots: int,
        max_chunk: int,
        max_len: int,
        graphs: Sequence[int] | None = None,
        **options: object,
    ) -> None:
        self.model, self.device = model, model.device
        self.page_size, self.max_slots, self.max_pages = page_size, max_slots, -(-max_len // page_size)
        layers = layers_of(model)
        on_cuda = self.device.type == "cuda"
        self.graphs = _buckets(max_slots) if graphs is None else sorted(graphs)
        if not on_cuda:
            self.graphs = []
        self.cache = torch.zeros(
            len(layers), 2, num_pages, page_size, layers[0].num_kv_heads, layers[0].head_dim, dtype=model.dtype, device=self.device
        )  # zeros: page 0 is read by padding, and must be finite
        most = max([max_slots, *self.graphs])
        sizes = Sizes(most, most + max_chunk, self.max_pages, page_size)
        self.backend: Backend = make(backend, layers, self.cache, sizes, **options)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        width = self.max_pages + _EXTRA
        self._host_state = np.zeros((max_slots + 1, width), np.int32)  # the last row is padding's
        self._state = ints(max_slots + 1, width)
        self._last = ints(max_slots + 1)
        self._decode = ints(3 * sizes.max_requests)  # slots, positions, how far positions advance
        self._meta = ints(8 * sizes.max_tokens + 8)
        self._staging = _Staging(max(width, len(self._meta)), self.device)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if on_cuda else None
        self._tokens = [torch.empty(2 * sizes.max_tokens, dtype=torch.int32, pin_memory=True) for _ in range(4)] if on_cuda else []
        self._turn = 0
        self._uploaded = 0  # decodes that `_decode` holds, padding included
        self.replay_seconds = 0.0  # of the host, to launch the last step's graph; 0 where it had none

    # ---- sequences
    def admit(self, slot: int, pages: Sequence[int], temperature: float, top_p: float, seed: int) -> None:
        """Tell the device of a sequence: its pages, and how its tokens are drawn. ``seed``: any int of 32 bits."""
        row = self._host_state[slot]
        row[:] = 0
        row[: len(pages)] = pages
        row[self.max_pages :].view(np.float32)[:2] = temperature, top_p
        row[-1] = np.uint32(seed & 0xFFFFFFFF).view(np.int32)
        self._staging.send([row], self._state[slot])

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages of all layers."""
        if len(targets):
            self.cache[:, :, torch.tensor(targets, device=self.device)] = self.cache[:, :, torch.tensor(sources, device=self.device)]

    # ---- steps
    @torch.no_grad()
    def launch(self, step: Step, timed: bool = False) -> Launched:
        """Start a step. On the CPU it is over when this returns. Where it raises, pages keep what they held at positions
        before the step's, so that it can be launched again."""
        self.replay_seconds = 0.0
        start = end = None
        if self.device.type == "cuda":
            end = torch.cuda.Event(enable_timing=timed)
            if timed:
                start = torch.cuda.Event(enable_timing=True)
                start.record()
        tokens = self._run_mixed(step) if len(step.chunk_slots) else self._run_decodes(step)
        if end is None:
            return Launched(tokens.clone(), None, None)
        self._turn = (self._turn + 1) % len(self._tokens)
        host = self._tokens[self._turn][: len(tokens)]
        host.copy_(tokens, non_blocking=True)
        end.record()
        return Launched(host, start, end)

    def _run_decodes(self, step: Step) -> torch.Tensor:
        n = len(step.decode_slots)
        size = next((size for size in self.graphs if size >= n), None)
        padded = size or n
        kv_lens = np.ones(padded, np.int32)
        kv_lens[:n] = step.decode_positions + 1
        key = (padded, step.mode, self.backend.graph_key(kv_lens))
        if size is not None and key not in self._graphs:
            self._capture(*key)
            self._uploaded = 0
        if not step.repeats or self._uploaded != padded:
            self._upload_decodes(step.decode_slots, step.decode_positions, padded)
        batch = self._decode_batch(padded, kv_lens, step.decode_slots)
        if self.backend.on_host:
            self.backend.prepare(batch)
        if size is None:
            return self._decode_forward(batch, step.mode)[:n]
        graph, tokens = self._graphs[key]
        begin = time.perf_counter()
        graph.replay()
        self.replay_seconds = time.perf_counter() - begin
        return tokens[:n]

    def _upload_decodes(self, slots: np.ndarray, positions: np.ndarray, padded: int) -> None:
        """Rows past the sequences are padding's: slot max_slots, at position 0, which does not advance."""
        rows = np.zeros((3, len(self._decode) // 3), np.int32)
        n = len(slots)
        rows[0, :n], rows[0, n:], rows[1, :n], rows[2, :n] = slots, self.max_slots, positions, 1
        self._staging.send([rows.reshape(-1)], self._decode)
        self._slots, self._positions, self._advance = self._decode.view(3, -1)[:, :padded]
        self._uploaded = padded

    def _decode_batch(self, padded: int, kv_lens: np.ndarray, slots: np.ndarray) -> Batch:
        """The host's part; `_decode_forward` fills in the device's, which a graph computes by itself."""

        def tables() -> np.ndarray:
            rows = np.full(padded, self.max_slots)
            rows[: len(slots)] = slots
            return self._host_state[rows, : self.max_pages]

        return Batch(padded, kv_lens, None, tables)

    def _decode_forward(self, batch: Batch, mode: str) -> torch.Tensor:
        """A step of decodes on the device, without the host: what is captured."""
        slots, positions = self._slots, self._positions
        state = self._state.index_select(0, slots)
        ids = self._last.index_select(0, slots)
        batch.device_tables, batch.device_kv_lens, batch.positions = state[:, : self.max_pages], positions + 1, positions.clone()
        pages = state.gather(1, (positions // self.page_size).long()[:, None])[:, 0]
        batch.slots = pages.long() * self.page_size + positions % self.page_size
        self.backend.plan(batch)
        logits = self._forward(ids, batch.positions, 0)
        tokens = self._sample(logits, mode, state, batch.device_kv_lens)
        self._last.index_copy_(0, slots.long(), tokens)
        self._positions += self._advance
        return tokens

    def _run_mixed(self, step: Step) -> torch.Tensor:
        n, chunks = len(step.decode_slots), len(step.chunk_slots)
        q_lens = np.concatenate([np.ones(n, np.int32), step.chunk_lens])
        starts = np.concatenate([step.decode_positions, step.chunk_starts])
        slots = np.concatenate([step.decode_slots, step.chunk_slots])
        q_indptr = np.zeros(n + chunks + 1, np.int32)
        np.cumsum(q_lens, out=q_indptr[1:])
        tokens = int(q_indptr[-1])
        request_of = np.repeat(np.arange(n + chunks, dtype=np.int32), q_lens)
        positions = np.arange(tokens, dtype=np.int32) - q_indptr[:-1][request_of] + starts[request_of]
        kv_lens = (starts + q_lens).astype(np.int32)
        rows = step.sample_rows if len(step.sample_rows) else q_indptr[:1]  # the model wants one; its logits are dropped
        parts = [step.chunk_ids, request_of, positions, rows, step.sample_slots, slots, kv_lens, q_indptr]
        self._staging.send(parts, self._meta)
        views = torch.split(self._meta[: sum(map(len, parts))], [len(part) for part in parts])
        ids, d_request_of, d_positions, d_rows, sample_slots, d_slots, d_kv_lens, d_q_indptr = views
        state = self._state.index_select(0, d_slots)
        pages = state[d_request_of.long(), (d_positions // self.page_size).long()]
        batch = Batch(n, kv_lens, q_lens, lambda: self._host_state[slots, : self.max_pages])
        batch.device_kv_lens, batch.device_tables, batch.q_indptr = d_kv_lens, state[:, : self.max_pages], d_q_indptr
        batch.positions, batch.request_of = d_positions, d_request_of
        batch.slots = pages.long() * self.page_size + d_positions % self.page_size
        if self.backend.on_host:
            self.backend.prepare(batch)
        self.backend.plan(batch)
        ids = torch.cat([self._last.index_select(0, d_slots[:n]), ids])
        self._uploaded = 0
        logits = self._forward(ids, d_positions, d_rows.long())
        if not len(step.sample_rows):
            return sample_slots
        sampled = self._sample(logits, step.mode, self._state.index_select(0, sample_slots), d_positions.index_select(0, d_rows) + 1)
        self._last.index_copy_(0, sample_slots.long(), sampled)
        return sampled

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of the token rows ``keep``; 0 is all."""
        out = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep, serve=self.backend)
        return out.logits[0]

    def _sample(self, logits: torch.Tensor, mode: str, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        how = state[:, self.max_pages :].contiguous()
        floats = how.view(torch.float32)
        return sample(logits, mode, floats[:, 0], floats[:, 1], how[:, 2], positions).to(torch.int32)

    # ---- graphs
    def warm_up(self, modes: Sequence[str] = (GREEDY,), longest: int | None = None) -> None:
        """Capture every graph that decodes of these modes need, up to requests of ``longest`` tokens; else each is captured
        when it is first needed, within a step."""
        longest = longest or self.max_pages * self.page_size
        used = {self.backend.graph_key(np.array([n], np.int32)) for n in range(1, longest + 1)}
        for padded in reversed(self.graphs):
            for mode in modes:
                for key in self.backend.graph_keys():
                    if key in used and (padded, mode, key) not in self._graphs:
                        self._capture(padded, mode, key)
        self._uploaded = 0

    @torch.no_grad()
    def _capture(self, padded: int, mode: str, key: Hashable) -> None:
        """A graph of a step of padding: every row is of page 0, and no position advances."""
        none = np.zeros(0, np.int32)
        self._upload_decodes(none, none, padded)
        kv_lens = np.full(padded, self.backend.longest_of(key), np.int32)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries and compilers start up outside the capture
                batch = self._decode_batch(padded, kv_lens, none)
                self.backend.prepare(batch)
                self._decode_forward(batch, mode)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        batch = self._decode_batch(padded, kv_lens, none)
        self.backend.prepare(batch)
        with torch.cuda.graph(graph, pool=self._pool):
            tokens = self._decode_forward(batch, mode)
        self._graphs[padded, mode, key] = graph, tokens


def _buckets(most: int) -> list[int]:
    """1, 2, 4, 8, then by 8 to 64, by 16 to 128, by 32, up to ``most`` or just above it."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max(most, 128) + 32, 32)]
    return sizes[: next(i for i, size in enumerate(sizes) if size >= most) + 1]
