"""python -m examples.serve MODEL: serve a model over HTTP."""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported: no progress bars beside ours

import json
import logging
import resource
from typing import Annotated

import torch
import typer
import uvicorn
from rich.console import Console

from .attention import BACKENDS, BackendError
from .engine import Engine
from .models import ModelError, load
from .sampling import GREEDY, SAMPLE, TOP_P
from .server import Server
from .text import ByteTokenizer

console = Console(stderr=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(
    model: Annotated[str, typer.Argument(help='"smollm2", a name or folder that transformers knows, or a configuration as JSON')] = "smollm2",
    host: str = "127.0.0.1",
    port: int = 8000,
    device: Annotated[str | None, typer.Option(help="default: the GPU, or the CPU where there is none")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default bfloat16 on a GPU, float32 on the CPU")] = None,
    random_weights: Annotated[bool, typer.Option("--random", help="random weights in place of the model's")] = False,
    backend: Annotated[str, typer.Option(help=f"attention: {', '.join(BACKENDS)}")] = "attngen",
    page_size: Annotated[int | None, typer.Option(help="tokens of a page; default 16, for flex 128")] = None,
    pages: Annotated[int | None, typer.Option(help="pages of the KV cache; default: half of what all slots at full length need")] = None,
    slots: Annotated[int, typer.Option(help="sequences that run at once")] = 64,
    waiting: Annotated[int, typer.Option(help="requests that may wait; more get 429")] = 256,
    max_len: Annotated[int | None, typer.Option(help="tokens of a sequence; default 4096, or the model's limit")] = None,
    chunk: Annotated[int, typer.Option(help="tokens of prompts in a step")] = 512,
) -> None:
    """Serve a model: /v1/completions, /v1/models, /health, /metrics."""
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("bfloat16" if on.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: one of {', '.join(DTYPES)} required")
    source = json.loads(model) if model.startswith("{") else model
    name = model if isinstance(source, str) else source.get("model_type", "random")
    try:
        with console.status(f"loading {name}"):
            loaded, tokenizer = load(source, device=on, dtype=DTYPES[dtype], random=random_weights)
        with console.status(f"starting {backend}: kernels and cache"):
            engine = Engine(
                loaded, backend=backend, page_size=page_size or (128 if backend == "flex" else 16), num_pages=pages, max_slots=slots,
                max_waiting=waiting, max_len=max_len or 4096, max_chunk=chunk,
            )  # fmt: skip
            engine.runner.warm_up((GREEDY, SAMPLE, TOP_P))
    except (BackendError, ModelError) as error:
        console.print(f"[red]serve:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file a connection
    cache = engine.runner.cache
    console.print(
        f"{name} on {on} in {dtype}, attention by {backend}; {engine.pool.capacity} pages of {engine.page_size} tokens, "
        f"{cache.nbytes / 2**30:.2f} GiB; http://{host}:{port}/v1/completions", highlight=False,
    )  # fmt: skip
    logging.basicConfig(level=logging.WARNING)
    server = Server(engine, tokenizer or ByteTokenizer(), name)
    uvicorn.run(server.app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
