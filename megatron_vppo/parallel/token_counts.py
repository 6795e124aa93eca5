"""The few numbers of tokens that micro-batches are padded to, and the filling of micro-batches by them.

Kernels and buffers of communication are made for a number of tokens. A run whose micro-batches have four of them makes
each once. Padding costs time as well, so micro-batches are filled for these numbers: as few as possible, and so that
their numbers of tokens lie just below.

Say the limit is 16 tokens, and the counts are 16, 15, 14 and 10. Parts of 9, 8, 6, 5, 4, 4, 3 and 1 tokens are 40
together. Three micro-batches have to hold them. The least that three counts can be is 10 + 15 + 15:

    count 15    9  6         full
    count 15    8  4  3      full
    count 10    5  4  1      full

A rank's mini-batch has to fill several micro-batches for that. Two of four counts make ten sums, which have to cover a
factor of two: at best they lie 7 % apart, and mini-batches that fill two micro-batches are padded by 2 to 4.4 %. It is
less than 3 % with a limit of 1.1 times the half of what such a mini-batch has. One that fills a single micro-batch has
four sizes to be padded to. For realistic groups of eight even the best four, chosen afterwards, add 7.2 % to three
groups, 5.8 % to four and 4.9 % to six; here it stays near 4 to 5 %, with more than four numbers of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

_SIXTEENTHS = (16, 15, 14, 10)
"""The counts, as parts of the limit. The upper ones lie close together: a rank's tokens, divided over at least six
micro-batches, lie between them. The lowest is for ranks that have few."""

_MOST_ADDED = 1.1

_TRIES = 32
"""The most sets of counts that are tried, those with the least room first. For realistic parts one of four fits."""

Part = int
"""The number of a part."""


def token_counts(limit: int) -> tuple[int, ...]:
    """Returns the numbers of tokens that micro-batches of at most `limit` have, the largest first."""
    return tuple(dict.fromkeys(max(1, limit * share // 16) for share in _SIXTEENTHS))


def padded_tokens(tokens: int, *, limit: int) -> int:
    """Returns the number that a micro-batch of `tokens` is padded to: a count, or else a multiple of a sixteenth of the
    limit.

    It stays as it is where more than a tenth would be added, as to one that is nearly empty: that costs more than
    kernels for another number.
    """
    grain = max(1, limit // 16)
    above = [count for count in token_counts(limit) if count >= tokens]
    candidates = (*above[-1:], -(-tokens // grain) * grain)
    return next((count for count in candidates if count <= _MOST_ADDED * tokens), tokens)


def fill(sizes: Sequence[int], *, limit: int) -> list[list[Part]]:
    """Divides parts over as few micro-batches as can be found, and among these so that little has to be padded.

    Args:
        sizes: the tokens of each part. One that is larger than the limit has a micro-batch by itself.

    Returns:
        The numbers of the parts of each micro-batch. The same arguments give the same result on every rank.
    """
    fitting = [part for part, size in enumerate(sizes) if size <= limit]
    alone = [[part] for part, size in enumerate(sizes) if size > limit]
    of_fitting = [sizes[part] for part in fitting]
    return alone + [[fitting[place] for place in places] for places in _fill_fitting(of_fitting, limit)]


def _fill_fitting(sizes: Sequence[int], limit: int) -> list[list[Part]]:
    first_fit = _first_fit(sizes, limit)
    for number in range(_least_number(sizes, limit), len(first_fit) + 1):
        found = first_fit if number == len(first_fit) else _arrange(sizes, (limit,) * number)
        if found is None:
            continue
        for capacities in itertools.islice(_capacities(number, sum(sizes), limit), _TRIES):
            if (closer := _arrange(sizes, capacities)) is not None:
                return closer
        return found
    return []


def _least_number(sizes: Sequence[int], limit: int) -> int:
    """Returns a number of micro-batches below which parts cannot fit: of those above a third, for example, a
    micro-batch holds two.
    """
    above = [(sum(size > limit // (held + 1) for size in sizes), held) for held in range(1, 9)]
    return max(-(-sum(sizes) // limit), *(-(-parts // held) for parts, held in above))


def _first_fit(sizes: Sequence[int], limit: int) -> list[list[Part]]:
    """Fills each part into the first micro-batch that has room, the largest first."""
    filled: list[list[Part]] = []
    room: list[int] = []
    for part in _largest_first(sizes):
        place = next((place for place, free in enumerate(room) if sizes[part] <= free), len(room))
        if place == len(room):
            filled.append([])
            room.append(limit)
        filled[place].append(part)
        room[place] -= sizes[part]
    return filled


def _capacities(number: int, total: int, limit: int) -> Iterator[tuple[int, ...]]:
    """Yields the token counts of `number` micro-batches that hold `total` together, those with the least room first.

    Two different counts at most: with more, fewer parts would fit.
    """
    counts = token_counts(limit)
    mixed = {
        (larger,) * many + (smaller,) * (number - many)
        for larger in counts
        for smaller in counts
        if smaller <= larger
        for many in range(number + 1)
    }
    yield from sorted((capacities for capacities in mixed if sum(capacities) >= total), key=lambda c: (sum(c), c))


# --- Arrangements -----------------------------------------------------------------------------------------------------


def _largest_first(sizes: Sequence[int]) -> list[Part]:
    return sorted(range(len(sizes)), key=lambda part: (-sizes[part], part))


def _arrange(sizes: Sequence[int], capacities: Sequence[int]) -> list[list[Part]] | None:
    """Puts parts into micro-batches of these capacities. None if no way is found, which does not mean there is none.

    Each part first goes where most room is, the largest first. Then parts move to other micro-batches or change places
    with smaller ones, as long as less is too much.
    """
    room, place = list(capacities), [0] * len(sizes)
    for part in _largest_first(sizes):
        place[part] = max(range(len(room)), key=lambda n: room[n])
        room[place[part]] -= sizes[part]
    while min(room, default=0) < 0:
        step = _best_step(sizes, place, room)
        if step is None:
            return None
        part, other, target = step
        source = place[part]
        moved = sizes[part] - (0 if other is None else sizes[other])
        place[part] = target
        if other is not None:
            place[other] = source
        room[source] += moved
        room[target] -= moved
    members: list[list[Part]] = [[] for _ in capacities]
    for part, number in enumerate(place):
        members[number].append(part)
    return [parts for parts in members if parts]


def _best_step(sizes: Sequence[int], place: Sequence[int], room: Sequence[int]) -> tuple[Part, Part | None, int] | None:
    """Finds the move out of the fullest micro-batch that lowers the tokens that are too much by most.

    Returns:
        A part, the part that it changes places with (None: it only moves), and the micro-batch that it goes to; or None
        if no move lowers them.
    """
    source = min(range(len(room)), key=lambda n: room[n])
    excess = -room[source]
    least, best = 0, None
    for part in (part for part, number in enumerate(place) if number == source):
        moves: list[tuple[int, Part | None, int]] = [(sizes[part], None, n) for n in range(len(room)) if n != source]
        moves += [(sizes[part] - sizes[other], other, n) for other, n in enumerate(place) if n != source]
        for moved, other, target in moves:
            if moved <= 0:
                continue
            change = max(0, excess - moved) - excess + max(0, moved - max(0, room[target]))
            if change < least:
                least, best = change, (part, other, target)
    return best
