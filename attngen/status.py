"""The status words: what a kernel found wrong with a batch's lengths or pages, in which request, and the number that shows it.

Two int32. The first holds what (bits 0-7) and the request's number, for append_kv the token's; the first error wins. The second
holds what was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from .errors import ParameterError

STATUS_WORDS = 2


class Wrong(IntEnum):
    """What is wrong, as in work.cuh."""

    NEGATIVE_Q = 1
    DECREASING_Q = 2
    LONG_BATCH = 3
    LONG_QUERY = 4
    NEGATIVE_KV = 5
    DECREASING_KV = 6
    NEGATIVE_KV_LEN = 7
    BAD_PAGE = 8
    LAST_PAGE_LEN = 9
    KV_START = 10
    PAST_TABLE = 11
    LONG_KEYS = 12
    OVERLAPPING_Q = 13
    BAD_PAGES = 14  # append_kv alone, as the next two
    LONG_POSITION = 15
    BAD_REQUEST = 16
    SHORT_Q = 32
    SHORT_KV = 64
    SHORT_MASK = 128  # custom_mask alone


_OF_BATCH: Mapping[int, str] = {
    Wrong.NEGATIVE_Q: "q_indptr[{i}] is {found}: required 0 or more",
    Wrong.DECREASING_Q: "q_indptr[{next}] is {found}, less than the entry before it: required none that decreases",
    Wrong.LONG_BATCH: "q_indptr[{next}] is {found}: required at most max_q_tokens={max_q_tokens}, given at construction",
    Wrong.LONG_QUERY: "{found} query tokens: required at most max_q_len, given to plan or at construction ({max_q_len})",
    Wrong.NEGATIVE_KV: "kv_indptr[{i}] is {found}: required 0 or more",
    Wrong.DECREASING_KV: "kv_indptr[{next}] is {found}, less than the entry before it: required none that decreases",
    Wrong.NEGATIVE_KV_LEN: "kv_lens[{i}] is {found}: required 0 or more",
    Wrong.LAST_PAGE_LEN: "kv_last_page_len[{i}] is {found}: required 1 to page_size={page_size}",
    Wrong.KV_START: "kv_start[{i}] is {found}: required 0 or more, and below 2**31 with the request's keys added",
    Wrong.PAST_TABLE: "its {end} at {found}: required within {room}",
    Wrong.LONG_KEYS: "{found} keys: required at most max_kv_len={max_kv_len}, given at construction",
    Wrong.OVERLAPPING_Q: "no room for its work, because the query rows of several requests overlap: required q_indptr that increases",
    Wrong.BAD_PAGE: "page {found}: required below the cache's number of pages; negative ones may stand where no row attends",
    Wrong.SHORT_Q: "q has {found} rows: required as many as q_indptr counts",
    Wrong.SHORT_KV: "k and v have {found} rows: required as many as kv_indptr counts",
}  # fmt: skip
_OF_TOKEN: Mapping[int, str] = {
    Wrong.BAD_PAGES: "kv_indptr decreases, is negative or runs past kv_indices at its request {found}",
    Wrong.LONG_POSITION: "its position {found} is past the pages of its request, or 2^30 or more",
    Wrong.BAD_PAGE: "its page or slot {found} is past the end of the cache",
    Wrong.BAD_REQUEST: "its request {found} is past the last one",
}


class Status(NamedTuple):
    """What was found; false if all is well."""

    what: int = 0
    index: int = 0  # of the request or token
    found: int = 0

    def __bool__(self) -> bool:
        return self.what != 0

    @property
    def words(self) -> tuple[int, int]:
        """As a kernel writes it."""
        return self.what | self.index << 8, self.found

    @staticmethod
    def of(words: Sequence[int]) -> Status:
        """As a kernel has written it."""
        first, found = words
        return Status(first & 0xFF, first >> 8 & 0xFFFFFF, found)

    @property
    def _of_another_release(self) -> str:
        return f"status {self.what}, {{found}}"  # a pack's kernel may know causes that this release has no text for

    def raise_for_batch(self, **facts: object) -> None:
        """A ParameterError that names the request; ``facts``: the limits that were not kept."""
        text = _OF_BATCH.get(self.what, self._of_another_release)
        raise ParameterError(f"request {self.index}: " + text.format(i=self.index, next=self.index + 1, found=self.found, **facts))

    def raise_for_token(self) -> None:
        """A ParameterError that names append_kv's token."""
        text = _OF_TOKEN.get(self.what, self._of_another_release)
        raise ParameterError(f"append_kv, token {self.index}: {text.format(found=self.found)}")
