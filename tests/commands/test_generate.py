"""scripts/generate.py: text from a trained run."""

import pytest

from scripts.generate import main
from tests.support.commands import exit_code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "error: RUN: nowhere is not a run folder"),
        (["RUN", "--temperature", "-1"], "error: temperature: should be at least 0"),
        (["RUN", "--top-p", "0"], "error: top_p: should be above 0"),
        (["RUN", "--max-new-tokens", "0"], "error: max_new_tokens: should be at least 1"),
        (["RUN", "--seed", str(2**70)], "error: seed: should be at least 0 and below 2**63"),
        (["RUN", "--seed", "x"], "error: argument --seed: invalid int value: 'x'"),
        ([], "error: the following arguments are required: run"),
    ],
    ids=str,
)
def test_generate_refuses_bad_input_in_one_line(arguments, expected, capsys):
    code = exit_code(main, arguments)
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith(expected)


def test_generate_writes_text_from_a_run(run_main, capsys):
    _, run, _, _ = run_main()
    texts = []
    for seed in ("1", "1", "2"):
        assert main([str(run), "--prompt", "def ", "--max-new-tokens", "30", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")
