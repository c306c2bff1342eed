"""The report as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attlas.bench.efficiency import EfficiencyLength
from attlas.bench.records import Failure, Measure, NetworkResult, Record, SpeedResult
from attlas.bench.report import numbers
from attlas.bench.report.digest import FUSED, MATERIALISED, Digest, NetworkTable, QualityRow, QualityTable, SpeedTable


def terminal_tables(records: Iterable[Record]) -> list[RenderableType]:
    """Quality per task, speed at the largest common length, and what they say, to be printed one by one."""
    digest = Digest(list(records))
    parts: list[RenderableType] = []
    for task in digest.quality:
        parts += [*_quality(task), Text()]
    for sweep in digest.speed:
        parts += [Text(sweep.setting, "bold"), Text()]
        for measure in sweep.measures:
            parts += [*_speed(sweep, measure), Text()]
    for networks in digest.networks:
        parts += [Text(networks.setting, "bold"), *_networks(networks), Text()]
    findings = Table.grid(padding=(0, 2))
    findings.add_column(max_width=24)
    for finding in digest.findings:
        findings.add_row(Text(finding.about, "dim"), Text(finding.text))
    return [*parts, findings if digest.findings else Text(digest.scope)]


def _quality(task: QualityTable) -> Iterable[RenderableType]:
    yield Text(f"{task.job.task}: {task.description} ({task.direction})", "bold")
    table = _table(
        [task.metric or "result", "difference", "", "parameters", "tokens/s", "state"],
    )
    places = numbers.places_for([row.value.half for row in task.ranked if row.value])
    for row in task.rows:
        table.add_row(Text(row.name), *_quality_cells(task, row, places))
    yield table
    for row in task.rows:
        yield from _reasons(row.name, row.failures)


def _quality_cells(task: QualityTable, row: QualityRow, places: int) -> Sequence[RenderableType]:
    if row.value is None:
        return [Text("failed", "red")]
    parameters, state = row.mean("parameters"), row.mean("state_bytes")
    gap, verdict = Text(numbers.MISSING), row.role
    if row.gap is not None:
        gap, verdict = Text(numbers.interval(row.gap, places, signs=True)), row.role or task.verdict(row.gap)
    return [
        Text(numbers.interval(row.value, places)),
        gap,
        Text(verdict, {"better": "green", "worse": "red"}.get(verdict, "dim")),
        Text(f"{numbers.signed(100 * (parameters / task.job.parameters - 1), 1)} %"),
        Text(f"{row.mean('tokens_per_second'):,.0f}"),
        Text(numbers.memory(state) if state else "none"),
    ]


def _speed(sweep: SpeedTable, measure: Measure) -> Iterable[RenderableType]:
    tokens = sweep.shown(measure)
    yield Text(f"{measure} at {tokens:,} tokens", "bold")
    table = _table(["ms", "SDPA\nis 1", "peak\nmemory", "state", "pays off\nagainst SDPA", "against\nmaterialised"])
    found = sweep.at(measure, tokens)
    dense = sweep.results(FUSED, measure).get(tokens) if FUSED in sweep.rows else None
    lengths = {each.name: each.lengths for each in sweep.efficiencies(measure)}
    for name, result in found.items():
        if not isinstance(result, SpeedResult):
            table.add_row(Text(name), Text("failed", "red"))
            continue
        times, own = result.times, lengths.get(name, {})
        table.add_row(
            Text(name),
            Text(numbers.milliseconds(times.median)),
            Text(numbers.ratio(dense.times.median / times.median) if dense else numbers.MISSING),
            Text(numbers.memory(result.peak_bytes)),
            Text(numbers.memory(result.state_bytes) if result.state_bytes else numbers.MISSING),
            _length(own.get(("time", FUSED))),
            _length(own.get(("time", MATERIALISED))),
        )
    yield table
    for name, result in found.items():
        if isinstance(result, Failure):
            yield from _reasons(name, [result])


def _networks(found: NetworkTable) -> Iterable[RenderableType]:
    table = _table(["parameters", "GMACs", "images/s", "ms, one picture", "memory"], "network")
    for name, row in found.rows.items():
        if isinstance(row, NetworkResult):
            table.add_row(
                Text(name),
                numbers.count(row.parameters),
                numbers.digits(row.macs / 1e9),
                numbers.digits(found.images_per_second(name)),
                numbers.milliseconds(row.single.median),
                numbers.memory(row.peak_bytes),
            )
        else:
            table.add_row(Text(name), Text("failed", "red"))
    yield table
    for name, row in found.rows.items():
        if isinstance(row, Failure):
            yield from _reasons(name, [row])


def _length(found: EfficiencyLength | None) -> Text:
    if found is None:
        return Text(numbers.MISSING)
    if found.never:
        return Text("never", "dim")
    return Text(f"{'≤ ' * found.always}{found.length:,.0f}")


def _table(heads: Sequence[str], first: str = "mechanism") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    for head in heads:
        table.add_column(Text(head), justify="left" if head == "" else "right")
    return table


def _reasons(name: str, failures: Iterable[Failure]) -> Iterable[Text]:
    """Each reason once."""
    for reason in dict.fromkeys(f"{each.error}: {each.message}" for each in failures):
        yield Text(f"{name}: {reason}", "red")
