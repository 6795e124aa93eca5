"""A step of given size for scaling.py: prompts, responses, texts and scores, all random."""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import megatron_vppo
from megatron_vppo.algorithm.types import GradedResponse, Prompt, Response, Reward, Scores

GROUP = 8
VOCABULARY = 8000
PROMPT_TOKENS = 1400
ANSWERS = ("42", "\\frac{3}{5}", "12.5", "x=3", "A", "\\sqrt{2}", "100\\pi", "3:4")


@dataclass(frozen=True)
class Step:
    """One step between grading and the update."""

    responses: list[Response]
    graded: list[GradedResponse]
    scores: Scores

    @property
    def groups(self) -> list[list[GradedResponse]]:
        return [self.graded[i : i + GROUP] for i in range(0, len(self.graded), GROUP)]


def make_prompts(count: int) -> list[Prompt]:
    """Makes prompts without images."""
    ids = tuple(range(PROMPT_TOKENS))
    return [
        Prompt("train", row, "What is it? " * 10, ANSWERS[row % len(ANSWERS)], tuple(list(ids)), ids[:120], (), ())
        for row in range(count)
    ]


def random_tokens(tokens: int, *, seed: int, vocabulary: int = VOCABULARY) -> tuple[list[int], list[float]]:
    """Returns token ids, and log-probs that are float32, as an engine's are."""
    draw = np.random.default_rng(seed)
    logps = np.log(draw.random(tokens)).astype(np.float32)
    return draw.integers(1, vocabulary, tokens).tolist(), logps.tolist()


def make_step(responses: int, tokens: int) -> Step:
    """Makes groups of 8, each with right and wrong responses."""
    words = tokenizer()
    made, texts = [], []
    for group, prompt in enumerate(make_prompts(responses // GROUP)):
        for sample in range(GROUP):
            answer = prompt.answer if sample % 2 else ANSWERS[(group + 3) % len(ANSWERS)]
            thoughts, logps = random_tokens(tokens, seed=group * GROUP + sample)
            ids = [*thoughts, *words.encode(f" \\boxed{{{answer}}}")][-tokens:]
            made.append(Response(prompt, group, sample, array("i", ids), array("d", logps), "stop", 0))
            texts.append(words.decode(ids, skip_special_tokens=True))
    rewards = [Reward(float(r.sample % 2), float(r.sample % 2), {}) for r in made]
    graded = [GradedResponse(*parts) for parts in zip(made, texts, rewards, strict=True)]
    old_BT, perturbed_BT = (torch.rand(len(made), tokens).log() for _ in range(2))
    return Step(made, graded, Scores(old_BT, torch.rand(len(made), tokens), perturbed_BT, None))


@functools.cache
def tokenizer() -> Any:
    """Trains a byte-level BPE tokenizer on the sources of the package."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    files = [str(path) for path in sorted(Path(megatron_vppo.__file__).parent.rglob("*.py"))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, special_tokens=["<eos>"])
    made.train(files, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def reward_file(folder: Path) -> str:
    """Writes a batch function that does what 'mathruler' does. Returns it as reward.reward_function."""
    file = folder / "grade_all.py"
    file.write_text(
        "from megatron_vppo.data.graders.mathruler import boxed_accuracy\n\n\n"
        "def grade(items):\n    return [boxed_accuracy(item['response'], item['ground_truth']) for item in items]\n"
    )
    return f"{file}:grade"
