"""VPPO, top to bottom (paper section 3). Every rank runs these lines.

DAPO runs the same steps, with one view in step 4, and in step 5 one advantage per response, which all of its tokens
share. GRPO also keeps every group in step 3. VPPO adds two things:

- Step 4 scores each response twice, with its image and with the image perturbed: what that changes is the dependency of
  each token.
- Step 5 scales a response's advantage by its mean dependency (Eq. 5), and leaves the gradient to the tokens that depend
  most (Eq. 4).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.mismatch import rollout_mismatch
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.observability.phases import ADVANTAGE, SAMPLE, SCORE, SYNC, UPDATE, VALIDATE
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.scorer import Views
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.setup.settings import vppo_settings
from megatron_vppo.system.heap import return_freed_memory
from megatron_vppo.system.stop_signals import StopRequested
from megatron_vppo.system.watchdog import Watchdog
from megatron_vppo.trainer.checkpointer import Checkpointer
from megatron_vppo.trainer.collect import Collector
from megatron_vppo.trainer.placement import Placement
from megatron_vppo.trainer.recorder import Recorder
from megatron_vppo.trainer.stopping import Stopping
from megatron_vppo.trainer.validate import Validator


@dataclass(frozen=True)
class Run:
    """Everything the loop drives, built and connected; see run.py."""

    config: RunConfig
    policy: MegatronPolicy
    placement: Placement
    sampler: EngineSampler
    collector: Collector
    validator: Validator | None
    log: RunLog
    start_step: int
    """The step whose weights are loaded; 0 for a fresh run."""
    total_steps: int
    checkpointer: Checkpointer
    recorder: Recorder
    watchdog: Watchdog
    stopping: Stopping
    unfinished_step: dict[str, Any] | None = None
    """The numbers of `start_step`, whose validation was cut off, see RunLog.pending; None: its line is written."""


class ValidationCut(StopRequested):
    """The run ends in the middle of a validation; the weights are those of the step itself."""

    def __init__(self, line: dict[str, Any]) -> None:
        """`line`: the numbers of the step without its validation."""
        super().__init__()
        self.line = line


def train(run: Run) -> bool:
    """Trains from the loaded weights to the last step. Returns False if the run has to stop before (stopping.py)."""
    config, log, stopping, watch = run.config, run.log, run.stopping, run.watchdog.watch
    run.placement.syncing()
    log.add_all(run.sampler.send_weights(run.policy.hf_weights(), version=run.start_step))
    try:
        _finish_start_step(run)
    except StopRequested:
        return _stop(run, run.start_step)

    for step in range(run.start_step + 1, run.total_steps + 1):
        _settle_checkpoint(run, wait=False)
        if stopping.before_step():
            return _stop(run, step - 1)
        place = run.collector.place()
        try:
            with stopping.durations.time("step"), log.step(step), watch("step", f"step {step}"):
                take_step(run, step)
                # 8. Validate, write the step's line of metrics, save a checkpoint. A resume drops lines after its
                # checkpoint.
                if run.validator and is_due(step, config.trainer.val_freq, run.total_steps):
                    _validate(run, run.validator, step)
        except ValidationCut as cut:
            return _stop(run, step, unfinished_step=cut.line)
        except StopRequested:
            run.collector.go_back_to(place)
            return _stop(run, step - 1)
        return_freed_memory()
        if is_due(step, config.trainer.save_freq, run.total_steps):
            _settle_checkpoint(run, wait=True)
            run.placement.writing()
            with stopping.durations.time("checkpoint"), watch("checkpoint"):
                run.recorder.wait()  # a resume finds the records of every step up to its checkpoint
                run.checkpointer.save(step)
    _settle_checkpoint(run, wait=True)
    return True


def take_step(run: Run, step: int) -> None:
    """Takes one training step. A step without a usable group is counted and changes nothing.

    Raises StopRequested if the run is to end before the update, which is where weights change.
    """
    config, policy, placement, sampler = run.config, run.policy, run.placement, run.sampler
    log, stopping = run.log, run.stopping
    settings = vppo_settings(config)
    views: Views = "both" if settings.needs_perturbed_view else "original"

    # 1-3. Sample groups of responses, grade them, keep the groups with right and wrong ones.
    with log.span(SAMPLE.span):
        placement.sampling()
    groups = run.collector.groups(step, log)
    log.add("rollout/skipped_steps", float(not groups))
    if groups:
        stopping.at_scoring()
        graded = [item for group in groups for item in group]

        # 4. How much did each token need the image? Both views in one forward pass of the old policy.
        with log.span(SCORE.span):
            placement.scoring()
            responses = [item.response for item in graded]
            scores = policy.score(
                responses,
                step=step,
                views=views,
                divergence=settings.divergence,
                with_visual_focus=settings.needs_visual_focus,
                boundary=stopping.at_scoring,
            )
        log.add_all(rollout_mismatch(responses, scores, bound=config.rollout.logprob_diff_bound))

        # 5. Advantages within each group, scaled by mean dependency; the tokens that get gradient.
        with log.span(ADVANTAGE.span):
            minibatches = assemble(
                graded,
                scores,
                settings=settings,
                responses_per_minibatch=config.actor.global_batch_size * config.rollout.n,
                data_parallel_size=policy.layout.data,
                micro_batch_size=config.actor.micro_batch_size_per_device_for_update,
                longest_response=config.data.max_response_length,
            )

        # 6. Clipped policy updates, one per mini-batch. The weights are those of another step from here on.
        stopping.before_update()
        with log.span(UPDATE.span), stopping.durations.time("update"):
            placement.updating()
            log.add("actor/lr", policy.trainable.set_step(step))
            for _ in range(config.actor.ppo_epochs):
                for minibatch in minibatches:
                    log.add_all({**minibatch.metrics, **policy.update(minibatch.batch)})

        # 7. Send the new weights to the engines, which have the frozen ones already.
        with log.span(SYNC.span), stopping.durations.time("weight sync"):
            placement.syncing()
            trained = policy.hf_weights(only_trained=True)
            log.add_all(sampler.send_weights(trained, version=step, kept=policy.frozen_hf_names))
        run.recorder.write(step, minibatches, groups, scores)
    log.add("rollout/engine_restarts", sampler.take_restarts())


def _validate(run: Run, validator: Validator, step: int) -> None:
    """Adds the validation to the step's line. Raises ValidationCut if the run is to end before that."""
    line = run.log.pending()
    with run.log.span(VALIDATE.span), run.watchdog.watch("validation"):
        run.placement.sampling()
        try:
            metrics = validator.run(step)
        except StopRequested as cut:
            raise ValidationCut(line) from cut
    run.log.add_all(metrics)
    run.checkpointer.note_validation(step, metrics["val/accuracy"])


