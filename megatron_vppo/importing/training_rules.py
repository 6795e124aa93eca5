"""Keys of theirs about batches, the optimizer, the algorithm and the trainer that are not plainly a setting of ours.

Each function works out what a value becomes. It takes the value in force and all others, which some of them need.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

from megatron_vppo.config.choices import LoggerService
from megatron_vppo.importing.input_rules import AUTHORS_GRADER_HERE, reward_function
from megatron_vppo.importing.rules import Outcome, becomes
from megatron_vppo.importing.their_values import TheirValues, path_as_written

NO_LIMIT = 1000
"""The value of algorithm.max_try_make_batch that stands for no limit: a step of 384 prompts would need 384,000."""

# --- Batches and the optimizer ----------------------------------------------------------------------------------------


def update_rows(value: int, theirs: TheirValues) -> Outcome:
    """Takes the rows of a micro-batch of the update, over which their code makes the mean scale one."""
    scope = "results depend on it, as theirs do; for less memory set max_tokens_per_micro_batch"
    return becomes("actor.micro_batch_size_per_device_for_update", value, comment=scope if theirs.shapes else "")


def experience_rows(value: int, theirs: TheirValues) -> Outcome:
    """Takes the rows of a micro-batch of scoring, where both views of a row lie in one micro-batch here."""
    name = "actor.micro_batch_size_per_device_for_experience"
    if theirs["worker.actor.dynamic_batching"]:
        return Outcome(dropped="micro-batches are filled by tokens, see worker.actor.dynamic_batching")
    if not theirs["algorithm.use_vppo_on_perception"]:
        return becomes(name, value)
    return becomes(name, max(1, value // 2), comment=f"theirs: {value}; here both views of a response are in it")


def dynamic_batching(value: bool, theirs: TheirValues) -> Outcome:
    """Takes micro-batches by tokens: as many as their rows of full length have."""
    if not value:
        return becomes("actor.max_tokens_per_micro_batch", None)
    rows = theirs["worker.actor.micro_batch_size_per_device_for_update"]
    length = theirs["data.max_prompt_length"] + theirs["data.max_response_length"]
    return becomes(
        "actor.max_tokens_per_micro_batch",
        rows * length,
        comment=f"theirs: {rows} rows of {length} tokens",
        differs="micro-batches hold whole groups here, and scoring has as many tokens for each view as the update, "
        f"not {theirs['worker.actor.micro_batch_size_per_device_for_experience']} rows of full length; with preset "
        f"'reference' the scope of a micro-batch is {rows} rows, where theirs has as many as fit",
    )


def offload(value: bool, theirs: TheirValues) -> Outcome:
    """Takes the parts of the trainer that leave the GPU while engines sample; their parameters go with gradients."""
    parts = ["params", "grads"] if theirs["worker.actor.offload.offload_params"] else []
    parts += ["optimizer"] if theirs["worker.actor.offload.offload_optimizer"] else []
    return becomes("actor.offload", parts)


def optimizer(value: str, theirs: TheirValues) -> Outcome:
    """Takes AdamW, which has float32 state here."""
    if value == "adamw":
        return Outcome(dropped="AdamW with float32 state, as here")
    if value == "adamw_bf16":
        return Outcome(
            dropped="the optimizer is AdamW with float32 state",
            differs="AdamW has float32 masters and moments here, 12 bytes per parameter; theirs has bfloat16 moments "
            "with Kahan summation, 6 bytes",
        )
    return Outcome(refused="AdamW is the only optimizer; set adamw")


def warmup_steps(value: int | None, theirs: TheirValues) -> Outcome:
    """Takes the steps of the warm-up."""
    if value is None:
        return Outcome(dropped="null: lr_warmup_ratio says it")
    return _warmup(value)


def warmup_ratio(value: float, theirs: TheirValues) -> Outcome:
    """Takes the share of the run's steps, which has to be known."""
    if theirs["worker.actor.optim.lr_warmup_steps"] is not None:
        return Outcome(dropped="lr_warmup_steps says it")
    steps = theirs["trainer.max_steps"]
    if value and steps is None:
        return Outcome(
            refused="a share of the steps needs their number; set trainer.max_steps, or "
            "worker.actor.optim.lr_warmup_steps instead"
        )
    return _warmup(int(value * steps), comment=f"theirs: {value:g} of {steps} steps") if value else _warmup(0)


def _warmup(steps: int, *, comment: str = "") -> Outcome:
    differs = f"step k of the {steps} has k/{steps} of the rate here, and (k-1)/{steps} there" if steps > 0 else ""
    return becomes("actor.optim.lr_warmup_steps", steps, comment=comment, differs=differs)


# --- Algorithm --------------------------------------------------------------------------------------------------------


def filter_key(value: str, theirs: TheirValues) -> Outcome:
    """Takes the accuracy, which 'overall' is, too, with the built-in grader."""
    built_in = reward_function(theirs["worker.reward.reward_function"], theirs).settings.get("reward.reward_function")
    if value == "accuracy" or (value == "overall" and built_in == AUTHORS_GRADER_HERE):
        return Outcome(dropped="groups are kept by accuracy")
    return Outcome(
        refused="groups are kept by the 'accuracy' of the reward function; set algorithm.filter_key=accuracy, and have "
        "the function return under that name what decides"
    )


