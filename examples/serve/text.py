"""Tokens to text as they come, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"  # what decoders give for bytes that are no character yet


class Tokenizer(Protocol):
    """What is used of transformers' tokenizers."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class ByteTokenizer:
    """Each byte of UTF-8 a token, for models with random weights."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


class TextStream:
    """The text of one sequence. What was given out is never taken back: a character that may still be incomplete is held
    back, and so is the beginning of what may become a stop string.

    stopped: whether a stop string was found. The text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens from _start give context to those from _read, whose text is not known yet
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token adds, as far as it is sure."""
        self._ids.append(token)
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if text.endswith(_BROKEN) or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._give(text[len(known) :])

    def flush(self) -> str:
        """The rest, when no token follows."""
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        self._start = self._read = len(self._ids)
        text = self._give(text[len(known) :])
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _give(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        tails = (text[-length:] for length in range(min(longest, len(text)), 0, -1))
        self._held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
        return text[: len(text) - len(self._held)]
