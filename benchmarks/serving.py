"""Load on a server of language models: what clients wait for, under arrivals that are stated.

    python benchmarks/serving.py compare      # attention backends in one process on one GPU, the engine of examples/serve
    python benchmarks/serving.py parallel     # n samples a prompt, shared prefixes on and off
    python benchmarks/serving.py streaming    # sinks + window: RoPE in the kernel beside a pass that rotates K
    python benchmarks/serving.py http URL     # any server of /v1/completions

Loads (lengths in tokens, drawn with a fixed seed; arrivals are Poisson at --rate, or all at once for `streams`):

    sharegpt   prompts log-normal(mu 4.6, sigma 1.1), mean 182; outputs log-normal(mu 5.2, sigma 0.9), mean 272; cut to 4..2048, 4..1024
    uniform    prompts uniform(512, 2048), outputs uniform(64, 256)
    one-long   every 16th prompt of 8192, the others of 128; outputs of 128
    system     a prompt of 1024 that all share, then uniform(16, 128); outputs of 128
    parallel   prompts of 2048, n samples each; outputs of 128
    streams    so many at once, prompts of 512, outputs of 256: decode at full width

TTFT is from arrival to a sample's first token, ITL between two tokens of a sample, both on the host's clock. Only decodes
that a graph repeats count for host us. Tables on the terminal, JSON and PNG under docs/serving/.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # examples/ is not installed

import attngen as ag
from attngen import variants
from examples.serve.attention import BACKENDS, Backend, BackendError, Batch, Layer, Sizes
from examples.serve.engine import Engine, Outputs, Request
from examples.serve.models import load as load_model
from examples.serve.runner import Runner, Step
from examples.serve.sampling import GREEDY

OUT = ROOT / "docs" / "serving"
console = Console(width=None if sys.stdout.isatty() else 160)
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)

SHAPES: dict[str, dict[str, Any]] = {  # configurations alone: weights are random, no network is needed
    "llama-3.1-8b": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=None,
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=8192),
    ),
    "vicuna-13b": dict(
        model_type="llama", vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=None,
    ),
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, eos_token_id=None, bos_token_id=None, tie_word_embeddings=True,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- loads


@dataclass
class Load:
    """Requests and when they arrive."""

    name: str
    arrivals: np.ndarray  # seconds from the start, increasing
    prompts: list[np.ndarray]
    outputs: list[int]
    n: int = 1


def make_load(name: str, *, rate: float, seconds: float, vocab: int, streams: int = 128, n: int = 8, scale: float = 1.0) -> Load:
    """A load of the table above; ``scale`` multiplies all lengths. The same arguments give the same load, others share no prompt."""
    random = np.random.default_rng(zlib.crc32(f"{name} {rate} {n}".encode()))
    count = streams if name == "streams" else max(1, int(rate * seconds))
    gaps = random.exponential(1 / rate, count) if name != "streams" else np.zeros(count)

    def tokens(length: float) -> np.ndarray:
        return random.integers(0, vocab, max(1, round(length * scale))).astype(np.int32)

    shared = tokens(1024)
    draw = {  # request i's prompt and how many tokens it gets
        "sharegpt": lambda i: (tokens(np.clip(random.lognormal(4.6, 1.1), 4, 2048)), np.clip(random.lognormal(5.2, 0.9), 4, 1024)),
        "uniform": lambda i: (tokens(random.integers(512, 2049)), random.integers(64, 257)),
        "one-long": lambda i: (tokens(8192 if i % 16 == 7 else 128), 128),
        "system": lambda i: (np.concatenate([shared, tokens(random.integers(16, 129))]), 128),
        "parallel": lambda i: (tokens(2048), 128),
        "streams": lambda i: (tokens(512), 256),
    }  # fmt: skip
    if name not in draw:
        raise typer.BadParameter(f"load {name!r}: one of {', '.join(draw)} required")
    pairs = [draw[name](i) for i in range(count)]
    return Load(name, gaps.cumsum(), [p for p, _ in pairs], [max(2, round(o * scale)) for _, o in pairs], n if name == "parallel" else 1)


# ---------------------------------------------------------------- what is measured


@dataclass
class Result:
    """One load on one server."""

    backend: str
    load: str
    rate: float
    requests: int = 0
    finished: int = 0
    seconds: float = 0.0
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)  # seconds, of each sample
    itl: list[float] = field(default_factory=list)  # seconds, of each token but the first ones
    kv_used: float = 0.0  # of the pool's pages, the most that were held
    kv_tokens: int = 0  # in held pages, at that time
    gpu_busy: float | None = None  # of the time, some step was on the device
    host_us: float | None = None  # of a decode step beside the graph's launch

    def row(self) -> dict[str, Any]:
        """Figures for the table and JSON: times in ms."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("ttft", "itl")}
        for what in ("ttft", "itl"):
            values = np.array(getattr(self, what)) * 1e3
            for p in (50, 90, 99):
                kept[f"{what}_p{p}_ms"] = round(float(np.percentile(values, p)), 3) if len(values) else None
        return {**kept, "tokens_per_s": round(self.tokens / self.seconds, 1) if self.seconds else None}


