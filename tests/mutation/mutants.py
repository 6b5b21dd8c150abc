"""The faults that are put into a file: those that mutmut makes, fewer of some kinds, and two kinds more."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation import mutators
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.pragma_handling import get_ignored_lines

# Nothing within a call of these, or within `raise`, is changed: no test should spell the texts of messages.
SAID_BY = {"say", "warn", "info"}
# The argument of zip is an assertion: no fault in it changes what the code does.
ASSERTED = "strict"


class Mutant(NamedTuple):
    line: int  # where the fault is
    change: str  # the lines that it changes: "old -> new"
    source: str  # the whole file with it
    lines: tuple[int, int] | None  # first and last of what has to be run for it to matter; None: the file's import


def mutants_of(path: Path) -> list[Mutant]:
    """All of a file's mutants, each one change, in the file's order."""
    source = path.read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(source))
    visitor = _Visitor(_operators(), get_ignored_lines(str(path), source, wrapper))
    module = wrapper.visit(visitor)
    found: dict[str, Mutant] = {}
    for mutation, (line, lines) in zip(visitor.mutations, visitor.places, strict=True):
        code = deep_replace(module, mutation.original_node, mutation.mutated_node).code
        if code not in found and code != source:
            found[code] = Mutant(line, _change(source, code), code, lines)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _change(source: str, code: str) -> str:
    lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm=""))[3:]
    old, new = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{old} -> {new}"


class _Visitor(MutationVisitor):
    """mutmut's own, which besides leaves out what is said and goes into decorated functions, since nothing is wrapped here."""

    METADATA_DEPENDENCIES = (*MutationVisitor.METADATA_DEPENDENCIES, ParentNodeProvider)

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.places: list[tuple[int, tuple[int, int] | None]] = []  # of each mutation

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Raise) or (isinstance(node, cst.Arg) and node.keyword and node.keyword.value == ASSERTED):
            return True
        if isinstance(node, cst.Call):
            name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
            if isinstance(name, cst.Name) and name.value in SAID_BY:
                return True
        return super()._skip_node_and_children(node.with_changes(decorators=()) if isinstance(node, cst.FunctionDef) else node)

    def _create_mutations(self, node: cst.CSTNode) -> None:
        super()._create_mutations(node)
        self.places += [self._place(node)] * (len(self.mutations) - len(self.places))

    def _place(self, node: cst.CSTNode) -> tuple[int, tuple[int, int] | None]:
        """An operator has no place of its own; what it stands in has."""
        while not (position := self.get_metadata(PositionProvider, node, None)):
            node = self.get_metadata(ParentNodeProvider, node)
        line, last, statement = position.start.line, position.end.line, node
        if isinstance(node, cst.BaseCompoundStatement):  # its condition was changed, not its body
            last = line
        while not isinstance(statement, cst.BaseSmallStatement | cst.BaseCompoundStatement | cst.Module):
            statement = self.get_metadata(ParentNodeProvider, statement)
        inside = self.get_metadata(ParentNodeProvider, statement, None)
        while inside is not None and not isinstance(inside, cst.FunctionDef):
            inside = self.get_metadata(ParentNodeProvider, inside, None)
        if inside is None or isinstance(statement, cst.FunctionDef | cst.ClassDef | cst.Module):
            return line, None
        return line, (self.get_metadata(PositionProvider, statement).start.line, last)


def _operators() -> list[tuple[type, Callable[[Any], Iterable[cst.CSTNode]]]]:
    ours = {
        mutators.operator_string: _another_word,
        mutators.operator_arg_removal: _without_an_argument,
        mutators.operator_assignment: _nothing_assigned,
    }
    return [*((kind, ours.get(operator, operator)) for kind, operator in mutators.mutation_operators),
            (cst.If, mutators.operator_if_exp), (cst.CompIf, mutators.operator_if_exp), (cst.Expr, _not_called)]


def _another_word(node: cst.BaseString) -> list[cst.BaseString]:
    """Upper and lower case, which mutmut makes too, say no more than this. Prose is left as it is."""
    prose = isinstance(node, cst.SimpleString) and node.value.count(" ") > 1
    return [] if prose else list(mutators.operator_string(node))[:1]


def _without_an_argument(node: cst.Call) -> list[cst.Call]:
    """The named ones, which may have a default. mutmut's None in the place of each fails at once nearly always."""
    return [node.with_changes(args=[*node.args[:at], *node.args[at + 1:]]) for at, argument in enumerate(node.args)
            if argument.keyword and argument.keyword.value != ASSERTED]


def _nothing_assigned(node: cst.Assign | cst.AnnAssign) -> Iterable[cst.CSTNode]:
    """To attributes and items: a local name that is None fails where it is used, and one that is not used has no place here."""
    targets = [target.target for target in node.targets] if isinstance(node, cst.Assign) else [node.target]
    if any(isinstance(target, cst.Attribute | cst.Subscript) for target in targets):
        yield from mutators.operator_assignment(node)


def _not_called(node: cst.Expr) -> list[cst.Pass]:
    """A call for its effect alone has none."""
    return [cst.Pass()] if isinstance(node.value, cst.Call) else []
