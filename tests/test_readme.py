"""The README's commands run, its reference is complete, its tree is the tree."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from moe.config.reference import describe_keys

pytestmark = pytest.mark.xdist_group("readme")  # its runs are made once

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [
        line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if line))


# Run by .ci/run itself, or measured by hand because they take minutes.
INSTALLATION = {"pip install -e . && python train.py", "pip install -e '.[dev]' && pytest"}
LOOPS = [
    command
    for command in commands()
    if command.startswith(("for ", "/usr/bin/time", "python scripts/doctor.py"))  # tests/test_doctor.py
]
RUNNABLE = [command for command in commands() if command not in INSTALLATION and command not in LOOPS]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, text_file):
    """A folder in which the README's relative paths exist."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text(text_file.read_text())
    (folder / "notes" / "all.jsonl").write_text(
        '{"body": "a line of notes, and then another"}\n{"body": "more"}\n' * 9
    )
    records = "".join(f'{{"body": "note {i}: {"word " * 60}"}}\n' for i in range(300))
    (folder / "notes" / "all.jsonl").write_text(records)
    return folder


@pytest.mark.parametrize("command", RUNNABLE)
def test_readme_commands_run(command, workplace, small, monkeypatch, capsys):
    """Each command as written, on the small model and corpus: its own arguments come last and win."""
    monkeypatch.chdir(workplace)
    words = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 "))  # as in all tests
    shrink = [
        item for item in small if not item.startswith(("moe.num_experts", "moe.top_k", "model.qk_norm"))
    ]
    if words[:2] == ["python", "train.py"]:
        if "--help" in words:
            with pytest.raises(SystemExit) as stop:
                train.main(words[2:])
            assert stop.value.code == 0
            return
        words = [word for word in words if not word.startswith("train.steps=")]  # minutes become two steps
        arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in words[2:]]
        file = [arguments.pop(0)] if arguments and "=" not in arguments[0] else []
        extra = [] if "--print-config" in words else [*shrink, "train.steps=2"]
        assert train.main([*file, *extra, *arguments]) == 0, capsys.readouterr().err
    elif words[:2] == ["python", "scripts/generate.py"]:
        if not (workplace / words[2]).exists():
            assert train.main([*shrink, "train.steps=2", f"run.dir={words[2]}"]) == 0
        call = [sys.executable, str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("def ")
    elif words[:2] == ["python", "scripts/compare.py"]:
        assert words[2] == "--runs"
        runs = {"--runs": [], "--against": []}
        for seed in (0, 1):
            for side, experts in (("--runs", []), ("--against", ["moe.num_experts=1", "moe.top_k=1"])):
                run = f"runs/{side.strip('-')}-{seed}"
                settings = [f"run.seed={seed}", f"run.dir={run}", "train.steps=2"]
                assert train.main([*shrink, *experts, *settings]) == 0
                runs[side].append(run)
        call = [
            sys.executable,
            str(ROOT / words[1]),
            "--runs",
            *runs["--runs"],
            "--against",
            *runs["--against"],
        ]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"mean difference [+-]\d\.\d{4} \[.*\], with the 95 % interval", done.stdout)
    elif words[1] == "scripts/ablate.py":  # sweeps themselves: tests/test_ablate.py
        texts = [item for item in small if item.startswith(("data.source", "data.cache_dir"))]
        call = [sys.executable, str(ROOT / words[1]), str(ROOT / words[2]), *texts, *words[3:]]
        done = subprocess.run([*call, "--dry-run"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "dense,equal_total" in done.stdout
    elif words[1] == "scripts/report.py":
        if not (workplace / words[2]).exists():
            assert train.main([*shrink, "train.steps=2", f"run.dir={words[2]}/any"]) == 0
        done = subprocess.run(
            [sys.executable, str(ROOT / words[1]), words[2]], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert (workplace / words[2] / "report.html").exists()
    elif words[1] in ("scripts/count.py", "scripts/plan.py"):
        done = subprocess.run(
            f"{sys.executable} {' '.join(words[1:])}",
            shell=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        shown = re.search(f"```bash\n{re.escape(command)}\n```\n\n```text\n(.*?)```", README, re.DOTALL)
        for line in shown[1].splitlines() if shown else []:
            assert line in done.stdout.splitlines()
    elif words[0] in ("torchrun", "deepspeed"):
        at = words.index("train.py")
        launcher = [str(Path(sys.executable).with_name(words[0])), *words[1:at]]
        if words[0] == "torchrun":
            launcher.insert(1, "--standalone")  # a port of its own, as other tests may run
        call = [
            *launcher,
            str(ROOT / "train.py"),
            *shrink,
            "train.steps=2",
            "train.global_batch_size=8",
            *words[at + 1 :],
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert (workplace / "runs" / words[-1].removeprefix("run.name=") / "summary.json").exists()
    else:
        pytest.fail(f"no test knows how to run this README command: {command}")


def test_measured_commands_name_existing_files():
    assert LOOPS, "the README shows the commands behind its figures"
    for command in LOOPS:
        for path in re.findall(r"(?:configs|scripts)/[\w.]+", command):
            assert (ROOT / path).exists(), path


def test_the_configuration_reference_is_that_of_help():
    assert describe_keys() in README


def test_the_file_tree_names_every_file():
    tree = README.split("```text\ntrain.py")[1].split("```")[0]
    listed = set(re.findall(r"^(\S+\.\w+)", "train.py" + tree, re.MULTILINE))
    actual = {
        str(path.relative_to(ROOT))
        for folder in ("moe", "scripts", "configs")
        for path in (ROOT / folder).rglob("*")
    }
    actual = {path for path in actual if path.endswith((".py", ".yaml")) and not path.endswith("__init__.py")}
    actual = {path for path in actual if not path.startswith("configs/zoo/")}  # a folder, and listed as one
    assert actual <= listed
    assert all((ROOT / path).exists() for path in listed)


def test_no_figure_is_left_blank():
    assert "@@" not in README
