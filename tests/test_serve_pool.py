"""The page pool of examples/serve, against a model that keeps everything in the open."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from examples.serve.pool import OutOfPages, PagePool

PAGES, SIZE = 13, 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # two tokens: prefixes meet often


class Pool(RuleBasedStateMachine):
    """Sequences are admitted over the prefixes that are known, forked, published and released in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, SIZE)
        self.sequences: list[tuple[list[int], list[int]]] = []  # tokens, pages
        self.known: dict[tuple[int, ...], int] = {}  # prefixes of whole pages that can be found, and their last page

    def forget(self, pages: list[int]) -> None:
        """Pages that were given out anew keep their prefix no more, and what followed it cannot be reached."""
        gone = [prefix for prefix, page in self.known.items() if page in pages]
        self.known = {p: page for p, page in self.known.items() if not any(p[: len(g)] == g for g in gone)}

    def expected(self, tokens: list[int]) -> list[int]:
        found = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if tuple(tokens[:end]) not in self.known:
                break
            found.append(self.known[tuple(tokens[:end])])
        return found

    @rule(tokens=TOKENS)
    def admit(self, tokens: list[int]) -> None:
        found = self.pool.match(np.array(tokens))
        assert found == self.expected(tokens)
        self.pool.share(found)
        missing = -(-len(tokens) // SIZE) - len(found)
        available = self.pool.available
        if missing > available:
            with pytest.raises(OutOfPages):
                self.pool.allocate(missing)
            assert self.pool.available == available
            self.pool.release(found)
            return
        new = self.pool.allocate(missing)
        assert len(set(new)) == missing and 0 not in new
        self.forget(new)
        self.sequences.append((tokens, found + new))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tokens, pages = data.draw(st.sampled_from(self.sequences))
        whole = len(tokens) // SIZE
        if len(pages) - whole > self.pool.available:
            return
        self.pool.share(pages[:whole])
        new = self.pool.allocate(len(pages) - whole)
        self.forget(new)
        self.sequences.append((tokens, pages[:whole] + new))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        tokens, pages = data.draw(st.sampled_from(self.sequences))
        self.pool.publish(np.array(tokens), pages)
        for end, page in zip(range(SIZE, len(tokens) + 1, SIZE), pages):
            self.known.setdefault(tuple(tokens[:end]), page)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(at)[1])

    @invariant()
    def every_page_is_somewhere(self) -> None:
        holders = Counter(page for _, pages in self.sequences for page in pages)
        assert [self.pool.holders(page) for page in range(PAGES)] == [holders[page] for page in range(PAGES)]
        assert self.pool.held == len(holders)
        assert self.pool.available == PAGES - 1 - len(holders)
        assert len(self.known) <= self.pool.held + self.pool.idle

    def teardown(self) -> None:
        for _, pages in self.sequences:
            self.pool.release(pages)
        assert self.pool.held == 0
        assert sorted(self.pool.allocate(PAGES - 1)) == list(range(1, PAGES))


QUICK = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase
TestPool.settings = QUICK


def test_the_model_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that takes any page for any other, as far as their tokens go, is caught."""
    monkeypatch.setattr(PagePool, "_blocks", lambda self, tokens: (b"same" for _ in range(len(tokens) // self.page_size)))
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Pool, settings=settings(QUICK, phases=[Phase.generate], database=None))


def test_misuse_raises() -> None:
    pool = PagePool(5, SIZE)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(ValueError, match="no holder"):
        pool.release(pages[:1])
    with pytest.raises(ValueError, match="is free"):
        pool.share(pages[:1])
    with pytest.raises(ValueError, match="not held"):
        pool.publish(np.array([1, 2]), pages[:1])


def test_the_end_of_a_prefix_is_reused_before_its_beginning() -> None:
    pool = PagePool(4, SIZE)
    tokens = np.arange(6)
    pages = pool.allocate(3)
    pool.publish(tokens, pages)
    pool.release(pages)
    assert pool.idle == 3
    assert pool.allocate(1) == pages[2:]
    assert pool.match(tokens) == pages[:2]


def test_a_page_whose_prefix_was_anothers_is_found_again() -> None:
    pool = PagePool(7, SIZE)
    first, second = pool.allocate(1), pool.allocate(2)
    tokens = np.arange(4)
    pool.publish(tokens[:2], first)
    pool.publish(tokens, second)  # its first page is not needed: the tree has one; its second hangs on that
    assert pool.match(tokens) == [first[0], second[1]]
    pool.release(first)
    taken = pool.allocate(4)  # takes the idle one too
    assert first[0] in taken and pool.match(tokens) == []
    pool.publish(tokens, second)
    assert pool.match(tokens) == second
