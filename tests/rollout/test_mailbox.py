"""Messages arrive in order, once, and leave nothing in the store."""

from __future__ import annotations

import torch.distributed as dist

from megatron_vppo.rollout.mailbox import Inbox, Mailbox


def test_messages_come_in_order_and_are_deleted() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    unused = store.num_keys()
    post, take = Mailbox(store, "a"), Mailbox(store, "a")
    other = Mailbox(store, "b")
    assert take.take() == []
    messages = [{number: bytes([0, 255, number])} for number in range(12)]  # of two digits as well
    for message in messages[:3]:
        post.post(message)
    assert take.take() == messages[:3] and take.take() == []
    for message in messages[3:]:
        post.post(message)
    assert other.take() == []
    assert take.take() == messages[3:]
    post.post("not taken")
    take.clear()
    assert store.num_keys() == unused


def test_several_ranks_post_into_one_and_their_messages_are_told_apart() -> None:
    store = dist.HashStore()
    inbox = Inbox(Mailbox(store, "a"))
    one, two = Mailbox(store, "a"), Mailbox(store, "a")
    for number in range(3):
        one.post((1, number))
        two.post((2, -number))
    assert inbox.take(1) == []
    inbox.look()
    assert (inbox.take(2), inbox.take(1), inbox.take(3)) == ([0, -1, -2], [0, 1, 2], [])
    one.post((1, 7))
    assert inbox.take(1) == []
    inbox.look()
    assert (inbox.take(1), inbox.take(2)) == ([7], [])
