"""Numbers of rows other than were released."""

from __future__ import annotations

from megatron_vppo.evaluation.released import unlike_release


def test_any_released_number_will_do() -> None:
    assert [unlike_release("mathverse", "testmini.parquet", rows) for rows in (3940, 788)] == [None, None]
    assert unlike_release("mathverse", "testmini.parquet", 3941) == (
        "testmini.parquet has 3941 rows, and 3940 (testmini), 788 (text only), 4728 (testmini and text only) were "
        "released; the copy is another version, or not whole"
    )


def test_files_of_papo_eval_are_known_by_name() -> None:
    path = "data/PAPO_eval/data/hiyouga_geometry3k-00000-of-00001.parquet"
    assert unlike_release("sharegpt", path, 601) is None
    assert "has 600 rows, and 601 (hiyouga_geometry3k) were released" in (unlike_release("sharegpt", path, 600) or "")
    assert "2907" in (unlike_release("sharegpt", "MathLLMs_MathVision.json@train", 2906) or "")
    assert "447" in (unlike_release("sharegpt", "papo/lscpku_LogicVista@test", 448) or ""), "a folder"
    assert unlike_release("sharegpt", "my_own.json", 5) is None
    assert unlike_release("rows", "my_own.json", 5) is None
