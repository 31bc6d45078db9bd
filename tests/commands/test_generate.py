"""scripts/generate.py: text from a trained run."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from scripts.generate import main
from tests.support.commands import assert_refused
from tests.support.paths import ROOT, TINY


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "error: RUN: nowhere is not a run folder"),
        (["RUN", "--temperature", "-1"], "error: temperature: should be at least 0"),
        (["RUN", "--top-p", "0"], "error: top_p: should be above 0"),
        (["RUN", "--max-new-tokens", "0"], "error: max_new_tokens: should be at least 1"),
        (["RUN", "--seed", str(2**70)], "error: seed: should be at least 0 and below 2**63"),
        (["RUN", "--seed", "x"], "error: argument --seed: invalid int value: 'x'"),
        (["RUN", "--top-k", "0"], "error: top_k: should be at least 1"),
        (["RUN", "--stop", ""], "error: stop: should not be empty"),
        (["RUN", "--prompt-file", "nowhere"], "error: --prompt-file: nowhere: No such file or directory"),
        ([], "error: the following arguments are required: run"),
    ],
    ids=str,
)
def test_generate_refuses_bad_input_in_one_line(arguments, expected, capsys):
    assert_refused(main, arguments, expected, capsys)


def test_generate_writes_text_from_a_run(run_main, capsys):
    _, run, _, _ = run_main()
    texts = []
    for seed in ("1", "1", "2"):
        assert main([str(run), "--prompt", "def ", "--max-new-tokens", "30", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")


def test_prompts_come_from_options_files_and_standard_input(run_main, tmp_path, capsys, monkeypatch):
    """Bytes that are not UTF-8 become the replacement character, where no mark at the start says UTF-16.

    Several texts are those of each alone.
    """
    _, run, _, _ = run_main()
    (tmp_path / "prompt.txt").write_bytes(b"import \xff os")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("für ".encode())))
    short = ["--max-new-tokens", "9"]
    (tmp_path / "wide.txt").write_bytes("für".encode("utf-16"))
    files = [str(tmp_path / "prompt.txt"), "-", str(tmp_path / "wide.txt")]
    files = [argument for file in files for argument in ("--prompt-file", file)]
    assert main([str(run), "--prompt", "def", "--prompt", "\udcfe", *files, *short]) == 0
    printed = capsys.readouterr().out
    alone = []
    for seed, prompt in enumerate(["def", "\ufffd", "import \ufffd os", "für ", "für"]):
        assert main([str(run), "--prompt", prompt, "--seed", str(seed), *short]) == 0
        alone.append(f"----- {seed + 1}\n" + capsys.readouterr().out)
        assert alone[-1].split("\n", 1)[1].startswith(prompt)
    assert printed == "".join(alone)


def test_an_interrupted_text_ends_with_its_line(monkeypatch, capfd):
    def interrupted(*_):
        yield 0, "some te"
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.inference.trained_run.load_run", lambda *_: None)
    monkeypatch.setattr("moe.inference.generation.stream", interrupted)
    assert main(["RUN", "--prompt", "write "]) == 130
    assert capfd.readouterr() == ("write some te\n", "interrupted\n")


def test_stop_and_top_k_reach_the_sampling(run_main, capsys):
    _, run, _, _ = run_main()
    call = [str(run), "--prompt", "x", "--max-new-tokens", "60", "--temperature", "5"]
    assert main(call) == 0
    free = capsys.readouterr().out
    assert main([*call, "--stop", free[8], "--stop", free[5]]) == 0
    assert capsys.readouterr().out == free[: min(free.index(free[8], 1), free.index(free[5], 1))] + "\n"
    greedy = []
    for options in (["--top-k", "1"], ["--temperature", "0"]):
        assert main([*call, *options]) == 0
        greedy.append(capsys.readouterr().out)
    assert greedy[0] == greedy[1] != free


@pytest.mark.parametrize("script", ["count.py", "generate.py"])
def test_a_reader_that_goes_away_is_no_traceback(script, run_main):
    """As in `count.py configs/tiny.yaml | head -1`; what the terminal's encoding lacks is none either."""
    about = (
        [str(TINY)]
        if script == "count.py"
        else [str(run_main()[1]), "--prompt", "ü", "--max-new-tokens", "3"]
    )
    command = [sys.executable, str(ROOT / "scripts" / script), *about]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")
    ended = subprocess.run(command, capture_output=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
