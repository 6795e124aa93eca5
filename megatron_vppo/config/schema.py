"""Every setting of a run: one class per component, one place per default, names as users of EasyR1 and verl know them.

Unknown keys are refused (see load.py for the message). The defaults are those of `algorithm.preset: global`; settings
marked (Preset) get another one from PRESETS under `reference`. What a user sets wins over either.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_vppo.config.choices import (
    AdvantageKind,
    BackendSetting,
    BadRows,
    CorrectionKind,
    CountedTokens,
    DependencyKind,
    Dtype,
    EntropyKind,
    Fp8Phase,
    Fp8Recipe,
    Grader,
    ImagePlace,
    KlKind,
    KlPlace,
    LoggerService,
    LossAverage,
    LrScheduleKind,
    MemoryPart,
    ModelPart,
    NamedPerturbUnit,
    NegativeAdvantages,
    PerceptionGradient,
    PerturbKind,
    PerturbSpace,
    PolicyLoss,
    Preset,
    Quantization,
    Recompute,
    ResizeMode,
    RewardType,
    SampleOrder,
    SeedKind,
    ShapingKind,
    ShapingMeanScope,
    ShapingMinScope,
    ShapingPlace,
    TextOnlyRows,
    TokenScores,
    TokenWeighting,
    TruncatedResponses,
    Unfinished,
    VerifyWeights,
    VisionSplit,
    WeightTransferSetting,
)
from megatron_vppo.config.ranges import (
    LARGEST_FLOAT,
    LARGEST_INT,
    LEAST_TEMPERATURE,
    MOST_RESPONSES,
    Count,
    CountOrZero,
    FilePath,
    FolderName,
    Pixels,
    Positive,
    PositiveOrZero,
    Share,
    ShareAboveZero,
    Text,
    Wait,
    Workers,
    holds_numbers,
)


class Section(BaseModel):
    """A group of settings: frozen, unknown names refused, the docstrings of its fields their descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false where a number belongs; pydantic would take them for 1 and 0."""
        assert info.field_name is not None, "pydantic calls it for a field"
        values = value.values() if isinstance(value, dict) else value
        given = values if isinstance(value, list | tuple | dict) else [value]
        if any(isinstance(one, bool) for one in given) and holds_numbers(cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("truth_value", "Input should be a number, not true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_no_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses Python's None where null belongs; YAML takes it for a text."""
        assert info.field_name is not None, "pydantic calls it for a field"
        if value == "None" and type(None) in get_args(cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("null", "Input should be null, which YAML does not write as None")
        return value


class DataFile(Section):
    """One of several data files: its path, and what is different for it. What is None is as `data` has it."""

    path: FilePath
    name: FolderName | None = None
    """Its name in metrics and records; None: the last part of the path."""
    weight: Positive | None = None
    """Its share of the prompts, next to the weights of the other files; None for all: every row counts alike."""
    prompt_key: Text | None = None
    answer_key: Text | None = None
    image_key: Text | None = None
    image_dir: FilePath | None = None
    image_place: ImagePlace | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


DataFiles = Annotated[
    Annotated[FilePath, Tag("path")] | Annotated[tuple[DataFile, ...], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "path"),
]
"""One path, or a list of paths and DataFiles."""


class PromptConfig(Section):
    """The settings by which an image question becomes tokens, in training and in evaluations."""

    format_prompt: FilePath | None = None
    """Jinja file that receives `content` (the problem); None: the problem as it is."""
    system_prompt: str | None = None
    """System turn; None: what the model's chat template puts there by itself."""
    max_prompt_length: Count = 4096
    """Tokens, image tokens included; longer prompts are left out, counted and reported."""
    max_response_length: Count = 2048
    """Tokens."""
    min_pixels: Pixels = 200704
    max_pixels: Pixels = 1003520
    """Pixel budget per image."""
    background: str = "white"
    """Colour behind transparent pixels: a name, or '#rrggbb'. The authors' resize drops transparency instead."""
    on_bad_row: BadRows = "error"
    plain_think_tokens: bool = False
    """Write <think> and </think> in plain pieces of text, where the tokenizer has tokens for them that the model was
    not trained with (Qwen3-VL Instruct). Those tokens are then not sampled."""
    num_workers: int = Field(default=2, ge=0, le=1024)
    """Processes that tokenise and check the data set at start; 0: in the trainer's own process."""


class DataConfig(PromptConfig):
    train_files: DataFiles
    """Parquet or JSON-lines file, folder, or hub id, as `path`, `path@split` or `repo@split`; or a list of them, of
    which each may be {path, name, weight, prompt_key, answer_key, image_key, image_dir, image_place}."""
    val_files: DataFiles | None = None
    """Held-out rows, same forms, without weights; None: no validation."""
    prompt_key: Text = "problem"
    """Column of the problems: texts, or conversations of a user's turn and others. `a.b` is the field b of a column a,
    here and in the next two."""
    answer_key: Text = "answer"
    """Column of the answers; where there is none, the last turn of a conversation is the answer."""
    image_key: Text = "images"
    image_dir: FilePath | None = None
    """Folder that relative image paths are taken from; None: the folder of the data file."""
    image_place: ImagePlace = "marks"
    """'marks': images are where the problem has <image>. 'first': in a problem without it, they come before the
    text."""
    rollout_batch_size: Count = 384
    """Prompts per training step."""
    shuffle: bool = True
    max_val_rows: Count | None = None
    """The number of rows, from the first of each file, to validate on; None: all."""


class ModelConfig(Section):
    path: FilePath
    """Hugging Face folder or hub id: config, weights, tokenizer, processor, chat template."""
    dtype: Dtype = "bfloat16"
    backend: BackendSetting = "auto"
    """Transformer layers of TransformerEngine or of plain torch; 'auto': the former where there are GPUs and it is
    installed."""
    freeze: tuple[ModelPart, ...] = ()
    """Parts that are not trained: no gradient, no optimizer state, sent to the rollout engines only once."""


class Fp8Config(Section):
    recipe: Fp8Recipe | None = None
    """Scaling of the inputs and weights of the language model's linear layers to 8 bits; None: no FP8."""
    scope: tuple[Fp8Phase, ...] = ("scoring", "update")
    """Phases that use it: scoring, which gives the two views of token dependency, and the policy update."""
    bf16_layers_at_ends: CountOrZero = 0
    """The number of language layers at the start, and of as many at the end, that stay in bfloat16 (not with
    'delayed')."""


class ParallelConfig(Section):
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    data_parallel_size: Count | None = None
    """None: as many as the devices allow (one on a machine without GPUs)."""
    context_parallel_size: Count = 1
    """Ranks that share the tokens of every sequence."""
    virtual_pipeline_model_parallel_size: Count = 1
    """Stages that each pipeline rank holds (interleaved schedule); 1: the plain schedule."""
    pipeline_layers: tuple[Count, ...] | None = None
    """Language model layers of each pipeline stage, in the order of the model; None: an even split. One entry per
    stage: pipeline size times virtual size."""
    sequence_parallel: bool | None = None
    """Between the language model's layers, tensor-parallel ranks share the tokens instead of each holding all. With one
    rank it has no effect. None: on GPUs."""
    vision_split: VisionSplit = "tensor"
    """The way tensor-parallel ranks share the vision tower's work: 'tensor' splits its layers, 'images' gives each rank
    the whole tower and images of its own. Context-parallel ranks get images of their own in both."""
    shared_prefix: bool = True
    """A prompt that several responses of a micro-batch share runs once for all of them, images included. Results do not
    depend on it. Under context parallelism it has no effect: ranks cut whole sequences.
    """
    recompute: Recompute = "none"
    """'selective': attention runs again in the backward pass; 'full': language and vision layers keep only their inputs
    and run again."""
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool | None = None
    """Data- and context-parallel ranks begin to sum up gradients while the backward pass of a mini-batch's last
    micro-batch runs, not after it. The sums are the same, with more than two ranks up to rounding. With one such rank
    it has no effect. None: on GPUs."""
    threads_per_rank: Workers = 1
    """CPU threads of a trainer rank on a machine without GPUs."""
    collective_timeout_seconds: Wait = 1800.0
    """The time that ranks wait for the slowest before the run fails; also while it samples, grades or writes."""


class PerturbConfig(Section):
    kind: PerturbKind = "patch_black"
    probability: Share = 0.5
    """The chance of each patch to be blacked (patch_black)."""
    stage: PerturbSpace = "patches"
    """'patches': after the processor, on the model's own patch grid; 'pixels': before the processor's resize, on a
    fixed grid (the authors'). (Preset.)"""
    patch_size: int | None = Field(default=None, gt=0, le=2**14)
    """Pixels; the grid of stage 'pixels'. None at stage 'patches', which uses the model's own patch."""
    per: NamedPerturbUnit | Count = "image"
    """A new perturbation for each response ('row'), one per image and step ('image'), or a number of them per image and
    step, which the responses to a prompt take in turn. (Preset.)"""
    noise_std: Positive = 189.0
    """Grey levels (gaussian_noise); the paper's ablation."""
    blur_radius: float = Field(default=6.0, gt=0, le=2**14)
    """Pixels (gaussian_blur); the paper's ablation."""
    grey_level: int = Field(default=128, ge=0, le=255)
    """0 (black) to 255 (white) (grey)."""

    @field_validator("per", mode="before")
    @classmethod
    def _unit_or_number(cls, value: Any) -> Any:
        """Refuses what is neither with one message; pydantic would have one for each of the two."""
        if value in get_args(NamedPerturbUnit) or (isinstance(value, int) and 0 < value <= LARGEST_INT):
            return value
        raise PydanticCustomError("perturb_unit", "Input should be 'row', 'image' or a whole number from 1 on")


class AlgorithmConfig(Section):
    preset: Preset = "global"
    """'reference' computes what the authors' code computes, its scopes included; 'global' does not depend on layout."""
    advantage: AdvantageKind = "grpo"
    """Advantage of a response from its reward: GRPO's, Dr. GRPO's without the deviation, RLOO's, or those of
    REINFORCE++, which divide by the deviation of the whole step."""
    policy_loss: PolicyLoss = "clip"
    """Surrogate loss: PPO's with DAPO's two bounds and a dual clip, GSPO's (set the bounds to 3e-4 and 4e-4), CISPO's,
    SAPO's, or REINFORCE's, without a ratio."""
    sapo_tau_positive: Positive = 1.0
    sapo_tau_negative: Positive = 1.05
    """Steepness of SAPO's gate, where the advantage is positive and elsewhere."""
    kl_coef: PositiveOrZero = 0.0
    """Weight of the divergence from the start model, which is then scored too. 0: there is no reference model."""
    kl_kind: KlKind = "k3"
    """Estimator of that divergence from the sampled tokens."""
    kl_in: KlPlace = "loss"
    """'loss': added to the loss, averaged as loss_avg_mode says. 'reward': its sum over a response is taken from the
    reward."""
    perception_loss_coef: PositiveOrZero = 0.0
    """Weight of PAPO's perception loss (its gamma): the divergence between the two views, which training raises."""
    perception_gradient: PerceptionGradient = "both_views"
    """'both_views': the update reads both views, and the perception loss has a gradient through either (PAPO's paper).
    'original_view': the perturbed view is scored once and constant (PAPO's code by default)."""
    perturbed_entropy_coef: PositiveOrZero = 0.0
    """Weight of the entropy term of the perturbed view in that loss (PAPO's eta_2; eta_1 is entropy_penalty_coef)."""
    use_vppo_on_perception: bool = True
    """Token gradient filtering (paper Eq. 4)."""
    token_scores: TokenScores = "dependency"
    """Numbers by which the filter ranks tokens: visual dependency, entropy, or random numbers (the paper's ablations).
    'dependency_or_entropy' keeps the top share by either (ToR); 'vepo' ranks by VEPO's product of both."""
    vepo_alpha: Share = 0.7
    """VEPO's weight of the divergence against the change of entropy."""
    token_weighting: TokenWeighting = "mask"
    """Weights of the policy gradient: one for kept tokens and zero for others; 'soft': sigmoid of the score, with the
    kept share as their mean (the paper's ablation); 'pgpo' and 'vgpo': those of these methods, which keep all
    tokens."""
    pgpo_tau: float = Field(default=0.4, gt=0, lt=1)
    """Relative dependency below which PGPO lowers a token's weight."""
    pgpo_beta: PositiveOrZero = 2.0
    """Weight that PGPO adds to the token of largest dependency, before weights are made one on average."""
    vgpo_strength: PositiveOrZero = 0.3
    """Share by which VGPO raises the score of a token at the end of a response, in proportion to its place."""
    vgpo_tail: ShareAboveZero = 0.5
    """Part of each response, at its end, in which VGPO raises scores."""
    vgpo_top: ShareAboveZero = 0.2
    """Share of the tokens of that part that are raised, those of largest score."""
    use_advantage_shaping: bool = True
    """Trajectory advantage shaping (paper Eq. 5)."""
    shaping_kind: ShapingKind = "vppo"
    """Scale of a response: VPPO's alpha, or VGPO's, which compares the responses to a prompt."""
    shaping_in: ShapingPlace = "advantage"
    """The scale multiplies the advantage, or the reward before the advantage is taken (the paper's ablation)."""
    use_entropy_penalty: bool = True
    top_p_perception_tokens: ShareAboveZero = 0.4
    """Share of each response's tokens that receive policy gradient."""
    advantage_scaling_min: ShareAboveZero = 0.9
    """beta_min of the advantage scale; beta_max follows from mean scale one."""
    advantage_scaling_max: Positive | None = None
    """beta_max, if it is to be fixed (the paper's ablation); the mean scale is then what comes of it."""
    entropy_penalty_coef: PositiveOrZero = 0.06
    dependency: DependencyKind = "k3_sampled"
    """Measure of token visual dependency: the authors' one-sample estimator, the paper's full-vocabulary KL, the
    Jensen-Shannon divergence, or the drop of the top token's probability. 'visual_focus' is VGPO's: the similarity of a
    token's hidden state to those of the image, for which no perturbed view is scored."""
    dependency_expm1: bool = True
    """expm1(x) - x instead of exp(x) - 1 - x, which cancels in fp32 for small x. (Preset.)"""
    stable_ranking: bool = True
    """Ties go to the earlier token. (Preset.)"""
    integer_ceil: bool = True
    """Number of kept tokens by exact arithmetic instead of a float32 product. (Preset.)"""
    shaping_min_scope: ShapingMinScope = "minibatch"
    """Responses over which the smallest mean dependency is taken. (Preset.)"""
    shaping_mean_scope: ShapingMeanScope = "minibatch"
    """Responses over which the mean advantage scale is made one. (Preset.)"""
    negative_advantages: NegativeAdvantages = "same"
    """Advantage scale where the advantage is negative: alpha, 1, or 2 - alpha."""
    text_only_rows: TextOnlyRows = "bypass"
    """Rows without an image: keep every token at scale 1, or rank their zero dependencies as the authors do.
    (Preset.)"""
    loss_denominator: CountedTokens = "all"
    """Tokens the policy-gradient sum is divided by: all response tokens or the kept ones."""
    loss_avg_mode: LossAverage = "token"
    """Mean over tokens of the mini-batch (authors' code), or per sequence and then over sequences (paper Eq. 6).
    'fixed_length': a sum per sequence over data.max_response_length, then a mean over sequences (Dr. GRPO)."""
    entropy_kind: EntropyKind = "nll"
    entropy_tokens: CountedTokens = "all"
    clip_ratio_low: float = Field(default=0.2, gt=0, lt=1)
    clip_ratio_high: Positive = 0.28
    clip_ratio_dual: float = Field(default=3.0, gt=1, le=LARGEST_FLOAT)
    online_filtering: bool = True
    """Keep only groups whose mean accuracy lies strictly between filter_low and filter_high."""
    filter_low: Share = 0.01
    filter_high: Share = 0.99
    max_try_make_batch: Count = 4
    """Prompts that a step samples at most, as a multiple of data.rollout_batch_size; then it trains on the groups it
    has."""
    truncated_responses: TruncatedResponses = "train"
    """Responses cut at the length limit: trained on with the reward they got, or without gradient."""
    resize: ResizeMode = "smart"
    """Images come under the pixel budget by the processor's own rule, or as the authors resize them before the
    processor runs. (Preset.)"""
    score_banned_tokens: bool = False
    """True if the trainer's log-probs count the image and vision tokens, which rollouts cannot sample. The authors' do.
    (Preset.)"""
    rollout_correction_cap: Positive | None = None
    """Weight each token's policy gradient by min(p_trainer / p_rollout, cap); None: no correction."""
    rollout_correction: CorrectionKind = "token"
    """'token': as above. 'sequence_mask': all tokens of a response by the product of their ratios, or zero if that is
    above the cap. 'geometric_mask': by one, or zero if the geometric mean of the ratios is above the cap or below one
    over it."""
    score_centering_tokens: int = Field(default=0, ge=0, le=20)
    """Likeliest tokens whose probabilities engines report at each position, by which the drift towards the engine is
    taken out of the gradient (score centering; policy_loss 'reinforce'). At most 20, vLLM's bound; 0: no centering."""
    reference_devices: Count | None = None
    """Devices of the emulated split for scope 'device_minibatch'; None: the data-parallel size."""
    perturb: PerturbConfig = PerturbConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = _preset_of(values)
        perturb = _as_set(values.get("perturb", {})) if preset else None
        if preset is None or perturb is None:
            return values
        filled = {**preset["perturb"], **perturb}
        if filled.get("stage") != "pixels" and "patch_size" not in perturb:
            filled.pop("patch_size", None)  # stage 'patches' takes the model's own grid
        return {**preset["algorithm"], **values, "perturb": filled}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "global": {"algorithm": {}, "perturb": {}, "rollout": {}},  # the defaults of the classes
    "reference": {
        "algorithm": {
            "dependency_expm1": False,
            "stable_ranking": False,
            "integer_ceil": False,
            "shaping_min_scope": "device_minibatch",
            "shaping_mean_scope": "microbatch",
            "resize": "easyr1",
            "score_banned_tokens": True,
            "text_only_rows": "rank",
        },
        "perturb": {"stage": "pixels", "patch_size": 14, "per": "row"},
        "rollout": {"seeds": "shared", "top_p": 0.99},
    },
}


