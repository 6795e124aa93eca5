"""Messages between ranks while engines sample, over a store of torch's.

A rank that waits for its engine cannot wait in a collective. It looks into its mailbox now and then instead.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from typing import Any, cast

import torch.distributed as dist

_POSTED = "posted"
"""The key of the number of messages that were posted."""


class Mailbox:
    """One end of a mailbox: several ranks may post, and one takes, in order. What is taken is deleted."""

    def __init__(self, store: dist.Store, name: str) -> None:
        """`name`: used once in the life of the store."""
        self._store = dist.PrefixStore(name, store)
        self._taken = 0

    def post(self, message: Any) -> None:
        """Sends a message; at most 8 MiB, which is the most that torch's store takes as one value."""
        number = self._store.add(_POSTED, 1) - 1
        self._store.set(str(number), cast(str, pickle.dumps(message)))  # bytes, whatever the stub says

    def take(self) -> list[Any]:
        """Returns the messages that have come since the last call."""
        messages = []
        while self._store.check([key := str(self._taken)]):
            messages.append(pickle.loads(self._store.get(key)))
            self._store.delete_key(key)
            self._taken += 1
        return messages

    def clear(self) -> None:
        """Deletes what was not taken, and all else in the store; when nobody posts any more."""
        self.take()
        self._store.delete_key(_POSTED)


class Inbox:
    """A mailbox into which many ranks post, sorted by sender. Rank 0 looks into one, however many engines there are."""

    def __init__(self, mailbox: Mailbox) -> None:
        """`mailbox`: its messages are pairs of a sender and what it says."""
        self._mailbox = mailbox
        self._sorted: dict[int, list[Any]] = defaultdict(list)

    def look(self) -> None:
        """Sorts what has come."""
        for sender, message in self._mailbox.take():
            self._sorted[sender].append(message)

    def take(self, sender: int) -> list[Any]:
        """Returns the messages of a sender that have been sorted since the last call."""
        return self._sorted.pop(sender, [])
