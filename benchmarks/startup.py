"""What a server's start costs: a pack, a new process without a compiler, every kernel loaded, the first batch computed.

    attngen precompile benchmarks/startup.toml                                   anywhere with nvcc, no GPU needed
    attngen cache export benchmarks/startup.toml -o startup.attnpack
    python benchmarks/startup.py --pack startup.attnpack                         on the GPU machine, half a minute

Without --pack it builds the set for this machine's CPU first. Each line is the median of fresh processes: PATH is empty,
ATTNGEN_JIT=off, the cache holds no kernel; time counts from after `import torch` and the CUDA context.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import json, shutil, sys, time
import torch
cuda = torch.cuda.is_available() and sys.argv[2] == "cuda"
device = "cuda" if cuda else "cpu"
dtype = torch.bfloat16 if cuda else torch.float32
torch.zeros(1, device=device).item()
assert shutil.which("nvcc") is None and shutil.which("g++") is None
t0 = time.perf_counter()
import attngen as ag
from attngen.variants import Gemma2
t1 = time.perf_counter()
loaded = ag.load_set(sys.argv[1], jit=False, device=device)
t2 = time.perf_counter()
attn = ag.BatchAttention(Gemma2(), num_heads=8, num_kv_heads=2, head_dim=128, page_size=16, dtype=dtype, max_requests=4,
                         max_q_tokens=256, max_pages=64, device=device)
q = torch.randn(37, 8, 128, dtype=dtype, device=device)
cache = torch.randn(64, 2, 16, 2, 128, dtype=dtype, device=device)
table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
indptr = torch.tensor([0, 36, 37], dtype=torch.int32, device=device)
lens = torch.tensor([60, 64], dtype=torch.int32, device=device)
t3 = time.perf_counter()
attn.plan(indptr, block_table=table, kv_lens=lens)
out = attn.run(q, cache)
if cuda:
    torch.cuda.synchronize()
t4 = time.perf_counter()
attn.check() if hasattr(attn, "check") else None
for i, (start, end, length) in enumerate(((0, 36, 60), (36, 37, 64))):
    k, v = (cache[table[i].long(), j].flatten(0, 1)[None, :length].float().cpu() for j in (0, 1))
    expected = ag.reference(q[None, start:end].float().cpu(), k, v, Gemma2())[0].to(out.device)
    assert (out[start:end].float() - expected).abs().max() < (2e-2 if cuda else 1e-4), "wrong result"
warm = ag.warmup(loaded)
stats = ag.stats()
assert stats["builds"] == 0, stats
names = []
if cuda:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attn.plan(indptr, block_table=table, kv_lens=lens)
        attn.run(q, cache)
        torch.cuda.synchronize()
    names = sorted({e.key for e in profile.key_averages() if "attngen" in e.key})
rows = loaded.kernels
print(json.dumps(dict(
    kernels=len(rows), device=torch.cuda.get_device_name() if cuda else "CPU", import_ms=1e3 * (t1 - t0), load_set_ms=1e3 * (t2 - t1),
    host_ms=loaded.host_ms, first_ms=1e3 * (t4 - t3), object_ms=1e3 * (t3 - t2), find_ms=sum(r.find_ms for r in rows) / len(rows),
    load_ms=sum(r.load_ms for r in rows) / len(rows), worst_load_ms=max(r.load_ms for r in rows), warmup_ms=warm,
    total_ms=1e3 * (t4 - t0), layers=loaded.layers(), names=names)))
"""


def child(pack: Path, cache: Path, device: str) -> dict:
    """One start, in a fresh process without a compiler."""
    env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "HOME", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    env |= {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "ATTNGEN_CACHE_DIR": str(cache), "ATTNGEN_JIT": "off"}
    done = subprocess.run([sys.executable, "-c", CHILD, str(pack), device], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="as attngen cache export wrote it")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        os.environ["ATTNGEN_CACHE_DIR"] = str(cache)
        sys.path.insert(0, str(ROOT))
        import torch
        from attngen.load import host

        host()  # a bare checkout builds its extension now; an installed package brings it
        pack, device = args.pack, "cuda" if torch.cuda.is_available() else "cpu"
        if pack is None:
            pack, device = Path(folder) / "startup.attnpack", "cpu"
            text = (ROOT / "benchmarks" / "startup.toml").read_text().replace('"9.0a"', '"cpu"')
            (Path(folder) / "startup.toml").write_text(text)
            attngen = [sys.executable, "-m", "attngen"]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "ATTNGEN_CACHE_DIR": str(Path(folder) / "built")}
            subprocess.run([*attngen, "precompile", f"{folder}/startup.toml"], env=env, check=True)
            subprocess.run([*attngen, "cache", "export", f"{folder}/startup.toml", "-o", pack], env=env, check=True)
        runs = [child(pack.resolve(), cache, device) for _ in range(args.runs)]
        first = runs[0]
        middle = {name: statistics.median(r[name] for r in runs) for name in first if name.endswith("_ms")}
        print(f"{first['device']}: {first['kernels']} kernels, {first['layers']}, median of {args.runs} fresh processes without compiler")
        print(f"import attngen {middle['import_ms']:.1f} ms | load_set {middle['load_set_ms']:.1f} ms (host extension "
              f"{middle['host_ms']:.1f}; a kernel: find {middle['find_ms']:.2f}, load {middle['load_ms']:.2f}, worst "
              f"{middle['worst_load_ms']:.2f}) | BatchAttention {middle['object_ms']:.1f} ms | first plan and run "
              f"{middle['first_ms']:.1f} ms | all {middle['total_ms']:.1f} ms | bar 100 ms "
              f"{'met' if middle['total_ms'] <= 100 else 'MISSED'}")  # fmt: skip
        print(f"warm-up of everything {middle['warmup_ms']:.0f} ms")
        for name in first["names"]:
            print(f"profilers show {name}")


if __name__ == "__main__":
    main()