def _preset_of(algorithm: Any) -> dict[str, dict[str, Any]] | None:
    """Returns the preset that algorithm values name; None where validation will refuse them anyway."""
    name = algorithm.get("preset", "global") if isinstance(algorithm, dict) else None
    return PRESETS.get(name) if isinstance(name, str) else None


def _as_set(section: Any) -> dict[str, Any] | None:
    """Returns the values that were set in a section, given as a mapping or as an instance; None for anything else."""
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return section if isinstance(section, dict) else None


class OptimConfig(Section):
    lr: float = Field(default=1e-6, gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, ge=1.2e-38, le=1)
    """A smaller one would be zero in float32, and make NaN of a weight that has no gradient."""
    weight_decay: PositiveOrZero = 0.01
    lr_warmup_steps: CountOrZero = 0
    """Training steps over which the learning rate rises linearly."""
    lr_scheduler_type: LrScheduleKind = "constant"
    """Course of the learning rate from the warm-up to the run's last step."""
    min_lr_ratio: Share = 0.0
    """Share of `lr` that 'linear' and 'cosine' fall to."""


class ActorConfig(Section):
    global_batch_size: Count = 128
    """Prompts per optimizer step (rollout.n responses each)."""
    micro_batch_size_per_device_for_update: Count = 4
    """The most responses in a micro-batch of the update; they are packed, so there is no padding. Groups of rollout.n
    responses that fit stay whole."""
    micro_batch_size_per_device_for_experience: Count = 8
    """The most responses in a micro-batch of scoring, likewise."""
    max_tokens_per_micro_batch: Count | None = None
    """Tokens that the model reads in a micro-batch of the update, in all views, filled with whole groups; in scoring,
    as many for each of the two views. Each is padded, by a tenth at most, so that a run's micro-batches have few
    different numbers of tokens. Padding for FP8 and sequence parallelism comes on top. None: micro-batches have as many
    responses as the two settings above say, which else have no effect."""
    ppo_epochs: Count = 1
    max_grad_norm: Positive = 1.0
    head_chunk_tokens: Count | None = None
    """Response tokens per chunk of the vocabulary head: logits of no more than these exist at once. None: 4096 on GPUs,
    1024 without."""
    offload: tuple[MemoryPart, ...] = ()
    """Parts of the trainer's memory that leave the GPU while the engines sample: weights, gradients (freed, not
    copied), optimizer state. The engines take their room, see rollout.free_cache_engine. GPUs only."""
    optim: OptimConfig = OptimConfig()


