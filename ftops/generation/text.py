"""Text of a row as its tokens come, and whether it holds a string to stop at."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Text:
    """`add` tokens one by one. A token is decoded behind those before it, since what it says, a space or half a character, hangs on them.

    tokenizer: what has decode(tokens, skip_special_tokens=...).
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._decode, self._stop, self._latest = tokenizer.decode, stop, ""
        self._tokens: list[int] = []
        self._from = self._told = 0  # the first token that is decoded again, and how many have been told

    def add(self, token: int) -> str:
        """The text that is new with this token; empty while a character is not whole."""
        self._tokens.append(token)
        return self._new(whole=True)

    def rest(self) -> str:
        """What was held back, when no token will follow."""
        return self._new(whole=False)

    def stops(self) -> bool:
        """Whether the text now holds one of the strings to stop at, ended by the last token."""
        return any(words in self._latest for words in self._stop)

    def _new(self, whole: bool) -> str:
        before, now = (self._decode(self._tokens[self._from : end], skip_special_tokens=True) for end in (self._told, None))
        if len(now) <= len(before) or (whole and now.endswith("\ufffd")):
            return ""
        self._from, self._told = self._told, len(self._tokens)
        new = now[len(before):]
        longest = max(map(len, self._stop), default=0)
        self._latest = (self._latest[max(len(self._latest) - longest + 1, 0):] if longest > 1 else "") + new
        return new
