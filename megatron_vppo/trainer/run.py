"""From a configuration to a run whose parts are built and connected, and taken down again in every case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vppo.algorithm.assemble import Minibatch
from megatron_vppo.algorithm.types import Prompt, Scores
from megatron_vppo.config.load import save_resolved
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.observability.progress import Progress
from megatron_vppo.observability.report import write_report
from megatron_vppo.observability.rollouts import cut_rollouts_after, write_rollouts
from megatron_vppo.parallel.checkpoint import latest_step, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.offload import TrainerMemory
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.setup.engines import EnginePlace, await_engines, start_engine
from megatron_vppo.setup.inputs import RunInputs, open_inputs, read_prompts
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.policy import make_policy
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.setup.sampling import eos_ids, train_sampling, val_sampling
from megatron_vppo.trainer.collect import Collector, Group
from megatron_vppo.trainer.grader import Grader
from megatron_vppo.trainer.loop import Run, train
from megatron_vppo.trainer.placement import Placement
from megatron_vppo.trainer.recorder import Recorder
from megatron_vppo.trainer.validate import Validator
from megatron_vppo.weights.stream import save_hf


def run_training(config: RunConfig) -> None:
    """One trainer rank, from start to finish: train, export, report."""
    layout = init_layout(
        tensor=config.parallel.tensor_model_parallel_size,
        pipeline=config.parallel.pipeline_model_parallel_size,
        context=config.parallel.context_parallel_size,
        virtual_stages=config.parallel.virtual_pipeline_model_parallel_size,
        vision_split=config.parallel.vision_split,
        data=config.parallel.data_parallel_size,
        timeout_seconds=config.parallel.collective_timeout_seconds,
    )
    if layout.device.type == "cpu":
        torch.set_num_threads(config.parallel.threads_per_rank)
    folder = RunFolder(Path(config.trainer.runs_dir) / config.trainer.project_name / config.trainer.experiment_name)
    with _open_run(config, layout, folder) as (run, source):
        train(run)
        target = folder.huggingface(run.total_steps)
        if config.trainer.save_hf and (run.start_step < run.total_steps or not from_rank_zero(target.is_dir)):
            run.placement.writing()
            save_hf(run.policy.hf_weights(), target, source=source, is_writer=layout.rank == 0)
    if layout.rank == 0:
        print(f"report: {write_report(folder.root)}", flush=True)
    destroy_layout()


@contextmanager
def _open_run(config: RunConfig, layout: Layout, folder: RunFolder) -> Iterator[tuple[Run, Path]]:
    """Builds everything. The engine starts first: without GPUs it loads while the rest is built, with them before."""
    is_writer = layout.rank == 0
    source = model_folder(config.model.path)
    inputs = open_inputs(config, source)
    processor, images = inputs.processor, inputs.images
    with ExitStack() as stack:
        engine = start_engine(config, layout, source, images=images, hf_config=inputs.hf_config, logs=folder.logs)
        sampler = EngineSampler(
            engine.client, engine_index=engine.index, num_engines=engine.count, images=images,
            verify=config.rollout.verify_weights,
        )  # fmt: skip
        stack.callback(sampler.close)
        grader = Grader(_reward_pool(config) if is_writer else None, _decoder(processor.tokenizer))
        stack.callback(grader.close)
        stream = _stream(config, inputs) if is_writer else None
        on_gpus = layout.device.type == "cuda"
        if on_gpus:  # vLLM measures while it starts how much is free: the trainer takes its memory only afterwards
            await_engines(engine, timeout_seconds=config.rollout.start_timeout_seconds)
        held_out = from_rank_zero(partial(_validation_prompts, config, inputs))
        total_steps = from_rank_zero(partial(_total_steps, config, stream))
        policy = make_policy(config, layout, source, inputs, total_steps=total_steps)

        start_step = from_rank_zero(partial(_start_step, config, folder))
        if start_step:
            state = load_checkpoint(folder.checkpoints, step=start_step, trainable=policy.trainable, layout=layout)
            if stream is not None:
                stream.load_state_dict(state["data"])
        if start_step > total_steps:
            raise ValueError(
                f"{folder.root} has reached step {start_step}, trainer.total_steps is {total_steps}; raise it, or set "
                "another trainer.experiment_name"
            )
        log = _open_log(config, layout, folder, start_step=start_step, total_steps=total_steps)
        stack.callback(log.close)
        if not on_gpus:
            await_engines(engine, timeout_seconds=config.rollout.start_timeout_seconds)
        eos = eos_ids(source, processor.tokenizer)
        yield Run(
            config=config,
            policy=policy,
            placement=_placement(config, policy, engine),
            sampler=sampler,
            collector=Collector(config, stream, sampler, grader, train_sampling(config, eos)),
            validator=Validator(config, held_out, sampler, grader, val_sampling(config, eos)) if held_out else None,
            log=log,
            start_step=start_step,
            total_steps=total_steps,
            save=partial(_save, config, layout, folder, policy, stream),
            record=partial(_record, config, layout, folder, Recorder(processor.tokenizer, images, policy)),
        ), source  # fmt: skip


def _stream(config: RunConfig, inputs: RunInputs) -> PromptStream:
    prompts = read_prompts(config, inputs, "train")
    print(f"train data: {prompts.report.summary()}", flush=True)
    return PromptStream(prompts, seed=config.trainer.seed, shuffle=config.data.shuffle)


def _validation_prompts(config: RunConfig, inputs: RunInputs) -> list[Prompt]:
    if "val" not in inputs.datasets:
        return []
    prompts = read_prompts(config, inputs, "val")
    print(f"validation data: {prompts.report.summary()}", flush=True)
    return list(prompts)


def _reward_pool(config: RunConfig) -> RewardPool:
    return RewardPool(
        config.reward.reward_function,
        reward_type=config.reward.reward_type,
        num_workers=config.reward.num_workers,
        timeout_seconds=config.reward.timeout_seconds,
    )


def _decoder(tokenizer: Any) -> Any:
    return partial(tokenizer.decode, skip_special_tokens=True)


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


def _start_step(config: RunConfig, folder: RunFolder) -> int:
    """The step of the newest complete checkpoint; 0: start anew."""
    newest = latest_step(folder.checkpoints)
    if newest is not None and not config.trainer.resume:
        raise ValueError(
            f"trainer.resume=false, but {folder.root} holds the checkpoint of step {newest}, which a new run would mix "
            "with its own; set another trainer.experiment_name, or remove the folder"
        )
    return newest or 0


def _total_steps(config: RunConfig, stream: PromptStream | None) -> int:
    assert stream is not None, "prompts are counted on rank 0"
    steps_per_epoch = stream.steps_per_epoch(config.data.rollout_batch_size)
    if steps_per_epoch == 0:
        raise ValueError(
            f"data.rollout_batch_size={config.data.rollout_batch_size} is more than the usable prompts of "
            f"{config.data.train_files}; lower it"
        )
    return config.trainer.total_steps or config.trainer.total_epochs * steps_per_epoch


def _open_log(config: RunConfig, layout: Layout, folder: RunFolder, *, start_step: int, total_steps: int) -> RunLog:
    is_writer = layout.rank == 0
    if is_writer:
        folder.root.mkdir(parents=True, exist_ok=True)
        save_resolved(config, folder.config)
        cut_rollouts_after(folder.root, start_step)
    return RunLog(
        folder.root,
        is_writer=is_writer,
        resume_step=start_step or None,
        loggers=config.trainer.loggers,
        project=config.trainer.project_name,
        experiment=config.trainer.experiment_name,
        config=config.model_dump(mode="json"),
        num_devices=layout.world_size,
        progress=Progress(total_steps=total_steps),
    )


def _save(
    config: RunConfig, layout: Layout, folder: RunFolder, policy: MegatronPolicy, stream: PromptStream | None, step: int
) -> None:
    save_checkpoint(
        folder.checkpoints,
        step=step,
        trainable=policy.trainable,
        layout=layout,
        state={"data": stream.state_dict()} if stream is not None else {},
        keep=config.trainer.save_limit,
    )


def _record(
    config: RunConfig,
    layout: Layout,
    folder: RunFolder,
    recorder: Recorder,
    step: int,
    minibatches: list[Minibatch],
    groups: list[Group],
    scores: Scores,
) -> None:
    if layout.rank == 0 and config.trainer.save_rollouts:
        write_rollouts(folder.root, step, recorder.records(step, minibatches, groups, scores))
