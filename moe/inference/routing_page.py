"""`routing.html`: what the experts of a run do, as a page that opens without a network."""

from base64 import b64encode
from html import escape
from io import BytesIO

from tokenizers import Tokenizer

from moe.inference.routing_statistics import LayerRouting, Routing

_FAVOURITES = 10
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; max-width: 72rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; margin: 1rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .4rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #444; vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
td.text { text-align: left; white-space: normal; border-bottom: 1px solid #ddd; padding-bottom: .6rem; }
code { background: #f0f0f0; border-radius: .2rem; padding: 0 .25rem; margin-right: .2rem; white-space: pre; }
figure { margin: 1rem 0; } img { width: 100%; max-width: 26rem; height: auto; }
figcaption, .note { color: #444; font-size: .9rem; }
"""


def routing_page(routing: Routing, title: str, tokenizer: Tokenizer) -> str:
    """The page: a table of the layers, and for each layer its experts and which go together."""
    sections = "".join(
        f"<details{' open' if i == 0 else ''}><summary>Layer {layer.layer}</summary>\n"
        f"{_experts(routing, layer, tokenizer)}{_together(layer)}</details>\n"
        for i, layer in enumerate(routing.layers)
    )
    texts, tokens = escape(", ".join(routing.texts)), f"{routing.layers[0].tokens:,} tokens"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{tokens} of {texts}; loss {routing.loss:.4f} nats per token.</p>\n"
        f"{_table([HEADER, *layer_rows(routing)])}\n{sections}</body></html>\n"
    )


HEADER = (
    "layer",
    "busiest / mean",
    "unused",
    "top-1 prob",
    "margin",
    "entropy",
    "routes kept",
    "cheapest to drop",
)


def layer_rows(routing: Routing) -> list[tuple[str, ...]]:
    """A row for each layer, for `HEADER`."""
    rows = []
    for layer in routing.layers:
        shares = layer.shares
        cheapest = min(layer.losses, key=lambda expert: layer.losses[expert], default=None)
        rows.append(
            (
                str(layer.layer),
                f"{float(shares.max() * len(shares)):.2f}",
                str(int((shares == 0).sum())),
                f"{layer.top1:.3f}",
                f"{layer.margin:.3f}",
                f"{layer.entropy:.3f}",
                "" if layer.kept is None else f"{layer.kept:.1%}",
                "" if cheapest is None else f"{cheapest}: {layer.losses[cheapest] - routing.loss:+.4f}",
            )
        )
    return rows


def _experts(routing: Routing, layer: LayerRouting, tokenizer: Tokenizer) -> str:
    """A row for each expert: its share of each text, and the tokens that go to it most."""
    by_text = layer.loads.double() / layer.loads.sum(1, keepdim=True)
    even, rows = 1 / by_text.shape[1], []
    several = len(routing.texts) > 1
    all_texts = [[share] if several else [] for share in layer.shares.tolist()]
    for expert in layer.shares.argsort(descending=True).tolist():
        cells = [f"<td>{expert}</td>"]
        for share in [*all_texts[expert], *by_text[:, expert].tolist()]:
            cells.append(f'<td style="background:{_shade(share / even)}">{share:.1%}</td>')
        if expert in layer.losses:
            cells.append(f"<td>{layer.losses[expert] - routing.loss:+.4f}</td>")
        elif layer.losses:
            cells.append("<td></td>")
        tokens = "".join(
            f'<code title="{share:.0%} of its occurrences">{escape(_written(tokenizer, token))}</code> '
            for token, share in layer.favourites(expert, _FAVOURITES)
        )
        row = f'<tr><td class="text" colspan="{len(cells)}">{tokens}</td></tr>\n'
        rows.append(f"<tr>{''.join(cells)}</tr>\n{row}")
    dropped = ["loss if dropped"] if layer.losses else []
    names = ["expert", *(["all"] if several else []), *routing.texts, *dropped]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        f'<div class="wide"><table><tr>{head}</tr>\n{"".join(rows)}</table></div>\n'
        f'<p class="note">Shares of the assignments; an even one is {even:.1%}. Below are the '
        "tokens of which the largest share goes to the expert; rare ones are left out.</p>\n"
    )


def _together(layer: LayerRouting) -> str:
    """A heat map of which experts a token has together."""
    from matplotlib.figure import Figure

    counts = layer.together.double()
    given = counts / counts.diagonal().clamp(min=1)[:, None]
    given.fill_diagonal_(0)
    figure = Figure(figsize=(4.2, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(given.numpy(), cmap="Blues", vmin=0)
    axes.set(xlabel="also goes to expert", ylabel="a token of expert")
    figure.colorbar(shown, shrink=0.8)
    file = BytesIO()
    figure.savefig(file)
    caption = f"Layer {layer.layer}: share of the tokens of one expert that also go to another."
    picture = b64encode(file.getvalue()).decode()
    image = f'<img alt="{caption}" src="data:image/png;base64,{picture}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _written(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False).replace("\n", "\\n").replace("\t", "\\t")


def _shade(of_even: float) -> str:
    """White for nothing, blue for twice an even share or more."""
    strength = min(of_even / 2, 1.0)
    return f"rgb({255 - int(150 * strength)},{255 - int(90 * strength)},255)"


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in body)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{names}</tr>\n{cells}</table></div>'
