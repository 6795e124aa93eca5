"""YAML as configurations have it, read and written.

Plain values mean what YAML 1.2 says they mean (010 is ten, 1:30 and 2026-01-31 are texts, 1e-6 is a number), and on,
off, yes and no are truth values besides. A key that is written twice is refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)$")
_FLOAT = re.compile(
    r"""^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(inf|Inf|INF)
    |\.(nan|NaN|NAN))$""",
    re.VERBOSE,
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Returns the patterns of plain values by their first character: YAML 1.1 without its numbers and dates."""
    kept = [_TAG + kind for kind in ("bool", "null", "merge")]
    resolvers = {
        first: [(tag, pattern) for tag, pattern in patterns if tag in kept]
        for first, patterns in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        resolvers.setdefault(first, []).extend([(f"{_TAG}int", _INTEGER), (f"{_TAG}float", _FLOAT)])
    return resolvers


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """Refuses a key that is written twice."""

    yaml_implicit_resolvers = _resolvers()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reads a mapping. Merges (<<) are resolved later: a merged key may be set again."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is set twice", key.start_mark)
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
    """Writes a text in quotes that the loader would take for another value."""

    yaml_implicit_resolvers = _resolvers()


def read_yaml(text: str, source: str) -> Any:
    """Returns the value that a YAML text has. Raises ValueError, which names `source`, if it is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)
    # yaml lets the errors of values through that it cannot convert ("!!bool maybe") or follow (3000 open brackets).
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def write_yaml(value: Any) -> str:
    """Returns a text that `read_yaml` reads back as an equal value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def write_yaml_value(value: Any) -> str:
    """Returns a value as it stands behind a key, in one line: `8`, `'010'`, `[a, b]`. `read_yaml` reads it back."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
