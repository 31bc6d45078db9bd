"""Planted bugs as data: what is changed where, and where such a bug was seen."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        area: the YAML file of this folder that describes it, such as `router`.
        name: unique.
        file: which file of the tree is changed.
        old: a piece of it that occurs once.
        new: what stands there instead.
        seen: where such a bug was reported; empty if it is ours.
    """

    area: str
    name: str
    file: str
    old: str
    new: str
    seen: str = ""

    def lines(self, tree: Path) -> range:
        """The numbers, from 1, of the lines that are changed.

        Raises:
            ValueError: `old` does not occur once, so the mutant has to be written anew.
        """
        text = (tree / self.file).read_text(encoding="utf-8")
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its old text occurs {times} times in {self.file}")
        first = text[: text.index(self.old)].count("\n") + 1
        return range(first, first + self.old.count("\n") + 1)

    def apply(self, tree: Path) -> None:
        """Plant the bug in a copy of the tree."""
        self.lines(tree)
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def all_mutants() -> list[Mutant]:
    """Those of all YAML files, area by area."""
    return list(_read())


def _read() -> Iterator[Mutant]:
    for path in sorted(FOLDER.glob("*.yaml")):
        for values in yaml.safe_load(path.read_text(encoding="utf-8")):
            yield Mutant(path.stem, **values)
