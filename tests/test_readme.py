"""The READMEs are true: their commands run, their Python runs, their files and links exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from moe.config.reference import replace_table
from tests.support.paths import ROOT

pytestmark = pytest.mark.xdist_group("readme")  # its runs are made once

FOLDERS = ("", "moe", "configs", "scripts", "tests")
PAGES = {folder: (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS}
EVERYTHING = "\n".join(PAGES.values())
PLACEHOLDERS = ("...", "HOST", "FILE", "CONFIG", "DIR", " N", "path/to", "python3.11")
# Run by .ci/run itself, by another test, or by hand because they take minutes.
INSTALLATION = ("pip install",)
BY_HAND = ("/usr/bin/time", "for ")
BY_OTHER_TESTS = ("python scripts/doctor.py", "pytest")  # tests/doctor; the suite itself


def commands() -> list[str]:
    """Every command once: of code blocks and of inline code, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", EVERYTHING, re.DOTALL)
    lines = [
        line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"```.*?```", "", EVERYTHING, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun|deepspeed|pytest)[ .\d][^`]+)`", prose)
    found = [" ".join(line.split()).removeprefix("OMP_NUM_THREADS=1 ") for line in [*lines, *inline] if line]
    return list(dict.fromkeys(one for one in found if not any(word in one for word in PLACEHOLDERS)))


LONG = [command for command in commands() if command.startswith(BY_HAND)]
ELSEWHERE = (*INSTALLATION, *BY_HAND, *BY_OTHER_TESTS)
RUNNABLE = [one for one in commands() if not one.startswith(ELSEWHERE) or "--world" in one]
UNIQUE = list({re.sub(r" run\.name=\S+", "", command): command for command in RUNNABLE}.values())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, text_file: Path) -> Path:
    """A folder in which the relative paths of the READMEs exist."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text(text_file.read_text())
    records = "".join(f'{{"body": "note {i}: {"word " * 60}"}}\n' for i in range(300))
    (folder / "notes" / "all.jsonl").write_text(records)
    (folder / "topics.txt").write_text(text_file.read_text())
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


@pytest.fixture
def shrink(small: list[str]) -> list[str]:
    """Overrides that make any training two steps of a small model, without the keys that commands set."""
    set_by_commands = ("moe.num_experts", "moe.top_k", "model.qk_norm", "train.steps")
    return [item for item in small if not item.startswith(set_by_commands)] + ["train.steps=2"]


@pytest.fixture
def tiny(workplace: Path, shrink: list[str], monkeypatch) -> Path:
    """A finished run in runs/tiny."""
    monkeypatch.chdir(workplace)
    if not Path("runs/tiny/summary.json").exists():
        assert train.main([*shrink, "run.dir=runs/tiny"]) == 0
    return workplace


def run(words: list[str], timeout: int = 120) -> str:
    """The output of a command that has to succeed without a word on stderr."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def check_train(words: list[str], shrink: list[str]) -> None:
    minutes = ("train.steps=", "optim.warmup_steps=")  # become two steps
    arguments = [word for word in words[2:] if not word.startswith(minutes)]
    if "--help" in arguments:
        assert train.main(arguments) == 0
        return
    file = [arguments.pop(0)] if arguments and "=" not in arguments[0] else []
    extra = [] if "--print-config" in words else shrink
    assert train.main([*file, *extra, *arguments]) == 0