class ValSamplingConfig(Section):
    n: int = Field(default=1, gt=0, le=MOST_RESPONSES)
    """Samples per prompt: k of avg@k."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0: greedy."""
    top_p: ShareAboveZero = 1.0


class EngineConfig(Section):
    """The settings of vLLM's engines that an evaluation has, too. Responses depend on them by rounding alone."""

    tensor_parallel_size: Count = 1
    """Devices per vLLM engine."""
    num_engines: Count | None = None
    """None: one per tensor_parallel_size devices on GPUs, one on a machine without GPUs."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, lt=1)
    """Share of each of its GPUs that an engine takes while it is awake."""
    cpu_kv_cache_gib: Positive = 1.0
    """GiB for the KV cache of an engine on CPU."""
    threads_per_engine: Workers | None = None
    """CPU threads of an engine on a machine without GPUs; None: all cores over the number of engines."""
    max_num_seqs: int | None = Field(default=None, gt=0, le=8192)
    """Responses in flight in an engine. vLLM takes no more than 8192 on GPUs of less than 70 GiB. None: 1024 on GPUs,
    256 without."""
    max_images_per_prompt: Count = 8
    """The most images that one prompt may have."""
    enforce_eager: bool | None = None
    """Run engines without CUDA graphs. None: with them on GPUs."""
    start_timeout_seconds: Wait = 600.0
    """Time for an engine to load."""
    engine_timeout_seconds: Wait = 300.0
    """Time without progress, such as one forward pass or one buffer of weights, after which an engine hangs. It is then
    started again. The default is vLLM's own bound of a forward pass."""
    max_engine_restarts: int = Field(default=3, ge=0, le=1000)
    """Restarts of each engine, after it died or hung, until the run ends; 0: none."""


