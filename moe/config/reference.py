"""The reference of all keys, for `train.py --help` and for configs/README.md.

`python -m moe.config.reference configs/README.md` updates the table in that file.
"""

import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from moe.config.errors import ConfigError
from moe.config.schema import Config, config_fields, on_resume

START, END = "<!-- keys: start -->", "<!-- keys: end -->"


def help_text(of: str = "") -> str:
    """One line per dotted key: values, default, meaning, for `train.py --help`.

    Args:
        of: a section or a key; empty: all keys.

    Raises:
        ConfigError: there is no such section or key.
    """
    if of and of not in {*Config.model_fields, *config_fields()}:
        sections = ", ".join(Config.model_fields)
        raise ConfigError("--help", f"no section or key {of!r}; the sections are {sections}")
    return "\n".join(
        f"  {key:<33} {_values(field):<29} {_default(field):<14} {field.description}"
        for key, field in config_fields().items()
        if not of or key == of or key.startswith(f"{of}.")
    )


def markdown() -> str:
    """A table per section: key, type, default, meaning, and whether a resumed run may change it."""
    tables = []
    for name, section in Config.model_fields.items():
        lines = [f"### {name}", "", section.annotation.__doc__ or "", ""]
        lines += ["| key | type | default | meaning | may change on resume |", "|---|---|---|---|---|"]
        for key, field in config_fields().items():
            if key.startswith(f"{name}."):
                kind = _values(field).replace(" | ", " or ").replace("|", ", ")
                may_change = "" if on_resume(key) == "refused" else "yes"
                default = _default(field).removeprefix("= ")
                lines.append(f"| `{key}` | {kind} | {default} | {field.description} | {may_change} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def replace_table(page: str) -> str:
    """The page with everything between its two markers replaced by `markdown()`."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{markdown()}\n\n{END}{rest.partition(END)[2]}"


def _values(field: FieldInfo) -> str:
    """The type, and the bounds of a number: `int >= 0`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(check, name):g}"
        for check in field.metadata
        for name, sign in signs.items()
        if getattr(check, name, None) is not None
    ]
    kind, *others = _type_name(field.annotation).split(" | ")
    return " | ".join([" ".join([kind, " and ".join(bounds)]).strip(), *others])


def _default(field: FieldInfo) -> str:
    return "" if field.default_factory else f"= {json.dumps(field.default)}"


def _type_name(annotation: Any) -> str:
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return "|".join(str(value) for value in parts)
    if kind in (Union, UnionType):
        return " | ".join(map(_type_name, parts))
    if kind is tuple:
        return f"[{', '.join(map(_type_name, parts))}]"
    return "null" if annotation is NoneType else annotation.__name__


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(replace_table(path.read_text(encoding="utf-8")), encoding="utf-8")
