"""The house rules: who may import whom, how long a file and a function may be, and what they are called."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# A lower wing never imports a higher one.
WINGS = [
    "config", "distributed", "kernels", "dispatch", "model", "data", "checkpoint",
    "training", "accounting", "runs", "inference", "ablation", "doctor", "benchmark",
]  # fmt: skip
LOOSE = {"__init__", "tables"}  # files of moe/ outside the wings; all may import the tables
DRAWERS = {"utils", "common", "base", "registry", "helpers", "misc"}


def module_of(path: Path) -> str:
    """Its dotted name; of an `__init__.py`, that of the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


LIBRARY = {module_of(path): path for path in sorted((ROOT / "moe").rglob("*.py"))}
IN_WINGS = [name for name in LIBRARY if name.count(".") and name.split(".")[1] in WINGS]
COMMANDS = [ROOT / "train.py", *sorted((ROOT / "scripts").glob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names_imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in it, and names that it imports from modules."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(path: Path) -> set[str]:
    """Modules of the library that a file imports."""
    return {name for name in names_imported(path) if name in LIBRARY}


def packages_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in names_imported(path)}


def wing_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_library_is_its_wings_and_few_loose_files():
    folder = ROOT / "moe"
    assert {path.name for path in folder.iterdir() if (path / "__init__.py").exists()} == set(WINGS)
    assert {path.stem for path in folder.glob("*.py")} == LOOSE


@pytest.mark.parametrize("module", IN_WINGS)
def test_no_wing_imports_a_higher_one(module):
    for other in modules_imported(LIBRARY[module]):
        assert other != "moe", f"{module} imports the public API"
        if other != "moe.tables":
            assert WINGS.index(wing_of(other)) <= WINGS.index(wing_of(module)), f"{module} imports {other}"


def test_the_tables_import_nothing_of_the_library():
    assert modules_imported(LIBRARY["moe.tables"]) == set()


@pytest.mark.parametrize("wing", WINGS)
def test_imports_within_a_wing_form_no_cycle(wing):
    """What only a type checker imports does not count: it would be none at run time."""
    within = {
        module: {other for other in run_time_imports(LIBRARY[module]) if wing_of(other) == wing}
        for module in IN_WINGS
        if wing_of(module) == wing and module != f"moe.{wing}"
    }
    left = {module: others & within.keys() for module, others in within.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a cycle among {sorted(left)}"


def run_time_imports(path: Path) -> set[str]:
    """Without those under `if TYPE_CHECKING:`."""
    hidden: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    hidden.add(inner.module or "")
    return modules_imported(path) - hidden


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_imports_no_command_and_no_test(module):
    assert not packages_imported(LIBRARY[module]) & {"train", "scripts", "tests"}


def imports_with_all_theirs(module: str) -> set[str]:
    """Packages that importing a module brings along, through the library and at the top of files only."""
    seen, packages, left = set(), set(), [module]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        left += [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
        for statement in tree_of(LIBRARY[name]).body:
            found: list[str] = []
            if isinstance(statement, ast.Import):
                found = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom):
                found = [statement.module or "", *(f"{statement.module}.{a.name}" for a in statement.names)]
            packages |= {one.split(".")[0] for one in found}
            left += [one for one in found if one in LIBRARY]
    return packages


@pytest.mark.parametrize("module", [name for name in IN_WINGS if wing_of(name) == "config"])
def test_the_configuration_needs_no_torch(module):
    assert "torch" not in packages_imported(LIBRARY[module])
    assert "torch" not in imports_with_all_theirs(module)


@pytest.mark.parametrize("module", [name for name in IN_WINGS if wing_of(name) == "accounting"])
def test_accounting_needs_no_torch_even_through_others(module):
    """Models of the hub are built, within a function, with torch and transformers."""
    assert "torch" not in imports_with_all_theirs(module)
    if module != "moe.accounting.huggingface":
        assert "torch" not in packages_imported(LIBRARY[module])


def test_deepspeed_is_imported_by_the_engine_and_to_be_measured_only():
    importers = {path for path in (*LIBRARY.values(), *COMMANDS) if "deepspeed" in packages_imported(path)}
    assert importers == {LIBRARY["moe.training.engine"], LIBRARY["moe.benchmark.peers"]}


def test_torch_distributed_is_used_in_its_places_only():
    """To start its launcher, `-m torch.distributed.run`, is not to use it."""
    allowed = {LIBRARY["moe.training.engine"]}
    allowed |= {
        path for name, path in LIBRARY.items() if wing_of(name) in ("distributed", "dispatch", "checkpoint")
    }
    for path in {*LIBRARY.values(), *COMMANDS} - allowed:
        text = path.read_text(encoding="utf-8").replace('"torch.distributed.run"', "")
        assert "torch.distributed" not in text, path


def test_no_module_is_a_drawer_and_no_two_have_the_same_name():
    names = Counter(path.stem for path in LIBRARY.values() if path.name != "__init__.py")
    assert not names.keys() & DRAWERS
    assert not [name for name, number in names.items() if number > 1]


@pytest.mark.parametrize("path", [*LIBRARY.values(), *COMMANDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (330 if path.name == "train.py" else 300)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_imports_another_test_module_or_conftest(path):
    """What several need is in tests/support; tests/mutants is a program, and its test."""
    modules = {module_of(other) for other in TESTS} - {"tests"}
    shared = {module for module in modules if module.startswith(("tests.support", "tests.mutants"))}
    packages = {".".join(module.split(".")[:-1]) for module in modules}
    for name in names_imported(path):
        if name.split(".")[0] == "tests" and name not in packages:
            assert name in shared or name.rpartition(".")[0] in shared, f"{path.name} imports {name}"


def test_the_folders_of_tests_are_those_of_the_wings_the_commands_and_what_is_shared():
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    assert folders == {*WINGS, "commands", "mutants", "support"}
