"""Planted bugs stay plantable: the code that each one changes still exists. Running them takes hours."""

from collections import Counter

import pytest

from tests.mutants.mutants import Mutant, all_mutants
from tests.support.paths import ROOT

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_still_applies_and_is_python(mutant: Mutant, tmp_path):
    assert mutant.lines(ROOT)
    assert mutant.new != mutant.old
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")


def test_names_are_unique():
    assert not [name for name, times in Counter(mutant.name for mutant in MUTANTS).items() if times > 1]


def test_a_mutant_that_no_longer_applies_is_named(tmp_path):
    (tmp_path / "code.py").write_text("a = 1\nb = 2\nb = 2\n")
    assert Mutant("area", "first", "code.py", "a = 1\nb", "a = 2\nb").lines(tmp_path) == range(1, 3)
    for old, times in (("c = 3", 0), ("b = 2", 2)):
        with pytest.raises(ValueError, match=f"gone: its old text occurs {times} times in code.py"):
            Mutant("area", "gone", "code.py", old, "").lines(tmp_path)
