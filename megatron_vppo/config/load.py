"""A reader of configurations, from a YAML file, its base files and dotted overrides; and a writer for the run folder.

    base: vppo.yaml          # optional; another file, relative to this one, that this one is laid over; or a list, of
                             # which each is laid over those before it
    rollout:
      n: 8

Every problem of a configuration is reported at once, with the file or override it came from.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from megatron_vppo.config.checks import problems_of
from megatron_vppo.config.schema import RunConfig, Section
from megatron_vppo.config.yaml_text import read_yaml, write_yaml

BASE_KEY = "base"
AnyConfig = TypeVar("AnyConfig", bound=Section)


@dataclass(frozen=True)
class Setting:
    """A value as a user wrote it."""

    value: Any
    source: str
    """The file or override that it stands in, for messages."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads `path` (and its `base` files), lays `key.name=value` overrides over it, and checks everything.

    Values of overrides are read as YAML: `rollout.n=8`, `actor.optim.betas=[0.9, 0.95]`, `data.val_files=null`.
    Later overrides win over earlier ones, overrides over the file, the file over its base. Paths inside the file stay
    as they are written.

    Raises:
        FileNotFoundError: the file or a base file does not exist.
        ValueError: naming every unknown setting (with the nearest valid name), wrong value and impossible combination.
    """
    return load_settings(RunConfig, path, overrides, checks=problems_of)


def load_settings(
    kind: type[AnyConfig], path: str | Path, overrides: Sequence[str], *, checks: Callable[[AnyConfig], list[str]]
) -> AnyConfig:
    """Reads the settings of a kind, as `load_config` does those of a run.

    Args:
        checks: returns the messages about combinations that cannot be.
    """
    layers = [*_file_layers(Path(path)), *(_override_layer(text) for text in overrides)]
    return settings_of(kind, layers, name=str(path), checks=checks)


def config_of(layers: Sequence[tuple[str, Mapping[Any, Any]]], *, name: str) -> RunConfig:
    """Checks the nested settings of a run, as `settings_of` does."""
    return settings_of(RunConfig, layers, name=name, checks=problems_of)


def settings_of(
    kind: type[AnyConfig],
    layers: Sequence[tuple[str, Mapping[Any, Any]]],
    *,
    name: str,
    checks: Callable[[AnyConfig], list[str]],
) -> AnyConfig:
    """Checks nested settings, of which later layers win over earlier ones.

    Args:
        kind: the class of the whole.
        layers: (source, settings) of each; messages name the source.
        name: the configuration as a whole, for the first line of a message.
        checks: as in `load_settings`.

    Raises:
        ValueError: naming every problem.
    """
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    for source, mapping in layers:
        for setting, value in _leaves(mapping, kind, "", source, problems, whole=kind):
            settings[setting] = Setting(value, source)
    try:
        config = kind.model_validate(_nested(settings))
    except ValidationError as error:
        problems += [_describe(e, settings, kind) for e in error.errors()]
    else:
        problems += checks(config)
        if not problems:
            return config
    heading = f"{name}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration"
    raise ValueError("\n  - ".join([heading, *problems]))


def save_resolved(config: Section, path: str | Path) -> None:
    """Writes every setting with the value in force; loading the file gives equal settings."""
    Path(path).write_text(write_yaml(config.model_dump(mode="json")), encoding="utf-8")


# --- Reading ----------------------------------------------------------------------------------------------------------


def _file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, Mapping[Any, Any]]]:
    """Reads the file and its bases: (source, mapping) of each, the lowest base first."""
    if not path.is_file():
        named_in = f" (named by '{BASE_KEY}' in {above[-1]})" if above else ""
        raise FileNotFoundError(f"no configuration file {path}{named_in}")
    if path.resolve() in [p.resolve() for p in above]:
        raise ValueError(f"'{BASE_KEY}' goes in a circle: {' -> '.join(map(str, [*above, path]))}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    content = read_yaml(text, str(path))
    mapping = {} if content is None else content
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} holds {_shown(content)}; it should hold sections such as 'data:' and 'model:'")
    base = mapping.pop(BASE_KEY, None)
    bases = [] if base is None else [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(one, str) for one in bases):
        raise ValueError(
            f"'{BASE_KEY}' in {path} is {_shown(base)}; set it to the path of a YAML file, or a list of them"
        )
    lower = [layer for one in bases for layer in _file_layers(path.parent / one, (*above, path))]
    return [*lower, (str(path), mapping)]


def _override_layer(text: str) -> tuple[str, Mapping[Any, Any]]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ValueError(f"override '{text}' is not of the form section.setting=value, for example rollout.n=8")
    if value.lstrip().startswith("#"):
        quoted = f"{name}=\"'{value.strip()}'\""
        raise ValueError(f"override '{text}': # begins a comment in YAML; write it in quotes: {quoted}")
    source = f"override '{text}'"
    return source, _nested({name: Setting(read_yaml(value, source), source)})


# --- Names ------------------------------------------------------------------------------------------------------------


def _section(model: type[Section], name: str) -> type[Section] | None:
    """Returns the section class of a field, None for a plain setting."""
    annotation = model.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _leaves(
    mapping: Mapping[Any, Any],
    model: type[Section],
    prefix: str,
    source: str,
    problems: list[str],
    *,
    whole: type[Section],
) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every known setting in the mapping; the others are added to `problems`."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if key not in model.model_fields:
            problems.append(f"{name} ({source}) is no setting; {_suggestion(name, isinstance(value, Mapping), whole)}")
            continue
        section = _section(model, key)
        if section is None:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _leaves(value, section, f"{name}.", source, problems, whole=whole)
        elif value is not None:  # `section:` with nothing below it changes nothing
            inside = ", ".join(section.model_fields)
            problems.append(f"{name} = {_shown(value)} ({source}): {name} is a section; set one of {inside}")


def _known_names(model: type[Section], prefix: str = "", *, sections: bool) -> Iterator[str]:
    for key in model.model_fields:
        section = _section(model, key)
        if (section is not None) == sections:
            yield f"{prefix}{key}"
        if section is not None:
            yield from _known_names(section, f"{prefix}{key}.", sections=sections)


def _suggestion(name: str, is_section: bool, kind: type[Section]) -> str:
    """Suggests the nearest valid name."""
    candidates = list(_known_names(kind, sections=is_section))
    if name in candidates:  # a key of a file that has dots
        *sections, last = name.split(".")
        return f"in a file, write '{last}' below {' and '.join(map(repr, sections))}"
    nearest = nearest_name(name, candidates)
    return f"did you mean {nearest}?" if nearest else f"the sections are {', '.join(kind.model_fields)}"


def nearest_name(name: str, candidates: Sequence[str]) -> str | None:
    """Returns the candidate that is most like a dotted name; None if none is like it.

    Likeness counts over the whole dotted name and over its last part, so that a setting in a wrong section is found.
    """

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    nearest = max(candidates, key=likeness)
    return nearest if likeness(nearest) >= 1.0 else None


def _nested(settings: Mapping[str, Setting]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, setting in settings.items():
        *sections, leaf = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = setting.value
    return nested


# --- Messages ---------------------------------------------------------------------------------------------------------


def _describe(error: Any, settings: Mapping[str, Setting], kind: type[Section]) -> str:
    """Formats a pydantic error as `name = value (source): what was expected`."""
    parts = [str(part) for part in error["loc"]]
    whole = ".".join(parts)
    inside: list[str] = []
    while parts and ".".join(parts) not in settings:
        inside.insert(0, parts.pop())  # an index into a list, and a field of what stands there
    name = ".".join(parts)
    if name:
        if len(inside) > 1 and inside[-2].isdigit():
            place = f"{name}[{inside[-2]}]"
            return _describe_entry(error, place, settings[name].source, _entry_fields(kind, name))
        too_short = error["type"] == "missing"
        expected = "too few values" if too_short else error["msg"].replace("Input should be ", "should be ")
        if error["type"] == "tuple_type":
            expected = "should be a list, such as [a, b]"
        elif error["type"] == "string_type":
            expected = "should be a text; write it in quotes (in a shell, in two kinds: \"'1'\")"
        return f"{name} = {_shown(settings[name].value)} ({settings[name].source}): {expected}"
    if error["type"] != "missing":
        return f"{whole} = {_shown(error['input'])}: {error['msg']}"
    known = _known_names(kind, sections=False)
    required = [n for n in known if n == whole or (n.startswith(f"{whole}.") and _is_required(n, kind))]
    return f"{' and '.join(required)} must be set"


def _describe_entry(error: Any, place: str, source: str, known: Sequence[str]) -> str:
    """Formats the error of a field in one of several entries of a setting, whose fields are `known`."""
    field = str(error["loc"][-1])
    where = f"{place}.{field}"
    if error["type"] == "missing":
        return f"{where} ({source}) must be set"
    if error["type"] == "extra_forbidden":
        nearest = nearest_name(field, known)
        hint = f"did you mean {nearest}?" if nearest else f"an entry has {', '.join(known)}"
        return f"{where} ({source}) is no setting; {hint}"
    return f"{where} = {_shown(error['input'])} ({source}): {error['msg'].replace('Input should be ', 'should be ')}"


def _entry_fields(kind: type[Section], name: str) -> list[str]:
    """Lists the fields of the entries of a setting that is a list of sections."""
    *sections, leaf = name.split(".")
    for key in sections:
        inner = _section(kind, key)
        assert inner is not None, name
        kind = inner
    waiting = [kind.model_fields[leaf].annotation]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return list(annotation.model_fields)
        waiting += get_args(annotation)
    return []


def _is_required(name: str, kind: type[Section]) -> bool:
    *sections, leaf = name.split(".")
    model: type[Section] = kind
    for key in sections:
        inner = _section(model, key)
        assert inner is not None, name
        model = inner
    return model.model_fields[leaf].is_required()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
