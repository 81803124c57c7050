"""The faults: single edits of a module's text, found by its syntax tree."""

import ast
import re
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.LShift: ">>",
    ast.BitOr: "&",
    ast.BitAnd: "|",
}
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}
WRAPPERS = frozenset({"abs", "int", "list", "reversed", "set", "sorted", "str", "tuple"})  # f(x) becomes x
# SQL statements, which contain much of the logic of the audit.
SQL = re.compile(r"\A\s*(?:SELECT|WITH|,) ?", re.ASCII)
SQL_EDITS = (
    (r"<>", "="),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" \+ 1\b", ""),
    (r" - 1\b", ""),
    (r"\bAND\b", "OR"),
    (r"\bOR\b", "AND"),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"\bFULL JOIN\b", "JOIN"),
    (r"\bSEMI JOIN\b", "ANTI JOIN"),
    (r"\bIS NULL\b", "IS NOT NULL"),
    (r"\bIS NOT NULL\b", "IS NULL"),
    (r"\bNOT good\b", "good"),
)


@dataclass(frozen=True)
class Mutant:
    """One edit: the changed lines before and after, each joined into one line, and the complete text after it."""

    line: int
    before: str
    after: str
    text: str
    scope: tuple[int, int] | None  # first and last line of the enclosing function


def mutants(text: str, excluded: frozenset[str] = frozenset()) -> list[Mutant]:
    """All mutants of a module's text, sorted by line.

    Args:
        excluded: qualified names of functions that are not mutated.
    """
    finder = _Finder(text, excluded)
    finder.visit(ast.parse(text))
    found = {(one.line, one.after): one for one in finder.found if one.after != one.before}
    return sorted(found.values(), key=lambda one: one.line)


class _Finder(ast.NodeVisitor):
    def __init__(self, text: str, excluded: frozenset[str]) -> None:
        self.found: list[Mutant] = []
        self._bytes = text.encode()  # the tree counts columns in bytes
        self._starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._excluded = excluded
        self._names: list[str] = []
        self._scope: tuple[int, int] | None = None
        self._statement = 0, len(self._bytes)  # of the module, in which the edit is

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def _source(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._bytes[start:end].decode()

    def _replace(self, start: int, end: int, new: str) -> None:
        changed = self._bytes[:start] + new.encode() + self._bytes[end:]
        first = self._bytes.rfind(b"\n", 0, start) + 1
        last = (self._bytes + b"\n").find(b"\n", end)
        before, after = self._bytes[first:last], self._bytes[first:start] + new.encode() + self._bytes[end:last]
        line = self._bytes.count(b"\n", 0, start) + 1
        one_line = (b" ".join(part.split()).decode() for part in (before, after))
        text = changed.decode()
        begin, finish = self._statement
        try:
            compile(self._bytes[begin:start] + new.encode() + self._bytes[end:finish], "mutant", "exec")
        except SyntaxError:  # such as an edit of the value of a `yield`
            return
        self.found.append(Mutant(line, *one_line, text, self._scope))

    def _edit(self, node: ast.AST, new: str) -> None:
        self._replace(*self._span(node), new)

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace the operator between two operands, which may be in parentheses and on separate lines."""
        start, end = self._span(left)[1], self._span(right)[0]
        place = re.search(rf"(?<!\w){old}(?!\w)" if old[0].isalpha() else old, self._bytes[start:end].decode())
        if place:
            self._replace(start + place.start(), start + place.end(), new)

    def visit_Module(self, node: ast.Module) -> None:
        for one in node.body:
            first = min([one, *getattr(one, "decorator_list", [])], key=lambda part: part.lineno)
            self._statement = self._at(first.lineno, 0), self._span(one)[1]
            self.visit(one)

    # Mutated nodes

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right, operator in zip(operands, operands[1:], node.ops, strict=False):
            old = {ast.NotIn: r"not\s+in", ast.IsNot: r"is\s+not", ast.Is: "is", ast.In: "in"}.get(
                type(operator), r"[=!<>]=|[<>]"
            )
            for new in COMPARISONS[type(operator)]:
                self._between(left, right, old, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._edit(node, f"({self._source(node.operand)})")
        elif isinstance(node.op, ast.USub):
            self._edit(node, self._source(node.operand))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if all(isinstance(one, ast.BinOp | ast.operator | ast.Constant) for one in ast.walk(node)):
            for new in ("+ 1", "- 1"):  # a constant such as 20 * 1024**2 is one number
                self._edit(node, f"({self._source(node)} {new})")
            return
        texts = (ast.JoinedStr, ast.Constant)
        is_text = any(
            isinstance(one, texts) and isinstance(getattr(one, "value", ""), str) for one in (node.left, node.right)
        )
        if type(node.op) in ARITHMETIC and not is_text:
            self._between(node.left, node.right, r"//|<<|[-+*/%|&]", ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._edit(node, "pass")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._edit(node, str(not value))
        elif isinstance(value, int):
            self._edit(node, str(value + 1))
            self._edit(node, str(value - 1))
        elif isinstance(value, float):
            self._edit(node, str(value * 2 + 1))
            self._edit(node, str(value / 2))
        elif isinstance(value, str) and SQL.match(value):
            source, start = self._source(node), self._span(node)[0]
            for old, new in SQL_EDITS:
                for place in re.finditer(old, source):
                    at = start + len(source[: place.start()].encode())
                    self._replace(at, at + len(place[0].encode()), new)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        plain = not any(isinstance(one, ast.Starred) for one in node.args)
        if name in OPPOSITES:
            self._edit(node.func, OPPOSITES[name])
        elif name in WRAPPERS and len(node.args) == 1 and plain:
            self._edit(node, f"({self._source(node.args[0])})")
        if len(node.args) > 1 and plain and name not in {*OPPOSITES, "isinstance"}:
            first, second = node.args[:2]
            start, end = self._span(first)[0], self._span(second)[1]
            between = self._bytes[self._span(first)[1] : self._span(second)[0]].decode()
            self._replace(start, end, self._source(second) + between + self._source(first))
        self.generic_visit(node)

    def _condition(self, test: ast.expr) -> None:
        """Negate a condition without an operator that is mutated itself."""
        if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.NamedExpr):
            self._edit(test, f"(not ({self._source(test)}))")

    def visit_If(self, node: ast.If) -> None:
        if self._source(node.test) == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._edit(node, "pass")  # but not its message, of which tests check only a part

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self._edit(node, "pass")
        elif not (isinstance(node.value, ast.Constant) and node.value.value in {None, False}):
            self._edit(node, "return None")
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._edit(node, "break")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call):
            self._edit(node, "pass")
        self.generic_visit(node)

    # Nodes without mutants

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Messages are not mutated."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        for one in node.body:
            self.visit(one)
        self._names.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._names.append(node.name)
        if ".".join(self._names) not in self._excluded:
            outer = self._scope
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            self._scope = outer or (first, node.end_lineno or node.lineno)
            for one in (*node.args.defaults, *(one for one in node.args.kw_defaults if one), *node.body):
                self.visit(one)
            self._scope = outer
        self._names.pop()
