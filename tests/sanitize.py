"""compute-sanitizer over a small set of calls: out-of-bounds and misaligned accesses, races in shared memory, reads of what
nobody wrote, barriers that not all threads reach.

    python tests/sanitize.py          needs a GPU and compute-sanitizer; exit status 1 if a tool reports anything
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def cases() -> None:
    """The calls. Tensors come from the host, by copies that initcheck sees."""
    import torch
    from batches import Batch, judge, make, split_params

    import attngen as ag
    from attngen import variants
    from attngen.variants import example_params

    mixed = ([1, 70, 0, 5, 150], [300, 90, 40, 5, 0])
    for variant, lens, options, more in (
        (variants.Causal(), ([1, 1, 1], [700, 1, 65]), dict(page_size=16, d=128), {}),
        (variants.Gemma2(), mixed, dict(page_size=3, layout="HND", d=64), {}),
        (variants.GptOss(), mixed, dict(page_size=16, d=64, heads=10), {}),
        (variants.StreamingLLM(), mixed, dict(page_size=5, d=128), {}),
        (variants.Sigmoid(), mixed, dict(page_size=16, d=192, dv=128), {}),
        (variants.Causal(), ([1, 33], [5000, 4100]), dict(page_size=16, d=64), dict(batch_invariant=True, max_kv_len=8192)),
        (variants.Causal(), ([8, 5, 1], [700, 65, 3000]), dict(page_size=16, d=128), dict(max_q_len=8)),
        (variants.Llama3RoPE(), ([8, 5, 1], [700, 65, 3000]), dict(page_size=5, d=64), dict(max_q_len=8)),
    ):
        batch = Batch(*lens, device="cuda", **options)
        params = example_params(type(variant), **batch.sizes())
        attn = make(variant, batch, max_requests=8, max_q_tokens=256, max_pages=2048, **more)
        to_plan, to_run = split_params(variant, params, "cuda")
        attn.plan(*batch.pages(), **to_plan)
        out = attn.run(batch.q, (batch.k, batch.v), **to_run)
        attn.check()
        judge(out, None, batch, variant, **params)
    q, k, v = (torch.randn(2, n, h, 64).bfloat16().cuda() for n, h in ((40, 4), (100, 2), (100, 2)))
    ag.attention(q, k, v, variants.Causal(), kv_lens=[100, 17], q_lens=[40, 3])
    cache = torch.zeros(8, 2, 16, 2, 64).bfloat16().cuda()
    slots = torch.tensor([3, -1, 127, 40]).cuda()
    ag.append_kv(k[0, :4], v[0, :4], cache, slot_mapping=slots)
    states = [torch.randn(5, 4, 64).cuda() for _ in range(3)], [torch.randn(5, 4).cuda() for _ in range(3)]
    ag.merge_states(*states)
    torch.cuda.synchronize()


def main() -> int:
    if sys.argv[1:] == ["cases"]:
        cases()
        return 0
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    # Each tensor in an allocation of its own: what is past its end is nobody's.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, str(here), "cases"], env=env, check=True)  # builds the kernels
    failed = []
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, str(here), "cases"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        print(f"{tool}: {'clean' if done.returncode == 0 else 'FAILED'}. {lines[-1] if lines else done.stderr[-300:]}", flush=True)
        if done.returncode:
            failed.append(tool)
            print("\n".join(lines[:60]), done.stderr[-2000:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
