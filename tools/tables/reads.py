"""Says which tokens of a run's answers depend on the image: digits read from the table, sums, or words.

    python tools/tables/reads.py --run RUN_FOLDER [--step N]

Prints one JSON object about the recorded answers of a step that were scored in both views. Answers that are not worded
as in the cold start, cell by cell, are left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vppo.observability.rollouts import RolloutRecord, read_rollouts, rollout_path
from tables.table import CELLS, READINGS

Kind = Literal["read", "sum", "word"]
"""A digit read from the image; a digit of an addition, the box's too, which follows from the text before it; anything
else, the end token included."""


def answer_pattern() -> re.Pattern[str]:
    """Matches a whole worded answer, right or wrong. Each group is one digit; those that are read have names."""
    cells = []
    for cell in CELLS:
        wordings = []
        for number, wording in enumerate(READINGS):
            # The digit comes first as what is read, then as what is added.
            pattern = re.escape(wording).replace(r"\{c\}", cell).replace(r"\{d\}", rf"(?P<d{cell}{number}>\d)", 1)
            wordings.append(re.sub(r"\\{\w+\\}", r"(\\d)", pattern))
        cells.append(f"(?:{'|'.join(wordings)})")
    return re.compile("".join(cells) + r"\\boxed\{(\d)\}")


def token_kinds(tokens: Sequence[str], pattern: re.Pattern[str]) -> list[Kind] | None:
    """Says of each token of an answer what it is; None if the answer is worded otherwise.

    Args:
        tokens: the text of each token, the end token last.
        pattern: what `answer_pattern` returns.
    """
    found = pattern.fullmatch("".join(tokens[:-1]))
    if found is None:
        return None
    of_character: dict[int, Kind] = {found.start(group): "sum" for group in range(1, pattern.groups + 1)}
    of_character |= {found.start(group): "read" for group in pattern.groupindex}  # -1: a wording that was not chosen
    kinds: list[Kind] = []
    begin = 0
    for token in tokens:
        kinds.append(of_character.get(begin, "word"))
        begin += len(token)
    return kinds


def measure(records: Iterable[RolloutRecord]) -> dict[str, Any]:
    """Measures each kind of token over all answers that were scored in both views.

    Returns:
        answers: their number; `worded_otherwise` of them are left out of what follows.
        tokens: the mean length of an answer, and its bounds.
        of each kind: its share of the tokens, the mean dependency and the mean of -log p, in nats, its share of all
        dependency, and the share of its tokens that carry policy gradient.
    """
    pattern = answer_pattern()
    answers = 0
    lengths: list[int] = []
    rows: dict[Kind, list[tuple[float, float, int]]] = {"read": [], "sum": [], "word": []}
    for record in records:
        if record.get("dependency") is None:
            continue
        answers += 1
        kinds = token_kinds(record["tokens"], pattern)
        if kinds is None:
            continue
        lengths.append(len(kinds))
        for kind, *numbers in zip(kinds, record["dependency"], record["old_logps"], record["kept"], strict=True):
            rows[kind].append(tuple(numbers))
    if not lengths:
        raise SystemExit(f"none of {answers} answers was scored in both views and worded as in the cold start")
    every = sum(dependency for of_kind in rows.values() for dependency, _, _ in of_kind)
    return {
        "answers": answers,
        "worded_otherwise": answers - len(lengths),
        "tokens": {"mean": sum(lengths) / len(lengths), "least": min(lengths), "most": max(lengths)},
        **{
            kind: {
                "share_of_tokens": len(of_kind) / sum(lengths),
                "mean_dependency": sum(dependency for dependency, _, _ in of_kind) / len(of_kind),
                "share_of_dependency": sum(dependency for dependency, _, _ in of_kind) / every,
                "mean_nll": -sum(logp for _, logp, _ in of_kind) / len(of_kind),
                "share_kept": sum(kept for _, _, kept in of_kind) / len(of_kind),
            }
            for kind, of_kind in rows.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="the folder of a run")
    parser.add_argument("--step", type=int, default=1, help="1: the answers of the start model")
    options = parser.parse_args()
    print(json.dumps(measure(read_rollouts(rollout_path(options.run, options.step))), indent=1))


if __name__ == "__main__":
    main()
