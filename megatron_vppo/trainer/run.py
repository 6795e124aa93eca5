"""A training run, opened from its configuration, trained, exported, and closed again in every case."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vppo.config.checks import check_warmup
from megatron_vppo.config.data_files import files_of, weights_of
from megatron_vppo.config.load import save_resolved
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.plain_think import THINK_TAGS, save_plain_tokenizer, think_token_ids
from megatron_vppo.data.prompt_sets import PromptSets
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.models.model_files import ModelFiles, check_weight_names, open_without_weights
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.observability.progress import Progress
from megatron_vppo.observability.record_writer import RecordWriter
from megatron_vppo.observability.report import write_report
from megatron_vppo.observability.rollouts import cut_rollouts_after
from megatron_vppo.observability.validations import VALIDATIONS
from megatron_vppo.parallel.all_reduce_speed import measure_all_reduce
from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps, set_aside_after
from megatron_vppo.parallel.checkpoint_keep import forget_best_after
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.offload import TrainerMemory
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.rollout.carry import Carry
from megatron_vppo.rollout.recovery import EngineRecovery
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.setup.attempts import ENDED_ON_REQUEST, FINISHED, begin_attempt, end_attempt
from megatron_vppo.setup.by_machine import by_machine, chosen_by_machine
from megatron_vppo.setup.engines import EnginePlace, await_engines, engines_on_gpus, start_engine
from megatron_vppo.setup.hardware import groups_cut, prompts_apart, slower_layers
from megatron_vppo.setup.inputs import RunInputs, open_inputs, read_prompts
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.policy import make_policy
from megatron_vppo.setup.preflight import check_run
from megatron_vppo.setup.resume import chosen_step
from megatron_vppo.setup.rewards import open_reward_pool
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.setup.sampling import train_sampling, val_sampling
from megatron_vppo.setup.world import World, show_world
from megatron_vppo.system.agreement import any_rank, on_every_rank
from megatron_vppo.system.attempt import attempt_name
from megatron_vppo.system.requeue import do_not_requeue
from megatron_vppo.system.stop_signals import StopSignals, ignore_stop_signals
from megatron_vppo.system.time_limit import job_end_time
from megatron_vppo.system.watchdog import Watchdog
from megatron_vppo.system.whole import naming_file
from megatron_vppo.trainer.checkpointer import Checkpointer, ResumePoint
from megatron_vppo.trainer.collect import Collector
from megatron_vppo.trainer.format_share import FormatShare
from megatron_vppo.trainer.grader import Grader
from megatron_vppo.trainer.keep_rate import KeepRate
from megatron_vppo.trainer.loop import Run, train
from megatron_vppo.trainer.placement import Placement
from megatron_vppo.trainer.policy_side import PolicySide
from megatron_vppo.trainer.recorder import Recorder
from megatron_vppo.trainer.stopping import Stopping
from megatron_vppo.trainer.validate import Validator
from megatron_vppo.weights.stream import save_hf

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Shows a line to the user; called on rank 0 only."""


