"""The draw: which prompts are handed out to whom, and which groups count, whatever the order of the verdicts."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_vppo.config.choices import SampleOrder
from megatron_vppo.rollout.draw import Draw

KEPT = (True, False, True, True, False, True, True, False)
"""The verdicts on eight prompts with a response each."""


def finished(draw: Draw, number: int) -> None:
    draw.ended(number)
    draw.judged(number, kept=KEPT[number])


def opened(wanted: int, *, most: int = 8, engines: int = 1, capacity: int = 100, **options: object) -> Draw:
    draw = Draw(wanted=wanted, most=most, responses=1, **{"order": "draw", **options})  # type: ignore[arg-type]
    draw.open_to(range(engines), capacity=capacity)
    return draw


def test_the_first_kept_groups_count_in_whatever_order_they_are_graded() -> None:
    for order in itertools.permutations(range(5)):
        draw = opened(3, seen=(3, 5))  # 1.1 x 3 / 0.6: six prompts
        assert draw.hand_out() == {0: [0, 1, 2, 3, 4, 5]}
        for number in order:
            assert not draw.is_decided or draw.chosen == [0, 2, 3]
            finished(draw, number)
        assert draw.is_decided and (draw.chosen, draw.needed, draw.used) == ([0, 2, 3], [0, 1, 2, 3], 4)
        draw.judged(5, kept=True)
        assert draw.chosen == [0, 2, 3], "a verdict that comes too late changes nothing"


def test_the_first_graded_groups_count_where_that_is_asked_for() -> None:
    draw = opened(2, order="arrival", seen=(1, 2))
    assert draw.hand_out() == {0: [0, 1, 2, 3, 4]}
    for number in (5 - 1, 3, 0):
        assert not draw.is_decided
        finished(draw, number)
    assert draw.is_decided and (draw.chosen, draw.needed, draw.used) == ([0, 3], [0, 3, 4], 5)


@pytest.mark.parametrize(
    ("wanted", "most", "seen", "size"),
    [
        (384, 1536, (0, 0), 423),  # nothing is known: as if all were kept, 1.1 x 384
        (384, 1536, (55, 100), 768),  # 1.1 x 384 / 0.55
        (384, 1536, (1, 100), 1536),
        (384, 1536, (0, 100), 1536),
        (384, 384, (55, 100), 384),
        (0, 0, (0, 0), 0),
    ],
)
def test_the_size_of_a_draw(wanted: int, most: int, seen: tuple[float, float], size: int) -> None:
    assert Draw(wanted=wanted, most=most, responses=8, order="draw", seen=seen).size == size


def test_a_draw_grows_where_fewer_are_kept_than_were_expected() -> None:
    """After 8 of 88 prompts with none kept 80 are missing: at a rate of 10 / 18 it takes 159, and 80 are on the way."""
    draw = Draw(wanted=80, most=400, responses=1, order="draw")
    assert draw.size == 88
    for number in range(8):
        draw.judged(number, kept=False)
    assert draw.size == 88 + 79
    for number in range(8, 8 + 80):
        draw.judged(number, kept=True)
    assert draw.size == 88 + 79, "never smaller"


def test_engines_get_as_much_as_they_have_room_for_the_emptiest_first() -> None:
    draw = Draw(wanted=8, most=8, responses=2, order="draw")
    draw.open_to([0, 1], capacity=4)
    assert draw.hand_out() == {0: [0, 2], 1: [1, 3]}
    assert draw.hand_out() == {}
    for number in (3, 3, 1):
        draw.ended(number)
    assert draw.hand_out() == {1: [4, 5]}, "one has a response in flight, then three"
    assert draw.given == 6


def test_what_a_lost_engine_has_not_finished_goes_to_others() -> None:
    draw = opened(6, most=6, engines=2, capacity=2)
    assert draw.hand_out() == {0: [0, 2], 1: [1, 3]}
    finished(draw, 1)
    assert draw.hand_out() == {1: [4]}
    assert draw.lost(1) == [3, 4]
    assert draw.hand_out() == {}
    finished(draw, 0)
    assert draw.hand_out() == {0: [3]}
    assert draw.lost(0) == [2, 3] and draw.hand_out() == {} and not draw.is_idle
    draw.open_to([0, 1], capacity=2)  # both have been started again
    assert draw.hand_out() == {0: [2, 4], 1: [3, 5]}


def test_nothing_is_handed_out_that_cannot_count_any_more() -> None:
    draw = opened(2, capacity=4, seen=(1, 4))
    assert draw.size == 8 and draw.hand_out() == {0: [0, 1, 2, 3]}
    finished(draw, 1)
    assert draw.hand_out() == {0: [4]}
    for number in (2, 3):
        finished(draw, number)
    assert draw.hand_out() == {} and not draw.is_decided, "0 may still push 3 out, and 5 cannot count"
    assert not draw.is_idle
    draw.ended(0)
    draw.ended(4)
    assert draw.is_idle
    draw.judged(0, kept=True)
    assert draw.chosen == [0, 2]


@pytest.mark.parametrize("order", ["draw", "arrival"])
def test_a_draw_without_enough_kept_groups_ends_with_its_last_prompt(order: SampleOrder) -> None:
    draw = opened(6, order=order)
    numbers = list(range(8))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        assert not draw.is_decided
        draw.hand_out()
        draw.judged(number, kept=KEPT[number])
    assert draw.is_decided and (draw.chosen, draw.needed, draw.used) == ([0, 2, 3, 5, 6], list(range(8)), 8)


def test_carried_groups_come_first_and_only_what_is_missing_of_them_is_asked() -> None:
    draw = Draw(wanted=2, most=8, responses=3, order="arrival", seen=(1, 1), missing=[1, 0, 3])
    draw.open_to([0, 1], capacity=4)
    assert draw.size == 3, "1.1 x 2 groups are expected to do"
    assert draw.hand_out() == {0: [0], 1: [2]}
    draw.judged(1, kept=False)
    assert draw.hand_out() == {0: [3], 1: [4]}, "with one and three responses in flight both have room"
    draw.ended(0)
    draw.judged(0, kept=True)
    assert not draw.is_idle and not draw.is_decided
    assert draw.lost(1) == [2, 4]
    assert draw.hand_out() == {0: [2]}
    for _ in range(3):
        draw.ended(2)
    draw.judged(2, kept=True)
    assert draw.is_decided and (draw.chosen, draw.needed, draw.reached) == ([0, 2], [0, 1, 2], 5)


@pytest.mark.parametrize("order", ["draw", "arrival"])
def test_more_groups_are_carried_than_may_be_sampled(order: SampleOrder) -> None:
    """A resume with smaller settings may bring that about: all are judged, and then it is decided."""
    draw = Draw(wanted=2, most=4, responses=1, order=order, missing=[0] * 6)
    for number in range(6):
        draw.judged(number, kept=False)
    assert draw.is_decided and draw.is_idle and draw.chosen == [] and draw.size == 6


@pytest.mark.parametrize(
    ("engines", "capacity", "most", "size"),
    [
        (8, 128, 1536, 1269),  # 1396.4 prompts for two steps, of which 8 x 16 are sampled at once
        (8, 132, 1536, 1261),  # 8 x 17: an engine with room for four of eight responses gets all of them
        (8, 1024, 1536, 768),  # all at once: 1.1 x 384 / 0.55, and nothing ahead
        (8, 128, 900, 900),
        (2, 128, 1536, 1365),
    ],
)
def test_as_much_is_begun_ahead_as_has_to_wait_for_room(engines: int, capacity: int, most: int, size: int) -> None:
    draw = Draw(wanted=384, most=most, responses=8, order="draw", seen=(55, 100), ahead=True)
    assert draw.size == 768, "nothing is known of engines"
    draw.open_to(range(engines), capacity=capacity)
    assert draw.size == size
    without = Draw(wanted=384, most=most, responses=8, order="draw", seen=(55, 100))
    without.open_to(range(engines), capacity=capacity)
    assert without.size == 768


def test_engines_with_room_go_on_with_what_the_next_step_needs() -> None:
    """Two of the first five prompts are wanted, and known when 0 is: until then slots of others take what follows."""
    draw = opened(2, capacity=2, seen=(1, 2), ahead=True)
    assert draw.size == 6 and draw.hand_out() == {0: [0, 1]}
    given = []
    for number in (1, 2, 3):
        finished(draw, number)
        given += draw.hand_out()[0]
    assert given == [2, 3, 4] and not draw.is_decided, "2 and 3 are kept, and 0 may be"
    draw.ended(4)
    assert draw.hand_out() == {0: [5]} and not draw.is_idle
    finished(draw, 0)
    assert draw.is_decided and (draw.chosen, draw.needed, draw.reached) == ([0, 2], [0, 1, 2], 6)
