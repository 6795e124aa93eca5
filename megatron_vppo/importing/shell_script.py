"""The words that a launch script passes to its program, read without running it.

    MODEL_PATH=Qwen/Qwen2.5-VL-7B-Instruct
    python3 -m verl.trainer.main \\
        config=examples/configs/config.yaml \\
        worker.actor.model.model_path=${MODEL_PATH}

Assignments, quotes, continued lines and comments are read as a shell does. Branches, loops, functions and arrays are
refused by their line; a guess about them could be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_DECLARING = ("export", "readonly", "declare", "local")
_BRANCHING = (
    "if", "then", "elif", "else", "fi", "for", "while", "until", "do", "done", "case", "esac", "select", "function",
    "{", "}",
)  # fmt: skip
_PROGRAM = re.compile(r"verl\.trainer\.main|(.*/)?verl/trainer/main\.py")


@dataclass(frozen=True)
class Word:
    """A word of a command, or the value of a variable."""

    text: str
    unset: tuple[str, ...] = ()
    """The variables in it that have no value, and `$(...)` for the output of a command."""


def words_of_run(text: str, *, name: str, environment: Mapping[str, str]) -> list[Word]:
    """Returns the words behind `python3 -m verl.trainer.main` in a script.

    Args:
        name: the script's, for messages.
        environment: values of variables that the script does not set.

    Raises:
        ValueError: the script does not call it, calls it twice, or has more in it than is read.
    """
    runs = []
    for words in _Reader(text, name, environment).commands():
        place = next((n for n, word in enumerate(words) if _PROGRAM.fullmatch(word.text)), None)
        if place is not None:
            runs.append([word for word in words[place + 1 :] if word.text])
    if len(runs) != 1:
        raise ValueError(f"{name} calls verl.trainer.main {len(runs)} times; give a script that calls it once")
    return runs[0]


@dataclass
class _Reader:
    text: str
    name: str
    environment: Mapping[str, str]
    at: int = 0
    variables: dict[str, Word] = field(default_factory=dict)

    def commands(self) -> Iterator[list[Word]]:
        """Yields the words of each command, assignments left out. Variables have the values of that place."""
        words: list[Word] = []
        only_assignments, after_condition = True, False
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in " \t\r":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif char == "#":
                self._skip_to("\n")
            elif char in "\n;&|":
                is_condition = self.text[self.at : self.at + 2] in ("&&", "||")
                after_condition = is_condition or (after_condition and not words)  # a line may end after &&
                self.at += 2 if is_condition else 1
                yield words
                words, only_assignments = [], True
            elif char in "<>":
                self._skip_redirection()
            elif char in "()":
                raise self._not_read(f"'{char}'")
            else:
                declares = only_assignments or (words and words[0].text in _DECLARING)
                assigned = _ASSIGNMENT.match(self.text, self.at) if declares else None
                if assigned and after_condition:
                    raise self._not_read(f"{assigned[0]} after && or ||")
                if assigned:
                    self._assign(assigned)
                    continue
                only_assignments = False
                words += self._read_words(splits=True)
                if words and words[0].text in _BRANCHING:
                    raise self._not_read(f"'{words[0].text}'")
        yield words

    def _assign(self, assigned: re.Match[str]) -> None:
        self.at = assigned.end()
        if self.text.startswith("(", self.at):
            raise self._not_read(f"{assigned[0]}(, an array,")
        value = self._one_word()
        before = self.variables.get(assigned[1], Word("")) if assigned[2] else Word("")
        self.variables[assigned[1]] = Word(before.text + value.text, before.unset + value.unset)

    # --- Words --------------------------------------------------------------------------------------------------------

    def _one_word(self) -> Word:
        words = self._read_words(splits=False)
        return words[0] if words else Word("")

    def _read_words(self, *, splits: bool) -> list[Word]:
        """Reads one word of the text, of which the value of a variable outside of quotes may make several or none.

        Args:
            splits: True where blanks in such a value divide words; in an assignment they do not.
        """
        words: list[Word] = []
        text, is_word = "", False
        unset: tuple[str, ...] = ()
        while self.at < len(self.text) and self.text[self.at] not in " \t\r\n;&|<>()":
            char = self.text[self.at]
            if char == "'":
                start = self.at + 1
                self.at = self._find("'", start) + 1
                text, is_word = text + self.text[start : self.at - 1], True
            elif char == '"':
                inside = self._quoted()
                text, unset, is_word = text + inside.text, unset + inside.unset, True
            elif char == "\\":
                text += self.text[self.at + 1 : self.at + 2].replace("\n", "")
                self.at, is_word = self.at + 2, True
            elif char in "$`":
                value = self._expanded()
                unset += value.unset
                parts = value.text.split() if splits else [value.text]
                for part in parts[:-1]:
                    words.append(Word(text + part, unset))
                    text, unset = "", ()
                text, is_word = text + (parts[-1] if parts else ""), is_word or bool(parts)
            else:
                text, self.at, is_word = text + char, self.at + 1, True
        if text.isdigit() and self.text[self.at : self.at + 1] in ("<", ">"):
            return words  # the number of a stream
        return [*words, Word(text, unset)] if is_word else words

    def _quoted(self) -> Word:
        self.at += 1
        text = ""
        unset: tuple[str, ...] = ()
        while (char := self.text[self.at : self.at + 1]) != '"':
            if not char:
                raise self._not_read("a quote that does not end")
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\", "\n"):
                text += self.text[self.at + 1].replace("\n", "")
                self.at += 2
            elif char in "$`":
                value = self._expanded()
                text, unset = text + value.text, unset + value.unset
            else:
                text, self.at = text + char, self.at + 1
        self.at += 1
        return Word(text, unset)

    def _expanded(self) -> Word:
        """Reads `$NAME`, `${NAME}`, `${NAME:-default}` or the output of a command, which is not known."""
        if self.text[self.at] == "`":
            self.at = self._find("`", self.at + 1) + 1
            return Word("", ("`...`",))
        self.at += 1
        if self.text.startswith("(", self.at):
            self._skip_brackets()
            return Word("", ("$(...)",))
        if self.text.startswith("{", self.at):
            start = self.at + 1
            self.at = self._find("}", start) + 1
            inside = re.fullmatch(r"([A-Za-z_]\w*)(?:(:?)-([^$`]*))?", self.text[start : self.at - 1])
            if not inside:
                raise self._not_read("${" + self.text[start : self.at])
            return self._value(inside[1], default=inside[3], also_for_empty=bool(inside[2]))
        if name := _NAME.match(self.text, self.at):
            self.at = name.end()
            return self._value(name[0], default=None, also_for_empty=False)
        char = self.text[self.at : self.at + 1]
        if char in (*"0123456789@*#?$!-",):
            self.at += 1
            # The arguments of the script: those of the import stand in their place.
            return Word("") if char in (*"123456789@*",) else Word("", (f"${char}",))
        return Word("$")

    def _value(self, name: str, *, default: str | None, also_for_empty: bool) -> Word:
        value = self.variables.get(name) or (Word(self.environment[name]) if name in self.environment else None)
        if default is not None and (value is None or (also_for_empty and not value.text)):
            return Word(default.strip("\"'"))
        return value or Word("", (name,))

    # --- Places -------------------------------------------------------------------------------------------------------

    def _find(self, what: str, start: int) -> int:
        place = self.text.find(what, start)
        if place < 0:
            raise self._not_read(f"{what} that is missing")
        return place

    def _skip_to(self, what: str) -> None:
        place = self.text.find(what, self.at)
        self.at = len(self.text) if place < 0 else place

    def _skip_brackets(self) -> None:
        depth = 0
        while True:
            char = self.text[self.at : self.at + 1]
            if not char:
                raise self._not_read("a bracket that does not end")
            depth += {"(": 1, ")": -1}.get(char, 0)
            self.at += 1
            if depth == 0:
                return

    def _skip_redirection(self) -> None:
        if self.text.startswith("<<", self.at):
            raise self._not_read("'<<'")
        while self.text[self.at : self.at + 1] in (*"<>&|", " "):
            self.at += 1
        self._one_word()

    def _not_read(self, what: str) -> ValueError:
        line = self.text.count("\n", 0, self.at) + 1
        return ValueError(
            f"{self.name}, line {line}: {what} is not read: a script may have assignments and commands alone; give its "
            "configuration and overrides instead: vppo import-config CONFIG.yaml key=value ..."
        )
