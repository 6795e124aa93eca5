"""The run over the table: their values in, the text of our YAML file and a report out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vppo.config.load import config_of
from megatron_vppo.config.schema import RunConfig, Section
from megatron_vppo.config.yaml_text import write_yaml_value
from megatron_vppo.importing.easyr1_keys import KEYS
from megatron_vppo.importing.rules import Outcome
from megatron_vppo.importing.sources import TheirConfig

PRESET = ("algorithm.preset", "reference")
"""The setting that no key of theirs has: the algorithm as the authors' code computes it."""
SHOWN = (
    "data.val_files", "data.max_prompt_length", "data.max_response_length", "data.min_pixels", "data.max_pixels",
    "data.rollout_batch_size", "algorithm.use_vppo_on_perception", "algorithm.use_advantage_shaping",
    "algorithm.use_entropy_penalty", "algorithm.top_p_perception_tokens", "algorithm.advantage_scaling_min",
    "algorithm.entropy_penalty_coef", "algorithm.online_filtering", "actor.global_batch_size", "actor.optim.lr",
    "actor.micro_batch_size_per_device_for_update", "rollout.n", "rollout.top_p", "rollout.val.n",
    "trainer.total_epochs", "trainer.val_freq", "trainer.save_freq",
)  # fmt: skip
"""The settings that a reader of a run looks for, written also where they have our default."""


@dataclass(frozen=True)
class ImportedConfig:
    """Our settings, and what became of each key of theirs."""

    config: RunConfig
    text: str
    """The YAML file, without its head."""
    translated: tuple[str, ...]
    """The keys that have settings here, as `key = value -> settings`."""
    dropped: tuple[str, ...]
    """Those that have none, with the reasons."""
    differs: tuple[str, ...]
    """Those whose run differs from theirs, whatever the settings."""


def import_config(source: TheirConfig, *, name: str) -> ImportedConfig:
    """Translates every key.

    Args:
        name: the user's file, for messages.

    Raises:
        ValueError: naming every key that is unknown, cannot be had here or has a value that does not work.
    """
    theirs = source.values
    outcomes = {key.name: key.outcome(theirs) for key in KEYS.values()}

    def lines(part: str) -> list[str]:
        said = {key: getattr(outcome, part) for key, outcome in outcomes.items()}
        return [f"{key} = {_their_text(theirs[key])}: {text}" for key, text in said.items() if text]

    problems = [*source.problems, *lines("refused")]
    if problems:
        count = f"{len(problems)} key{'s' if len(problems) > 1 else ''}"
        raise ValueError("\n  - ".join([f"{name}: {count} cannot be imported; nothing is written", *problems]))
    setting, preset = PRESET
    layers = [("of the import", _nested({setting: preset}))]
    layers += [(key, _nested(outcome.settings)) for key, outcome in outcomes.items() if outcome.settings]
    config = config_of(layers, name=f"{name}, imported")
    return ImportedConfig(
        config=config,
        text="".join(f"{line}\n" for line in _yaml_lines(config, outcomes)),
        translated=tuple(
            f"{key} = {_their_text(theirs[key])} -> {', '.join(outcome.settings)}"
            for key, outcome in outcomes.items()
            if outcome.settings
        ),
        dropped=tuple(lines("dropped")),
        differs=tuple(lines("differs")),
    )


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested


def _their_text(value: Any) -> str:
    return write_yaml_value(list(value) if isinstance(value, tuple) else value)


# --- Our file ---------------------------------------------------------------------------------------------------------


def _yaml_lines(config: RunConfig, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Yields the lines of the settings that are not our defaults and of SHOWN, in the order of the schema."""
    given = {name for outcome in outcomes.values() for name in outcome.settings}
    setting, preset = PRESET
    required = _nested({"data.train_files": config.data.train_files, "model.path": config.model.path})
    defaults = RunConfig.model_validate({**required, **_nested({setting: preset})})
    written = {"data.train_files", "model.path", setting, *(name for name in SHOWN if name in given)}
    comments = {name: text for outcome in outcomes.values() for name, text in outcome.comments.items()}
    comments[setting] = "what the authors' code computes; docs/algorithm.md says how `global` differs"
    yield from _section_lines(config, defaults, "", written, comments)


def _section_lines(
    section: Section, defaults: Section, prefix: str, written: set[str], comments: Mapping[str, str]
) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for field in type(section).model_fields:
        name, value, default = f"{prefix}{field}", getattr(section, field), getattr(defaults, field)
        if isinstance(value, Section):
            inside = list(_section_lines(value, default, f"{name}.", written, comments))
            yield from [f"{indent}{field}:", *inside] if inside else []
        elif value != default or name in written:
            comment = f"  # {comments[name]}" if name in comments else ""
            shown = list(value) if isinstance(value, tuple) else value
            yield f"{indent}{field}: {write_yaml_value(shown)}{comment}"
