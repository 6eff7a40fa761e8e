"""The pages of a cache: who holds which, and which ones hold tokens that another request may begin with as well.

A page is held by one or more requests, or idle: nobody holds it, but its tokens are known and it waits for a request that begins with them,
until the page is needed, the one that has waited longest first; or it is free. The tokens of a full page are known by a digest of them and
of all tokens before them, so that two requests share just the pages up to where they part.
"""
from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page of `tokens` behind the page named `before` (b"": none). 128 bits: not even on purpose do two sound alike."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class Pages:
    """Pages 0 to count - 1 of `size` tokens. No tensors: what is in them is the caller's."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count))[::-1]
        self._holders = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def available(self) -> int:
        """How many can be taken."""
        return len(self._free) + len(self._idle)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of `names` that is known."""
        found = []
        for name in names:
            page = self._page.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """One more request holds these, which are held or idle."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def take(self) -> int:
        """A page that nobody holds, now held once; what was known of it is forgotten. Raises IndexError where there is none."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page = self._idle.popitem(last=False)[0]
            del self._page[self._name.pop(page)]
        else:
            raise IndexError("Pages: all are held")
        self._holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One request holds these no longer. Its last page is the first to be taken again, since the others can serve without it."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._name:
                self._idle[page] = None
            else:
                self._free.append(page)

    def remember(self, page: int, name: bytes) -> None:
        """A held page has all the tokens of `name`. Nothing happens if another page has them already."""
        if name not in self._page and page not in self._name:
            self._page[name], self._name[page] = page, name
