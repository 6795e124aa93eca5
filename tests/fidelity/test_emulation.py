"""Emulated FP8 inside real Megatron layers: which layers, what they multiply, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.fidelity.emulation import emulated_fp8, fp8_linears
from megatron_vppo.fidelity.formats import quantise_dequantise
from megatron_vppo.models.options import Fp8Options, ModelOptions
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.policy_rig import STEP, make_batch, make_policy, make_responses

FLOAT32_SUM = 1e-5
"""The tolerance for products of about 1 that are added up in another order."""
BFLOAT16_ROUNDING = 2**-8
RECIPES: tuple[Fp8Recipe, ...] = ("blockwise", "tensorwise", "delayed", "mxfp8")


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield init_layout(tensor=1, pipeline=1, timeout_seconds=60)
    destroy_layout()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, tiny_config(tied=False, vocab=301))  # three layers
    return path


@pytest.fixture
def policy(folder: Path, layout: Layout) -> MegatronPolicy:
    return make_policy(folder, layout, rows=2)


def weights(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for stage in policy.trainable.stages for name, p in stage.named_parameters()}


def linear(policy: MegatronPolicy, layer: int, name: str) -> nn.Module:
    return policy.trainable.stages[0].language.decoder.layers[layer].get_submodule(name)


NAMES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_multiplies_quantised_operands(policy: MegatronPolicy, recipe: Fp8Recipe, name: str) -> None:
    module = linear(policy, 1, name)
    weight_OK = module.weight.detach().clone()
    hidden_T1K = torch.randn(5, 1, weight_OK.shape[1], generator=torch.Generator().manual_seed(1)) * 30
    with torch.no_grad():
        plain, _ = module(hidden_T1K)
        with emulated_fp8(policy.trainable.stages, Fp8Options(recipe)):
            got, _ = module(hidden_T1K)
    x_TK = quantise_dequantise(hidden_T1K[:, 0], recipe=recipe, operand="input").double()
    w_OK = quantise_dequantise(weight_OK, recipe=recipe, operand="weight").double()
    expected = x_TK @ w_OK.T + (module.bias.double() if module.bias is not None else 0)
    size = expected.abs().max()
    assert (got[:, 0] - expected).abs().max() < FLOAT32_SUM * size
    assert (plain[:, 0] - expected).abs().max() > 1e-3 * size, "quantisation is seen"


def test_only_the_linears_of_inner_layers_change(policy: MegatronPolicy) -> None:
    before = weights(policy)
    with torch.no_grad(), emulated_fp8(policy.trainable.stages, Fp8Options("tensorwise", bf16_layers_at_ends=1)):
        inside = weights(policy)
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert changed == {f"language.decoder.layers.1.{name}.weight" for name in NAMES}
    with torch.no_grad(), emulated_fp8(policy.trainable.stages, Fp8Options("tensorwise")):
        inside = weights(policy)
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert changed == {f"language.decoder.layers.{layer}.{name}.weight" for layer in range(3) for name in NAMES}


@pytest.mark.parametrize("fails", [False, True], ids=["in the end", "after an error"])
def test_weights_and_scores_are_back(policy: MegatronPolicy, fails: bool) -> None:
    responses = make_responses()
    before, places = weights(policy), [p.data_ptr() for p in policy.trainable.stages[0].parameters()]
    plain = policy.score(responses, step=STEP, views="both", divergence="kl_full")
    try:
        with emulated_fp8(policy.trainable.stages, Fp8Options("mxfp8")):
            quantised = policy.score(responses, step=STEP, views="both", divergence="kl_full")
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass
    again = policy.score(responses, step=STEP, views="both", divergence="kl_full")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
    assert [p.data_ptr() for p in policy.trainable.stages[0].parameters()] == places
    for name in ("old_logp_BT", "perturbed_logp_BT", "divergence_BT", "entropy_BT"):
        assert torch.equal(getattr(plain, name), getattr(again, name))
        assert not torch.equal(getattr(plain, name), getattr(quantised, name))
    assert (plain.old_logp_BT - quantised.old_logp_BT).abs().max() < 1.0, "near, not elsewhere"


def test_gradients_are_refused(policy: MegatronPolicy) -> None:
    with (
        emulated_fp8(policy.trainable.stages, Fp8Options("blockwise")),
        pytest.raises(RuntimeError, match="forward pass only"),
    ):
        policy.accumulate_gradients(make_batch(make_responses(), "nll"))
    policy.accumulate_gradients(make_batch(make_responses(), "nll"))


def test_delayed_scales_by_the_largest_of_earlier_forwards(policy: MegatronPolicy) -> None:
    module = linear(policy, 0, "mlp.linear_fc1")
    weight_OK = quantise_dequantise(module.weight.detach().clone(), recipe="delayed", operand="weight").double()
    generator = torch.Generator().manual_seed(2)
    factors = (1.0, 4.0, 0.5, 40.0)
    inputs = [torch.randn(3, 1, weight_OK.shape[1], generator=generator) * factor for factor in factors]
    largest = [x.abs().max() for x in inputs]
    scaled_by = [None, largest[0], largest[1], largest[1]]  # the last is ten times larger and saturates
    with torch.no_grad(), emulated_fp8(policy.trainable.stages, Fp8Options("delayed")):
        outputs = [module(x)[0] for x in inputs]
    for x, before, got in zip(inputs, scaled_by, outputs, strict=True):
        x_TK = quantise_dequantise(x[:, 0], recipe="delayed", operand="input", amax_before=before).double()
        assert (got[:, 0] - x_TK @ weight_OK.T).abs().max() < FLOAT32_SUM * got.abs().max()
    assert (
        quantise_dequantise(inputs[3][:, 0], recipe="delayed", operand="input", amax_before=largest[1])
    ).abs().max() < (largest[1] * 1.001)


def test_a_bfloat16_model_rounds_products_alone(folder: Path, layout: Layout) -> None:
    policy = make_policy(folder, layout, rows=2, dtype=torch.bfloat16)
    module = linear(policy, 0, "self_attention.linear_qkv")
    weight_OK = module.weight.detach().clone()
    hidden_T1K = torch.randn(5, 1, weight_OK.shape[1], generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad(), emulated_fp8(policy.trainable.stages, Fp8Options("tensorwise")):
        got, _ = module(hidden_T1K)
    expected = (
        quantise_dequantise(hidden_T1K[:, 0], recipe="tensorwise", operand="input").double()
        @ quantise_dequantise(weight_OK, recipe="tensorwise", operand="weight").double().T
        + module.bias.double()
    )
    assert got.dtype == module.weight.dtype == torch.bfloat16
    assert ((got[:, 0].double() - expected).abs() <= BFLOAT16_ROUNDING * expected.abs() + FLOAT32_SUM).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Fp8Options("delayed", bf16_layers_at_ends=1), "one scope for all layers"),
        (Fp8Options("mxfp8", bf16_layers_at_ends=2), "none of the 3 layers"),
    ],
)
def test_impossible_options_are_refused(policy: MegatronPolicy, options: Fp8Options, message: str) -> None:
    with pytest.raises(ValueError, match=message), emulated_fp8(policy.trainable.stages, options):
        pass


def layers_in_fp8(rank: int, world_size: int, folder: Path) -> list[int]:
    layout = init_layout(tensor=1, pipeline=2, virtual_stages=1, timeout_seconds=60)
    policy = make_policy(folder, layout, rows=2, options=ModelOptions(pipeline_layers=(1, 2)))
    chosen = {id(module) for module in fp8_linears(policy.trainable.stages, Fp8Options("mxfp8", bf16_layers_at_ends=1))}
    layers = policy.trainable.stages[0].language.decoder.layers
    return [number for number, layer in enumerate(layers) if id(layer.mlp.linear_fc1) in chosen]


@pytest.mark.distributed
@pytest.mark.extended
def test_ends_are_those_of_the_whole_model(folder: Path) -> None:
    assert run_gloo(layers_in_fp8, 2, folder) == [[], [0]], "stages of one and two layers: the second of three"