class Meter:
    """Notes when each sample's tokens come. Nothing is computed before the end."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, Any]] = []

    def note(self, outputs: Outputs, now: float) -> None:
        if len(outputs.samples):
            self.steps.append((now, outputs.samples))
        for _, error in outputs.failed:
            raise error

    def fill(self, result: Result, start: float, width: int | None = None) -> None:
        """``width``: count ITL only where so many samples got a token, and the step before too."""
        last: dict[int, float] = {}
        before = 0
        for now, samples in self.steps:
            for sample in samples:
                known = last.get(sample.uid)
                last[sample.uid] = now
                if known is None:
                    result.ttft.append(now - start - sample.request.tag)
                elif width is None or len(samples) == before == width:
                    result.itl.append(now - known)
            result.tokens += len(samples)
            before = len(samples)


def drive(engine: Engine, load: Load, result: Result, limit: float) -> Result:
    """Run a load on an engine in this process, for at most ``limit`` seconds after the last arrival."""
    requests = [
        Request(prompt, output, n=load.n, temperature=0.0 if load.n == 1 else 0.8, seed=i, ignore_eos=True, tag=at)
        for i, (prompt, output, at) in enumerate(zip(load.prompts, load.outputs, load.arrivals))
    ]
    meter, due, stats = Meter(), 0, replace(engine.stats)
    start = time.perf_counter()
    end = start + load.arrivals[-1] + limit
    while due < len(requests) or engine.has_work:
        now = time.perf_counter()
        if now > end:
            break
        while due < len(requests) and start + load.arrivals[due] <= now:
            engine.submit(requests[due])
            due += 1
        if not engine.has_work:
            time.sleep(max(0.0, start + load.arrivals[due] - now))
            continue
        for outputs in engine.step():
            meter.note(outputs, time.perf_counter())
        if engine.pool.held / engine.pool.capacity > result.kv_used:
            result.kv_used = engine.pool.held / engine.pool.capacity
            result.kv_tokens = engine.pool.held * engine.page_size
    result.seconds = time.perf_counter() - start
    for request in requests[:due]:
        engine.cancel(request)
    while engine.has_work:
        engine.step()
    result.requests, result.finished = due, engine.stats.finished_requests - stats.finished_requests
    meter.fill(result, start, len(requests) if load.name == "streams" else None)
    if engine.runner.device.type == "cuda":
        result.gpu_busy = round((engine.stats.device_seconds - stats.device_seconds) / result.seconds, 3)
    if steps := engine.stats.host_steps - stats.host_steps:
        result.host_us = round((engine.stats.host_seconds - stats.host_seconds) / steps * 1e6, 1)
    return result


def show(results: Sequence[Result], title: str) -> None:
    table = Table(title=title + "; times in ms", title_justify="left")
    columns = [("backend", "backend"), ("load", "load"), ("rate/s", "rate"), ("done", "finished"), ("tok/s", "tokens_per_s"),
               *((f"{w.upper()} p{p}", f"{w}_p{p}_ms") for w in ("ttft", "itl") for p in (50, 90, 99)),
               ("KV", "kv_used"), ("KV tokens", "kv_tokens"), ("GPU", "gpu_busy"), ("host us", "host_us")]  # fmt: skip
    for name, _ in columns:
        table.add_column(name, justify="left" if name in ("backend", "load") else "right")
    for result in results:
        row = result.row()
        row["kv_used"] = f"{row['kv_used']:.0%}" if row["kv_used"] else None
        row["gpu_busy"] = f"{row['gpu_busy']:.0%}" if row["gpu_busy"] else None
        table.add_row(*("-" if row[key] is None else f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for _, key in columns))
    console.print(table)


def brief(result: Result) -> None:
    """One line, as soon as it is known."""
    row = result.row()
    console.print(
        f"{result.backend} | {result.load} at {result.rate:g}/s | {result.finished} of {result.requests} requests | TTFT p50 {row['ttft_p50_ms']} "
        f"p99 {row['ttft_p99_ms']} ms | ITL p50 {row['itl_p50_ms']} p99 {row['itl_p99_ms']} ms | {row['tokens_per_s']} tokens/s",
        highlight=False,
    )


def save(results: Sequence[Result], name: str, facts: dict[str, Any]) -> None:
    """JSON of the figures, PNG of the distributions."""
    OUT.mkdir(parents=True, exist_ok=True)
    facts = {"command": " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d"),
             "torch": torch.__version__, **facts}  # fmt: skip
    (OUT / f"{name}.json").write_text(json.dumps({"facts": facts, "results": [r.row() for r in results]}, indent=1) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r.load, r.rate) for r in results))
    figure, axes = plt.subplots(len(cases), 2, figsize=(10, 3 * len(cases)), squeeze=False, layout="constrained")
    for (load, rate), pair in zip(cases, axes):
        for what, axis in zip(("ttft", "itl"), pair):
            lines = [(r.backend, np.sort(getattr(r, what)) * 1e3) for r in results if (r.load, r.rate) == (load, rate) and getattr(r, what)]
            if not lines:
                axis.set_axis_off()
                continue
            for label, values in lines:
                axis.plot(values, np.linspace(0, 100, len(values)), label=label)
            title = load + (f", {rate:g} requests/s" if rate else "")
            axis.set(xlabel=f"{what.upper()}, ms", ylabel="percentile", ylim=(0, 100), xscale="log", title=title)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(OUT / f"{name}.png", dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- in process


@dataclass
class Machine:
    """A model on a device, for engines one after another."""

    model: Any
    facts: dict[str, Any]

    @staticmethod
    def of(shape: str, layers: int | None, device: str | None) -> Machine:
        on = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if on != "cpu" else torch.float32
        torch.manual_seed(0)
        start = time.perf_counter()
        model, _ = load_model(SHAPES[shape], device=on, dtype=dtype, random=True, layers=layers)
        name = torch.cuda.get_device_name() if on != "cpu" else f"{torch.get_num_threads()} CPU threads"
        facts = {"device": name, "shape": shape, "layers": model.config.num_hidden_layers, "dtype": str(dtype).removeprefix("torch.")}
        console.print(f"{shape}, {facts['layers']} layers, random {facts['dtype']} weights on {name}, made in {time.perf_counter() - start:.1f} s")
        return Machine(model, facts)

    def engine(self, backend: str, *, slots: int, kv_tokens: int, max_len: int, chunk: int, **options: Any) -> Engine:
        """An engine that has run every kind of step once."""
        page = 128 if backend == "flex" else 16
        on_cuda = self.model.device.type == "cuda"
        graphs = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < slots] + [slots]
        start = time.perf_counter()
        with Progress(SpinnerColumn(), TextColumn(f"{backend}: kernels, graphs"), TimeElapsedColumn(), console=console, transient=True) as progress:
            progress.add_task("")
            engine = Engine(
                self.model, backend=backend, page_size=page, num_pages=kv_tokens // page + 1, max_slots=slots, max_waiting=1 << 20,
                max_len=max_len, max_chunk=chunk, graphs=graphs, timed=on_cuda, **options,
            )  # fmt: skip
            engine.runner.warm_up()
            sizes = sorted({min(chunk, size) for size in (100, 200, 400, chunk)})
            for size in sizes:  # chunks of every shape that is compiled, beside decodes and alone
                for beside in (0, 1, 3):
                    self._run(engine, [Request(np.zeros(4, np.int32) + i, 4, ignore_eos=True) for i in range(beside)], size)
        if on_cuda:
            torch.cuda.synchronize()
        console.print(f"{backend}: ready in {time.perf_counter() - start:.1f} s, {len(engine.runner._graphs)} graphs")
        return engine

    def _run(self, engine: Engine, decodes: Sequence[Request], chunk: int) -> None:
        engine.submit(*decodes)
        engine.step()
        prompt = np.random.default_rng(chunk + len(decodes)).integers(0, 1000, chunk)
        engine.submit(Request(prompt, 3, ignore_eos=True))
        while engine.has_work:
            for outputs in engine.step():
                for _, error in outputs.failed:
                    raise error


def free(engine: Engine) -> None:
    """Give an engine's memory back before the next one is made."""
    engine.runner._graphs.clear()
    engine.runner.backend = engine.runner.cache = None  # type: ignore[assignment]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_CHOICES = {"attngen": "shared_prefix", "flashinfer": "prefill"}  # the option that a label's second half sets
