"""A small server of language models over attngen: continuous batching, shared prefixes, one plan a step.

    python -m examples.serve smollm2                       # http://127.0.0.1:8000/v1/completions, on the CPU or a GPU

From the bottom up, each file one thing:

    pool.py       pages of the KV cache: holders, prefixes, eviction
    attention.py  the backend, one small class: attngen, FlashInfer, SDPA, FlexAttention
    sampling.py   logits to tokens, on the device
    models.py     transformers' own modules, with their attention handed to a backend
    runner.py     one step on the device: metadata, forward pass, CUDA graphs
    engine.py     which requests take part in a step: admission, chunks, forks, faults
    text.py       tokens to text as they come, stop strings
    worker.py     the engine in a thread, streams of tokens out of it
    metrics.py    what Prometheus reads
    server.py     HTTP

Nothing up to engine.py imports a web package: benchmarks/serving.py drives the engine in process.
"""
