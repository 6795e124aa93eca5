"""Settings of a run to those of sampling, for training and for validation."""

from __future__ import annotations

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.setup.sampling import train_sampling, val_sampling


def test_training_and_validation_have_settings_of_their_own() -> None:
    config = RunConfig.model_validate(
        {
            "data": {"train_files": "x", "max_response_length": 9},
            "model": {"path": "m"},
            "rollout": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "val": {"temperature": 0.0, "top_p": 0.8}},
        }
    )
    train, val = train_sampling(config, (1,)), val_sampling(config, (1,))
    assert (train.temperature, train.top_p, train.top_k, train.max_tokens) == (0.7, 0.9, 5, 9)
    assert (val.temperature, val.top_p, val.top_k, val.max_tokens) == (0.0, 0.8, -1, 9)
    assert train.stop_token_ids == val.stop_token_ids == (1,)
