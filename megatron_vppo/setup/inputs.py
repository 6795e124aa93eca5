"""The configuration and processor of a model's folder, and the data files: everything a run reads, opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

from megatron_vppo.config.data_files import files_of
from megatron_vppo.config.schema import DataFile, PerturbConfig, PromptConfig, RunConfig
from megatron_vppo.data.dataset import VisionDataset, open_dataset
from megatron_vppo.data.decode import Rgb, parse_color
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.images import Perturbing, VisionInputs
from megatron_vppo.data.perturb import BlackPatches, BlackSquares, GaussianBlur, GaussianNoise, GreyImage, Perturbation
from megatron_vppo.data.plain_think import think_token_ids, with_plain_think
from megatron_vppo.data.prompt_sets import PromptSets
from megatron_vppo.data.prompts import PromptBuilder, PromptSet, load_prompts, read_template
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.models.model_files import ModelFiles
from megatron_vppo.setup.rewards import has_user_function
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
    banned_ids: tuple[int, ...]
    """The tokens that are never sampled: those of images, those that the model's folder suppresses, and those of the
    think tags where they are plain text."""
    datasets: dict[str, VisionDataset]
    """One for each file, by the names of `files_of`."""
    images: VisionInputs
    builder: PromptBuilder


def open_inputs(config: RunConfig, model: ModelFiles) -> RunInputs:
    """Opens the data files, and prepares them for the model.

    Raises ValueError for a file or column that is missing, for a pixel budget that no image fits, and as
    `with_plain_think`.
    """
    processor, banned_ids = processor_and_bans(config.data, model)
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
        banned_ids=banned_ids,
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


def processor_and_bans(data: PromptConfig, model: ModelFiles) -> tuple[Any, tuple[int, ...]]:
    """Returns the processor that prompts are tokenised with, and the tokens that are never sampled.

    Raises ValueError as `with_plain_think`.
    """
    banned = dict.fromkeys((*vision_token_ids(model.hf_config), *model.suppressed_ids))
    if not data.plain_think_tokens:
        return model.processor, tuple(banned)
    banned.update(dict.fromkeys(think_token_ids(model.processor.tokenizer)))
    return with_plain_think(model.processor), tuple(banned)


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
    """Opens the data of the run, file by file, under the names of `files_of`.

    Raises ValueError for a file, split or column that is missing.
    """
    return {
        name: open_file(config, name, file)
        for split in ("train", "val")
        for name, file in files_of(config.data, split).items()
    }


def open_file(config: RunConfig, name: str, file: DataFile) -> VisionDataset:
    """Opens the rows of one file, one of `files_of`. Raises ValueError as `open_datasets`."""
    assert file.prompt_key and file.answer_key and file.image_key and file.image_place, "files_of fills them in"
    return open_dataset(
        file.path,
        problem_key=file.prompt_key,
        answer_key=file.answer_key,
        image_key=file.image_key,
        image_dir=file.image_dir,
        image_place=file.image_place,
        max_rows=config.data.max_val_rows if name.partition("/")[0] == "val" else None,
    )


def _template(config: RunConfig) -> str | None:
    return None if config.data.format_prompt is None else read_template(config.data.format_prompt)


def read_prompts(config: RunConfig, inputs: RunInputs, split: str) -> PromptSets:
    """Tokenises the rows of 'train' or 'val', or reads what an earlier start has kept; returns the usable prompts."""
    return PromptSets([_read_file(config, inputs, name) for name in files_of(config.data, split)])


def _read_file(config: RunConfig, inputs: RunInputs, name: str) -> PromptSet:
    dataset = inputs.datasets[name]
    return load_prompts(
        dataset,
        inputs.builder,
        split=name,
        max_prompt_length=config.data.max_prompt_length,
        max_images=config.rollout.max_images_per_prompt,
        on_bad_row=config.data.on_bad_row,
        num_workers=config.data.num_workers,
        with_extras=has_user_function(config.reward),
        cache=row_cache(config, dataset, inputs.builder),
    )
