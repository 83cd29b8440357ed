"""Prints figures of the product's code: how many modules, lines, parameters, records, settings and cycles it has.

python tools/figures.py [--against REVISION] [--json] [--records]

Nothing of the product is imported: everything is read from the syntax trees, so another revision can be measured too.
Product code is the five packages without the generated `peer/wire/`.
"""

import argparse
import ast
import gc
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
FLOORS = {"talkoot": 3, "expert_server": 2, "trainer_client": 2, "dht": 1, "peer": 0}
"""The floor of each package. A package imports only from floors below its own, never from the other package on its
floor.
"""
GENERATED = "peer/wire/"
SHORT = 60
LONG_FUNCTION = 40
TRAINER_STEP = (
    "trainer_client/moe.py",
    "trainer_client/dispatch/dispatcher.py",
    "trainer_client/dispatch/forward.py",
    "trainer_client/dispatch/batches.py",
    "trainer_client/dispatch/calls.py",
    "trainer_client/dispatch/grpc_caller.py",
    "trainer_client/dispatch/policy.py",
    "dht/beam_search.py",
    "dht/directory.py:LiveExperts",
)
"""The modules that take part in a trainer's step. After a colon: the only class of a module that counts."""
NODE_STEP = ("expert_server/serving/*.py", "expert_server/experts/graphs.py")

NOT_OF_A_STEP = ("Limits", "Stats")
"""Records whose names end like this are made once at the start, so they do not count."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Figures = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Module:
    """One file: its name in imports, its source, and its syntax tree."""

    path: str
    name: str
    lines: int
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All nodes of the tree."""
        return tuple(ast.walk(self.tree))

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")


Code = dict[str, Module]
"""The modules by their names."""


