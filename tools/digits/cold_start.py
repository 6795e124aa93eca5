"""The supervised cold start of the small model, stopped while reinforcement learning has most left to teach.

Shape suffix legend: B = responses (rows); L = tokens of a sequence, prompt and response; T = response tokens,
right-padded; V = vocabulary rows.
"""

from __future__ import annotations

import json
import re
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from digits.checkpoint import Processor
from digits.task import Task

WARMUP_STEPS = 20
LANDING_AT = 0.12
"""The mean probability of a demonstration's digits at which about a quarter of the responses are right."""
LANDING_LR = 0.25
"""The factor of the learning rate from then on."""
STEPS_BETWEEN_CHECKS = 4
ROWS_PER_CHECK = 256
CLEAR_OF_BAND = 0.03
"""The distance that the model keeps from the band's lower end: more than the standard error of one validation."""


@dataclass(frozen=True)
class Rows:
    """One split of the data set in memory."""

    prompt: str
    """The problem after the processor's chat template, one image token in it; the same for every row."""
    images: torch.Tensor
    """uint8 [rows, 3, height, width]."""
    digits: torch.Tensor
    """int64 [rows, digits of an image], in reading order."""

    def __len__(self) -> int:
        return len(self.digits)

    def first(self, count: int) -> Rows:
        return Rows(self.prompt, self.images[:count], self.digits[:count])


@dataclass(frozen=True)
class Accuracy:
    sampled: float
    """The share of right responses at temperature 1, over every held-out row and sample."""
    greedy: float
    steps: int


def load_rows(folder: Path, split: str, processor: Processor) -> Rows:
    """Loads the images of `split`.parquet with the digits that labels.json names.

    Raises:
        ValueError: the rows do not share one problem text (their prompts would differ in length).
    """
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train", cache_dir=None)
    problems = set(table["problem"])
    if len(problems) != 1:
        raise ValueError(f"{folder}/{split}.parquet holds {len(problems)} different problems; the cold start takes one")
    before, after = problems.pop().split("<image>")
    content = [{"type": "text", "text": before}] if before else []
    content += [{"type": "image"}, {"type": "text", "text": after}]
    images = np.stack([np.asarray(row[0].convert("RGB")) for row in table["images"]])
    return Rows(
        prompt=processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True),
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        digits=torch.tensor(json.loads((folder / "labels.json").read_text())[split]["digits"]),
    )


def prompt_inputs(processor: Processor, rows: Rows, index_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs the processor on the prompts and images of the chosen rows."""
    images = list(rows.images[index_B])
    inputs = processor(
        text=[rows.prompt] * len(images),
        images=images,
        return_tensors="pt",
        images_kwargs={"disable_grouping": False},  # equal sizes: one batched operation instead of one per image
    )
    return dict(inputs)


def with_responses(
    inputs: dict[str, torch.Tensor], responses: Sequence[Sequence[int]], *, pad: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Appends each row's response on the right.

    Returns:
        The model's inputs, and labels int64 [B, L]: the response's tokens, -100 on prompt and padding.
    """
    longest = max(len(r) for r in responses)
    response_BT = torch.tensor([[*r, *[pad] * (longest - len(r))] for r in responses])
    real_BT = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in responses])
    prompt_ids = inputs["input_ids"]
    together = {
        **inputs,
        "input_ids": torch.cat((prompt_ids, response_BT), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], real_BT), dim=1),
        "mm_token_type_ids": torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(response_BT)), dim=1),
    }
    labels_BL = torch.cat((torch.full_like(prompt_ids, -100), response_BT.masked_fill(real_BT == 0, -100)), dim=1)
    return together, labels_BL