def check_launcher(words: list[str], shrink: list[str]) -> None:
    at = words.index("train.py")
    launcher = [str(Path(sys.executable).with_name(words[0])), *words[1:at]]
    if words[0] == "torchrun":
        launcher.insert(1, "--standalone")  # a port of its own, as other tests may run
    call = [*launcher, str(ROOT / "train.py"), *shrink, "train.global_batch_size=8", *words[at + 1 :]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    name = next((word.removeprefix("run.name=") for word in words if word.startswith("run.name=")), "run")
    assert (Path("runs") / name / "summary.json").exists()


def check_generate(words: list[str], shrink: list[str]) -> None:
    assert run([sys.executable, str(ROOT / words[1]), *words[2:]]).startswith("def ")


def check_runs(words: list[str], shrink: list[str]) -> None:
    assert "finished" in run([sys.executable, str(ROOT / words[1]), *words[2:]])


def check_evaluate(words: list[str], shrink: list[str]) -> None:
    for text in words[3:]:
        Path(text).parent.mkdir(exist_ok=True)
        Path(text).write_text((ROOT / text).read_text()[:1000])
    assert "bits per byte" in run([sys.executable, str(ROOT / words[1]), *words[2:]])


def check_experts(words: list[str], shrink: list[str]) -> None:
    for text in [word for word in words[3:] if word.endswith(".md")]:
        Path(text).parent.mkdir(exist_ok=True)
        Path(text).write_text((ROOT / text).read_text()[:1000])
    assert "busiest / mean" in run([sys.executable, str(ROOT / words[1]), *words[2:]])


def check_tables(words: list[str], shrink: list[str]) -> None:
    """count.py, plan.py and dry runs print the lines that the README shows below the command."""
    printed = run(["sh", "-c", f"{sys.executable} {ROOT}/{' '.join(words[1:])}"]).splitlines()
    command = re.escape(" ".join(words))
    shown = re.search(f"```bash\n{command}\n```\n\n```text\n(.*?)```", EVERYTHING, re.DOTALL)
    for line in shown[1].splitlines() if shown else []:
        assert line in printed


def check_ablate(words: list[str], shrink: list[str]) -> None:
    """Its plan; ablations themselves are tested in tests/commands/test_ablate.py."""
    texts = [item for item in shrink if item.startswith(("data.source", "data.cache_dir"))]
    call = [sys.executable, str(ROOT / words[1]), words[2], *texts, *words[3:], "--dry-run"]
    assert "dense,equal_total" in run(call)


def check_tokenize(words: list[str], shrink: list[str]) -> None:
    call = [sys.executable, str(ROOT / words[1]), words[2], *shrink, *words[3:]]
    assert "training tokens" in run(call)


def check_report(words: list[str], shrink: list[str]) -> None:
    run([sys.executable, str(ROOT / words[1]), *words[2:]])
    assert (Path(words[2]) / "report.html").exists()


def check_bench(words: list[str], shrink: list[str]) -> None:
    """It measures something, at sizes that take no time; of repeated options the last one counts."""
    small = {
        "layer": ["--experts", "8", "--tokens", "16", "--repeats", "1"],
        "step": [*shrink, "--steps", "1"],
        "dispatch": [*shrink, "--ranks", "1,2", "--repeats", "1"],
        "generate": ["--new-tokens", "4", "--repeats", "1", *(shrink if "--config" in words else [])],
    }
    printed = run([sys.executable, str(ROOT / words[1]), *words[2:], *small[words[2]]])
    assert json.loads(printed)["results"] if "--json" in words else len(printed.splitlines()) > 1


def check_reference(words: list[str], shrink: list[str]) -> None:
    run([sys.executable, *words[1:]])
    assert Path(words[-1]).read_text() == PAGES["configs"], f"run: {' '.join(words)}"


CHECKS: dict[str, Callable[[list[str], list[str]], None]] = {
    "python train.py": check_train,
    "torchrun": check_launcher,
    "deepspeed": check_launcher,
    "python scripts/generate.py": check_generate,
    "python scripts/runs.py": check_runs,
    "python scripts/evaluate.py": check_evaluate,
    "python scripts/experts.py": check_experts,
    "python scripts/count.py": check_tables,
    "python scripts/plan.py": check_tables,
    "python scripts/doctor.py": check_tables,
    "python scripts/ablate.py": check_ablate,
    "python scripts/tokenize_corpus.py": check_tokenize,
    "python scripts/report.py": check_report,
    "python scripts/bench.py": check_bench,
    "python -m moe.config.reference": check_reference,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", UNIQUE)
def test_every_command_runs(command: str, tiny: Path, shrink: list[str]):
    """As written, on a small model and corpus; the command's own arguments come last and win."""
    check = next((check for start, check in CHECKS.items() if command.startswith(start)), None)
    assert check is not None, f"no test knows how to run {command!r}"
    check(shlex.split(command), shrink)


def test_commands_that_take_minutes_name_existing_files():
    assert LONG, "the READMEs show the commands behind their figures"
    for command in LONG:
        for path in re.findall(r"(?:configs|scripts)/[\w.]+", command):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_python_example_runs_as_it_is_shown(folder: str, tiny: Path):
    examples = re.findall(r"```python\n(.*?)```", PAGES[folder], re.DOTALL)
    assert examples or folder not in ("", "moe")
    for example in examples:
        run([sys.executable, "-c", example])


@pytest.mark.slow
def test_every_python_example_satisfies_a_type_checker(tmp_path: Path):
    """In another folder and by PYTHONPATH, so that the library is seen as an installed one."""
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "basic"}')
    for folder, page in PAGES.items():
        for number, example in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL)):
            (tmp_path / f"{folder}_{number}.py").write_text(example)
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_the_front_page_is_short():
    assert len(PAGES[""].splitlines()) <= 200
    assert len(PAGES[""].split()) <= 1500


def test_the_table_of_keys_is_current():
    assert replace_table(PAGES["configs"]) == PAGES["configs"]


def tour_of(folder: str) -> set[str]:
    """The files that a tour lists, relative to its README; an indented one is in the folder above it."""
    block = re.search(r"## (?:Tour|Where things are)\n\n```text\n(.*?)```", PAGES[folder], re.DOTALL)
    assert block is not None
    listed, inside = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        inside = name if name.endswith("/") else inside if line.startswith(" ") else ""
        listed.add(inside if name.endswith("/") else inside + name)
    return listed


@pytest.mark.parametrize("folder", ["", "moe", "tests"])
def test_everything_in_a_tour_exists(folder: str):
    for path in tour_of(folder):
        assert (ROOT / folder / path).exists(), path


@pytest.mark.parametrize("folder", ["moe", "tests"])
def test_a_tour_names_every_file(folder: str):
    files = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))
    named = {str(path) for path in files if path.name != "__init__.py" or path.parent == Path()}
    assert named - {"__init__.py"} <= tour_of(folder)


@pytest.mark.parametrize("folder", ["configs", "scripts"])
def test_a_folders_page_names_every_file(folder: str):
    for path in (ROOT / folder).iterdir():
        if path.suffix in (".py", ".yaml", ".sh"):
            assert path.name in PAGES[folder], path


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_link_leads_somewhere(folder: str):
    prose = re.sub(r"```.*?```", "", PAGES[folder], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        path, _, anchor = target.partition("#")
        page = (ROOT / folder / path).resolve() if path else ROOT / folder / "README.md"
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            assert anchor in {anchor_of(heading) for heading in headings}, target


def test_no_figure_is_left_blank():
    assert "@@" not in EVERYTHING
