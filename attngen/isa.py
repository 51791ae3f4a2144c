"""Instruction sets of CPUs: which there are, which this host has."""

from __future__ import annotations

import functools
import platform

CPU_ISAS = ("avx512_bf16", "avx512", "avx2", "generic")  # best first
_ISA_NEEDS = {  # as /proc/cpuinfo names them
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c", "avx2", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c", "avx2"},
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set(),
}


@functools.cache
def host_isa() -> str:
    """The best instruction set in CPU_ISAS that this host runs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "generic"
    found: set[str] = set()
    try:
        with open("/proc/cpuinfo") as lines:  # no further than the first core: a big host takes milliseconds for all
            for line in lines:
                if line.startswith("flags"):
                    found = set(line.partition(":")[2].split())
                    break
    except OSError:
        return "generic"
    return next(isa for isa in CPU_ISAS if _ISA_NEEDS[isa] <= found)