def working_tree() -> Code:
    paths = sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))
    return _parse({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def revision(name: str) -> Code:
    """The code of a commit, branch or tag. Raises CalledProcessError for an unknown one."""
    command = ["git", "archive", "--format=tar", name, *FLOORS]
    packed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    sources: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and member.name.endswith(".py"):
                sources[member.name] = file.read().decode("utf-8")
    return _parse(sources)


def _parse(sources: dict[str, str]) -> Code:
    modules = (
        Module(path, _module_name(path), len(source.splitlines()), ast.parse(source, path))
        for path, source in sources.items()
        if not path.startswith(GENERATED)
    )
    return {module.name: module for module in modules}


def _module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def figures(code: Code) -> Figures:
    """All figures, by their names."""
    plain = [module for module in code.values() if not module.is_package]
    functions = [(module, function) for module in code.values() for function in _functions(module)]
    lengths = [_length(function) for _, function in functions]
    where, most = max(functions, key=lambda each: _parameters(each[1]))
    edges = import_edges(code)
    by_role = settings(code)
    return {
        "modules (without __init__)": len(plain),
        "lines": sum(module.lines for module in code.values()),
        f"modules under {SHORT} lines": sum(module.lines < SHORT for module in plain),
        "most parameters of a function": _parameters(most),
        "  which is": f"{where.name}.{most.name}",
        "records in a training step: trainer": _count(records(code, TRAINER_STEP), private=False),
        "  and private to their module: trainer": _count(records(code, TRAINER_STEP), private=True),
        "records in a training step: node": _count(records(code, NODE_STEP), private=False),
        "  and private to their module: node": _count(records(code, NODE_STEP), private=True),
        "settings": sum(by_role.values()),
        "  of which": ", ".join(
            f"{role.removesuffix('Settings')} {count}" for role, count in by_role.items()
        ),
        "modules that import hivemind": len(hivemind_importers(code)),
        "  outside peer/": sum(not name.startswith("peer.") for name in hivemind_importers(code)),
        "functions": len(functions),
        f"functions over {LONG_FUNCTION} lines": sum(length > LONG_FUNCTION for length in lengths),
        "median function, in lines": round(median(lengths)),
        "import cycles": len(cycles(edges)),
        "upward imports": len(upward_imports(edges)),
    }


def _functions(module: Module) -> Iterator[Function]:
    return (node for node in module.nodes if isinstance(node, Function))


def _length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _parameters(function: Function) -> int:
    arguments = function.args
    named = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    bound = bool(named) and named[0] in ("self", "cls")
    variadic = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(named) + len(arguments.kwonlyargs) + variadic - bound


def import_edges(code: Code) -> dict[str, set[str]]:
    """For each module, the modules of the product that it imports anywhere in its code."""
    return {name: set(_imported(module, code)) for name, module in code.items()}


def _imported(module: Module, code: Code) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in code)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source = _source(module, node)
                submodule = f"{source}.{alias.name}"
                if submodule in code or source in code:
                    yield submodule if submodule in code else source


def _source(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of the module that `from ... import` imports from."""
    if not node.level:
        return node.module or ""
    above = module.name.split(".")
    above = above[: len(above) - node.level + module.is_package]
    return ".".join([*above, node.module] if node.module else above)


def hivemind_importers(code: Code) -> list[str]:
    return sorted(name for name, module in code.items() if any(_external(module, "hivemind")))


def _external(module: Module, package: str) -> Iterator[bool]:
    for node in module.nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] == package for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0] == package


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import one another: the strongly connected components, by Tarjan 1972."""
    found: list[list[str]] = []
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        path.append(name)
        on_path.add(name)
        for target in sorted(edges[name]):
            if target not in numbers:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in on_path:
                lowest[name] = min(lowest[name], numbers[target])
        if lowest[name] == numbers[name]:
            start = path.index(name)
            component = path[start:]
            del path[start:]
            on_path.difference_update(component)
            if len(component) > 1 or name in edges[name]:
                found.append(sorted(component))

    for name in sorted(edges):
        if name not in numbers:
            visit(name)
    return found


def upward_imports(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports from a floor to one above it, or to the other package of the same floor."""
    return sorted(
        (name, target) for name, targets in edges.items() for target in targets if _rises(name, target)
    )


def _rises(name: str, target: str) -> bool:
    package, other = name.split(".")[0], target.split(".")[0]
    return package != other and FLOORS[other] >= FLOORS[package]


def records(code: Code, places: tuple[str, ...]) -> list[str] | None:
    """The dataclasses and named tuples of some modules, as `path:class`. None if one of the modules does not exist."""
    found: list[str] = []
    for place in places:
        pattern, _, only = place.partition(":")
        modules = [module for module in code.values() if fnmatch(module.path, pattern)]
        if not modules:
            return None
        for module in modules:
            classes = (node for node in module.nodes if isinstance(node, ast.ClassDef))
            names = [node.name for node in classes if _is_record(node) and only in ("", node.name)]
            found += [f"{module.path}:{name}" for name in names]
    return found


def _count(names: list[str] | None, *, private: bool) -> int | None:
    return None if names is None else sum((":_" in name) == private for name in names)


def _is_record(node: ast.ClassDef) -> bool:
    if node.name.endswith(NOT_OF_A_STEP):
        return False
    decorators = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return "dataclass" in map(_last_name, decorators) or "NamedTuple" in map(_last_name, node.bases)


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def settings(code: Code) -> dict[str, int]:
    """The number of settings of each role and of the manifest, as docs/settings.md lists them."""
    roles = {
        node.name: len(_fields(code, module, node))
        for module in code.values()
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and _sets(node, "env_prefix")
    }
    return roles | {"Manifest": _manifest_keys(code)}


def _sets(node: ast.ClassDef, attribute: str) -> bool:
    return any(
        isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and each.target.id == attribute
        and each.value is not None
        for each in node.body
    )


def _manifest_keys(code: Code) -> int:
    module = code["dht.manifest"]
    total = 0
    for annotation in _fields(code, module, _class(module, "Manifest")).values():
        section = _class(module, _last_name(annotation), required=False)
        total += 1 if section is None else len(_fields(code, module, section))
    return total


def _fields(code: Code, module: Module, node: ast.ClassDef | None) -> dict[str, ast.expr]:
    """The annotations of a model's fields by name, including inherited fields."""
    fields: dict[str, ast.expr] = {}
    if node is None:
        return fields
    for base in node.bases:
        fields |= _fields(code, *_resolve(code, module, _last_name(base)))
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            fields[each.target.id] = each.annotation
    return {name: kind for name, kind in fields.items() if "ClassVar" not in ast.unparse(kind)}


def _resolve(code: Code, module: Module, name: str) -> tuple[Module, ast.ClassDef | None]:
    """The definition of a class that a module names, if the product defines it."""
    local = _class(module, name, required=False)
    if local is not None:
        return module, local
    for node in module.nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source = _source(module, node)
                if (alias.asname or alias.name) == name and source in code:
                    return _resolve(code, code[source], alias.name)
    return module, None


def _class(module: Module, name: str, *, required: bool = True) -> ast.ClassDef | None:
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    if required:
        raise LookupError(f"{module.path} has no class {name}")
    return None


def table(columns: dict[str, Figures]) -> str:
    """A table of the figures, with a column for each revision."""
    names = list(next(iter(columns.values())))
    rows = [["figure", *columns]]
    rows += [[name, *(_shown(column[name]) for column in columns.values())] for name in names]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,}"


def main() -> None:
    gc.disable()  # it would look through all trees again and again, which takes as long as all else
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="REVISION", help="show a commit, branch or tag beside the tree")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--records", action="store_true", help="list the records of a training step as well")
    options = parser.parse_args()
    try:
        sources = {options.against: revision(options.against)} if options.against else {}
    except subprocess.CalledProcessError:
        parser.error(f"git has no revision {options.against} with the five packages")
    sources["tree"] = working_tree()
    columns = {name: figures(code) for name, code in sources.items()}
    print(json.dumps(columns, indent=2) if options.json else table(columns))
    if options.records:
        for name, code in sources.items():
            found = [*(records(code, TRAINER_STEP) or ()), *(records(code, NODE_STEP) or ())]
            print("\n".join([f"\nrecords, {name}:", *found]), file=sys.stderr if options.json else sys.stdout)


if __name__ == "__main__":
    main()
