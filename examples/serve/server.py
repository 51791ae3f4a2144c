"""HTTP: OpenAI's /v1/completions over the engine, with server-sent events; /v1/models, /health, /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .engine import Engine, EngineLost, Refused, Request
from .metrics import Metrics
from .text import TextStream, Tokenizer
from .worker import Cancelled, Stream, Worker

_MOST_BYTES = 16 << 20  # of a body

_Stop = Annotated[str, StringConstraints(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CompletionBody(BaseModel):
    """OpenAI's fields, and two more. Fields of its that mean something here and are not served take their default alone."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool = False  # go on to max_tokens
    return_token_ids: bool = False  # beside each choice's text
    best_of: Literal[1] | None = None
    echo: Literal[False] = False
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: None = None
    logprobs: None = None
    suffix: None = None


class HttpError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 429 else "overloaded_error" if self.status in (429, 503) else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse(self.body(), self.status, headers)


class _Completion:
    """One call of /v1/completions."""

    def __init__(self, body: CompletionBody, stream: Stream, tokenizer: Tokenizer | None) -> None:
        self.body, self.stream = body, stream
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self._texts = [TextStream(tokenizer, stops) if tokenizer else None for _ in range(stream.choices)]
        self._generated = 0
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": body.model}

    async def parts(self) -> AsyncIterator[tuple[int, str, int, str | None]]:
        """(choice, text, token, why it ended) for each token, until all choices are over."""
        left = self.stream.choices
        while left:
            choice, token, reason = await self.stream.next()
            self._generated += 1
            text, out = self._texts[choice], ""
            if text is not None:
                out = text.push(token) if reason != "stop" else ""  # an end token is no text
                if reason:
                    out += text.flush()
                if text.stopped:
                    self.stream.stop(choice)
                    reason = "stop"
            left -= reason is not None
            yield choice, out, token, reason

    async def whole(self) -> dict[str, Any]:
        choices = [{"index": i, "text": "", "logprobs": None, "finish_reason": None, "token_ids": []} for i in range(self.stream.choices)]
        async for choice, text, token, reason in self.parts():
            choices[choice]["text"] += text
            choices[choice]["token_ids"].append(token)
            choices[choice]["finish_reason"] = reason
        if not self.body.return_token_ids:
            for choice in choices:
                del choice["token_ids"]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self, first: tuple[int, str, int, str | None], rest: AsyncIterator[tuple[int, str, int, str | None]]) -> AsyncIterator[str]:
        try:
            part = first
            while True:
                index, text, token, reason = part
                choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
                if self.body.return_token_ids:
                    choice["token_ids"] = [token]
                yield _event({**self._head, "choices": [choice]})
                try:
                    part = await anext(rest)
                except StopAsyncIteration:
                    break
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _event({**self._head, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except Cancelled:
            return
        except Exception as error:
            yield _event(_as_http(error).body())
        finally:
            self.stream.cancel()

    def _usage(self) -> dict[str, Any]:
        prompt, cached = (sum(values) for values in zip(*((len(r.prompt), r.cached_tokens) for r in self.stream.requests)))
        return {
            "prompt_tokens": prompt, "completion_tokens": self._generated, "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip


class Server:
    """The application of one engine.

    Args:
        engine: not stepped by anybody else from now on.
        tokenizer: None: prompts are token ids, answers too (return_token_ids).
        name: of the model, as requests must give it.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, name: str) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.metrics = Metrics(engine)
        self.worker = Worker(engine, self.metrics.observe)
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            lifespan=self._lifespan,
            exception_handlers={HttpError: lambda _, error: error.response()},
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.worker.start_in(asyncio.get_running_loop())
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "attngen"}]})

    async def _health(self, _: HttpRequest) -> Response:
        lost = self.worker.lost
        return JSONResponse({"status": "ok" if lost is None else str(lost)}, 200 if lost is None else 503)

    async def _metrics(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def _completions(self, http: HttpRequest) -> Response:
        body = await self._body(http)
        requests = [self._request(body, ids) for ids in self._prompts(body)]
        try:
            stream = self.worker.submit(requests)
        except (Refused, EngineLost) as error:
            raise _as_http(error) from error
        watch = asyncio.create_task(_when_gone(http, stream))
        completion = _Completion(body, stream, self.tokenizer)
        try:
            if not body.stream:
                return JSONResponse(await completion.whole())
            parts = completion.parts()
            first = await anext(parts)  # what fails before the first token still has a status of its own
            answer = StreamingResponse(_then(completion.events(first, parts), watch.cancel), media_type="text/event-stream")
            watch = None
            return answer
        except Cancelled:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            raise _as_http(error) from error
        finally:
            if watch is not None:
                watch.cancel()
                stream.cancel()

    async def _body(self, http: HttpRequest) -> CompletionBody:
        raw = bytearray()
        try:
            async for part in http.stream():
                raw += part
                if len(raw) > _MOST_BYTES:
                    raise HttpError(413, f"a body of more than {_MOST_BYTES >> 20} MiB: send a shorter prompt")
        except ClientDisconnect as gone:
            raise HttpError(400, "the client went away within its request") from gone
        try:
            body = CompletionBody.model_validate_json(bytes(raw))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise HttpError(400, f"{where}: {first['msg']}" if where else first["msg"]) from error
        if body.model != self.name:
            raise HttpError(404, f"model {body.model!r} is not served here: {self.name!r} is", "model_not_found")
        if body.stop and self.tokenizer is None:
            raise HttpError(400, "stop: a tokenizer required, and this model has none")
        return body

    def _prompts(self, body: CompletionBody) -> list[list[int]]:
        prompt = body.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]  # type: ignore[assignment]
        if not prompt:
            raise HttpError(400, "prompt: text, or at least one token, required")
        if isinstance(prompt[0], str):
            if self.tokenizer is None:
                raise HttpError(400, "prompt: token ids required, since this model has no tokenizer")
            return [self.tokenizer.encode(text) for text in prompt]  # type: ignore[arg-type]
        return prompt  # type: ignore[return-value]

    def _request(self, body: CompletionBody, ids: list[int]) -> Request:
        if ids and not (0 <= min(ids) and max(ids) < self.engine.vocab_size):
            raise HttpError(400, f"prompt: tokens from 0 to {self.engine.vocab_size - 1} required, found {min(ids)} to {max(ids)}")
        return Request(
            np.array(ids, np.int32), body.max_tokens, n=body.n, temperature=body.temperature, top_p=body.top_p, seed=body.seed,
            ignore_eos=body.ignore_eos,
        )  # fmt: skip


def _as_http(error: Exception) -> HttpError:
    if isinstance(error, HttpError):
        return error
    if isinstance(error, Refused):
        return HttpError(429 if error.busy else 400, str(error), "overloaded" if error.busy else None)
    if isinstance(error, EngineLost):
        return HttpError(503, str(error))
    return HttpError(500, f"the model failed on this request: {type(error).__name__}: {error}")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _when_gone(http: HttpRequest, stream: Stream) -> None:
    """Give pages back when nobody listens any more."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


async def _then(events: AsyncIterator[str], call: Any) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    finally:
        call()
        await events.aclose()  # type: ignore[attr-defined]
