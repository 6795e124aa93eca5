"""Architectures that are refused."""

from __future__ import annotations

import pytest

from megatron_vppo.models.families import family_of
from tests.models.tiny import tiny_config, tiny_qwen3_config


def test_unsupported_architectures_are_refused() -> None:
    config = tiny_config(tied=False, vocab=301, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding window"):
        family_of(config)
    config = tiny_config(tied=False, vocab=301, hidden_act="gelu")
    with pytest.raises(ValueError, match="'gelu'"):
        family_of(config)

    config = tiny_qwen3_config(tied=False, vocab=301, taps=(0, 2), attention_bias=True)
    with pytest.raises(ValueError, match="attention_bias"):
        family_of(config)
    for taps in ((2, 0), (1, 3)):
        with pytest.raises(ValueError, match=r"must rise and lie below the tower's 3 layers"):
            family_of(tiny_qwen3_config(tied=False, vocab=301, taps=taps))
