"""What a server's start costs: a pack, a new process without a compiler, every kernel loaded, the first batch computed.

    attngen precompile benchmarks/startup.toml                                   anywhere with nvcc, no GPU needed
    attngen cache export benchmarks/startup.toml -o startup.attnpack
    python benchmarks/startup.py --pack startup.attnpack                         on the GPU machine, half a minute

startup.toml is what "5 variants, prefill and decode, 5 head dims" takes to be served, startup50.toml is 50 kernels by count.
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
import collections, json, shutil, sys, time
import torch
cuda = torch.cuda.is_available() and sys.argv[2] == "cuda"
device = "cuda" if cuda else "cpu"
dtype = torch.bfloat16 if cuda else torch.float32
torch.zeros(1, device=device).item()
assert shutil.which("nvcc") is None and shutil.which("g++") is None
t0 = time.perf_counter()
import attngen as ag
t1 = time.perf_counter()
from attngen.variants import Gemma2
t2 = time.perf_counter()
ag.load_set
t3 = time.perf_counter()
loaded = ag.load_set(sys.argv[1], jit=False, device=device)
t4 = time.perf_counter()
ag.BatchAttention
t5 = time.perf_counter()
attn = ag.BatchAttention(Gemma2(), num_heads=8, num_kv_heads=2, head_dim=128, page_size=16, dtype=dtype, max_requests=4,
                         max_q_tokens=256, max_pages=64, device=device)
t6 = time.perf_counter()
q = torch.randn(37, 8, 128, dtype=dtype, device=device)
cache = torch.randn(64, 2, 16, 2, 128, dtype=dtype, device=device)
table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
indptr = torch.tensor([0, 36, 37], dtype=torch.int32, device=device)
lens = torch.tensor([60, 64], dtype=torch.int32, device=device)
t7 = time.perf_counter()
attn.plan(indptr, block_table=table, kv_lens=lens)
out = attn.run(q, cache)
if cuda:
    torch.cuda.synchronize()
t8 = time.perf_counter()
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
rows, phases = loaded.kernels, collections.Counter(row.name.partition("_")[0] for row in loaded.kernels)
ms = dict(
    import_attngen=t1 - t0, import_variants=t2 - t1, import_load_set=t3 - t2, load_set=t4 - t3, import_batch=t5 - t4, object=t6 - t5,
    first=t8 - t7, all=(t6 - t0) + (t8 - t7),  # without the tensors that the batch is made of
)
ms = {name: 1e3 * seconds for name, seconds in ms.items()}
ms |= dict(read=loaded.read_ms, host=loaded.host_ms, find=sum(r.find_ms for r in rows), load=sum(r.load_ms for r in rows),
           worst=max(r.find_ms + r.load_ms for r in rows), warmup=warm)
print(json.dumps(dict(kernels=len(rows), phases=phases, device=torch.cuda.get_device_name() if cuda else "CPU", ms=ms,
                      layers=loaded.layers(), names=names)))
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
        child(pack.resolve(), cache, device)  # writes what Python compiles attngen to, as pip does
        runs = [child(pack.resolve(), cache, device) for _ in range(args.runs)]
        first = runs[0]
        m = {name: statistics.median(r["ms"][name] for r in runs) for name in first["ms"]}
        count = first["kernels"]
        kinds = ", ".join(f"{n} {name}" for name, n in first["phases"].items())
        print(f"{first['device']}: {count} kernels ({kinds}), {first['layers']}, median of {args.runs} fresh processes without compiler")
        print(f"import attngen {m['import_attngen']:.1f} ms, its variants {m['import_variants']:.1f}, load_set's modules "
              f"{m['import_load_set']:.1f}, BatchAttention's {m['import_batch']:.1f}")  # fmt: skip
        rest = m["load_set"] - m["read"] - m["host"] - m["find"] - m["load"]
        print(f"load_set {m['load_set']:.1f} ms: read the pack's index {m['read']:.1f}, host extension {m['host']:.1f}, find and hash "
              f"{m['find']:.1f} ({m['find'] / count:.2f} a kernel), load {m['load']:.1f} ({m['load'] / count:.2f} a kernel; worst, found "
              f"and loaded, {m['worst']:.2f}), engine's modules and the rest {rest:.1f}")  # fmt: skip
        print(f"BatchAttention {m['object']:.1f} ms | first plan and run {m['first']:.1f} ms | all {m['all']:.1f} ms | bar 100 ms "
              f"{'met' if m['all'] <= 100 else 'MISSED'}; a kernel {(m['find'] + m['load']) / count:.2f} ms | bar 1 ms "
              f"{'met' if m['find'] + m['load'] <= count else 'MISSED'}")  # fmt: skip
        print(f"warm-up of everything {m['warmup']:.0f} ms")
        for name in first["names"]:
            print(f"profilers show {name}")


if __name__ == "__main__":
    main()