class RolloutConfig(EngineConfig):
    n: int = Field(default=8, gt=1, le=MOST_RESPONSES)
    """Responses per prompt."""
    temperature: float = Field(default=1.0, ge=LEAST_TEMPERATURE, le=2)
    top_p: ShareAboveZero = 1.0
    top_k: int = Field(default=-1, le=LARGEST_INT)
    """-1: off."""
    seeds: SeedKind = "independent"
    """Per-request seeds: derived from (run, step, attempt, prompt, sample); the authors' 1..n for every prompt; or
    none. (Preset.)"""
    order: SampleOrder = "draw"
    """The groups that a step trains on: the first kept ones of the draw, which no delay changes, or those that were
    graded first. 'arrival' does not wait for long responses, which then are trained on less often."""
    unfinished: Unfinished = "drop"
    """Groups that a step began and did not need: dropped, or carried to the next step, which goes on with their
    responses. These then have tokens of several weights, so 'carry' needs algorithm.rollout_correction_cap, and which
    groups are carried depends on time. With 'carry' engines that have room begin prompts of the next step."""
    free_cache_engine: bool | None = None
    """Engines give their GPU memory back, weights included, while the trainer computes; None: on GPUs, where they share
    them with the trainer."""
    weight_transfer: WeightTransferSetting = "auto"
    """Way of the weights to the engines: host memory (shm) or buffers on the GPU (ipc); 'auto': ipc on GPUs."""
    quantization: Quantization | None = None
    """Number format of the linear layers in the engines' language model, scaled as fp8.recipe says (block by block
    without one). Engines quantise the weights that they are sent. GPUs only."""
    val: ValSamplingConfig = ValSamplingConfig()
    verify_weights: VerifyWeights = "first"
    """Weight syncs after which vLLM's checksums are compared with those of the weights sent to it."""
    logprob_diff_bound: Positive = 0.05
    """Nats; tokens whose rollout and trainer log-prob differ by more are counted."""