def run_training(config: RunConfig, world: World, *, say: Say, signals: StopSignals) -> bool:
    """Runs one trainer rank from start to finish: train, export, report.

    Returns:
        True: the run is finished. False: it was stopped on request, and its state is saved.
    """
    layout = init_layout(
        tensor=config.parallel.tensor_model_parallel_size,
        pipeline=config.parallel.pipeline_model_parallel_size,
        context=config.parallel.context_parallel_size,
        virtual_stages=config.parallel.virtual_pipeline_model_parallel_size,
        vision_split=config.parallel.vision_split,
        data=config.parallel.data_parallel_size,
        device=world.device,
        timeout_seconds=config.parallel.collective_timeout_seconds,
    )
    if layout.device.type == "cpu":
        torch.set_num_threads(config.parallel.threads_per_rank)
    speed = measure_all_reduce(layout.device) if world.num_hosts > 1 else None
    source = model_folder(config.model.path)
    files = open_without_weights(source)
    check_run(config, files.hf_config, world_size=layout.world_size, on_gpu=layout.device.type == "cuda")
    on_every_rank(partial(_check_weights, source, files, layout))
    folder = RunFolder.of(config.trainer)
    if layout.rank == 0:
        show_world(world, speed, logs=folder.logs / attempt_name(), say=say)
    with _open_run(config, world, layout, folder, source, files, say, signals) as run:
        finished = train(run)
        target = folder.huggingface(run.total_steps)
        if (
            finished
            and config.trainer.save_hf
            and (run.start_step < run.total_steps or not from_rank_zero(target.is_dir))
        ):
            run.placement.writing()
            finish = None
            if config.data.plain_think_tokens:
                own = think_token_ids(files.processor.tokenizer)
                finish = partial(save_plain_tokenizer, run.recorder.tokenizer, own_ids=own)
            save_hf(run.policy.hf_weights(), target, source=source, is_writer=layout.rank == 0, finish=finish)
    if not finished:
        ignore_stop_signals()  # srun ends all ranks by SIGTERM when the first one has ended with this status
        dist.barrier()  # the checkpoint is in its place, and the logs are closed
        if layout.rank == 0:
            end_attempt(folder.root, ENDED_ON_REQUEST)
            say(f"stopped {run.stopping.reason or 'on request'}; the same command goes on from here")
        dist.barrier()  # when the first rank has ended, srun kills the others after KillWait
        destroy_layout()
        return False
    if layout.rank == 0:
        say(f"report: {write_report(folder.root)}")
        end_attempt(folder.root, FINISHED)
        do_not_requeue(folder.root, f"finished: step {config.trainer.total_steps or 'last'}")
    destroy_layout()
    return True


def _check_weights(source: Path, files: ModelFiles, layout: Layout) -> None:
    """Checks the names of the weights for all ranks; each of them would read the same headers."""
    if layout.rank == 0:
        check_weight_names(source, files.hf_config)


@contextmanager
def _open_run(
    config: RunConfig,
    world: World,
    layout: Layout,
    folder: RunFolder,
    source: Path,
    files: ModelFiles,
    say: Say,
    signals: StopSignals,
) -> Iterator[Run]:
    """Builds the parts of a run and connects them.

    The engine is started first. On GPUs the rest waits until it has loaded, because vLLM measures while it starts how
    much memory is free. On a machine without GPUs it loads while the rest is built.
    """
    is_writer, on_gpus = layout.rank == 0, layout.device.type == "cuda"
    inputs = open_inputs(config, files)
    images, tokenizer, eos = inputs.images, inputs.processor.tokenizer, inputs.eos_ids
    stopping = _stopping(config, signals, is_writer=is_writer)
    on_every_rank(partial(_begin_attempt, config, layout, folder))
    with ExitStack() as stack:
        logs = folder.logs / attempt_name()
        engine = start_engine(config, layout, source, world=world, inputs=inputs, logs=logs)
        sampler = EngineSampler(
            engine.client, engine_index=engine.index, num_engines=engine.count, images=images,
            verify=config.rollout.verify_weights, store=world.meeting.store("engines"),
            max_num_seqs=engine.max_num_seqs, stop_wanted=stopping.wanted,
        )  # fmt: skip
        stack.callback(sampler.close)
        grader = _grader(config, inputs, world, say)
        stack.callback(grader.close)
        stream = _stream(config, inputs, say) if is_writer else None
        if on_gpus:
            await_engines(engine, timeout_seconds=config.rollout.start_timeout_seconds)
        held_out = _validation_prompts(config, inputs, say) if is_writer else PromptSets([])
        total_steps = from_rank_zero(partial(_total_steps, config, stream))

        if is_writer:
            _say_what_follows(config, on_gpus, engine.count, say)
        policy = make_policy(config, layout, source, inputs, total_steps=total_steps)
        keep_rate = KeepRate()
        carry = Carry(stream)
        checkpointer = Checkpointer(
            config.trainer, folder, layout, policy.trainable, stream, keep_rate, carry, say,
            asynchronous=by_machine(config, on_gpu=on_gpus).async_checkpoints,
            plain_think_tokens=config.data.plain_think_tokens,
        )  # fmt: skip
        resumed = checkpointer.resume()
        _check_reached(folder, resumed.step, total_steps=total_steps)
        if is_writer:
            _pass_over_later_checkpoints(folder, resumed.step, say)
        log = _open_log(config, layout, folder, resumed, total_steps=total_steps)
        stack.callback(log.close)
        if not on_gpus:
            await_engines(engine, timeout_seconds=config.rollout.start_timeout_seconds)
        placement = _placement(config, policy, engine)
        sampler.recover_with(_recovery(config, policy, placement, engine))
        writer = RecordWriter(folder.root) if is_writer and config.trainer.save_rollouts else None
        recorder = Recorder(tokenizer, images, config.algorithm.perturb.per, writer)
        stack.callback(recorder.close)
        share = _format_share(config, inputs, say)
        validator = Validator(config, held_out, sampler, grader, val_sampling(config, eos), recorder, share)
        signals.begin_work()
        yield Run(
            config=config,
            policy=policy,
            placement=placement,
            sampler=sampler,
            collector=Collector(config, stream, keep_rate, carry, sampler, grader, train_sampling(config, eos), share),
            validator=None if config.data.val_files is None else validator,
            log=log,
            start_step=resumed.step,
            total_steps=total_steps,
            checkpointer=checkpointer,
            recorder=recorder,
            stopping=stopping,
            unfinished_step=resumed.unfinished_step,
            watchdog=_watchdog(config),
        )


