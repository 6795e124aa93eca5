"""What a model's folder and the data files hold, opened for a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.dataset import VisionDataset, open_dataset
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.data.perturb import PerturbSettings
from megatron_vppo.data.prompts import PromptBuilder, PromptSet, load_prompts, read_template
from megatron_vppo.models.read_config import read_hf_config


@dataclass(frozen=True)
class RunInputs:
    hf_config: Any
    processor: Any
    """Of transformers."""
    datasets: dict[str, VisionDataset]
    """'train', and 'val' where there is one."""
    images: VisionInputs
    builder: PromptBuilder


def open_inputs(config: RunConfig, source: Path) -> RunInputs:
    """
    Args:
        source: folder of the model.
    """
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    geometry = ImageGeometry.from_processor(
        processor.image_processor,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        mode=config.algorithm.resize,
    )
    datasets = _datasets(config)
    perturb = PerturbSettings(**config.algorithm.perturb.model_dump())
    return RunInputs(
        hf_config=read_hf_config(source),
        processor=processor,
        datasets=datasets,
        images=VisionInputs(
            datasets, processor.image_processor, geometry=geometry, perturb=perturb, run_seed=config.trainer.seed
        ),
        builder=PromptBuilder(processor, geometry, template=_template(config), system_prompt=config.data.system_prompt),
    )


def _datasets(config: RunConfig) -> dict[str, VisionDataset]:
    data = config.data
    open_split = partial(
        open_dataset,
        problem_key=data.prompt_key,
        answer_key=data.answer_key,
        image_key=data.image_key,
        image_dir=data.image_dir,
    )
    datasets = {"train": open_split(data.train_files)}
    if data.val_files is not None:
        datasets["val"] = open_split(data.val_files, max_rows=data.max_val_rows)
    return datasets


def _template(config: RunConfig) -> str | None:
    return None if config.data.format_prompt is None else read_template(config.data.format_prompt)


def read_prompts(config: RunConfig, inputs: RunInputs, split: str) -> PromptSet:
    """The usable prompts of 'train' or 'val'."""
    return load_prompts(
        inputs.datasets[split],
        inputs.builder,
        split=split,
        max_prompt_length=config.data.max_prompt_length,
        max_images=config.rollout.max_images_per_prompt,
        on_bad_row=config.data.on_bad_row,
        num_workers=config.data.num_workers,
    )
