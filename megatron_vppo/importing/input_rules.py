"""Keys of theirs about data, model, rollout and rewards that are not plainly a setting of ours.

Each function works out what a value becomes. It takes the value in force and all others, which some of them need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vppo.config.choices import Grader
from megatron_vppo.config.schema import RolloutConfig
from megatron_vppo.importing.rules import Outcome, becomes
from megatron_vppo.importing.their_values import COUNT, NUMBER, TheirValues, path_as_written

TEMPLATES = Path(__file__).resolve().parents[2] / "examples" / "format_prompt"
"""The prompt templates that come with this project. One of them is the authors'."""
AUTHORS_GRADER = ("reward_function/math.py", "compute_score_wo_format")
"""The end of the path and the name of the function that 'mathruler' is."""
AUTHORS_GRADER_HERE: Grader = "mathruler"

# --- Data and model ---------------------------------------------------------------------------------------------------


def train_rows(value: str, theirs: TheirValues) -> Outcome:
    """Takes a file, folder or hub id, which may have `@split` behind it."""
    if not value:
        return Outcome(refused="set data.train_files")
    return becomes("data.train_files", _source(value, theirs))


def val_rows(value: str, theirs: TheirValues) -> Outcome:
    """Takes the rows to validate on; none without a path."""
    return becomes("data.val_files", _source(value, theirs) if value else None)


def _source(value: str, theirs: TheirValues) -> str:
    path, at, split = value.partition("@")
    found = theirs.folders.find(path)
    return f"{path_as_written(found)}{at}{split}" if found else value


def image_dir(value: str | None, theirs: TheirValues) -> Outcome:
    """Takes the folder of images. Their program ignores one that is not there."""
    if value is None:
        return becomes("data.image_dir", None)
    found = theirs.folders.find(value)
    if found is None:
        return Outcome(refused=f"there is no folder {value}; there it is ignored: set data.image_dir=null for that")
    return becomes("data.image_dir", path_as_written(found))


def format_prompt(value: str | None, theirs: TheirValues) -> Outcome:
    """Takes the template of the prompt: theirs, or ours where it is the same file or theirs is not here."""
    if value is None:
        return becomes("data.format_prompt", None)
    found, shipped = theirs.folders.find(value), TEMPLATES / Path(value).name
    comes_with_us = Path(value).parent.name == TEMPLATES.name and shipped.is_file()
    if comes_with_us and (found is None or _content(found) == _content(shipped)):
        return becomes("data.format_prompt", path_as_written(shipped), comment="theirs, which comes with vppo")
    if found is None or not found.is_file():
        return Outcome(
            refused=f"there is no file {value}; there prompts go without it: set data.format_prompt=null for that"
        )
    return becomes("data.format_prompt", path_as_written(found))


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def model_path(value: str | None, theirs: TheirValues) -> Outcome:
    """Takes a folder or hub id."""
    if not value:
        return Outcome(refused="set worker.actor.model.model_path")
    found = theirs.folders.find(value)
    return becomes("model.path", path_as_written(found) if found else value)


def tokenizer_path(value: str | None, theirs: TheirValues) -> Outcome:
    """Refuses a tokenizer of another folder than the model's."""
    if value in (None, theirs["worker.actor.model.model_path"]):
        return Outcome(dropped="the tokenizer is that of the model's folder")
    return Outcome(refused="the tokenizer is that of model.path; copy yours into that folder, and leave this out")


def min_pixels(value: int | None, theirs: TheirValues) -> Outcome:
    """Takes the lower bound of the pixel budget, which is a number here."""
    return _bound("data.min_pixels", value)


def max_pixels(value: int | None, theirs: TheirValues) -> Outcome:
    """Takes the upper bound, likewise."""
    return _bound("data.max_pixels", value)


def _bound(setting: str, value: int | None) -> Outcome:
    if value is None:
        return Outcome(refused="null is no limit there, and a number is needed here; set one")
    return becomes(setting, value)


def dtype(value: str | None, theirs: TheirValues) -> Outcome:
    """Takes the dtype of the weights. Their float32 weights compute in bfloat16, as ours with float32 masters do."""
    if value not in (None, "bf16", "bfloat16", "fp32", "float32"):
        return Outcome(refused="the model has bfloat16 weights, and float32 ones in the optimizer; set bf16")
    return becomes("model.dtype", "bfloat16")