def boxed_number(text: str) -> int | None:
    """Finds the number in the last `\\boxed{}`; None if there is none."""
    found = re.findall(r"\\boxed\{(\d+)\}", text)
    return int(found[-1]) if found else None


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    processor: Processor,
    task: Task,
    rows: Rows,
    *,
    samples: int,
    batch: int = 512,
) -> float:
    """Measures the share of right responses over all rows.

    Args:
        samples: the number of responses per row, at temperature 1; 0: one greedy response.
    """
    tokenizer = processor.tokenizer
    banned = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    choice: dict[str, Any] = {"do_sample": False}
    if samples:
        choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    model.eval()
    right = 0
    for index_B in torch.arange(len(rows)).split(max(1, batch // max(1, samples))):
        inputs = prompt_inputs(processor, rows, index_B)
        out = model.generate(**inputs, **choice, max_new_tokens=task.longest_solution, suppress_tokens=banned)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [task.answer(digits) for digits in rows.digits[index_B].tolist() for _ in range(max(1, samples))]
        right += sum(boxed_number(text) == answer for text, answer in zip(texts, answers, strict=True))
    return right / (len(rows) * max(1, samples))


def train(
    model: PreTrainedModel,
    processor: Processor,
    task: Task,
    train_rows: Rows,
    val_rows: Rows,
    *,
    band: tuple[float, float],
    stop_at: float,
    max_steps: int,
    batch: int,
    misread_share: float,
    lr: float,
    seed: int,
    report: Callable[[str], None],
) -> Accuracy:
    """Trains on demonstrations with AdamW until held-out accuracy at temperature 1 reaches `stop_at`.

    Checking the accuracy costs as much as several steps. So checks begin only when the probability that the model gives
    to all digits of a demonstration passes LANDING_AT. From then on the learning rate is low, so that the stop is not
    overshot. A check that reaches `stop_at` on some rows is confirmed on all of them.

    Args:
        band: the held-out accuracies, sampled, that the finished model may have.
        stop_at: the accuracy to stop at, inside the band.
        max_steps: the number of steps after which to give up.
        misread_share: the share of demonstrations in which one of the digits is misread, as by a weak teacher. The
            model learns to look and, with that, to doubt its reading. Rewards can remove this doubt.
        report: a function that receives a line now and then.

    Raises:
        RuntimeError: the finished model's accuracy lies outside the band.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    begin = time.perf_counter()
    likely, sampled = 0.0, None
    step, landing = 0, 0
    while step < max_steps and (sampled is None or sampled < band[0] + CLEAR_OF_BAND):
        step += 1
        landing += bool(landing or likely > LANDING_AT)
        for group in optimizer.param_groups:
            group["lr"] = lr * (LANDING_LR if landing else min(1.0, step / WARMUP_STEPS))
        loss, digits = _supervised_step(
            model, processor, task, train_rows, optimizer, batch=batch, misread_share=misread_share, generator=generator
        )
        likely = 0.7 * likely + 0.3 * digits
        line = f"step {step:4d}  loss {loss:.3f}  digits {likely:.2f}"
        if landing and landing % STEPS_BETWEEN_CHECKS == 0:
            quick = accuracy(model, processor, task, val_rows.first(ROWS_PER_CHECK), samples=1)
            line += f"  held-out accuracy {quick:.3f}"
            if quick >= stop_at:
                sampled = accuracy(model, processor, task, val_rows, samples=2)
                line += f", on all rows {sampled:.3f}"
        if step % 10 == 0 or "accuracy" in line:
            report(f"{line}  {time.perf_counter() - begin:.0f} s")
    if sampled is None:
        sampled = accuracy(model, processor, task, val_rows, samples=2)
    if not band[0] <= sampled <= band[1]:
        raise RuntimeError(
            f"held-out accuracy is {sampled:.3f} after {step} steps, outside {band[0]} .. {band[1]}; "
            "set more --max-steps, another --stop-at or another --seed"
        )
    return Accuracy(sampled=sampled, greedy=accuracy(model, processor, task, val_rows, samples=0), steps=step)


def misread(digits: torch.Tensor, *, share: float, generator: torch.Generator) -> torch.Tensor:
    """Copies the digits and replaces one of a row by another digit in about `share` of the rows.

    Args:
        digits: int64 [rows, digits of an image], each 0 to 9.
    """
    rows, places = digits.shape
    wrong = torch.rand(rows, generator=generator) < share
    place = torch.randint(places, (rows,), generator=generator)
    off_by = torch.randint(1, 10, (rows,), generator=generator)
    return (digits + F.one_hot(place, places) * (wrong * off_by)[:, None]) % 10


def _supervised_step(
    model: PreTrainedModel,
    processor: Processor,
    task: Task,
    rows: Rows,
    optimizer: torch.optim.Optimizer,
    *,
    batch: int,
    misread_share: float,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Takes one optimizer step on `batch` random rows in random wordings, some of them misread.

    Returns:
        The mean loss per response token before the step, and the mean over rows of the probability of all their digits.
    """
    tokenizer = processor.tokenizer
    index_B = torch.randint(len(rows), (batch,), generator=generator)
    wordings = torch.randint(task.wordings, (batch, task.choices), generator=generator)
    told = misread(rows.digits[index_B], share=misread_share, generator=generator)
    texts = [task.solution(*pair) for pair in zip(told.tolist(), wordings.tolist(), strict=True)]
    responses = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    inputs, labels_BL = with_responses(prompt_inputs(processor, rows, index_B), responses, pad=tokenizer.pad_token_id)
    model.train()
    logits_BLV = model(**inputs, use_cache=False).logits[:, :-1]
    next_BL = labels_BL[:, 1:]
    loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), next_BL, ignore_index=-100, reduction="none")
    loss = loss_BL.sum() / (next_BL != -100).sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(string.digits)))
    digit_loss_B = (loss_BL.detach() * torch.isin(next_BL, digit_ids)).sum(dim=1)
    return loss.item(), torch.exp(-digit_loss_B).mean().item()
