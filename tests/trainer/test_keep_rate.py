"""The keep rate of the steps before: recent steps weigh more, and a resumed run knows it to the last bit."""

from __future__ import annotations

import json

import pytest

from megatron_vppo.trainer.keep_rate import KeepRate


def test_recent_steps_weigh_more() -> None:
    rate = KeepRate()
    assert rate.seen == (0.0, 0.0)
    for kept, sampled in ((8, 10), (4, 20), (6, 30)):
        rate.note(kept=kept, sampled=sampled)
    assert rate.seen == (8 / 4 + 4 / 2 + 6, 10 / 4 + 20 / 2 + 30)


def test_a_resumed_run_knows_it() -> None:
    rate, resumed = KeepRate(), KeepRate()
    for kept in (1, 2, 3, 5, 7):
        rate.note(kept=kept, sampled=3 * kept)
    resumed.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert resumed.seen == rate.seen
    with pytest.raises(ValueError, match="lacks sampled"):
        resumed.load_state_dict({"kept": 1.0})
    with pytest.raises(ValueError, match="has kept=-1"):
        resumed.load_state_dict({"kept": -1.0, "sampled": 2.0})
    assert resumed.seen == rate.seen
