"""Names of columns, with dots that stand for fields and with dots of their own."""

from __future__ import annotations

from megatron_vppo.data.columns import Column


def test_a_name_is_that_of_a_column_or_of_a_field_in_one() -> None:
    columns = ("problem", "reward_model", "a.b")
    assert Column.of("problem", columns) == Column("problem")
    assert Column.of("reward_model.ground_truth", columns) == Column("reward_model", ("ground_truth",))
    assert Column.of("reward_model.a.b", columns).inside == ("a", "b")
    assert Column.of("a.b", columns) == Column("a.b"), "a column whose name has a dot"
    assert Column.of("a.b", ("a", "a.b")) == Column("a.b"), "rather than the field of another"
    assert Column.of("gone.b", columns) == Column("gone.b"), "named whole in the message that it is missing"
    assert Column("a", ("b", "c")).name == "a.b.c"