Shape = Annotated[str, typer.Option(help=f"of the model: {', '.join(SHAPES)}")]
Layers = Annotated[int | None, typer.Option(help="layers of the model; default all")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu")]
Seconds = Annotated[float, typer.Option(help="of arrivals")]
Scale = Annotated[float, typer.Option(help="multiplies all lengths")]
Name = Annotated[str, typer.Option(help="of the files under docs/serving")]


def words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


@app.command()
def compare(
    backends: Annotated[str, typer.Option(help=f"of {', '.join(BACKENDS)}; attngen:off shares no prefixes, flashinfer:fa3 takes minutes to build")]
    = "attngen,flashinfer,sdpa,flex",
    loads: Annotated[str, typer.Option(help="of the table above")] = "streams,sharegpt,uniform",
    rates: Annotated[str, typer.Option(help="requests a second")] = "8",
    shape: Shape = "llama-3.1-8b",
    layers: Layers = None,
    seconds: Seconds = 10,
    limit: Annotated[float, typer.Option(help="seconds after the last arrival")] = 20,
    slots: Annotated[int, typer.Option(help="sequences at once, and of `streams`")] = 128,
    kv_tokens: Annotated[int, typer.Option(help="tokens of the cache")] = 160_000,
    max_len: Annotated[int, typer.Option(help="tokens of a sequence")] = 4096,
    chunk: Annotated[int, typer.Option(help="prompt tokens of a step")] = 512,
    scale: Scale = 1.0,
    lag: Annotated[int | None, typer.Option(help="steps launched ahead of the tokens read; default 1 on a GPU")] = None,
    device: Device = None,
    name: Name = "compare",
) -> None:
    """Attention backends in one process, on the same weights, cache size and arrivals."""
    machine, results = Machine.of(shape, layers, device), []
    facts = {**machine.facts, "slots": slots, "kv_tokens": kv_tokens, "chunk": chunk, "seconds": seconds, "scale": scale, "lag": lag}
    cases = [(load, rate) for load in words(loads) for rate in ([0.0] if load == "streams" else map(float, words(rates)))]
    made = [make_load(load, rate=rate, seconds=seconds, vocab=machine.model.config.vocab_size, streams=slots, scale=scale) for load, rate in cases]
    for label in words(backends):
        backend, _, choice = label.partition(":")
        if choice and backend not in _CHOICES:
            raise typer.BadParameter(f"{label}: a choice after the colon is for {', '.join(_CHOICES)} alone")
        options = {_CHOICES[backend]: choice} if choice else {}
        try:
            engine = machine.engine(backend, slots=slots, kv_tokens=kv_tokens, max_len=max_len, chunk=chunk, lag=lag, **options)
            for load, (_, rate) in zip(made, cases):
                results.append(drive(engine, load, Result(label, load.name, rate), limit))
                brief(results[-1])
            free(engine)
        except BackendError as error:
            console.print(f"[yellow]{error}[/yellow]", highlight=False)
        except Exception:  # time on a GPU is short: the others still run
            console.print_exception()
        if results:
            save(results, name, facts)
    results.sort(key=lambda r: cases.index((r.load, r.rate)))
    show(results, f"{shape}, {machine.facts['layers']} layers, {machine.facts['device']}")


@app.command()
def parallel(
    groups: Annotated[int, typer.Option(help="prompts at once")] = 16,
    ns: Annotated[str, typer.Option(help="samples of each")] = "4,8,16",
    backend: str = "attngen",
    shape: Shape = "llama-3.1-8b",
    layers: Layers = None,
    chunk: Annotated[int, typer.Option(help="prompt tokens of a step")] = 2048,
    scale: Scale = 1.0,
    device: Device = None,
    name: Name = "parallel",
) -> None:
    """n samples of each of some prompts of 2048 tokens, with shared prefixes planned as such and not."""
    machine, results = Machine.of(shape, layers, device), []
    counts = [int(word) for word in words(ns)]
    each = round(128 * scale) + 160  # of a sample, with room to its page's end
    for shared in ("auto", "off") if backend == "attngen" else (None,):
        engine = machine.engine(
            backend, slots=groups * max(counts), kv_tokens=groups * (round(2048 * scale) + max(counts) * each) + 4096,
            max_len=round(2048 * scale) + each, chunk=chunk, **({} if shared is None else {"shared_prefix": shared}),
        )  # fmt: skip
        for n in counts:
            load = make_load("parallel", rate=1.0, seconds=groups, vocab=machine.model.config.vocab_size, n=n, scale=scale)
            load.arrivals[:] = 0.0
            label = backend if shared is None else f"{backend} {shared}"
            results.append(drive(engine, load, Result(label, f"{groups} x n={n}", 0.0), limit=60))
            brief(results[-1])
        free(engine)
    results.sort(key=lambda r: int(r.load.rpartition("=")[2]))
    show(results, f"parallel generation, {shape}, {machine.facts['layers']} layers, {machine.facts['device']}")
    save(results, name, {**machine.facts, "groups": groups, "chunk": chunk, "scale": scale})


# ---------------------------------------------------------------- streaming


class Fused(Backend):
    """StreamingLLM in one kernel: the cache holds keys unrotated, which are rotated as they are read."""

    name = "rope in the kernel"

    def __init__(self, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes, *, sinks: int, window: int) -> None:
        super().__init__(layers, cache, sizes)
        self.sinks, self.window = sinks, window
        self._attn = self._object(variants.StreamingLLM(sinks=sinks, window=window))

    def _object(self, variant: ag.Variant) -> ag.BatchAttention:
        kind, sizes, cache = self.layers[0], self.sizes, self.cache
        return ag.BatchAttention(
            variant, num_heads=kind.num_heads, num_kv_heads=kind.num_kv_heads, head_dim=kind.head_dim, scale=kind.scale, dtype=cache.dtype,
            device=cache.device, page_size=sizes.page_size, max_requests=sizes.max_requests, max_q_tokens=sizes.max_requests, max_q_len=1,
            max_pages=sizes.max_requests * sizes.max_pages,
        )  # fmt: skip

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        self._attn.plan(None, block_table=batch.device_tables, kv_lens=batch.device_kv_lens)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ag.append_kv(k, v, (self.cache[layer, 0], self.cache[layer, 1]), slot_mapping=self._batch.slots)
        return self._attn.run(q, (self.cache[layer, 0], self.cache[layer, 1]))


class Separate(Fused):
    """The same result with a pass before attention that rotates q, and the keys that are seen into a second cache: one
    compiled kernel of torch's own."""

    name = "rope in a pass"

    def __init__(self, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes, *, sinks: int, window: int) -> None:
        Backend.__init__(self, layers, cache, sizes)
        self.sinks, self.window = sinks, window
        self._attn = self._object(variants.Streaming(sinks=sinks, window=window))
        self._rotated = torch.zeros_like(cache[0, 0])
        d = cache.shape[-1]
        self._inv_freq = 10000.0 ** -(torch.arange(0, d, 2, device=cache.device).float() / d)
        self._pass = torch.compile(_rotate_pages, dynamic=False)

    def plan(self, batch: Batch) -> None:
        super().plan(batch)
        size, sink_pages = self.sizes.page_size, -(-self.sinks // self.sizes.page_size)
        tables, positions = batch.device_tables, batch.positions
        evicted = (batch.device_kv_lens - self.sinks - self.window).clamp_min(0)
        first = ((positions - self.window + 1).clamp_min(0) // size).clamp_min(sink_pages)
        pages = torch.arange(-(-self.window // size) + 1, device=tables.device, dtype=torch.int32) + first[:, None]
        pages = torch.cat([torch.arange(sink_pages, device=tables.device, dtype=torch.int32).expand(len(tables), -1), pages], 1)
        at = pages[..., None] * size + torch.arange(size, device=tables.device, dtype=torch.int32)
        self._at = torch.where(at < self.sinks, at, at - evicted[:, None, None])  # [requests, pages, page_size], in the cache
        self._pages = tables.gather(1, pages.clamp_max(tables.shape[1] - 1).long())
        self._q_at = positions - evicted

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache[layer, 0], self.cache[layer, 1]
        ag.append_kv(k, v, (keys, values), slot_mapping=self._batch.slots)
        q = self._pass(q, self._q_at, keys, self._rotated, self._pages, self._at, self._inv_freq)
        return self._attn.run(q, (self._rotated, values))


def _rotate_pages(q: Any, q_at: Any, keys: Any, rotated: Any, pages: Any, at: Any, inv_freq: Any) -> torch.Tensor:
    rotated[pages.long()] = _rotate(keys[pages.long()], at[..., None], inv_freq)
    return _rotate(q, q_at[:, None], inv_freq)


def _rotate(x: torch.Tensor, at: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama's RoPE of x [..., head_dim] at positions [...]."""
    angle = at[..., None].float() * inv_freq
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


class _NoRope(torch.nn.Module):
    """In place of a model's rotary embedding: angles of 0."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = 1, position_ids.shape[1], self.head_dim
        return x.new_ones(shape), x.new_zeros(shape)


@app.command()
def streaming(
    streams: int = 24,
    sinks: int = 4,
    window: int = 2000,
    context: Annotated[int, typer.Option(help="tokens that each stream has seen already")] = 3000,
    steps: Annotated[int, typer.Option(help="tokens of each stream that are timed")] = 128,
    shape: Shape = "vicuna-13b",
    layers: Layers = None,
    device: Device = None,
    name: Name = "streaming",
) -> None:
    """StreamingLLM decode: RoPE in the attention kernel beside a pass that rotates the keys it sees, each step."""
    machine, results, texts = Machine.of(shape, layers, device), [], []
    kind = machine.model.config
    machine.model.model.rotary_emb = _NoRope(kind.head_dim or kind.hidden_size // kind.num_attention_heads)
    each = -(-(context + steps + 8) // 16)
    on_cuda = machine.model.device.type == "cuda"
    for backend in (Fused, Separate):
        BACKENDS[backend.name] = backend
        runner = Runner(
            machine.model, backend.name, num_pages=streams * each + 1, page_size=16, max_slots=streams, max_chunk=0, max_len=each * 16,
            graphs=[streams], sinks=sinks, window=window,
        )  # fmt: skip
        random = torch.Generator(machine.model.device).manual_seed(0)
        for part in runner.cache:
            part.normal_(generator=random)
        for slot in range(streams):
            runner.admit(slot, range(1 + slot * each, 1 + (slot + 1) * each), 0.0, 1.0, 0)
        slots, none = np.arange(streams, dtype=np.int32), np.zeros(0, np.int32)
        result, tokens = Result(backend.name, f"{streams} streams, {sinks} + {window}", 0.0, streams, streams), []
        before = 0.0
        for i in range(steps + 3):
            positions = np.full(streams, context + i, np.int32)
            step = Step(slots, positions, none, none, none, none, none, slots, GREEDY, repeats=i > 0)
            tokens.append(runner.launch(step).tokens().copy())
            now = time.perf_counter()
            if i > 2:  # compiled, captured, and one more
                result.itl += [now - before]
            before = now
        result.tokens, result.seconds = streams * len(result.itl), sum(result.itl)
        results.append(result)
        texts.append(np.array(tokens))
        runner.backend = None  # type: ignore[assignment]
        del runner
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()
    fused, separate = (statistics.median(result.itl) for result in results)
    show(results, f"streaming, {shape}, {machine.facts['layers']} layers, {machine.facts['device']}")
    first = int((texts[0] != texts[1]).any(1).argmax()) if (texts[0] != texts[1]).any() else steps + 3
    console.print(f"ITL {fused / separate:.3f} of the separate pass; the first {first} of {steps + 3} tokens of all streams are equal")
    save(results, name, {**machine.facts, "streams": streams, "sinks": sinks, "window": window, "context": context})


# ---------------------------------------------------------------- over HTTP


@app.command()
def http(
    url: Annotated[str, typer.Argument(help="of the server, as http://127.0.0.1:8000")],
    model: Annotated[str, typer.Option(help="as the server names it")] = "smollm2",
    loads: Annotated[str, typer.Option(help="of the table above")] = "sharegpt",
    rates: Annotated[str, typer.Option(help="requests a second")] = "2",
    vocab: Annotated[int, typer.Option(help="tokens of prompts are below this")] = 30_000,
    seconds: Seconds = 10,
    scale: Scale = 1.0,
    n: Annotated[int, typer.Option(help="samples of the load `parallel`")] = 8,
    name: Name = "http",
) -> None:
    """Any server of OpenAI's /v1/completions, each token by server-sent events."""
    results = []
    for load_name in words(loads):
        for rate in map(float, words(rates)):
            load = make_load(load_name, rate=rate, seconds=seconds, vocab=vocab, streams=max(1, int(rate * seconds)), n=n, scale=scale)
            results.append(asyncio.run(_drive_http(url, model, load, Result(model, load_name, rate))))
            brief(results[-1])
    save(results, name, {"url": url, "seconds": seconds, "scale": scale})


async def _drive_http(url: str, model: str, load: Load, result: Result) -> Result:
    import httpx2

    start, refused = time.perf_counter(), 0

    async def one(client: httpx2.AsyncClient, prompt: np.ndarray, output: int, at: float) -> None:
        nonlocal refused
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        body = dict(model=model, prompt=prompt.tolist(), max_tokens=output, n=load.n, temperature=0.0 if load.n == 1 else 0.8,
                    ignore_eos=True, stream=True)  # fmt: skip
        last: dict[int, float] = {}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                refused += 1
                return
            async for event in httpx2.EventSource(answer):
                now = time.perf_counter()
                for choice in [] if event.data == "[DONE]" else json.loads(event.data).get("choices", []):
                    known = last.get(choice["index"])
                    (result.ttft.append(now - start - at) if known is None else result.itl.append(now - known))
                    last[choice["index"]] = now
                    result.tokens += 1
        result.finished += 1

    async def watch(client: httpx2.AsyncClient) -> None:
        """KV use, of a server that says it as ours does."""
        while True:
            lines = (await client.get("/metrics")).text.splitlines()
            pages = {state: float(line.split()[-1]) for line in lines for state in ("held", "idle", "free") if f'pages{{state="{state}"' in line}
            if pages:
                result.kv_used = max(result.kv_used, pages["held"] / sum(pages.values()))
            await asyncio.sleep(0.5)

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        watching = asyncio.create_task(watch(client))
        await asyncio.gather(*(one(client, *request) for request in zip(load.prompts, load.outputs, load.arrivals)))
        watching.cancel()
    result.requests, result.seconds = len(load.prompts), time.perf_counter() - start
    if refused:
        console.print(f"[yellow]{refused} of {result.requests} requests were refused[/yellow]")
    return result


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    app()
