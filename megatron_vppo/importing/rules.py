"""The rules by which a key of theirs becomes settings of ours, is dropped, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from megatron_vppo.importing.their_values import TheirValues, ValueKind


@dataclass(frozen=True)
class Outcome:
    """One key with its value, after the import: settings, or why there are none."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Our settings by their dotted names."""
    comments: Mapping[str, str] = field(default_factory=dict)
    """The comments next to settings, where a value was worked out or means more than it says."""
    differs: str = ""
    """The difference to their run that the settings do not show."""
    dropped: str = ""
    """The reason why no setting stands for it."""
    refused: str = ""
    """The reason why it cannot be had here, and what to set."""


def becomes(setting: str, value: Any, *, comment: str = "", differs: str = "") -> Outcome:
    """Returns the outcome of a key that is one setting."""
    return Outcome({setting: value}, comments={setting: comment} if comment else {}, differs=differs)


class Rule(Protocol):
    """A way to treat a key. The fields are for the table of docs/import.md, where this is read only."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of ours that it may give a value."""

    @property
    def note(self) -> str:
        """The sentence for the table."""

    def apply(self, value: Any, theirs: TheirValues) -> Outcome:
        """Treats one value."""


@dataclass(frozen=True)
class Same:
    """A setting of ours with the same meaning."""

    setting: str
    note: str = ""

    @property
    def settings(self) -> tuple[str, ...]:
        return (self.setting,)

    def apply(self, value: Any, theirs: TheirValues) -> Outcome:
        return becomes(self.setting, value)


@dataclass(frozen=True)
class Computed:
    """Settings of ours that are worked out of the value, and of others where needed."""

    settings: tuple[str, ...]
    work_out: Callable[[Any, TheirValues], Outcome]
    note: str

    def apply(self, value: Any, theirs: TheirValues) -> Outcome:
        return self.work_out(value, theirs)


@dataclass(frozen=True)
class Dropped:
    """A key without a counterpart, on whose value no result depends."""

    note: str
    matters: bool = False
    """True if a value other than the default is worth a word to the user."""
    settings: tuple[str, ...] = ()

    def apply(self, value: Any, theirs: TheirValues) -> Outcome:
        return Outcome(dropped=self.note)


@dataclass(frozen=True)
class Fixed:
    """A key with values that are what is done here anyway; every other one is refused."""

    values: tuple[Any, ...]
    note: str
    """The reason for refusing the others, and what to set."""
    settings: tuple[str, ...] = ()

    def apply(self, value: Any, theirs: TheirValues) -> Outcome:
        if value in self.values:
            return Outcome(dropped="it is so here")
        return Outcome(refused=self.note)


@dataclass(frozen=True)
class TheirKey:
    """A row of the table."""

    name: str
    kind: ValueKind
    default: Any
    """The default of their dataclass."""
    rule: Rule
    only_with: str = ""
    """A flag of theirs without which the key has no effect."""

    def outcome(self, theirs: TheirValues) -> Outcome:
        """Treats the value in force."""
        if self.only_with and not theirs[self.only_with]:
            return Outcome(dropped=f"without effect while {self.only_with} is false")
        value = theirs[self.name]
        outcome = self.rule.apply(value, theirs)
        if isinstance(self.rule, Dropped) and self.rule.matters and value != self.default:
            return replace(outcome, differs=self.rule.note)
        return outcome


def keys_of(prefix: str, *rows: tuple[Any, ...]) -> tuple[TheirKey, ...]:
    """Makes keys of rows: name, kind, default, rule, and the flag that it has an effect with, if there is one."""
    return tuple(TheirKey(f"{prefix}.{name}", *rest) for name, *rest in rows)
