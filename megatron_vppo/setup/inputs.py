"""The configuration and processor of a model's folder, and the data files: everything a run reads, opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

from megatron_vppo.config.schema import PerturbConfig, PromptConfig, RunConfig
from megatron_vppo.data.dataset import VisionDataset, open_dataset
from megatron_vppo.data.decode import Rgb, parse_color
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.images import Perturbing, VisionInputs
from megatron_vppo.data.perturb import BlackPatches, BlackSquares, GaussianBlur, GaussianNoise, GreyImage, Perturbation
from megatron_vppo.data.prompts import PromptBuilder, PromptSet, load_prompts, read_template
from megatron_vppo.models.model_files import ModelFiles
from megatron_vppo.setup.row_key import row_cache


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads, opened."""

    hf_config: Any
    """The model's configuration, of transformers."""
    processor: Any
    """The model's processor, of transformers."""
    eos_ids: tuple[int, ...]
    """The tokens at which a response ends."""
    datasets: dict[str, VisionDataset]
    """'train', and 'val' where there is one."""
    images: VisionInputs
    builder: PromptBuilder


def open_inputs(config: RunConfig, model: ModelFiles) -> RunInputs:
    """Opens the data files, and prepares them for the model.

    Raises ValueError for a file or column that is missing, and for a pixel budget that no image fits.
    """
    processor = model.processor
    geometry = ImageGeometry.from_processor(
        processor.image_processor,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        mode=config.algorithm.resize,
    )
    datasets = open_datasets(config)
    perturb = config.algorithm.perturb
    return RunInputs(
        hf_config=model.hf_config,
        processor=processor,
        eos_ids=model.eos_ids,
        datasets=datasets,
        images=VisionInputs(
            datasets,
            processor.image_processor,
            geometry=geometry,
            background=background_color(config.data),
            perturbing=Perturbing(make_perturbation(perturb), per=perturb.per),
            run_seed=config.trainer.seed,
        ),
        builder=PromptBuilder(processor, geometry, template=_template(config), system_prompt=config.data.system_prompt),
    )


def background_color(data: PromptConfig) -> Rgb:
    """Returns the colour behind transparent pixels. Raises ValueError if data.background is none."""
    try:
        return parse_color(data.background)
    except ValueError as error:
        raise ValueError(f"data.background: {error}; set a name such as white, or '#rrggbb'") from error


def make_perturbation(config: PerturbConfig) -> Perturbation:
    """Builds the perturbation of the kind that is set, with the parameters of this kind."""
    if config.kind == "patch_black":
        if config.stage == "patches":
            return BlackPatches(config.probability)
        assert config.patch_size is not None, "config/checks.py asks for it"
        return BlackSquares(config.probability, side=config.patch_size)
    if config.kind == "gaussian_noise":
        return GaussianNoise(config.noise_std)
    if config.kind == "gaussian_blur":
        return GaussianBlur(config.blur_radius)
    if config.kind == "grey":
        return GreyImage(config.grey_level)
    assert_never(config.kind)


def open_datasets(config: RunConfig) -> dict[str, VisionDataset]:
    """Opens the data of the run: 'train', and 'val' where there is one.

    Raises ValueError for a file, split or column that is missing.
    """
    splits = ("train",) if config.data.val_files is None else ("train", "val")
    return {split: open_split(config, split) for split in splits}


def open_split(config: RunConfig, split: str) -> VisionDataset:
    """Opens the rows of 'train' or 'val'. Raises ValueError as `open_datasets`."""
    data = config.data
    source = data.train_files if split == "train" else data.val_files
    assert source is not None, "there is validation data"
    return open_dataset(
        source,
        problem_key=data.prompt_key,
        answer_key=data.answer_key,
        image_key=data.image_key,
        image_dir=data.image_dir,
        max_rows=data.max_val_rows if split == "val" else None,
    )


def _template(config: RunConfig) -> str | None:
    return None if config.data.format_prompt is None else read_template(config.data.format_prompt)


def read_prompts(config: RunConfig, inputs: RunInputs, split: str) -> PromptSet:
    """Tokenises the rows of 'train' or 'val', or reads what an earlier start has kept; returns the usable prompts."""
    dataset = inputs.datasets[split]
    return load_prompts(
        dataset,
        inputs.builder,
        split=split,
        max_prompt_length=config.data.max_prompt_length,
        max_images=config.rollout.max_images_per_prompt,
        on_bad_row=config.data.on_bad_row,
        num_workers=config.data.num_workers,
        cache=row_cache(config, dataset, inputs.builder),
    )
