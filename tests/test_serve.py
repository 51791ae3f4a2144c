"""examples/serve end to end on the CPU: over HTTP against transformers' generate, faults, and that every page comes back."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

WEB = ("httpx2", "prometheus_client", "pydantic", "starlette", "uvicorn")
for package in WEB:  # `make setup` installs them; machines that run the gpu tests have none
    pytest.importorskip(package, reason="pip install -e '.[serve]'")

import httpx2
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from examples.serve import server as serve_server
from examples.serve.attention import BackendError
from examples.serve.engine import Engine, Refused, Request, run
from examples.serve.models import ATTENTION, ModelError, load
from examples.serve.runner import Runner
from examples.serve.sampling import GREEDY, SAMPLE, TOP_P, sample
from examples.serve.server import Server
from examples.serve.text import ByteTokenizer, TextStream
from served import tokens_of

NEW = 10  # tokens that most requests ask for
TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
SIZES = dict(page_size=8, num_pages=150, max_slots=12, max_len=128, max_chunk=40)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models lose by more, and the tests beside these need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=None)
def model(kind: str = "llama", **others: Any) -> Any:
    torch.manual_seed(0)
    return load({"model_type": kind, **TINY, **others}, device="cpu", dtype=torch.float32)[0]


def generate(prompt: list[int], count: int = NEW, kind: str = "llama", **others: Any) -> list[int]:
    """What transformers makes of a prompt, with its own cache and eager attention."""
    loaded = model(kind, **others)
    loaded.set_attn_implementation("eager")
    try:
        ids = torch.tensor([prompt])
        return loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()
    finally:
        loaded.set_attn_implementation(ATTENTION)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Every other one begins with up to 70 tokens of one prefix."""
    random = np.random.default_rng(seed)
    prefix = random.integers(0, 256, 70).tolist()
    return [
        (prefix[: random.integers(8, 70)] if i % 2 else []) + random.integers(0, 256, random.integers(1, 50)).tolist() for i in range(count)
    ]


