"""Tables for the terminal."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the first column flush left, the others flush right. Short rows end early."""
    widths = [0] * max(len(row) for row in rows)
    for row in rows:
        widths[: len(row)] = [max(width, len(cell)) for width, cell in zip(widths, row, strict=False)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )


def short(number: float) -> str:
    """Three digits and a unit, such as 46.7B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}" if abs(number) < 1e3 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.3g}"


def plain(number: float) -> str:
    """A number to read aloud: whole from 100 on, three digits below."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """A time to read aloud."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def gib(size: float) -> str:
    """Bytes as GiB, for tables."""
    return f"{size / 2**30:,.2f} GiB"


def memory_size(size: float) -> str:
    """Bytes in the unit that suits them."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if size >= u), (2**10, "KiB"))
    return f"{plain(size / unit)} {name}"
