"""Writes the table of docs/import.md from megatron_vppo/importing/easyr1_keys.py.

python tools/import_table.py
"""

from __future__ import annotations

from pathlib import Path

from megatron_vppo.config.yaml_text import write_yaml_value
from megatron_vppo.importing.actor_keys import NO_CRITIC, REFERENCE_MODEL
from megatron_vppo.importing.easyr1_keys import PROGRAM, SET_BY_PROGRAM, SETTABLE
from megatron_vppo.importing.rules import Dropped, Fixed, TheirKey

PAGE = Path(__file__).resolve().parent.parent / "docs" / "import.md"
BEGIN, END = "<!-- table: tools/import_table.py -->\n", "<!-- end of table -->\n"


def table() -> str:
    """Returns the rows: one per key, except for the critic, the reference model and what their program sets."""
    lines = ["| Their key | Their default | Here | What becomes of it |", "| --- | --- | --- | --- |"]
    lines += [row(key) for key in SETTABLE if key.rule is not NO_CRITIC and not is_of_reference(key)]
    for name, keys, note in (
        ("worker.critic.\\*", [key for key in SETTABLE if key.rule is NO_CRITIC], NO_CRITIC.note),
        ("worker.ref.\\*", [key for key in SETTABLE if is_of_reference(key)], REFERENCE_MODEL.note),
        (", ".join(key.name for key in PROGRAM), PROGRAM, SET_BY_PROGRAM.note),
    ):
        lines.append(f"| {name} ({len(keys)} keys) | | | dropped: {note} |")
    return "".join(f"{line}\n" for line in lines)


def is_of_reference(key: TheirKey) -> bool:
    """Returns True for the keys below worker.ref. Those of the KL term stand under algorithm."""
    return key.rule is REFERENCE_MODEL and key.name.startswith("worker.ref.")


def row(key: TheirKey) -> str:
    """Returns the row of a key. Names of theirs are no code, so that they are not taken for settings of ours."""
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    here = ", ".join(f"`{setting}`" for setting in key.rule.settings)
    return f"| {key.name} | {write_yaml_value(default)} | {here} | {note_of(key)} |"


def note_of(key: TheirKey) -> str:
    rule, note = key.rule, key.rule.note
    if isinstance(rule, Dropped):
        note = f"dropped: {note}"
    elif isinstance(rule, Fixed):
        values = " or ".join(write_yaml_value(value) for value in rule.values)
        note = f"only {values}: {note}"
    only = f"only with {key.only_with}" if key.only_with else ""
    return "; ".join(filter(None, [note, only])) or "the same"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(before + table() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
