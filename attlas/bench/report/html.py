"""The report as one HTML file that opens without a server or a network."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

import attlas
from attlas.analysis.visible import share_of_draws
from attlas.bench.records import Record, to_json
from attlas.bench.report import numbers
from attlas.bench.report.digest import Digest, Picture, machine_facts
from attlas.bench.report.network_section import network_section
from attlas.bench.report.quality_section import index_section, quality_section
from attlas.bench.report.speed_section import speed_section
from attlas.bench.report.svg import definitions, marker, matrix
from attlas.bench.report.table import Looks
from attlas.core.errors import BadInput

ALONE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What the browser may load for the page: nothing but the page."""


def write_html(
    records: Iterable[Record],
    path: str | Path,
    *,
    command: str,
    machine: Mapping[str, str],
    title: str = "Attention mechanisms compared",
) -> Path:
    """Write the report of some records.

    Args:
        records: of speed and quality, in any mixture; failures included.
        path: of the file; its folder is made.
        command: what the user typed, for others to repeat.
        machine: what it ran on (see `attlas.bench.machine.describe`).
        title: of the page.

    Returns:
        The absolute path of the file.
    """
    page = Path(path).resolve()
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(Digest(list(records)), command, machine, title), encoding="utf-8")
    return page


def render(digest: Digest, command: str, machine: Mapping[str, str], title: str) -> str:
    """The whole page."""
    looks = digest.styles
    quality = [quality_section(task, looks) for task in digest.quality]
    quality += [index_section(index, looks) for index in digest.indices]
    sections = [
        ("quality", "Quality", "".join(quality)),
        ("speed", "Speed and memory", "".join(speed_section(sweep, looks) for sweep in digest.speed)),
        ("networks", "Networks", "".join(map(network_section, digest.networks))),
        ("masks", "Who sees whom", _masks(digest.pictures, looks)),
        ("reproduce", "Reproduce", _reproduce(digest, command, machine)),
        ("terms", "How to read this", _own("terms.html")),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{part}</section>' for key, name, part in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{ALONE}"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_own('page.css')}</style></head><body>{definitions()}<main><header>"
        f'<p class="kicker">Attlas {escape(attlas.__version__)} · {datetime.datetime.now():%d %B %Y, %H:%M}</p>'
        f"<h1>{escape(title)}</h1><p>{escape(digest.scope)}</p>{_findings(digest)}<nav>{links}</nav></header>"
        f'{_legend(looks)}{body}</main><div id="tip" role="status" hidden></div>'
        f"<script>{_own('page.js')}</script></body></html>\n"
    )


def _own(name: str) -> str:
    """A file that comes with this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _findings(digest: Digest) -> str:
    found = "".join(f"<dt>{escape(each.about)}</dt><dd>{escape(each.text)}</dd>" for each in digest.findings)
    return f'<dl class="findings">{found}</dl>' if found else ""


def _legend(looks: Looks) -> str:
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-name="{escape(name)}">{marker(look)}{escape(name)}</button>'
        for name, look in looks.items()
    )
    return f'<div class="legend" role="group" aria-label="Show or hide mechanisms">{buttons}</div>' if looks else ""


def _masks(pictures: Iterable[Picture], looks: Looks) -> str:
    shown, missing = [], []
    for each in pictures:
        try:
            shown.append(_mask(each, looks))
        except Exception as error:  # a mechanism that cannot be pictured does not cost the report
            missing.append(f"{each.name}: {error}")
    if not shown:
        return ""
    notes = "".join(f'<p class="note">Not pictured: {escape(note)}</p>' for note in missing)
    return (
        '<p class="soft">Rows are queries, columns are keys. A cell is filled where the output depends on the key\'s '
        "value, or on the token where a mechanism has no values: the gradients of small random layers say so. Lighter "
        "cells depend on it in some draws only, and a second picture shows what one position in the middle of a grid "
        "sees.</p>"
        f'<div class="masks">{"".join(shown)}</div>{notes}'
    )


def _mask(each: Picture, looks: Looks) -> str:
    try:
        share_NN, settings = share_of_draws(each.mechanism, each.causal, each.grid, params=each.params), ""
    except BadInput:  # settings for more tokens than the picture has
        share_NN, settings = share_of_draws(each.mechanism, each.causal, each.grid), ", small settings"
    tokens = share_NN.shape[0]
    picture = matrix(share_NN, title=f"Tokens that each output of {each.name} depends on")
    if len(each.grid) == 2:
        rows, columns = each.grid
        middle = share_NN[rows // 2 * columns + columns // 2].reshape(rows, columns)
        picture += matrix(middle, title=f"Positions that the middle of the grid depends on in {each.name}")
    pattern = "causal" if each.causal else "noncausal"
    axes = " × ".join(map(str, each.grid)) + " tokens" * (len(each.grid) == 1)
    seen = numbers.digits(float(share_NN.sum()) / tokens)
    return (
        f'<figure class="mask c{looks[each.row].colour}" data-name="{escape(each.row)}">'
        f'<div class="pair">{picture}</div><figcaption><b>{escape(each.name)}</b><br>{pattern}, {axes}{settings}<br>'
        f"sees {seen} of {tokens} tokens</figcaption></figure>"
    )


def _reproduce(digest: Digest, command: str, machine: Mapping[str, str]) -> str:
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in machine.items())
    others = len(set(map(machine_facts, digest.records)))
    mixed = f'<p class="bad">The records come from {others} machines or versions.</p>' if others > 1 else ""
    # Nothing inside may end the script element.
    data = json.dumps([to_json(record) for record in digest.records]).replace("<", "\\u003c")
    return (
        f"<p>On this machine, this command made this page:</p><pre>{escape(command)}</pre><dl>{facts}</dl>{mixed}"
        f'<p><button type="button" class="save">Save the {len(digest.records)} records as JSON</button></p>'
        f'<script type="application/json" id="records">{data}</script>'
    )