class GradingWorkersConfig(Section):
    """The settings of the processes that grade responses, in training and in evaluations."""

    num_workers: Workers | None = None
    """Processes that decode and grade responses. None: one per core of rank 0's fair share of its host, up to 32; but 1
    for a batch function of yours, which may compare all responses that it gets."""
    timeout_seconds: float = Field(default=10.0, ge=0.001, le=9 * 3600)
    """Time for one response. One that takes longer gets the reward zero and is counted. At most 9 hours: a batch gets
    up to 60 times as long, and Linux waits no longer than 24 days."""


class RewardConfig(GradingWorkersConfig):
    reward_function: FilePath = "mathruler"
    """A built-in grader: 'mathruler' (the authors'), 'math_verify', 'choice', 'number', 'iou' or 'format'; or
    `file.py:function` of yours."""
    parts: dict[Grader, Positive] = {}
    """Weights of built-in graders whose weighted sum is the reward. The accuracy is that of reward_function, which is
    one of them. Empty: reward_function alone."""
    relative_tolerance: Share = 1e-6
    """The deviation from the answer that 'number' takes for right, as a share of the answer."""
    absolute_tolerance: PositiveOrZero = 0.0
    """The same in the unit of the answer; the larger of both holds."""
    iou_threshold: ShareAboveZero = 0.5
    """Intersection over union from which 'iou' takes a response for right. The reward is the overlap itself."""
    overlong_buffer_tokens: CountOrZero = 0
    """Last tokens before data.max_response_length over which a penalty on the reward grows from zero to
    overlong_penalty (DAPO's soft punishment). 0: none."""
    overlong_penalty: Positive = 1.0
    """Taken from the reward of a response that reaches the limit."""
    reward_function_kwargs: dict[str, Any] = {}
    """Further arguments of a function of yours, by name."""
    reward_type: RewardType = "auto"
    """The call of a function of yours: with a list of all responses once they are sampled ('batch'), or once per
    response while others are sampled ('sequential'). 'auto': by the names of its parameters; a list if they say
    nothing."""
    max_error_share: ShareAboveZero = 1.0
    """Share of the rewards of a step that may fail: if as many fail, the run ends."""


