"""scripts/evaluate.py: how well a trained run predicts a text."""

import json
import math

import pytest

from scripts.evaluate import main
from tests.support.commands import assert_refused
from tests.support.runs import read_lines


def test_the_table_has_a_line_for_each_text_and_one_for_all(run_main, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("def main(self):\n" * 40)
    (tmp_path / "b.txt").write_text("\x7f?" * 300)
    texts = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    _, run, _, _ = run_main(f"data.validation={texts[0]}", "train.eval_batches=100")
    assert main([str(run), *texts, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out).values()
    # The run's own evaluation leaves out the first token, and what fills no window: 640 of 641 tokens.
    evaluated = [line["eval/loss"] for line in read_lines(run) if "eval/loss" in line]
    assert first["nats_per_token"] == pytest.approx(evaluated[-1], rel=0.02)
    assert first["nats_per_token"] < second["nats_per_token"]
    assert (second["tokens"], second["num_bytes"]) == (601, 600)
    assert main([str(run), *texts]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["text", *texts, "all"]
    loss = (first["nats"] + second["nats"]) / (641 + 601)
    bits = (first["nats"] + second["nats"]) / math.log(2) / (640 + 600)
    assert lines[3][1:] == ["2", "1,242", "1,240", f"{loss:.4f}", f"{math.exp(loss):,.2f}", f"{bits:.4f}"]
    assert main([str(run), texts[0], "--stride", "1", "--json"]) == 0
    more_context = json.loads(capsys.readouterr().out)[texts[0]]
    assert more_context["tokens"] == 641
    assert more_context["nats"] != first["nats"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "README.md"], "error: RUN: nowhere is not a run folder"),
        (["RUN"], "error: the following arguments are required: FILE"),
        (["RUN", "README.md", "--stride", "0"], "error: argument --stride: should be a whole number above 0"),
        (["RUN", "README.md", "--encoding", "x"], "error: --encoding: 'x' is no encoding"),
        (["RUN", "data.suffixes=[.txt]"], "error: data.suffixes=[.txt]: evaluate.py takes no overrides"),
        (["RUN", "missing.txt"], "error: FILE: no such file: missing.txt; give a path"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(arguments, expected, capsys):
    assert_refused(main, arguments, expected, capsys)


def test_advice_names_options_and_no_keys_of_train(run_main, tmp_path, monkeypatch, capsys):
    _, run, _, _ = run_main()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "latin.txt").write_bytes("h\xe9".encode("latin-1"))
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("text")
    (tmp_path / "mixed" / "b.csv").write_text("text\nrow")
    field = "--text-field: rows.jsonl, record 1: no field 'text'; the records have body"
    for name, expected in {
        "rows.jsonl": f"{field}; fix it, or name another field\n",
        "latin.txt": "--encoding: latin.txt is not utf-8 text; name its encoding, or convert or remove it\n",
        "mixed": "FILE: mixed mixes file types (csv, text); give a glob such as 'FOLDER/*.txt'\n",
        "nobody/nothing": "FILE: 'nobody/nothing' is not a file here",
    }.items():
        assert main([str(run), name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {expected}")
        assert "data." not in error
