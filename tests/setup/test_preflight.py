"""Settings that a model refuses are refused before anything starts."""

from __future__ import annotations

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.setup.preflight import check_positions
from tests.models.tiny import tiny_config


def config_of(prompt: int, response: int) -> RunConfig:
    data = {"train_files": "x", "max_prompt_length": prompt, "max_response_length": response}
    return RunConfig.model_validate({"data": data, "model": {"path": "m"}})


def test_a_sequence_has_to_fit_the_models_positions() -> None:
    model = tiny_config(tied=True, vocab=299, max_position_embeddings=4096)
    check_positions(config_of(3000, 1096), model)
    with pytest.raises(ValueError, match=r"max_prompt_length 3000 \+ .* 1097 = 4097 tokens, .* has 4096 positions"):
        check_positions(config_of(3000, 1097), model)
