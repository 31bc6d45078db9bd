"""The report of an ablation: `report.html`, which opens without a network, `results.csv` and PNG files."""

import csv
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.comparison import Comparison, compare, rows
from moe.ablation.conclusions import conclusions, headline
from moe.ablation.figures import draw_figures
from moe.ablation.results import read_runs
from moe.config import ConfigError
from moe.tables import plain, short

FIGURES = "figures"  # the folder of the pictures
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; max-width: 72rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.headline { font-size: 1.25rem; line-height: 1.35; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; width: 100%; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; min-width: 10rem; }
thead th { border-bottom: 2px solid #444; vertical-align: bottom; overflow-wrap: normal; }
figure { margin: 1.2rem 0; } img { width: 100%; max-width: 48rem; height: auto; }
figcaption { color: #444; font-size: .9rem; }
summary { cursor: pointer; font-weight: 600; font-size: 1.15rem; margin: 1.2rem 0 .5rem; }
@media (max-width: 50rem) {
  thead { display: none; }
  tr, td { display: block; } tr { border-bottom: 2px solid #444; padding: .4rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-title); color: #444; text-align: left; }
  td:first-child { font-weight: 600; } td:first-child::before { content: none; } td:empty { display: none; }
}
"""

_QUALITY = {
    "cell": ("cell", str),
    "seeds": ("seeds", str),
    "params_total": ("parameters, total", short),
    "params_active": ("active", short),
    "flops_per_token": ("FLOPs per token, training", short),
    "loss": ("loss, nats per token", "{:.4f}".format),
    "bits_per_byte": ("bits per byte", "{:.4f}".format),
    "difference": ("difference to dense", "{:+.4f}".format),
    "equivalent_dense_params_no_input_emb": ("equivalent dense size (active, without embedding)", short),
}
_TIME = {
    "cell": ("cell", str),
    "steps": ("steps", "{:,}".format),
    "tokens": ("tokens", short),
    "planned_step_ms": ("ms a step, measured before", plain),
    "step_ms": ("ms a step", plain),
    "planned_seconds": ("seconds, planned", plain),
    "seconds": ("seconds, mean", plain),
    "seconds_min": ("shortest run", plain),
    "seconds_max": ("longest run", plain),
    "seconds_to_baseline": ("mean over that of dense", "{:.3f}".format),
}
_EFFORT = {
    "cell": ("cell", str),
    "tokens_per_s": ("tokens per second", plain),
    "load_imbalance": ("load, busiest over mean", "{:.2f}".format),
    "dead_experts": ("dead experts", "{:.1f}".format),
    "router_entropy": ("router entropy, nats", "{:.2f}".format),
    "dropped_fraction": ("dropped", "{:.2%}".format),
    "flops": ("FLOPs, training", "{:.2e}".format),
    "device_hours": ("device hours", plain),
    "usd": ("USD", plain),
    "kwh": ("kWh", plain),
    "tco2e": ("tCO2e", "{:.2g}".format),
}


def write_report(root: Path) -> list[str]:
    """Write a report on all finished runs below a folder into that folder, and return its sentences.

    Raises:
        ConfigError: there is no finished run, or the folder cannot be written.
    """
    runs, left_out = read_runs(root)
    sets, record = compare(runs), AblationFolder(root)
    notes, said, table, sections = [], [], [], []
    if record.is_quick():
        notes.append(
            "A quick ablation: the models are far from converged, so neither the size of the differences nor "
            "the order of similar cells carries over to the full training."
        )
    if unfinished := record.unfinished():
        notes.append(f"Not finished, so not included: {'; '.join(unfinished)}.")
    if left_out:
        places = "; ".join(str(path.relative_to(root)) for path in left_out)
        notes.append(f"Left out because another run has the same settings and seed: {places}.")
    try:
        for number, comparison in enumerate(sets, 1):
            some, sentences = list(rows(comparison)), list(conclusions(comparison))
            (root / FIGURES).mkdir(exist_ok=True)
            pictures = draw_figures(comparison, root / FIGURES, f"_{number}" if len(sets) > 1 else "")
            sections.append(_section(comparison, some, sentences, pictures))
            table += some
            settings = f"{comparison.title}: " if comparison.title else ""
            said += [settings + headline(comparison), *sentences]
        with (root / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in table for key in row))
            writer.writeheader()
            writer.writerows(table)
        title = escape(root.resolve().name)
        page = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
            + "".join(f"<p><strong>{escape(note)}</strong></p>\n" for note in notes)
            + "<hr>\n".join(sections)
            + "</body></html>\n"
        )
        (root / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError("DIR", f"the report cannot be written to {root} ({error.strerror})") from None
    return notes + said


def _section(
    comparison: Comparison, table: list[dict[str, Any]], said: list[str], pictures: list[tuple[Path, str]]
) -> str:
    cells = comparison.cells
    run = next(iter(cells[0].runs.values()))
    seeds = sorted({seed for cell in cells for seed in cell.runs})
    settings = f"{comparison.title}: " if comparison.title else ""
    amount = f"{short(run.summary['tokens'])} tokens each of"
    if comparison.is_race:
        amount = f"each planned for {plain(cells[0].planned_seconds or 0)} seconds of training on"
    data = run.config.data
    text = ", ".join(source.source for source in data.sources.values()) or data.source
    opening = (
        f"{settings}{sum(len(cell.runs) for cell in cells)} runs of {len(cells)} cells, "
        f"seeds {', '.join(map(str, seeds))}, {amount} {text}. Runs of one seed share "
        "their batches and all initial weights outside experts and routers. All runs share the validation "
        "text."
    )
    by_text = {key: (f"loss on {key[5:]}", "{:.4f}".format) for key in table[0] if key.startswith("loss/")}
    first, *others = (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,'
        f'{b64encode(path.read_bytes()).decode()}"><figcaption>{escape(caption)}</figcaption></figure>\n'
        for path, caption in pictures
    )
    details = (
        "<h2>What it shows</h2>\n<ul>" + "".join(f"<li>{escape(one)}</li>\n" for one in said) + "</ul>\n"
        f"<h2>Time</h2>\n{_table(table, _TIME)}\n"
        "<p>Seconds are those of the training steps, without evaluations and checkpoints.</p>\n"
        f"<h2>Speed, routing and cost</h2>\n{_table(table, _EFFORT)}\n"
        "<p>FLOPs and cost are per run, mean over seeds. Price and energy need rates, which cost.* in the "
        f"configuration sets.</p>\n<h2>More figures</h2>\n{''.join(others)}"
    )
    return (
        f'<p class="headline">{escape(headline(comparison))}</p>\n<p>{escape(opening)}</p>\n{first}'
        f"<h2>Quality</h2>\n{_table(table, _QUALITY | by_text)}\n"
        "<p>Loss: final validation loss, mean over seeds. Its 95 % interval includes what seeds change in "
        "all cells alike. To compare cells, use the differences to dense, which are paired by seed.</p>\n"
        f"<details><summary>Details: every comparison, time, routing, cost, more figures</summary>\n{details}"
        "</details>\n"
    )


def _table(table: list[dict[str, Any]], columns: Mapping[str, Any]) -> str:
    shown = {key: how for key, how in columns.items() if any(row[key] is not None for row in table)}
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in shown.values())
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-title="{escape(title)}">{_cell(row, key, form)}</td>'
            for key, (title, form) in shown.items()
        )
        + "</tr>\n"
        for row in table
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(row: dict[str, Any], key: str, form: Any) -> str:
    """A value, with its interval if it has one."""
    text = "" if row[key] is None else form(row[key])
    if row.get(f"{key}_low") is not None:
        text += f" [{form(row[f'{key}_low'])}, {form(row[f'{key}_high'])}]"
    return escape(text)
