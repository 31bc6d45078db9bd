"""Who may import whom: lower levels know nothing of higher ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"moe.config"},
    {"moe.config_io", "moe.tables", "moe.scaling", "moe.losses", "moe.distributed.topology", "moe.manifest"},
    {"moe.distributed.groups", "moe.distributed.collectives", "moe.distributed.launch"},
    {"moe.ops.permute", "moe.ops.grouped_mm"},
    {"moe.router", "moe.experts", "moe.dispatch", "moe.attention"},
    {"moe.layer"},
    {"moe.transformer"},
    {"moe.accounting", "moe.cost", "moe.data.corpus", "moe.data.tokenizer"},
    {"moe.optim", "moe.checkpoint", "moe.plots"},
    {"moe.data.tokens", "moe.memory", "moe.huggingface", "moe.telemetry", "moe.run_folder"},
    {"moe.generation", "moe.engine", "moe.sweep.plan", "moe.sweep.statistics"},
    {"moe.evaluation", "moe.reporting", "moe.sweep.findings", "moe.sweep.record"},
    {"moe.sweep.plots", "moe.sweep.sentences", "moe.sweep.runner"},
    {"moe.sweep.page"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "moe").rglob("*.py")
    if path.name != "__init__.py"
}


def imports_of(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    assert module in LEVEL, "give the new module its level here"
    imported = imports_of(MODULES[module])
    for other in imported & LEVEL.keys():
        assert LEVEL[other] < LEVEL[module] or LEVEL[other] == LEVEL[module] == 4, f"{module} imports {other}"
    assert not any(name.split(".")[0] in ("train", "scripts", "tests") for name in imported)


def test_the_config_needs_no_torch():
    assert not any(name.split(".")[0] == "torch" for name in imports_of(MODULES["moe.config"]))


def test_deepspeed_is_imported_by_the_engine_only():
    paths = [*MODULES.values(), ROOT / "train.py", *(ROOT / "scripts").glob("*.py")]
    importers = [
        path.name for path in paths if any(name.split(".")[0] == "deepspeed" for name in imports_of(path))
    ]
    assert importers == ["engine.py"]


def test_torch_distributed_is_used_in_its_places_only():
    allowed = {"moe.engine", "moe.checkpoint"}
    for module, path in MODULES.items():
        if module not in allowed and not module.startswith("moe.distributed"):
            assert "torch.distributed" not in path.read_text(), module


def test_no_module_is_a_drawer():
    names = {path.stem for path in MODULES.values()}
    assert not names & {"utils", "common", "base", "registry", "helpers", "misc"}
    for module, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 400, module