class TrainerConfig(Section):
    project_name: FolderName = "megatron_vppo"
    experiment_name: FolderName = "default"
    runs_dir: FilePath = "runs"
    seed: int = Field(default=1, ge=0, lt=2**32)
    total_steps: Count | None = None
    """Training steps; None: total_epochs passes over the data."""
    total_epochs: Count = 2
    val_before_train: bool = True
    val_freq: int = Field(default=5, le=LARGEST_INT)
    """Steps between validations; -1: only before and after training."""
    save_freq: int = Field(default=5, le=LARGEST_INT)
    """Steps between checkpoints; -1: only the last step."""
    save_limit: int = Field(default=1, le=LARGEST_INT)
    """Newest checkpoints that are kept; -1: all. The one with the best val/accuracy is kept besides them."""
    save_model_only: bool = False
    """Leave the optimizer's state out of checkpoints. A run that goes on from one has the weights (rounded to
    model.dtype) and the place in the data, and its optimizer starts from zero."""
    async_checkpoints: bool | None = None
    """Write the files of a checkpoint while training goes on. None: on GPUs. The state is copied to host memory first,
    and stays there until it is written; on a CPU, writing would take cores and memory from training."""
    save_hf: bool = True
    """Export the final weights as a Hugging Face folder."""
    stop_within_seconds: Wait = 240.0
    """The time that may pass from a request to stop (SIGUSR2; under srun also SIGTERM) to a boundary, where the run
    writes a checkpoint and ends. Scoring has about four boundaries in it. After a request an update is begun only if it
    is known to end in time; one that has begun is finished."""
    max_attempts_without_progress: Count = 3
    """Attempts of a requeued SLURM job that may begin at the same step; one more ends it for good."""
    resume: bool = True
    """Go on from a checkpoint of the run folder, if there is one. If false, a folder that has one is refused."""
    resume_step: Count | None = None
    """The step whose checkpoint to go on from; later checkpoints are set aside. None: the newest one."""
    watchdog: float = Field(default=10.0, ge=0, le=1e6)
    """A step, validation or checkpoint that takes longer than this many times its median ends the run, and every
    rank leaves its stacks in its log. No limit is below rollout.engine_timeout_seconds + rollout.start_timeout_seconds,
    the time of an engine's restart. 0: off."""
    load_checkpoint_path: FilePath | None = None
    """A checkpoint of another run, .../checkpoints/global_step_N, that a new run starts from: weights, optimizer, place
    in the data and the count of steps. Once the run has a checkpoint of its own, it goes on from that, so that a job
    that is started again keeps what it has done. Refused in a folder with checkpoints of a run that began otherwise."""
    save_rollouts: bool = True
    """Record every response that was trained on, and those of validations."""
    loggers: tuple[LoggerService, ...] = ()
    """Services that metrics go to besides metrics.jsonl and TensorBoard, which are always written."""


class RunConfig(Section):
    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    fp8: Fp8Config = Fp8Config()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    actor: ActorConfig = ActorConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_rollout_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = _preset_of(_as_set(values.get("algorithm", {})))
        rollout = _as_set(values.get("rollout", {}))
        if preset is None or rollout is None:
            return values
        return {**values, "rollout": {**preset["rollout"], **rollout}}
