"""Every docstring of the standard library of the Python that runs this, with its name and kind.

Modules written in Python are parsed, never imported. Modules written in C have no source to parse, so those in
`COMPILED` are imported and asked for `__doc__`; importing them has no side effect. Names are the ones people write:
`asyncio.sleep` rather than `asyncio.tasks.sleep`, `os.path.join` rather than `posixpath.join`.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

COMPILED = (
    *("array", "atexit", "binascii", "builtins", "bz2", "cmath", "collections", "contextvars", "csv", "decimal", "faulthandler"),
    *("functools", "gc", "hashlib", "io", "itertools", "lzma", "marshal", "math", "mmap", "operator", "os", "pickle", "random"),
    *("re", "select", "signal", "socket", "sqlite3", "ssl", "string", "struct", "sys", "threading", "time", "tracemalloc"),
    *("types", "unicodedata", "weakref", "zlib"),
)

# Not about using Python: tests, an editor, dead tools, code tables, and generated files.
LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "distutils", "ensurepip", "turtledemo", "pydoc_data", "site-packages"),
    *("_pyio", "_pyrepl", "__phello__"),
}

# Where the file that holds the source is not the module that people import.
PUBLIC_MODULE = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "_pydecimal": "decimal",
    "_pydatetime": "datetime",
    "_collections_abc": "collections.abc",
    "_weakrefset": "weakref",
}


class Entry(NamedTuple):
    """One documented thing: `kind` is module, class, exception, function, method or property."""

    name: str
    kind: str
    signature: str
    text: str

    @property
    def module(self) -> str:
        """The name's first part: the module, or a built-in name itself."""
        return self.name.partition(".")[0]

    @property
    def is_public(self) -> bool:
        """Whether no part of the name begins with an underscore."""
        return not any(part.startswith("_") for part in self.name.split("."))


@cache
def stdlib_entries() -> tuple[Entry, ...]:
    """All entries in a fixed order, private names too, one a name; where C and Python both document a name, C does."""
    found: dict[str, Entry] = {}
    for entry in (*compiled_entries(), *source_entries(Path(sysconfig.get_path("stdlib")))):
        if entry.text.strip():
            found.setdefault(entry.name, entry)
    return tuple(found.values())


def source_entries(library: Path) -> Iterator[Entry]:
    """Entries of every .py file under `library`, in the order of the paths."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts) and not (parts[0] == "encodings" and len(parts) > 1):
            yield from _module_entries(path, library)


def _module_entries(path: Path, library: Path) -> Iterator[Entry]:
    tree = _parsed(path)
    parts = path.relative_to(library).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = PUBLIC_MODULE.get(module, module)
    package, exported = _exported_by_package(path, tree)
    if parts[0] not in PUBLIC_MODULE:
        yield Entry(module, "module", "", ast.get_docstring(tree) or "")
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prefix = module.rpartition(".")[0] if package and node.name in exported else module
            yield from _definition_entries(node, prefix, inside_class=False)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _definition_entries(node: ast.stmt, prefix: str, inside_class: bool) -> Iterator[Entry]:
    name = f"{prefix}.{node.name}"
    text = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        kind = "exception" if node.name.endswith(("Error", "Exception", "Warning")) else "class"
        yield Entry(name, kind, f"class {name}({bases})", text)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _definition_entries(child, name, inside_class=True)
        return
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "functools.cached_property", "cached_property"}:
        yield Entry(name, "property", name, text)
    elif not any(decorator.endswith((".setter", ".deleter", "overload")) for decorator in decorators):
        signature = f"{name}({ast.unparse(node.args)})"
        yield Entry(name, "method" if inside_class else "function", signature, text)


def _exported_by_package(path: Path, tree: ast.Module) -> tuple[bool, set[str]]:
    """Whether `path` lies in a package that imports from it, and the names that it takes."""
    init = path.parent / "__init__.py"
    if path == init or not init.exists():
        return False, set()
    names: set[str] = set()
    for node in _parsed(init).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == path.stem:
            for alias in node.names:
                names |= _declared_public(tree) if alias.name == "*" else {alias.name}
    return bool(names), names


def _declared_public(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    return set()


def compiled_entries() -> Iterator[Entry]:
    """Entries of the modules in `COMPILED` that this Python has, less what their source documents just as well."""
    for module_name in COMPILED:
        if importlib.util.find_spec(module_name) is None:
            continue
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        yield Entry(module_name, "module", "", inspect.cleandoc(module.__doc__ or ""))
        for name in sorted(getattr(module, "__all__", dir(module))):
            value = getattr(module, name)
            if not _belongs_to(value, module_name):
                continue
            # An alias (`IOError`, `socket.error`) is documented under the name that the type gives itself.
            if isinstance(value, type) and value.__name__ == name:
                yield from _type_entries(value, prefix + name)
            elif _is_compiled_routine(value):
                yield _documented(value, prefix + name, "function")


def _belongs_to(value: object, module_name: str) -> bool:
    """False for what a module has only imported from another public one."""
    owner = getattr(value, "__module__", None) or module_name
    return module_name == "builtins" or owner in (module_name, "posix", "nt") or owner.startswith("_")


def _is_compiled_routine(value: object) -> bool:
    return inspect.isroutine(value) and not inspect.isfunction(value)


def _type_entries(value: type, name: str) -> Iterator[Entry]:
    yield _documented(value, name, "exception" if issubclass(value, BaseException) else "class")
    for attribute, member in sorted(vars(value).items()):
        # A static or class method keeps its own docstring behind the binding.
        member = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if _is_compiled_routine(member):
            yield _documented(member, f"{name}.{attribute}", "method")
        elif inspect.isdatadescriptor(member):
            yield _documented(member, f"{name}.{attribute}", "property")


def _documented(value: object, name: str, kind: str) -> Entry:
    text = value.__doc__ if isinstance(value.__doc__, str) else ""
    # C marks the bound first parameter with a dollar sign; a function's is its module, which no caller passes.
    arguments = re.sub(r"\$module, /(?:, )?", "", getattr(value, "__text_signature__", None) or "").replace("$", "")
    return Entry(name, kind, name + arguments, inspect.cleandoc(text))
