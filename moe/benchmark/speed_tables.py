"""The tables that scripts/bench.py prints."""

from collections.abc import Iterator, Sequence
from typing import Any

from moe.tables import short

Row = list[str]


def layer_rows(records: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """A header, and a row per contender and shape."""
    yield [
        "contender", "experts", "tokens", "top-k", "forward", "backward", "both", "quartiles",
        "to dense", "peak MiB", "passes",
    ]  # fmt: skip
    for record in records:
        relative, peak = record["relative_to_dense"], record["peak_mib"]
        yield [
            record["contender"],
            *(str(record[key]) for key in ("num_experts", "tokens", "top_k")),
            *(_ms(record[key]) for key in ("forward_ms", "backward_ms", "forward_backward_ms")),
            _quartiles(record["forward_backward_quartiles_ms"]),
            "" if relative is None else f"{relative:.3f}",
            "" if peak is None else f"{peak:,.1f}",
            str(record["repeats"]),
        ]


def step_rows(records: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """A header, and for each configuration a row with its floor below it."""
    parts = ("forward", "backward", "update")
    yield [
        "configuration", "parameters", "active", *parts, "rest", "step", "tokens/s", "to the first",
    ]  # fmt: skip
    for record in records:
        yield [
            record["config"],
            *(short(record[key]) for key in ("params", "active_params")),
            *(_ms(record[f"{part}_ms"]) for part in (*parts, "rest", "step")),
            f"{record['tokens_per_s']:,.0f}",
            f"{record['relative_to_first']:.3f}",
        ]
        yield ["  floor", "", "", *(_ms(record[f"{part}_floor_ms"]) for part in parts)]


def dispatch_rows(records: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """A header, and a row per number of ranks."""
    yield [
        "ranks", "experts", "tokens", "rows: mean", "busiest", "GFLOP: mean", "sent KiB: mean", "expected",
        "step expected", "ms", "quartiles",
    ]  # fmt: skip
    for record in records:
        rows, flops = record["rows_per_rank"], record["routed_flops_per_rank"]
        kib = [
            sum(record["dispatch_bytes_per_rank"]) / record["ranks"],
            record["expected_dispatch_bytes"],
            record["expected_step_bytes"],
        ]
        yield [
            str(record["ranks"]),
            *(str(record[key]) for key in ("experts_per_rank", "tokens_per_rank")),
            f"{sum(rows) / len(rows):,.0f}",
            f"{max(rows):,}",
            f"{sum(flops) / len(flops) / 1e9:,.3f}",
            *(f"{value / 2**10:,.1f}" for value in kib),
            _ms(record["layer_ms"]),
            _quartiles(record["layer_quartiles_ms"]),
        ]


def generation_rows(record: dict[str, Any]) -> Iterator[Row]:
    """A header and a row."""
    yield ["model", "parameters", "new tokens", "context", "ms/token", "tokens/s", "quartiles", "runs"]
    yield [
        record["model"],
        short(record["params"]),
        *(str(record[key]) for key in ("new_tokens", "context")),
        _ms(record["ms_per_token"]),
        f"{record['tokens_per_s']:,.1f}",
        _quartiles(record["tokens_per_s_quartiles"]),
        str(record["repeats"]),
    ]


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _quartiles(values: Sequence[float]) -> str:
    return " - ".join(_ms(value) for value in values)