def freeze(value: bool, theirs: TheirValues) -> Outcome:
    """Takes the frozen tower with its projector, which transformers has inside the tower."""
    return becomes("model.freeze", ["vision_tower", "projector"] if value else [])


def recompute(value: bool, theirs: TheirValues) -> Outcome:
    """Takes gradient checkpointing."""
    return becomes("parallel.recompute", "full" if value else "none", comment="their gradient checkpointing")


# --- Rollout and rewards ----------------------------------------------------------------------------------------------


def rollout_seed(value: int, theirs: TheirValues) -> Outcome:
    """Takes seed 1, which their vLLM counts up for the responses to each prompt."""
    if value != 1:
        return Outcome(
            refused=f"responses to a prompt have the seeds {value}, {value + 1}, ... there, and 1, 2, ... here; "
            "set worker.rollout.seed=1, or have seeds of their own by rollout.seeds=independent in our file"
        )
    return becomes("rollout.seeds", "shared")


def limit_images(value: int, theirs: TheirValues) -> Outcome:
    """Takes the most images of a prompt."""
    most = RolloutConfig.model_fields["max_images_per_prompt"].default
    if value <= 0:
        return Outcome(
            dropped="no limit there",
            differs=f"no limit there; here a row may have {most} images (rollout.max_images_per_prompt)",
        )
    return becomes("rollout.max_images_per_prompt", value)


def gpu_share(value: float, theirs: TheirValues) -> Outcome:
    """Takes the engine's share of a GPU."""
    return becomes(
        "rollout.gpu_memory_utilization",
        value,
        differs="an engine takes the same share of its GPUs, and what it leaves has to hold what of the trainer stays "
        "on them; `vppo train --dry-run` says if it does",
    )


def model_length(value: int | None, theirs: TheirValues) -> Outcome:
    """Refuses a context that is too short for prompt and response."""
    needed = theirs["data.max_prompt_length"] + theirs["data.max_response_length"]
    if value is None or value >= needed:
        return Outcome(dropped="engines have room for the longest prompt and response")
    return Outcome(refused=f"prompt and response have up to {needed} tokens; set it to null")


def val_sampling(value: dict[str, Any], theirs: TheirValues) -> Outcome:
    """Takes the sampling of validation, which inherits from that of training there."""
    others = sorted(value.keys() - {"n", "temperature", "top_p", "top_k"})
    if others:
        return Outcome(refused=f"{', '.join(others)}: validation has n, temperature and top_p here; leave it out")
    try:
        top_k = COUNT.value_of(value.get("top_k", theirs["worker.rollout.top_k"]))
        settings = {
            "rollout.val.n": COUNT.value_of(value.get("n", 1)),
            "rollout.val.temperature": NUMBER.value_of(value.get("temperature", theirs["worker.rollout.temperature"])),
            "rollout.val.top_p": NUMBER.value_of(value.get("top_p", theirs["worker.rollout.top_p"])),
        }
    except ValueError as problem:
        return Outcome(refused=f"n, temperature, top_p or top_k in it {problem}")
    if top_k != -1:
        return Outcome(refused=f"validation has no top_k here, and {top_k} there; set top_k: -1 in it")
    inherited = {f"rollout.val.{name}" for name in ("temperature", "top_p")} - {f"rollout.val.{name}" for name in value}
    return Outcome(settings, comments={name: "theirs: that of training, since it is not set" for name in inherited})


def reward_function(value: str | None, theirs: TheirValues) -> Outcome:
    """Takes the file and function; the authors' grader is built in."""
    if not value:
        return Outcome(refused="set worker.reward.reward_function")
    file, colon, function = value.rpartition(":")
    if not colon:
        file, function = value, "main"
    ending, name = AUTHORS_GRADER
    if function == name and f"/{file}".endswith(f"/{ending}"):
        return becomes("reward.reward_function", AUTHORS_GRADER_HERE, comment=f"theirs, as published: {name}")
    found = theirs.folders.find(file)
    if found is None:
        return Outcome(refused=f"there is no file {file}")
    return becomes("reward.reward_function", f"{path_as_written(found)}:{function}")


def reward_type(value: str, theirs: TheirValues) -> Outcome:
    """Takes the way a function of the user's is called."""
    if AUTHORS_GRADER_HERE in reward_function(theirs["worker.reward.reward_function"], theirs).settings.values():
        return Outcome(dropped="the built-in grader takes one response at a time")
    return becomes("reward.reward_type", value)
