"""Their configuration as a user has it: a YAML file or a launch script, and overrides, laid over their defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vppo.config.load import nearest_name
from megatron_vppo.config.yaml_text import read_yaml
from megatron_vppo.importing.easyr1_keys import KEYS
from megatron_vppo.importing.shell_script import Word, words_of_run
from megatron_vppo.importing.their_values import MAPPING, Folders, TheirValues

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class TheirConfig:
    """The values in force, and what was found on the way."""

    values: TheirValues
    base: Path | None
    """The YAML file; None: a script without one, whose values are their defaults."""
    notes: tuple[str, ...]
    """Variables without a value, and what came of them."""
    problems: tuple[str, ...]
    """Keys that they do not have, and values that they would refuse."""


def read_source(source: Path, overrides: Sequence[str], *, environment: Mapping[str, str]) -> TheirConfig:
    """Reads a YAML file or a script, and lays overrides over it. `config=FILE` among these replaces the file.

    Raises:
        FileNotFoundError: the source, or the file that it names, is not there.
        ValueError: one of them cannot be read.
    """
    text = _text_of(source)
    folders = Folders.around(source)
    is_script = source.suffix not in (".yaml", ".yml") and (source.suffix == ".sh" or "verl.trainer.main" in text)
    words = words_of_run(text, name=str(source), environment=environment) if is_script else []
    given = [*words, *(Word(text) for text in overrides)]
    base = _base_of(given, None if is_script else source, folders)
    collected = _Values()
    if base is not None:
        content = read_yaml(_text_of(base), str(base))
        if content is not None and not isinstance(content, Mapping):
            raise ValueError(f"{base} holds {type(content).__name__}; it should hold sections such as 'data:'")
        collected.add(content or {}, str(base))
    for word in given:
        if not word.text.startswith("config="):
            collected.override(word)
    return TheirConfig(TheirValues(collected.values, folders), base, tuple(collected.notes), tuple(collected.problems))


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _base_of(words: Sequence[Word], source: Path | None, folders: Folders) -> Path | None:
    """Returns the YAML file: the last `config=FILE`, or the source itself."""
    named = [word for word in words if word.text.startswith("config=")]
    if not named:
        return source
    path = named[-1].text.removeprefix("config=")
    found = folders.find(path)
    if found is None:
        unset = f" ({', '.join(named[-1].unset)} has no value)" if named[-1].unset else ""
        raise FileNotFoundError(
            f"config={path}{unset}: there is no such file, neither in {folders.starts[0]} nor here, nor in a folder "
            "above one of the two; give the file: config=PATH"
        )
    return found


class _Values:
    """The values so far, from the defaults on."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {name: key.default for name, key in KEYS.items()}
        self.notes: list[str] = []
        self.problems: list[str] = []

    def override(self, word: Word) -> None:
        """Lays `key=value` over the values. An empty value is null, and left out where null is none."""
        name, equals, text = word.text.partition("=")
        if not equals or not _OVERRIDE.fullmatch(name):
            self.problems.append(f"override '{word.text}' is not of the form section.key=value")
            return
        unset = ", ".join(dict.fromkeys(word.unset))
        said = f"{word.text}: {unset} has no value" if unset else f"{name}= is empty"
        if not text.strip() and name in KEYS and not KEYS[name].kind.null:
            self.notes.append(
                f"{said}; their program would refuse that. Left out: it stays {_shown(self.values[name])}"
            )
            return
        if unset or not text.strip():
            self.notes.append(f"{said}; " + ("taken for null" if not text.strip() else "nothing stands in its place"))
        try:
            value = read_yaml(text, f"override '{word.text}'")
        except ValueError as problem:
            self.problems.append(str(problem))
            return
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        self.add(nested, f"override '{word.text}'")

    def add(self, mapping: Mapping[Any, Any], source: str) -> None:
        """Lays nested values over those so far; what is wrong is noted."""
        for name, given in self._leaves(mapping, "", source):
            try:
                if isinstance(given, str) and "${" in given:
                    raise ValueError("refers to another key by ${...}; write its value")
                value = KEYS[name].kind.value_of(given)
            except ValueError as problem:
                self.problems.append(f"{name} = {_shown(given)} ({source}): {problem}")
                continue
            self.values[name] = {**self.values[name], **value} if KEYS[name].kind is MAPPING else value

    def _leaves(self, mapping: Mapping[Any, Any], prefix: str, source: str) -> Iterator[tuple[str, Any]]:
        for key, given in mapping.items():
            name = f"{prefix}{key}"
            if name in KEYS:
                yield name, given
            elif not any(known.startswith(f"{name}.") for known in KEYS):
                nearest = nearest_name(name, list(KEYS))
                hint = f"did you mean {nearest}?" if nearest else "leave it out"
                self.problems.append(f"{name} ({source}) is no key of VPPO-RL or EasyR1 0.3.3; {hint}")
            elif isinstance(given, Mapping):
                yield from self._leaves(given, f"{name}.", source)
            elif given is not None:
                self.problems.append(f"{name} = {_shown(given)} ({source}): {name} is a section")


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
