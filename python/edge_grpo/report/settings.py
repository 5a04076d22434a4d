"""The table of settings on the page: one column a group, with what differs marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edge_grpo.config import TrainConfig, flatten, to_dict
from edge_grpo.report.groups import Group


def configuration(groups: Sequence[Group]) -> str:
    """Return the table of settings; those in which groups differ, or a single one from the defaults, are marked."""
    columns = [_shared(group) for group in groups]
    if not any(columns):
        return ""
    defaults = flatten(to_dict(TrainConfig()))
    keys = sorted({key for column in columns for key in column}, key=lambda key: _order(key, defaults))
    rows = []
    for key in keys:
        values = [column.get(key, "–") for column in columns]
        differs = any(value != values[0] for value in values) if len(groups) > 1 else values[0] != defaults.get(key)
        differs = differs and key != "output"  # every run has its own
        cells = "".join(f"<td>{escape(_text(value))}</td>" for value in values)
        rows.append(f'<tr class="{"differs" if differs else "same"}"><th scope="row">{escape(key)}</th>{cells}</tr>')
    against = "differences between the columns" if len(groups) > 1 else "differences from the defaults"
    names = "".join(
        f'<th scope="col"><span class="swatch" style="--run: var(--c{index % 8})"></span> {escape(group.name)}</th>'
        for index, group in enumerate(groups)
    )
    return "".join(
        [
            '<h2>Configuration</h2><div class="card"><p class="filters"><label>',
            f'<input type="checkbox" id="only-differences" checked> Only {against}, marked</label></p>',
            '<div class="scroll"><table class="config">',
            f'<thead><tr><th scope="col">Key</th>{names}</tr></thead><tbody>{"".join(rows)}</tbody>',
            "</table></div></div>",
        ]
    )


def _shared(group: Group) -> dict[str, Any]:
    """The settings of a group's runs; where these differ, all of their values in one text."""
    settings = [flatten(run.config) for run in group.runs if run.config]
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in settings for key in each):
        texts = list(dict.fromkeys(_text(each.get(key, "–")) for each in settings))
        found[key] = settings[0].get(key) if len(texts) == 1 else ", ".join(texts)
    return found


def _order(key: str, defaults: Mapping[str, Any]) -> tuple[int, str]:
    known = list(defaults)
    return (known.index(key), key) if key in defaults else (len(known), key)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
