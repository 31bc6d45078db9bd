"""The folder of an ablation: what was planned, what is finished, and whose it is."""

import json

import pytest

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import plan_cells
from moe.config import ConfigError, load_config
from tests.support.paths import TINY as TINY_FILE

TINY = load_config(TINY_FILE, ["model.vocab_size=1024"])


def add(folder, experts, seeds):
    """Plan one cell of so many experts."""
    name = f"num_experts={experts}"
    cells = plan_cells(TINY, {"moe.num_experts": [experts]}, "active_flops")
    folder.add_plan([cell for cell in cells if cell.name == name], seeds, {})
    return name


def lines(folder):
    return [json.loads(line) for line in folder.results.read_text().splitlines()]


def test_a_line_is_a_run_that_somebody_asked_for_and_a_failure_is_kept_until_it_is_fixed(tmp_path):
    folder = AblationFolder(tmp_path)
    eight = add(folder, 8, [0])
    folder.write_results({(eight, 0): 1})
    failed = {"cell": eight, "seed": 0, "finished": False, "exit_code": 1}
    assert lines(folder) == [failed]
    sixteen = add(folder, 16, [3])
    add(folder, 8, [2])
    folder.write_results({})
    missing = {"finished": False, "exit_code": None}
    assert lines(folder) == [
        failed,
        {"cell": eight, "seed": 2, **missing},
        {"cell": sixteen, "seed": 3, **missing},
    ]
    assert folder.unfinished() == [f"{eight} seed 0 (exit code 1)", f"{eight} seed 2", f"{sixteen} seed 3"]
    folder.run(eight, 0).path.mkdir(parents=True)
    folder.run(eight, 0).summary.write_text('{"final_eval_loss": 3.0}')
    folder.write_results({})
    assert lines(folder)[0] == {"cell": eight, "seed": 0, "finished": True, "final_eval_loss": 3.0}


def test_a_plan_with_one_list_of_seeds_for_all_cells_goes_on(tmp_path):
    folder = AblationFolder(tmp_path)
    eight = add(folder, 8, [0])
    plan = json.loads(folder.plan.read_text())
    del plan["cells"][eight]["seeds"]
    folder.plan.write_text(json.dumps(plan | {"seeds": [1, 2]}))
    sixteen = add(folder, 16, [3])
    folder.write_results({})
    assert [(line["cell"], line["seed"]) for line in lines(folder)] == [(eight, 1), (eight, 2), (sixteen, 3)]


def test_a_folder_is_locked_by_one_ablation_at_a_time(tmp_path):
    folder = AblationFolder(tmp_path / "new")
    with folder.locked(), pytest.raises(ConfigError, match="another ablation is running"), folder.locked():
        pass
    with folder.locked():
        assert folder.path.is_dir()
