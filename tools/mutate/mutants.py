"""The changes that are tried in a source: found in its syntax tree, made at their place in the text.

Left out is what cannot change a result: annotations, decorators, docstrings, f-strings, assertions, the messages of
exceptions, logging and printing.
"""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
"""Each operator as it is written, and what takes its place."""
NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
"""Comparisons whose other operator is their negation already."""

FUNCTIONS = {
    "min": "max",
    "minimum": "maximum",
    "amin": "amax",
    "argmin": "argmax",
    "any": "all",
    "ceil": "floor",
    "zeros": "ones",
    "zeros_like": "ones_like",
    "new_zeros": "new_ones",
}
FUNCTIONS |= {new: old for old, new in FUNCTIONS.items()} | {"mean": "sum", "sum": "mean"}
DROPPED_METHODS = {"clamp"}
SILENT = {"print", "warn", "debug", "info", "warning", "error", "exception"}
"""Functions that write messages."""
UNTOUCHED_ARGUMENTS = {"strict"}
SEQUENCES = (ast.JoinedStr, ast.List, ast.Tuple)


@dataclass(frozen=True)
class Mutant:
    """One change of a source."""

    file: str
    line: int
    function: str
    """The qualified name of the function around it; empty outside of functions, where code runs on import."""
    kind: str
    before: str
    after: str
    start: int
    end: int
    """The place of `before` in the bytes of the source."""
    statement: tuple[int, int]
    """The first and last line of the statement around it, for a compound statement of its head."""

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.end :]


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Lists the mutants of a source, in the order of the text; those that do not compile are left out."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return sorted(filter(lambda mutant: _compiles(mutant.apply(source)), finder.found), key=lambda m: (m.start, m.end))


def sample(mutants: Sequence[Mutant], number: int, *, seed: int) -> list[Mutant]:
    """Draws mutants evenly over functions: one of each in turn, until there are enough."""
    by_function: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_function[mutant.file, mutant.function].append(mutant)
    numbers = random.Random(seed)
    for group in by_function.values():
        numbers.shuffle(group)
    longest = max(map(len, by_function.values()), default=0)
    turns = [group[turn] for turn in range(longest) for group in by_function.values() if turn < len(group)]
    chosen = set(turns[:number])
    return [mutant for mutant in mutants if mutant in chosen]


def _compiles(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.found: list[Mutant] = []
        self._scopes: list[ast.FunctionDef | ast.ClassDef] = []
        self._statement = (1, 1)
        self._line_starts = [0]
        for line in source.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    # --- Places -------------------------------------------------------------------------------------------------------

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._line_starts[node.lineno - 1] + node.col_offset
        return start, self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr) -> str:
        return self.source[slice(*self._span(node))].decode()

    def _add(self, kind: str, start: int, end: int, after: str) -> None:
        is_function = any(not isinstance(scope, ast.ClassDef) for scope in self._scopes)
        function = ".".join(scope.name for scope in self._scopes) if is_function else ""
        line, before = self.source.count(b"\n", 0, start) + 1, self.source[start:end].decode()
        self.found.append(Mutant(self.file, line, function, kind, before, after, start, end, self._statement))

    def _replace(self, kind: str, node: ast.expr | ast.stmt, after: str) -> None:
        self._add(kind, *self._span(node), after)

    def _operator(self, kind: str, left: ast.expr, operator: ast.AST, right: ast.expr) -> None:
        """Exchanges the operator between two operands, where there are also brackets, line breaks and comments."""
        if type(operator) not in OPERATORS:
            return
        written, after = OPERATORS[type(operator)]
        start, end = self._span(left)[1], self._span(right)[0]
        between = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), self.source[start:end])
        pattern = written if written.startswith(("is", "not")) else re.escape(written)
        place = re.search(pattern.encode(), between)
        assert place is not None
        self._add(kind, start + place.start(), start + place.end(), after)

    # --- Scopes and statements ----------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            self._statement = (node.lineno, last or node.lineno)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "__repr__":
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                self.visit(default)
            self._visit_scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_scope(node)

    def _visit_scope(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self._scopes.append(node)
        for statement in node.body:
            self.visit(statement)
        self._scopes.pop()

    def _nothing(self, node: ast.AST) -> None:
        """Leaves a node and all below it as they are."""

    visit_Assert = visit_Raise = visit_JoinedStr = visit_arg = visit_Import = visit_ImportFrom = _nothing

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) or (isinstance(node.value, ast.Call) and _name(node.value) in SILENT):
            return
        if isinstance(node.value, ast.Call):
            self._replace("statement", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._replace("statement", node, "pass")
        self.generic_visit(node)

    # --- Branches -----------------------------------------------------------------------------------------------------

    def visit_If(self, node: ast.If) -> None:
        text = self._text(node.test)
        if text == "TYPE_CHECKING" or text.startswith("__name__"):
            return
        if isinstance(node.body[0], ast.Raise):
            self._replace("guard", node.test, "False")
        else:
            self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self._negate(condition)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        compared = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], NEGATED)
        if not compared and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self._replace("branch", test, f"(not ({self._text(test)}))")

    # --- Expressions --------------------------------------------------------------------------------------------------

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            self._operator("comparison", left, operator, right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._operator("boolean", left, node.op, right)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(_is_sequence(operand) for operand in (node.left, node.right)):
            self._operator("arithmetic", node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not _is_sequence(node.value):
            self._operator("arithmetic", node.target, node.op, node.value)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._replace("sign", node, f"({self._text(node.operand)})")
        if not isinstance(node.operand, ast.Constant):
            self.visit(node.operand)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace("constant", node, str(not value))
        elif isinstance(value, int):
            self._replace("constant", node, str(value + 1))
        elif isinstance(value, float):
            self._replace("constant", node, repr(value * 2 or 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        name, end = _name(node), self._span(node.func)[1]
        if name in FUNCTIONS and (isinstance(node.func, ast.Attribute) or name != "sum"):
            self._add("function", end - len(name), end, FUNCTIONS[name])
        if name in DROPPED_METHODS and isinstance(node.func, ast.Attribute):
            self._replace("dropped", node, self._text(node.func.value))
        if name == "abs" and len(node.args) == 1:
            self._replace("dropped", node, f"({self._text(node.args[0])})")
        for child in (node.func, *node.args, *(k.value for k in node.keywords if k.arg not in UNTOUCHED_ARGUMENTS)):
            self.visit(child)


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_sequence(node: ast.expr) -> bool:
    return isinstance(node, SEQUENCES) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))