class Letters:
    """A tokenizer of one letter a token, so that random tokens are text."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 0x4E00 for letter in text]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x4E00 + token) for token in token_ids)


class Running:
    """A server in a thread, and what tests ask of it."""

    def __init__(self, engine: Engine, tokenizer: Any = None) -> None:
        self.engine, self.server = engine, Server(engine, tokenizer or Letters(), "tiny")
        config = uvicorn.Config(self.server.app, port=0, log_level="error", timeout_graceful_shutdown=1)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run)
        self._thread.start()
        wait(lambda: self._uvicorn.started)
        self.url = f"http://127.0.0.1:{self._uvicorn.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx2.Client(base_url=self.url, timeout=60)

    def post(self, **fields: Any) -> httpx2.Response:
        return self.client.post("/v1/completions", json=body(**fields))

    def idle(self) -> None:
        """Nothing runs and every page is back."""
        wait(lambda: not self.engine.has_work)
        assert self.engine.pool.held == 0 and self.engine.running == 0 and not self.server.worker._live

    def close(self) -> None:
        self.client.close()
        self._uvicorn.should_exit = True
        self._thread.join()


def wait(until: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": NEW, "temperature": 0, "return_token_ids": True, **fields}


@contextlib.contextmanager
def serving(**sizes: Any) -> Iterator[Running]:
    running = Running(Engine(model(), backend="sdpa", **{**SIZES, **sizes}))
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with serving(max_waiting=64) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int]]]:
    return [(prompt, generate(prompt)) for prompt in prompts(32)]


# ---------------------------------------------------------------- the same tokens as generate


async def ask(client: httpx2.AsyncClient, stream: bool, **fields: Any) -> dict[int, list[int]]:
    """Token ids by choice."""
    if not stream:
        answer = await client.post("/v1/completions", json=body(**fields))
        assert answer.status_code == 200, answer.text
        return {choice["index"]: choice["token_ids"] for choice in answer.json()["choices"]}
    found: dict[int, list[int]] = {}
    async with client.stream("POST", "/v1/completions", json=body(stream=True, **fields)) as answer:
        assert answer.status_code == 200
        async for event in httpx2.EventSource(answer):
            if event.data != "[DONE]":
                for choice in event.json()["choices"]:
                    found.setdefault(choice["index"], []).extend(choice["token_ids"])
    return found


@pytest.mark.parametrize("backend", ["attngen", "sdpa"])
def test_32_concurrent_requests_get_what_generate_makes(backend: str, expected: list[tuple[list[int], list[int]]]) -> None:
    running = Running(Engine(model(), backend=backend, **SIZES))

    async def all_at_once() -> list[dict[int, list[int]]]:
        async with httpx2.AsyncClient(base_url=running.url, timeout=60) as client:
            return await asyncio.gather(*(ask(client, i % 3 == 0, prompt=prompt) for i, (prompt, _) in enumerate(expected)))

    try:
        found = asyncio.run(all_at_once())
        running.idle()
    finally:
        running.close()
    assert [answer[0] for answer in found] == [tokens for _, tokens in expected]
    stats = running.engine.stats
    assert stats.cached_tokens > 0 and stats.decode_steps > 0 and stats.steps - stats.decode_steps > 3  # shared, mixed, chunked


@pytest.mark.parametrize(
    ("kind", "backend", "others"),
    [
        # soft caps, windows in every other layer, a scale of its own
        ("gemma2", "attngen", dict(sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=4, tie_word_embeddings=False)),
        ("qwen3", "sdpa", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),  # q and k norms
    ],
)
def test_what_a_model_says_of_its_layers_is_honoured(kind: str, backend: str, others: dict[str, Any]) -> None:
    engine = Engine(model(kind, **others), backend=backend, **SIZES)
    requests = [Request(prompt, NEW) for prompt in prompts(6, seed=1)]
    found = tokens_of(engine, requests)
    assert found == [[generate(request.prompt.tolist(), NEW, kind, **others)] for request in requests]
    assert engine.pool.held == 0


def test_a_lagging_engine_gives_the_same(expected: list[tuple[list[int], list[int]]]) -> None:
    """As on a GPU: a step is launched before the tokens of the one before are read. Some requests end early."""
    end = Counter(token for _, tokens in expected for token in tokens).most_common(1)[0][0]
    engine = Engine(model(), backend="sdpa", lag=1, **SIZES)
    engine._is_end[end] = True
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for _, tokens in expected]
    assert tokens_of(engine, [Request(prompt, NEW) for prompt, _ in expected]) == [[tokens] for tokens in cut]
    assert engine.pool.held == 0 and any(len(tokens) < NEW for tokens in cut)


@pytest.mark.parametrize("backend", ["attngen", "sdpa"])
def test_a_replayed_step_needs_nothing_of_the_host(
    backend: str, expected: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph would do, in its place: the captured step again, with what the host knew at its capture."""

    def capture(self: Runner, padded: int, mode: str, key: Any) -> None:
        none = np.zeros(0, np.int32)
        self._upload_decodes(none, none, padded)
        views, kv_lens = (self._slots, self._positions, self._advance), np.full(padded, self.backend.longest_of(key), np.int32)

        def again() -> torch.Tensor:
            self._slots, self._positions, self._advance = views
            return self._decode_forward(self._decode_batch(padded, kv_lens, none), mode)

        tokens = again()
        self._graphs[padded, mode, key] = SimpleNamespace(replay=lambda: tokens.copy_(again())), tokens

    monkeypatch.setattr(Runner, "_capture", capture)
    engine = Engine(model(), backend=backend, lag=1, **SIZES)
    engine.runner.graphs = [1, 4, 12]  # most steps are padded
    requests = [Request(prompt, NEW + i % 7, n=1 + i % 3) for i, (prompt, _) in enumerate(expected)]
    found = tokens_of(engine, requests)
    assert [[sample[:NEW] for sample in samples] for samples in found] == [[new] * (1 + i % 3) for i, (_, new) in enumerate(expected)]
    assert engine.pool.held == 0 and len(engine.runner._graphs) >= 2 and engine.stats.host_steps > 0


# ---------------------------------------------------------------- parallel sampling


@pytest.mark.parametrize("length", [16, 19])  # the prompt ends with a page, and within one
def test_samples_share_the_prompt_and_nothing_else(length: int) -> None:
    engine = Engine(model(), backend="sdpa", **SIZES)
    prompt = list(range(100, 100 + length))
    request = Request(prompt, NEW, n=4, temperature=1.5, seed=5)
    engine.submit(request)
    engine.step()
    whole, own = length // 8, -(-(length + NEW) // 8) - length // 8
    assert engine.pool.held == whole + 4 * own
    tables = [one.pages for one in request.samples]
    assert all(table[:whole] == tables[0][:whole] for table in tables)
    assert len({page for table in tables for page in table[whole:]}) == 4 * own
    while engine.has_work:
        engine.step()
    assert engine.pool.held == 0
    greedy = Request(prompt, NEW, n=3)  # all of them read what the first has written, the copied part of a page too
    assert tokens_of(engine, [greedy]) == [[generate(prompt)] * 3]