def shaping(value: bool, theirs: TheirValues) -> Outcome:
    """Takes advantage shaping, which does nothing there without the token filter."""
    if value and not theirs.shapes:
        said = "does nothing there without use_vppo_on_perception"
        return becomes("algorithm.use_advantage_shaping", False, comment=f"theirs: true, which {said}", differs=said)
    return becomes("algorithm.use_advantage_shaping", value)


def scaling_min(value: float, theirs: TheirValues) -> Outcome:
    """Takes beta_min."""
    if not theirs.shapes:
        return Outcome(dropped="without effect while advantages are not shaped")
    return becomes("algorithm.advantage_scaling_min", value)


def most_draws(value: int, theirs: TheirValues) -> Outcome:
    """Takes the most prompts of a step. Rounds of mini_rollout_batch_size are counted in those of a whole batch."""
    end = "at the limit a step trains on the groups that it has; there the run ends"
    if value <= 0:
        return becomes("algorithm.max_try_make_batch", NO_LIMIT, comment="theirs: no limit", differs=end)
    batch = theirs["data.rollout_batch_size"]
    round_size = theirs["data.mini_rollout_batch_size"] or batch
    comment = "" if round_size == batch else f"theirs: {value} rounds of {round_size} prompts"
    batches = math.ceil(value * round_size / batch)
    return becomes("algorithm.max_try_make_batch", batches, comment=comment, differs=end)


# --- Trainer ----------------------------------------------------------------------------------------------------------


def devices(value: int, theirs: TheirValues) -> Outcome:
    """Takes the GPUs as devices of the authors' scopes. Those that share a sequence count as one."""
    if not theirs.shapes:
        return Outcome(dropped="the size of a job is given when it starts")
    shared = theirs["worker.actor.ulysses_size"]
    comment = f"theirs: {theirs['trainer.nnodes']} x {theirs['trainer.n_gpus_per_node']} GPUs" + (
        f", {shared} to a sequence" if shared > 1 else ""
    )
    return becomes("algorithm.reference_devices", theirs.gpus // shared, comment=comment)


def epochs(value: int, theirs: TheirValues) -> Outcome:
    """Takes the passes over the data, unless the steps are given."""
    if theirs["trainer.max_steps"] is not None:
        return Outcome(dropped="without effect next to trainer.max_steps")
    return becomes("trainer.total_epochs", value)


def val_freq(value: int, theirs: TheirValues) -> Outcome:
    """Takes the steps between validations. All numbers below 1 mean at the end alone, as -1 does here."""
    return becomes("trainer.val_freq", value if value > 0 else -1)


def save_freq(value: int, theirs: TheirValues) -> Outcome:
    """Takes the steps between checkpoints, likewise."""
    return becomes("trainer.save_freq", value if value > 0 else -1)


def save_limit(value: int, theirs: TheirValues) -> Outcome:
    """Takes the number of checkpoints that are kept. All numbers below 1 mean all, as -1 does here."""
    return becomes("trainer.save_limit", value if value > 0 else -1)


def loggers(value: tuple[str, ...], theirs: TheirValues) -> Outcome:
    """Takes the services; the terminal, a file and TensorBoard have the metrics always."""
    services = [name for name in value if name not in ("console", "tensorboard", "file")]
    known = get_args(LoggerService)
    if unknown := [name for name in services if name not in known]:
        return Outcome(refused=f"{', '.join(unknown)} is no logger here; set {' or '.join(known)}, or leave it out")
    return becomes("trainer.loggers", services)


def save_path(value: str | None, theirs: TheirValues) -> Outcome:
    """Takes a folder of checkpoints that ends in project and experiment, as ours do."""
    if value is None:
        return Outcome(dropped="checkpoints are in runs_dir/project_name/experiment_name")
    path = Path(value)
    names = (theirs["trainer.project_name"], theirs["trainer.experiment_name"])
    if path.parts[-2:] == names:
        return becomes("trainer.runs_dir", str(path.parent.parent))
    return Outcome(
        refused=f"a run is in runs_dir/project_name/experiment_name here, so a folder ends in {'/'.join(names)}; leave "
        "it out, and set trainer.runs_dir in our file"
    )


def load_path(value: str | None, theirs: TheirValues) -> Outcome:
    """Takes a checkpoint of ours. Theirs hold FSDP's shards."""
    if value is None:
        return becomes("trainer.load_checkpoint_path", None)
    found = theirs.folders.find(value)
    if found is None or not (found / "trainer_state.json").is_file():
        return Outcome(
            refused=f"{value} is no checkpoint of ours, and theirs hold FSDP's shards; merge one by their "
            "model_merger.py, set worker.actor.model.model_path to the result, and leave this out"
        )
    return becomes("trainer.load_checkpoint_path", path_as_written(found))
