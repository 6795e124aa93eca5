"""Messages between ranks while engines sample, in order, from one rank to one other, over a store of torch's.

A rank that waits for its engine cannot wait in a collective. It looks into its mailbox now and then instead.
"""

from __future__ import annotations

import pickle
from typing import Any, cast

import torch.distributed as dist


class Mailbox:
    """One end of a line of messages. One rank posts and one other takes; a message is deleted when it is taken."""

    def __init__(self, store: dist.Store, name: str) -> None:
        """`name`: used once in the life of the store."""
        self._store = dist.PrefixStore(name, store)
        self._number = 0
        """Messages that this end has posted or taken."""

    def post(self, message: Any) -> None:
        """Sends a message; at most 8 MiB, which is the most that torch's store takes as one value."""
        self._store.set(str(self._number), cast(str, pickle.dumps(message)))  # bytes, whatever the stub says
        self._number += 1

    def take(self) -> list[Any]:
        """Returns the messages that have come since the last call."""
        messages = []
        while self._store.check([key := str(self._number)]):
            messages.append(pickle.loads(self._store.get(key)))
            self._store.delete_key(key)
            self._number += 1
        return messages