def _finish_start_step(run: Run) -> None:
    """Does what the step of the loaded weights lacks: the validation before training, or one that was cut off."""
    before_train = run.validator and run.start_step == 0 and run.config.trainer.val_before_train
    if run.unfinished_step is None and not before_train:
        return
    with run.log.step(run.start_step):
        run.log.restore(run.unfinished_step or {})
        if run.validator:
            _validate(run, run.validator, run.start_step)


def _stop(run: Run, step: int, *, unfinished_step: dict[str, Any] | None = None) -> bool:
    """Saves a checkpoint of `step`, the last one that is done, unless there is one. Returns False."""
    run.stopping.leaving()
    run.sampler.close()
    run.placement.without_engines()
    run.recorder.wait()
    is_saved = step == run.start_step or is_due(step, run.config.trainer.save_freq, run.total_steps)
    _settle_checkpoint(run, wait=True)
    if unfinished_step is not None or not is_saved:
        run.placement.writing()
        with run.stopping.durations.time("checkpoint"), run.watchdog.watch("checkpoint"):
            run.checkpointer.save(step, unfinished_step=unfinished_step)
    _settle_checkpoint(run, wait=True)
    return False


def _settle_checkpoint(run: Run, *, wait: bool) -> None:
    """Puts the checkpoint that is being written in its place, if its files are there or the run waits for them."""
    with run.watchdog.watch("checkpoint files") if wait else nullcontext():
        seconds = run.checkpointer.settle(wait=wait)
    if seconds is not None:
        run.stopping.durations.add("checkpoint", seconds)


def is_due(step: int, freq: int, total_steps: int) -> bool:
    """Returns True every `freq` steps and after the last one; with a negative `freq` only after the last one."""
    return step == total_steps or (freq > 0 and step % freq == 0)
