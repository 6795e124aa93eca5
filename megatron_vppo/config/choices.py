"""The choices of every setting that has some, each set once. A leaf: every room may import it, and it imports nothing.

The setting's description in `schema.py` says what each choice does; here is what the choices are about.
"""

from __future__ import annotations

from typing import Literal, get_args

# --- Data and rewards -------------------------------------------------------------------------------------------------

BadRows = Literal["error", "skip"]
"""The treatment of data rows that cannot be used."""

ImagePlace = Literal["marks", "first"]
"""The place of a row's images where its problem has no mark of them."""

ResizeMode = Literal["smart", "easyr1"]
"""The rule that brings images under the pixel budget."""

RewardType = Literal["auto", "batch", "sequential"]
"""The way a user's reward function is called."""

Grader = Literal["mathruler", "math_verify", "choice", "number", "iou", "format"]
"""The built-in graders."""
GRADERS: tuple[Grader, ...] = get_args(Grader)

# --- Model ------------------------------------------------------------------------------------------------------------

Dtype = Literal["float32", "bfloat16"]
"""The number format of the weights."""

BackendSetting = Literal["auto", "te", "torch"]
"""The maker of the transformer layers; `models/options.py` has the two that 'auto' stands for."""

ModelPart = Literal["vision_tower", "projector", "language_model"]
"""The parts of a model that can be frozen."""

VisionSplit = Literal["tensor", "images"]
"""The way tensor-parallel ranks share the vision tower's work."""

Recompute = Literal["none", "selective", "full"]
"""The activations that the backward pass computes again instead of keeping them."""

Fp8Recipe = Literal["blockwise", "tensorwise", "delayed", "mxfp8"]
"""The scaling of FP8 operands."""

Fp8Phase = Literal["scoring", "update"]
"""The trainer's phases that can run in FP8."""

# --- Algorithm --------------------------------------------------------------------------------------------------------

Preset = Literal["global", "reference"]
"""The named sets of algorithm settings."""

DependencyKind = Literal["k3_sampled", "kl_full", "jsd", "top1_drop", "visual_focus"]
"""The measures of a token's visual dependency."""

Divergence = Literal["kl_full", "jsd", "top1_drop"]
"""The measures of visual dependency that need both distributions over the whole vocabulary."""

ShapingKind = Literal["vppo", "vgpo"]
"""The scales that responses get from their dependency."""

ShapingPlace = Literal["advantage", "reward"]
"""The side of the group's baseline on which that scale counts."""

ShapingMinScope = Literal["minibatch", "device_minibatch"]
"""The rows over which advantage shaping takes its minimum."""

ShapingMeanScope = Literal["minibatch", "microbatch"]
"""The rows over which advantage shaping takes its mean."""

NegativeAdvantages = Literal["same", "unscaled", "mirrored"]
"""The scale of negative advantages."""

TextOnlyRows = Literal["bypass", "rank"]
"""The treatment of rows without an image."""

AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
"""The baseline and the scale of rewards."""

PolicyLoss = Literal["clip", "gspo", "cispo", "sapo", "reinforce"]
"""The surrogate losses of the policy."""

TokenScores = Literal["dependency", "entropy", "dependency_or_entropy", "vepo", "random"]
"""The numbers by which the token filter ranks tokens."""

DEPENDENCY_SCORES = frozenset[TokenScores]({"dependency", "dependency_or_entropy", "vepo"})
"""Those that are made of the tokens' dependency."""

TokenWeighting = Literal["mask", "soft", "pgpo", "vgpo"]
"""The weights that tokens get from their scores."""

KlKind = Literal["k1", "abs", "k2", "k3"]
"""The estimators of the divergence from the reference model."""

KlPlace = Literal["loss", "reward"]
"""The side of the advantage on which that divergence counts."""

PerceptionGradient = Literal["both_views", "original_view"]
"""The views through which the perception loss has a gradient."""

CorrectionKind = Literal["token", "sequence_mask", "geometric_mask"]
"""The unit that the rollout correction weighs, and what becomes of it beyond the cap."""

LossAverage = Literal["token", "seq", "fixed_length"]
"""The mean that the policy-gradient loss is."""

EntropyKind = Literal["nll", "entropy"]
"""The quantity that the entropy term takes."""

CountedTokens = Literal["all", "selected"]
"""The tokens that a term counts: every response token, or those that the token filter selected."""

TruncatedResponses = Literal["train", "mask"]
"""The treatment of responses cut at the length limit."""

PerturbKind = Literal["patch_black", "gaussian_noise", "gaussian_blur", "grey"]
"""The ways to hide what an image shows."""

PerturbSpace = Literal["patches", "pixels"]
"""The side of the image processor on which an image is perturbed."""

NamedPerturbUnit = Literal["row", "image"]
PerturbUnit = NamedPerturbUnit | int
"""The unit that gets a random perturbation of its own: a response ('row'), or an image once per step ('image'). A
number: each image has as many perturbations per step, which the responses to its prompt take in turn."""

# --- Actor ------------------------------------------------------------------------------------------------------------

LrScheduleKind = Literal["constant", "linear", "cosine"]
"""The course of the learning rate after its warm-up."""

MemoryPart = Literal["params", "grads", "optimizer"]
"""The parts of the trainer's memory that can leave the GPU."""
MEMORY_PARTS: tuple[MemoryPart, ...] = get_args(MemoryPart)

# --- Rollout ----------------------------------------------------------------------------------------------------------

SeedKind = Literal["independent", "shared", "engine"]
"""The origin of the sampling seeds."""

SampleOrder = Literal["draw", "arrival"]
"""The groups that a step trains on, where more are kept than it wants."""

Unfinished = Literal["drop", "carry"]
"""The end of groups that a step began and did not need."""

WeightTransferSetting = Literal["auto", "shm", "ipc"]
"""The way of weights to the engines; `rollout/records.py` has the two that 'auto' stands for."""

VerifyWeights = Literal["always", "first", "never"]
"""The weight syncs whose checksums are compared."""

Quantization = Literal["fp8"]
"""The number format that engines quantise weights to."""

# --- Trainer ----------------------------------------------------------------------------------------------------------

LoggerService = Literal["wandb", "swanlab"]
"""The services that metrics can go to."""

# --- Evaluation -------------------------------------------------------------------------------------------------------

BenchmarkSource = Literal[
    "rows",
    "sharegpt",
    "mathverse",
    "dynamath",
    "mmk12",
    "geometry3k",
    "mathvision",
    "we_math",
    "logicvista",
    "mmmu_pro",
]
"""The formats that benchmarks come in."""

Grading = Literal["mathruler", "math_verify", "choice", "letters", "number", "text", "iou"]
"""The rules by which responses to a benchmark are graded."""

EvalPreset = Literal["paper", "papo-eval"]
"""The named sets of settings of an evaluation."""
