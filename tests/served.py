"""What an engine of examples/serve generates."""

from __future__ import annotations

from examples.serve.engine import Engine, Outputs, Request, run


def tokens_of(engine: Engine, requests: list[Request]) -> list[list[list[int]]]:
    """New tokens by request and sample."""
    found = {request: [[] for _ in range(request.n)] for request in requests}

    def note(outputs: Outputs, _: float) -> None:
        for who, token in zip(outputs.samples, outputs.tokens.tolist()):
            found[who.request][who.index].append(token)

    run(engine, requests, note)
    return list(found.values())