def _say_what_follows(config: RunConfig, on_gpu: bool, num_engines: int, say: Say) -> None:
    """Says what the machine and the settings bring about that the file of the run does not show."""
    notes = (
        slower_layers(config, on_gpu=on_gpu),
        prompts_apart(config),
        groups_cut(config),
        chosen_by_machine(config, on_gpu=on_gpu),
        engines_on_gpus(config, count=num_engines) if on_gpu else None,
    )
    for note in filter(None, notes):
        say(note)


def _begin_attempt(config: RunConfig, layout: Layout, folder: RunFolder) -> None:
    """Writes down that this attempt begins, before anything that may fail in it."""
    if layout.rank == 0:
        step = chosen_step(config.trainer, folder, checkpoint_steps(folder.checkpoints))
        begin_attempt(folder.root, step, most_without_progress=config.trainer.max_attempts_without_progress)


# --- The parts of a run -----------------------------------------------------------------------------------------------


def _stream(config: RunConfig, inputs: RunInputs, say: Say) -> PromptStream:
    prompts = read_prompts(config, inputs, "train")
    for one in prompts.sets:
        say(f"{one.split} data: {one.report.summary()}")
    stream = PromptStream(
        prompts, seed=config.trainer.seed, shuffle=config.data.shuffle, weights=weights_of(config.data)
    )
    if mixture := stream.describe():
        say(mixture)
    return stream


def _validation_prompts(config: RunConfig, inputs: RunInputs, say: Say) -> PromptSets:
    prompts = read_prompts(config, inputs, "val")
    for one in prompts.sets:
        say(f"{one.split.replace('val', 'validation', 1)} data: {one.report.summary()}")
    return prompts


def _total_steps(config: RunConfig, stream: PromptStream | None) -> int:
    assert stream is not None, "prompts are counted on rank 0"
    steps_per_epoch = stream.steps_per_epoch(config.data.rollout_batch_size)
    if steps_per_epoch == 0:
        raise ValueError(
            f"data.rollout_batch_size={config.data.rollout_batch_size} is more than the usable prompts of "
            f"{' and '.join(file.path for file in files_of(config.data, 'train').values())}; lower it"
        )
    stream.check_draws(config.data.rollout_batch_size)
    total_steps = config.trainer.total_steps or config.trainer.total_epochs * steps_per_epoch
    check_warmup(config, total_steps=total_steps)
    return total_steps


