"""Pages of a KV cache: who holds each one, and which prefix it keeps.

A page is free, held (by one sequence or many), or idle: held by nobody, but still the keys and values of a known prefix,
until somebody needs the room. Full pages are found again by the tokens in them and in all pages before them: the pages
form a radix tree, in a dict of (node of the page before, this page's tokens). Tokens are compared, not hashes of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

_ROOT = 0


class OutOfPages(RuntimeError):
    """Fewer pages are left than were asked for. Nothing was allocated."""


class PagePool:
    """Pages 1 to num_pages - 1, reference-counted. Page 0 is nobody's: rows of padding write there.

    Args:
        num_pages: pages of the cache, page 0 included.
        page_size: tokens of a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"num_pages {num_pages}, page_size {page_size}: required at least 2 pages of at least 1 token")
        self.num_pages, self.page_size = num_pages, page_size
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: low numbers first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._tree: dict[tuple[int, bytes], tuple[int, int]] = {}  # (parent node, tokens) -> (node, page)
        self._key_of: dict[int, tuple[int, bytes]] = {}  # of each page in the tree
        self._nodes = _ROOT

    @property
    def capacity(self) -> int:
        """Pages that can be held at all."""
        return self.num_pages - 1

    @property
    def available(self) -> int:
        """Pages that `allocate` can give now: free ones, and idle ones whose prefix it forgets."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return self.capacity - self.available

    @property
    def idle(self) -> int:
        """Pages that nobody holds and whose prefix can still be found."""
        return len(self._idle)

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int]:
        """New pages, held once. Raises OutOfPages, and then takes none."""
        if count > self.available:
            raise OutOfPages(f"{count} pages required, {self.available} of {self.capacity} available")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._tree[self._key_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each page, held or idle."""
        for page in pages:
            if self._holders[page] == 0:
                if page not in self._idle:
                    raise ValueError(f"page {page} is free: required one that is held, or that match found")
                del self._idle[page]
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page. Of a sequence's pages the last one becomes the first to be reused, since the
        prefix that ends before it is of use without it."""
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise ValueError(f"page {page} has no holder: it was released before")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match(self, tokens: np.ndarray) -> list[int]:
        """The pages of the longest known prefix of int32 tokens [n], whole pages only. `share` them before `allocate`."""
        node, pages = _ROOT, []
        for block in self._blocks(tokens):
            found = self._tree.get((node, block))
            if found is None:
                break
            node, page = found
            pages.append(page)
        return pages

    def publish(self, tokens: np.ndarray, pages: Sequence[int]) -> None:
        """Let `match` find the held pages of int32 tokens [n], as far as they are full. Where the tree has another page for
        the same prefix, that one stays."""
        node = _ROOT
        for block, page in zip(self._blocks(tokens), pages):
            key = (node, block)
            found = self._tree.get(key)
            if found is None:
                self._register(page, key)
                found = self._tree[key]
            node = found[0]

    def _register(self, page: int, key: tuple[int, bytes]) -> None:
        before = self._key_of.get(page)
        if self._holders[page] == 0 or before is not None and before[1] != key[1]:
            raise ValueError(f"page {page} is not held, or keeps other tokens: it cannot be published for these")
        if before is not None:  # its prefix was another's page, which is gone: nobody could find this one any more
            del self._tree[before]
        self._nodes += 1
        self._tree[key] = self._nodes, page
        self._key_of[page] = key

    def _blocks(self, tokens: np.ndarray) -> Iterable[bytes]:
        size = self.page_size
        whole = np.ascontiguousarray(tokens, dtype=np.int32)
        return (whole[at : at + size].tobytes() for at in range(0, len(whole) - size + 1, size))
