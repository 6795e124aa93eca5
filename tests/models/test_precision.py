"""The phases in which FP8 is in force, and the sizes that it asks of a model. Widths are worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.models.build import build_model
from megatron_vppo.models.families import family_of
from megatron_vppo.models.megatron_config import language_config, vision_config
from megatron_vppo.models.options import Fp8Options, ModelOptions
from megatron_vppo.models.precision import check_fp8_model, language_precision
from megatron_vppo.planning.published import PUBLISHED, published_config

CPU = torch.device("cpu")
RECIPES: tuple[Fp8Recipe, ...] = ("blockwise", "tensorwise", "delayed", "mxfp8")


def megatron_config(options: ModelOptions) -> TransformerConfig:
    hf_config = published_config("qwen2.5-vl-7b")
    return language_config(
        hf_config,
        family=family_of(hf_config),
        tensor=1,
        context=1,
        stages=(28,),
        options=options,
        dtype=torch.bfloat16,
        device=CPU,
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_released_models_run_in_fp8_over_four_ranks(name: str, recipe: Fp8Recipe) -> None:
    hf_config = published_config(name)
    tensor = min(4, hf_config.text_config.num_key_value_heads)
    check_fp8_model(hf_config, Fp8Options(recipe), tensor=tensor, pipeline=1, backend="te")


def test_a_width_that_does_not_fit_is_named() -> None:
    """Qwen2.5-VL-7B has 28 query and 4 key-value heads of 128, and an MLP of 18944 = 148 * 128."""
    hf_config = published_config("qwen2.5-vl-7b")
    check_fp8_model(hf_config, Fp8Options("mxfp8"), tensor=4, pipeline=1, backend="te")
    hf_config.text_config.intermediate_size = 18944 + 16
    check_fp8_model(hf_config, Fp8Options("tensorwise"), tensor=1, pipeline=1, backend="te")
    with pytest.raises(ValueError, match="multiples of 32, but the MLP width of a rank is 18960"):
        check_fp8_model(hf_config, Fp8Options("mxfp8"), tensor=1, pipeline=1, backend="te")
    with pytest.raises(ValueError, match="multiples of 16, but the MLP width of a rank is 9480"):
        check_fp8_model(hf_config, Fp8Options("blockwise"), tensor=2, pipeline=1, backend="te")


def test_ends_that_leave_nothing_are_refused() -> None:
    hf_config = published_config("qwen2.5-vl-7b")
    check_fp8_model(hf_config, Fp8Options("blockwise", bf16_layers_at_ends=13), tensor=1, pipeline=1, backend="te")
    with pytest.raises(ValueError, match="none of the 28 layers"):
        check_fp8_model(hf_config, Fp8Options("blockwise", bf16_layers_at_ends=14), tensor=1, pipeline=1, backend="te")
    check_fp8_model(hf_config, Fp8Options("blockwise", bf16_layers_at_ends=7), tensor=1, pipeline=4, backend="te")
    with pytest.raises(ValueError, match="more than the 7 layers of one of 4 pipeline stages"):
        check_fp8_model(hf_config, Fp8Options("blockwise", bf16_layers_at_ends=8), tensor=1, pipeline=4, backend="te")
    with pytest.raises(ValueError, match=r"set fp8.bf16_layers_at_ends=0"):
        check_fp8_model(hf_config, Fp8Options("delayed", bf16_layers_at_ends=1), tensor=1, pipeline=1, backend="te")


def test_plain_layers_never_pretend() -> None:
    """Megatron itself would run them in bfloat16 without a word."""
    options = ModelOptions(backend="torch", fp8=Fp8Options("blockwise"))
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1), pp=SimpleNamespace(size=lambda: 1))
    with pytest.raises(ValueError, match="set model"):
        build_model(
            published_config("qwen2.5-vl-7b"),
            groups=groups,  # type: ignore[arg-type]
            vision_groups=None,  # type: ignore[arg-type]
            dtype=torch.bfloat16,
            device=CPU,
            options=options,
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_is_told_the_recipe(recipe: Fp8Recipe) -> None:
    config = megatron_config(ModelOptions(backend="te", fp8=Fp8Options(recipe)))
    assert config.fp8_recipe == recipe
    assert config.fp8 == {"blockwise": "e4m3", "mxfp8": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid"}[recipe]
    assert config.tp_only_amax_red, "data-parallel ranks may have different numbers of micro-batches"
    assert not config.first_last_layers_bf16 and not config.fp8_param and not config.fp8_dot_product_attention


def test_megatron_is_told_of_the_ends() -> None:
    config = megatron_config(ModelOptions(backend="te", fp8=Fp8Options("blockwise", bf16_layers_at_ends=2)))
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 2)


def test_the_vision_tower_never_runs_in_fp8() -> None:
    hf_config = published_config("qwen3-vl-2b")
    config = vision_config(
        hf_config,
        family=family_of(hf_config),
        tensor=1,
        options=ModelOptions(backend="te", fp8=Fp8Options("blockwise")),
        dtype=torch.bfloat16,
        device=CPU,
    )
    assert config.fp8 is None


def test_precision_holds_within_the_block_alone() -> None:
    stage = SimpleNamespace(config=megatron_config(ModelOptions(backend="te", fp8=Fp8Options("blockwise"))))
    with language_precision([stage], fp8=False):
        assert stage.config.fp8 is None
    assert stage.config.fp8 == "e4m3"
    with pytest.raises(KeyError), language_precision([stage], fp8=False):
        raise KeyError
    with language_precision([stage], fp8=True):
        assert stage.config.fp8 == "e4m3"


def test_a_model_without_fp8_is_not_asked_for_it() -> None:
    stage = SimpleNamespace(config=megatron_config(ModelOptions()))
    with language_precision([stage], fp8=False):
        assert stage.config.fp8 is None
    with pytest.raises(ValueError, match=r"set fp8.recipe"), language_precision([stage], fp8=True):
        pass