def _stopping(config: RunConfig, signals: StopSignals, *, is_writer: bool) -> Stopping:
    return Stopping(
        signals,
        end_time=job_end_time() if is_writer else None,
        stop_within_seconds=config.trainer.stop_within_seconds,
        any_rank=any_rank,
        warn=logger.warning if is_writer else None,
    )


def _grader(config: RunConfig, inputs: RunInputs, world: World, say: Say) -> Grader:
    pool, tokenizer = None, inputs.processor.tokenizer
    if world.rank == 0:
        pool = open_reward_pool(config.reward, config.data, inputs.datasets, tokenizer, world.places, say=say)
    return Grader(pool, max_error_share=config.reward.max_error_share)


def _format_share(config: RunConfig, inputs: RunInputs, say: Say) -> FormatShare:
    asking = (inputs.builder.template, config.data.system_prompt)
    return FormatShare(
        config.reward.reward_function,
        asks=any(THINK_TAGS[0] in text for text in asking if text is not None),
        has_tokens=bool(think_token_ids(inputs.processor.tokenizer)),
        say=say,
    )


def _placement(config: RunConfig, policy: MegatronPolicy, engine: EnginePlace) -> Placement:
    if engine.sleeps and engine.client is not None:
        engine.client.preserve(policy.frozen_hf_names)
    return Placement(
        TrainerMemory(policy.trainable),
        engine.client,
        offloads=config.actor.offload,
        engines_sleep=engine.sleeps,
        barrier=dist.barrier,
    )


def _recovery(config: RunConfig, policy: MegatronPolicy, placement: Placement, engine: EnginePlace) -> EngineRecovery:
    return EngineRecovery(
        engine.client,
        PolicySide(policy, placement),
        name=f"rollout engine {engine.index}",
        most_restarts=config.rollout.max_engine_restarts,
        start_timeout_seconds=config.rollout.start_timeout_seconds,
    )


def _watchdog(config: RunConfig) -> Watchdog:
    restart_seconds = config.rollout.engine_timeout_seconds + config.rollout.start_timeout_seconds
    return Watchdog(factor=config.trainer.watchdog, least_seconds=restart_seconds)


def _check_reached(folder: RunFolder, start_step: int, *, total_steps: int) -> None:
    """Refuses to go on from a step after the last one."""
    if start_step > total_steps:
        raise ValueError(
            f"{folder.root} has reached step {start_step}, trainer.total_steps is {total_steps}; raise it, or set "
            "another trainer.experiment_name"
        )


def _pass_over_later_checkpoints(folder: RunFolder, start_step: int, say: Say) -> None:
    """Sets aside the checkpoints after the one that the run goes on from. The loop saves those steps again."""
    if aside := set_aside_after(folder.checkpoints, start_step):
        forget_best_after(folder.checkpoints, start_step)
        say(
            f"goes on from step {start_step}; later checkpoints are set aside, to be deleted by you: "
            f"{', '.join(map(str, aside))}. If trainer.resume_step is set, leave it out at the next start"
        )


def _open_log(
    config: RunConfig, layout: Layout, folder: RunFolder, resumed: ResumePoint, *, total_steps: int
) -> RunLog:
    """Opens the log, and brings the run folder to the state of the step that was loaded."""
    is_writer, start_step = layout.rank == 0, resumed.step
    last_line = start_step if resumed.unfinished_step is None else start_step - 1
    if is_writer:
        folder.root.mkdir(parents=True, exist_ok=True)
        with naming_file(folder.config):
            save_resolved(config, folder.config)
        cut_rollouts_after(folder.root, start_step)
        VALIDATIONS.cut_after(folder.root, last_line if start_step else -1)
    return RunLog(
        folder.root,
        is_writer=is_writer,
        resume_step=last_line if start_step else None,
        loggers=config.trainer.loggers,
        project=config.trainer.project_name,
        experiment=config.trainer.experiment_name,
        config=config.model_dump(mode="json"),
        num_devices=layout.world_size,
        progress=Progress(total_steps=total_steps),
    )
