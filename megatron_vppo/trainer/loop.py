"""VPPO, top to bottom (paper section 3). Every rank runs these lines.

DAPO runs the same steps, with one view in step 4, and in step 5 one advantage per response, which all of its tokens
share. GRPO also keeps every group in step 3. VPPO adds two things:

- Step 4 scores each response twice, with its image and with the image perturbed: what that changes is the dependency of
  each token.
- Step 5 scales a response's advantage by its mean dependency (Eq. 5), and leaves the gradient to the tokens that depend
  most (Eq. 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.mismatch import rollout_mismatch
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.observability.phases import ADVANTAGE, SAMPLE, SCORE, SYNC, UPDATE, VALIDATE
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.scorer import Views
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.setup.settings import vppo_settings
from megatron_vppo.trainer.checkpointer import Checkpointer
from megatron_vppo.trainer.collect import Collector
from megatron_vppo.trainer.placement import Placement
from megatron_vppo.trainer.recorder import Recorder
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


def train(run: Run) -> None:
    """Trains from the loaded weights to the last step. A step without a usable group is counted and changes nothing."""
    config, policy, placement, sampler, log = run.config, run.policy, run.placement, run.sampler, run.log
    settings = vppo_settings(config)
    views: Views = "both" if settings.needs_dependency else "original"

    placement.syncing()
    log.add_all(sampler.send_weights(policy.hf_weights(), version=run.start_step))
    if run.validator and run.start_step == 0 and config.trainer.val_before_train:
        with log.step(0), log.span(VALIDATE.span):
            placement.sampling()
            log.add_all(run.validator.run())

    for step in range(run.start_step + 1, run.total_steps + 1):
        with log.step(step):
            # 1-3. Sample groups of responses, grade them, keep the groups with right and wrong ones.
            with log.span(SAMPLE.span):
                placement.sampling()
            groups = run.collector.groups(step, log)
            log.add("rollout/skipped_steps", float(not groups))
            if groups:
                graded = [item for group in groups for item in group]

                # 4. How much did each token need the image? Both views in one forward pass of the old policy.
                with log.span(SCORE.span):
                    placement.scoring()
                    responses = [item.response for item in graded]
                    scores = policy.score(responses, step=step, views=views, divergence=settings.divergence)
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
                    )

                # 6. Clipped policy updates, one per mini-batch.
                with log.span(UPDATE.span):
                    placement.updating()
                    log.add("actor/lr", policy.trainable.set_step(step))
                    for _ in range(config.actor.ppo_epochs):
                        for minibatch in minibatches:
                            log.add_all({**minibatch.metrics, **policy.update(minibatch.batch)})

                # 7. Send the new weights to the engines, which have the frozen ones already.
                with log.span(SYNC.span):
                    placement.syncing()
                    trained = policy.hf_weights(only_trained=True)
                    log.add_all(sampler.send_weights(trained, version=step, kept=policy.frozen_hf_names))
                run.recorder.write(step, minibatches, groups, scores)

            # 8. Validate, write the step's line of metrics, save a checkpoint. A resume drops lines after its
            # checkpoint.
            if run.validator and is_due(step, config.trainer.val_freq, run.total_steps):
                with log.span(VALIDATE.span):
                    placement.sampling()
                    validation = run.validator.run()
                log.add_all(validation)
                run.checkpointer.note_validation(step, validation["val/accuracy"])
        if is_due(step, config.trainer.save_freq, run.total_steps):
            placement.writing()
            run.checkpointer.save(step)


def is_due(step: int, freq: int, total_steps: int) -> bool:
    """Returns True every `freq` steps and after the last one; with a negative `freq` only after the last one."""
    return step == total_steps or (freq > 0 and step % freq == 0)
