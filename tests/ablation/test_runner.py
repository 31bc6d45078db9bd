"""How the runs of an ablation are trained side by side."""

import re
import sys
import textwrap

from moe.ablation import runner
from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import plan_cells
from moe.ablation.runner import AblationRunner, Conditions, Task
from moe.config import load_config
from tests.support.paths import TINY

# In place of train.py: a step takes a tenth of a second, of the cell with 16 experts two of them.
SCRIPT = """
    import json, sys, time
    from pathlib import Path
    folder = Path(next(item for item in sys.argv if item.startswith("run.dir=")).partition("=")[2].strip("'"))
    folder.mkdir(parents=True)
    for step in range(1, 13):
        time.sleep(0.2 if "16" in str(folder) else 0.1)
        with (folder / "metrics.jsonl").open("a") as file:
            print(json.dumps({"step": step}), file=file)
    (folder / "summary.json").write_text("{}")
"""


def test_progress_says_how_far_each_run_is_and_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "PROGRESS_SECONDS", 0.25)
    script, config = tmp_path / "train.py", load_config(TINY, ["train.steps=12", "model.vocab_size=1024"])
    script.write_text(textwrap.dedent(SCRIPT))
    cells = plan_cells(config, {"moe.num_experts": [8, 16]}, "active_flops", "cpu", baselines=False)
    folder = AblationFolder(tmp_path / "ablation")
    folder.path.mkdir()
    folder.add_plan(cells, [0], {})
    tasks = [Task(cell, 0, folder.run(cell.name, 0)) for cell in cells]
    AblationRunner(folder, tasks, script, Conditions([sys.executable], jobs=2, threads=1)).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    of_run = r"num_experts=(\d+),seed=0 (\d+)/12, 00:0(\d) left"
    said = [found for line in lines for found in re.findall(of_run, line)]
    assert {experts for experts, _, _ in said} == {"8", "16"}
    for experts, step, seconds in said:  # starting Python takes a while as well
        assert -0.6 < int(seconds) - (12 - int(step)) * (0.2 if experts == "16" else 0.1) < 4