def test_seeds_repeat_and_choices_differ(tiny: Running) -> None:
    fields = dict(prompt=[5, 6, 7], n=3, temperature=1.0, top_p=0.9, seed=11)
    first, second = (tiny.post(**fields).json()["choices"] for _ in range(2))
    assert first == second
    assert len({tuple(choice["token_ids"]) for choice in first}) == 3
    assert tiny.post(**{**fields, "seed": 12}).json()["choices"] != first
    tiny.idle()


def test_sampling_follows_the_distribution() -> None:
    rows = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(rows, 4)
    wanted = torch.softmax(logits[0] / 0.8, -1)
    temperature, seed, position = torch.full((rows,), 0.8), torch.arange(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    for mode, top_p, kept in ((SAMPLE, 1.0, [0, 1, 2, 3]), (TOP_P, 1.0, [0, 1, 2, 3]), (TOP_P, 0.8, [2, 3])):
        drawn = sample(logits, mode, temperature, torch.full((rows,), top_p), seed, position).bincount(minlength=4) / rows
        part = torch.zeros(4)
        part[kept] = wanted[kept] / wanted[kept].sum()
        assert (drawn - part).abs().max() < 0.01
    assert sample(logits, TOP_P, temperature * 0, temperature, seed, position).unique().tolist() == [3]
    assert sample(logits, GREEDY, temperature, temperature, seed, position).unique().tolist() == [3]


# ---------------------------------------------------------------- text


def test_stop_strings_end_a_text_before_them(tiny: Running) -> None:
    prompt = [3, 1, 4]
    text = Letters().decode(generate(prompt, 30))
    stop = text[6:9]
    where = text.index(stop)
    answer = tiny.post(prompt=prompt, max_tokens=30, stop=["never", stop]).json()
    assert answer["choices"][0]["text"] == text[:where] and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == where + 3
    pieces = []
    with tiny.client.stream("POST", "/v1/completions", json=body(prompt=prompt, max_tokens=30, stop=stop, stream=True)) as stream:
        pieces = [choice["text"] for event in httpx2.EventSource(stream) if event.data != "[DONE]" for choice in event.json()["choices"]]
    assert "".join(pieces) == text[:where]
    tiny.idle()


def test_text_comes_in_whole_characters() -> None:
    text = "é😀 end"
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(token) for token in ByteTokenizer().encode(text)]
    assert pieces[:6] == ["", "é", "", "", "", "😀"] and "".join(pieces) + stream.flush() == text
    cut = TextStream(ByteTokenizer())
    assert cut.push(0xC3) == "" and cut.flush() == "\ufffd"


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(ByteTokenizer(), ["abc"])
    assert [stream.push(ord(letter)) for letter in "xababd"] == ["x", "", "", "ab", "", "abd"]
    assert [stream.push(ord(letter)) for letter in "ab"] == ["", ""] and stream.flush() == "ab"
    stream = TextStream(ByteTokenizer(), ["abc"])
    assert "".join(stream.push(ord(letter)) for letter in "zabcq") == "z" and stream.stopped and stream.flush() == ""


# ---------------------------------------------------------------- what a server must bear


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        (dict(model="other", prompt=[1]), 404, "'tiny' is"),
        (dict(prompt=[1], variant="ALiBi"), 400, "variant: Extra inputs"),
        (dict(prompt=[1], temperature=-1), 400, "temperature: "),
        (dict(prompt=[1], logprobs=3), 400, "logprobs: "),
        (dict(prompt=[]), 400, "at least one token"),
        (dict(prompt=""), 400, "prompt is empty"),
        (dict(prompt=[256]), 400, "from 0 to 255"),
        (dict(prompt=[10**30]), 400, "from 0 to 255"),
        (dict(prompt=[[1], [-1]]), 400, "from 0 to 255"),
        (dict(prompt=[1] * 120), 400, "make 130: at most 128"),
        (dict(prompt=[1], max_tokens=0), 400, "max_tokens: "),
        (dict(prompt=[1] * 20, max_tokens=108, n=12), 400, "170 pages of 8 tokens needed, and the pool has 149"),
        (dict(prompt=[1], n=13), 400, "n 13: from 1 to 12"),
        (dict(prompt=[1] * 9, stop=""), 400, "stop"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(tiny: Running, fields: dict[str, Any], status: int, message: str) -> None:
    answer = tiny.post(**fields)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
    tiny.idle()


def test_bodies_that_are_no_json_or_too_long(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"", b'{"model": "tiny", "prompt": ', b"\xff\xfe", b"[]", b"null"):
        assert tiny.client.post("/v1/completions", content=content).status_code == 400
    monkeypatch.setattr(serve_server, "_MOST_BYTES", 100)
    assert tiny.client.post("/v1/completions", content=b"x" * 101).status_code == 413
    assert tiny.client.get("/v1/completions").status_code == 405
    tiny.idle()


def test_clients_that_go_away_give_their_pages_back(tiny: Running) -> None:
    before = tiny.engine.stats.cancelled_requests
    long = body(prompt=[1] * 20, max_tokens=100, n=3)
    with tiny.client.stream("POST", "/v1/completions", json={**long, "stream": True}) as stream:
        next(iter(httpx2.EventSource(stream)))
        assert tiny.engine.pool.held > 0
    wait(lambda: tiny.engine.stats.cancelled_requests == before + 1)
    with pytest.raises(httpx2.ReadTimeout):
        tiny.client.post("/v1/completions", json=long, timeout=0.02)
    wait(lambda: tiny.engine.stats.cancelled_requests == before + 2)
    tiny.idle()


def test_1000_connections_at_once(tiny: Running) -> None:
    """All are answered: with tokens, or told to come back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    wanted = generate([9, 9], 2)
    refused = tiny.engine.stats.refused_requests

    async def all_at_once() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=tiny.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body(prompt=[9, 9], max_tokens=2)) for _ in range(1000)))

    try:
        answers = asyncio.run(all_at_once())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    codes = Counter(answer.status_code for answer in answers)
    assert set(codes) <= {200, 429} and codes[200] >= 64
    assert all(answer.json()["choices"][0]["token_ids"] == wanted for answer in answers if answer.status_code == 200)
    busy = [answer for answer in answers if answer.status_code == 429]
    assert tiny.engine.stats.refused_requests - refused == len(busy)
    assert all(answer.headers["Retry-After"] == "1" and "try again" in answer.json()["error"]["message"] for answer in busy)
    tiny.idle()


def test_requests_wait_for_pages_and_none_is_lost(expected: list[tuple[list[int], list[int]]]) -> None:
    engine = Engine(model(), backend="sdpa", **{**SIZES, "num_pages": 18, "max_waiting": 32})
    requests, most = [Request(prompt, NEW) for prompt, _ in expected], 0
    found: dict[Request, list[int]] = {request: [] for request in requests}

    def note(outputs: Any, _: float) -> None:
        nonlocal most
        most = max(most, engine.pool.held)
        for who, token in zip(outputs.samples, outputs.tokens.tolist()):
            found[who.request].append(token)

    run(engine, requests, note)
    assert list(found.values()) == [tokens for _, tokens in expected]
    assert 10 < most <= 17 and engine.pool.held == 0
    engine.submit(*(Request([1], 1) for _ in range(32)))
    with pytest.raises(Refused, match="32 requests wait") as refused:
        engine.submit(Request([1], 1))
    assert refused.value.busy


@pytest.mark.parametrize("when", ["prompt", "decode"])
def test_a_step_that_raises_costs_only_the_request_at_fault(
    tiny: Running, expected: list[tuple[list[int], list[int]]], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    poison, launch = [251] * 21, Runner.launch

    def raising(self: Runner, step: Any, timed: bool = False) -> Any:
        slots = step.chunk_slots if when == "prompt" else step.decode_slots
        if any((tiny.engine._tokens[slot, :21] == poison).all() for slot in slots):
            raise RuntimeError("poison")
        return launch(self, step, timed)

    monkeypatch.setattr(Runner, "launch", raising)
    failed = tiny.engine.stats.failed_requests

    async def all_at_once() -> list[Any]:
        async with httpx2.AsyncClient(base_url=tiny.url, timeout=60) as client:
            bad = client.post("/v1/completions", json=body(prompt=poison, n=2))
            return await asyncio.gather(bad, *(ask(client, False, prompt=prompt) for prompt, _ in expected[:9]))

    bad, *good = asyncio.run(all_at_once())
    assert bad.status_code == 500 and "RuntimeError: poison" in bad.json()["error"]["message"]
    assert [answer[0] for answer in good] == [tokens for _, tokens in expected[:9]]
    assert tiny.engine.stats.failed_requests == failed + 1
    tiny.idle()


def test_an_engine_that_is_lost_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as running:
        assert running.client.get("/health").status_code == 200

        def broken(self: Engine) -> None:
            raise RuntimeError("no device")

        monkeypatch.setattr(Engine, "_collect", broken)
        for _ in range(2):  # the one that it happens to, and one that comes later
            answer = running.post(prompt=[1, 2])
            assert answer.status_code == 503 and "no device" in answer.json()["error"]["message"]
        assert running.client.get("/health").status_code == 503


def test_a_server_that_stops_ends_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.02), step(self))[1])  # 120 tokens take a while
    with serving() as running, running.client.stream("POST", "/v1/completions", json=body(prompt=[1], max_tokens=120, stream=True)) as stream:
        events = iter(httpx2.EventSource(stream))
        next(events)
        running.server.worker.close()
        assert any("shutting down" in event.data for event in events)


def test_metrics_and_models(tiny: Running) -> None:
    prompt = list(range(40))
    assert tiny.post(prompt=[prompt, prompt[:30]]).status_code == 200
    assert tiny.post(prompt=prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    tiny.idle()
    text = tiny.client.get("/metrics").text
    samples = {(s.name, *s.labels.values()): s.value for family in text_string_to_metric_families(text) for s in family.samples}
    stats = tiny.engine.stats
    assert samples["attngen_serve_generated_tokens_total",] == stats.generated_tokens > 0
    assert samples["attngen_serve_requests_total", "finished"] == stats.finished_requests
    assert samples["attngen_serve_pages", "held"] == 0
    assert samples["attngen_serve_pages", "idle"] + samples["attngen_serve_pages", "free"] == tiny.engine.pool.capacity
    assert samples["attngen_serve_time_to_first_token_seconds_count",] > 0
    assert [found["id"] for found in tiny.client.get("/v1/models").json()["data"]] == ["tiny"]


# ---------------------------------------------------------------- what is refused when an engine is made


def test_backends_say_what_they_lack() -> None:
    with pytest.raises(BackendError, match="the package flashinfer required"):
        Engine(model(), backend="flashinfer", **SIZES)
    with pytest.raises(BackendError, match="one of attngen, flashinfer, sdpa, flex required"):
        Engine(model(), backend="triton", **SIZES)
    with pytest.raises(BackendError, match="multiple of 128 required, its block; found 8"):
        Engine(model(), backend="flex", **SIZES)
    with pytest.raises(BackendError, match="sdpa has no soft cap, and the model asks for one of 50.0"):
        Engine(model("gemma2", sliding_window=5), backend="sdpa", **SIZES)


def test_models_that_ask_for_more_than_is_served() -> None:
    sinks = dict(num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    with pytest.raises(ModelError, match="GptOssAttention passes s_aux"):
        Engine(load({"model_type": "gpt_oss", **TINY, **sinks}, device="cpu", dtype=torch.float32)[0], backend="sdpa", **SIZES)
    with pytest.raises(ModelError, match="random weights required"):
        load("smollm2", device="cpu", dtype=torch.float32, layers=2)
    with pytest.raises(ModelError, match="that transformers can load required"):
        load({"model_type": "no-such"}, device="cpu", dtype=torch.float32)
    with pytest.raises(ModelError, match="belongs to examples/serve"):
        model()(input_ids=torch.zeros(1, 1, dtype=torch.long))


def test_what_drives_the_engine_in_process_needs_no_web_package() -> None:
    folder = Path(serve_server.__file__).parent
    for name in ("pool", "attention", "sampling", "models", "runner", "engine", "text"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            names = [alias.name for alias in getattr(node, "names", ())] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not {found.split(".")[0] for found in names} & {*WEB, "server", "worker", "metrics"}


def test_cancelling_a_prompts_reader_hands_it_over() -> None:
    engine = Engine(model(), backend="sdpa", **SIZES)
    request = Request(list(range(100)), NEW, n=2)
    engine.submit(request)
    engine.step()
    engine.cancel(request, 0)
    found = []
    while engine.has_work:
        found += [token for outputs in engine.step() for token in outputs.tokens.tolist()]
    assert found == generate(list(range(100))) and engine.pool.held == 0
