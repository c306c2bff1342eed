"""What records say, worked out once for the terminal and for the page."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from attlas.bench.efficiency import (
    EfficiencyLength,
    efficiency_length,
    memory_curve,
    scaling_exponent,
    time_curve,
)
from attlas.bench.network import is_network
from attlas.bench.records import (
    Failure,
    Measure,
    NetworkJob,
    NetworkResult,
    QualityJob,
    QualityResult,
    Record,
    SpeedJob,
    SpeedResult,
)
from attlas.bench.report import numbers
from attlas.bench.report.svg import Style
from attlas.bench.speed import BASELINES
from attlas.bench.statistics import Interval, Scores, composite, difference, interval, within_noise
from attlas.bench.tasks import TASKS, task_named
from attlas.core.errors import AttlasError

MATERIALISED, FUSED = "materialised", "SDPA"
"""What the two softmax baselines of a speed sweep are called."""

MEASURES: tuple[Measure, ...] = ("forward", "forward+backward", "prefill", "decode")

Identity = tuple[str, ...]


# -- quality ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QualityRow:
    """A mechanism on a task, over its seeds.

    Attributes:
        name: how the row is called.
        mechanism: for `attlas.mixer`.
        role: "baseline", "noise control" or "".
        runs: what the seeds gave.
        failures: why seeds gave nothing.
        value: of the metric; None where every seed failed.
        gap: to the baseline; None for the baseline itself and where there is none.
    """

    name: str
    mechanism: str
    role: str
    runs: Sequence[QualityResult]
    failures: Sequence[Failure]
    value: Interval | None
    gap: Interval | None

    @property
    def values(self) -> list[float]:
        """Of the metric, one for each seed that gave one."""
        return [run.value for run in self.runs]

    def mean(self, attribute: str) -> float:
        """Of a number of the results, over the seeds."""
        return fmean(getattr(run, attribute) for run in self.runs)

    def detail(self, group: str) -> float | None:
        """The metric on one group of the held-out data, over the seeds."""
        values = [run.details[group] for run in self.runs if group in run.details]
        return fmean(values) if values else None


@dataclass(frozen=True)
class QualityTable:
    """A task at one setting; rows from best to worst, then those that failed."""

    job: QualityJob
    metric: str
    higher_is_better: bool
    rows: Sequence[QualityRow]

    @property
    def description(self) -> str:
        """What the task asks."""
        return TASKS[self.job.task].description if self.job.task in TASKS else self.job.task

    @property
    def direction(self) -> str:
        """Which way the metric runs."""
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def ranked(self) -> list[QualityRow]:
        """The rows that have a value."""
        return [row for row in self.rows if row.value is not None]

    @property
    def baseline(self) -> QualityRow | None:
        """What the others are held against."""
        return next((row for row in self.rows if row.role == "baseline"), None)

    @property
    def control(self) -> QualityRow | None:
        """The noise control, where it ran."""
        return next((row for row in self.ranked if row.role == "noise control"), None)

    def noisy(self, gap: Interval) -> bool:
        """Whether a difference says nothing."""
        return within_noise(gap, self.control.gap if self.control else None)

    def verdict(self, gap: Interval) -> str:
        """What a difference to the baseline says."""
        if gap.half is None:
            return "one seed"
        if self.noisy(gap):
            return "within noise"
        return "better" if (gap.mean > 0) == self.higher_is_better else "worse"

    @property
    def setting(self) -> str:
        """What every row shares."""
        job = self.job
        said = f"{job.steps} steps of {job.batch} sequences of {job.length} tokens"
        whole = [row.name for row in self.rows if is_network(row.mechanism)]
        if len(whole) < len(self.rows):
            said += (
                f"; {job.layers} layers of {job.dim} channels, {job.heads} heads; {job.parameters:,} parameters each"
            )
        return f"{said}; image networks as they are" if whole else said


def quality_tables(records: Iterable[Record], names: Mapping[Identity, str]) -> list[QualityTable]:
    """One table for each task and setting."""
    settings: dict[Any, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        job = record.job
        if isinstance(job, QualityJob):
            settings[_setting(job, "mechanism", "seed", "label", "params")][names[identity(job)]].append(record)
    return [_quality_table(rows) for rows in settings.values()]


def _quality_table(rows: Mapping[str, Sequence[Record]]) -> QualityTable:
    jobs = {name: _quality_job(records[0]) for name, records in rows.items()}
    results = {
        name: [record.result for record in records if isinstance(record.result, QualityResult)]
        for name, records in rows.items()
    }
    metric, higher = next(
        ((run.metric, run.higher_is_better) for runs in results.values() for run in runs), ("", False)
    )
    baseline, controls = _roles(jobs)
    roles = dict.fromkeys(controls, "noise control") | {baseline: "baseline"}
    reference = [run.value for run in results.get(baseline, [])]
    table = []
    for name, records in rows.items():
        values = [run.value for run in results[name]]
        failures = [record.failure for record in records if record.failure]
        value = interval(values) if values else None
        gap = difference(values, reference) if values and reference and name != baseline else None
        table.append(QualityRow(name, jobs[name].mechanism, roles.get(name, ""), results[name], failures, value, gap))
    sign = -1 if higher else 1
    table.sort(key=lambda row: math.inf if row.value is None else sign * row.value.mean)
    return QualityTable(next(iter(jobs.values())), metric, higher, table)


def _roles(jobs: Mapping[str, QualityJob]) -> tuple[str, list[str]]:
    """The names of the baseline ("" without one) and of its controls: the same mathematics under other labels.

    A run without a control has softmax for its baseline.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name, job in jobs.items():
        alike[json.dumps([job.mechanism, job.params], sort_keys=True)].append(name)
    for names in alike.values():
        own = [name for name in names if jobs[name].label == jobs[name].mechanism]
        if own and len(names) > 1:
            return own[0], [name for name in names if name != own[0]]
    return next((name for name, job in jobs.items() if job.mechanism == BASELINES[0][0]), ""), []


@dataclass(frozen=True)
class Index:
    """The composite index over the tasks of one pattern; see `attlas.bench.statistics.composite`."""

    pattern: str
    tasks: Sequence[str]
    scores: Mapping[str, Interval]
    roles: Mapping[str, str]


def composite_indices(tables: Iterable[QualityTable]) -> list[Index]:
    """One for each pattern that has at least two tasks."""
    patterns: dict[str, list[QualityTable]] = defaultdict(list)
    for table in tables:
        if table.job.task in TASKS and table.ranked:
            patterns["causal" if TASKS[table.job.task].causal else "noncausal"].append(table)
    indices = []
    for pattern, group in patterns.items():
        tasks = list(dict.fromkeys(table.job.task for table in group))
        if len(tasks) < 2:
            continue
        roles = {row.name: row.role for table in group for row in table.rows}
        controls = [name for name, role in roles.items() if role == "noise control"]
        scores = [Scores(table.higher_is_better, {row.name: row.values for row in table.ranked}) for table in group]
        if index := composite(scores, controls):
            indices.append(Index(pattern, tasks, index, roles))
    return indices


def _quality_job(record: Record) -> QualityJob:
    assert isinstance(record.job, QualityJob)
    return record.job


# -- speed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedTable:
    """Speed under one setting.

    Attributes:
        facts: what every row shares, in words.
        apart: those of the facts that tell it from the other settings of the same report.
        rows: name -> measure -> tokens -> what came out.
    """

    facts: Sequence[str]
    apart: str
    rows: Mapping[str, Mapping[Measure, Mapping[int, SpeedResult | Failure]]]

    @property
    def setting(self) -> str:
        """What every row shares."""
        return ", ".join(self.facts)

    @property
    def measures(self) -> list[Measure]:
        """What was measured, in the usual order."""
        return [m for m in MEASURES if any(m in each for each in self.rows.values())]

    def results(self, name: str, measure: Measure) -> dict[int, SpeedResult]:
        """Tokens -> result, in rising order."""
        found = self.rows[name].get(measure, {})
        return {n: outcome for n, outcome in sorted(found.items()) if isinstance(outcome, SpeedResult)}

    def shown(self, measure: Measure) -> int:
        """The largest length at which every mechanism that ran at all ran, the materialised baseline aside.

        Where they share none, the largest that was asked for.
        """
        lengths = [set(found) for name in self.rows if (found := self.results(name, measure)) and name != MATERIALISED]
        common = set.intersection(*lengths) if lengths else set()
        return max(common or {n for each in self.rows.values() for n in each.get(measure, {})})

    def efficiencies(self, measure: Measure) -> list[Efficiency]:
        """Of every mechanism that ran and is not a baseline, the earliest to pay off in time first."""
        own = [name for name in self.rows if name not in (FUSED, MATERIALISED) and self.results(name, measure)]
        found = [_efficiency(self, name, measure) for name in own]
        return sorted(found, key=lambda each: [_length(each, baseline) for baseline in (FUSED, MATERIALISED)])

    def at(self, measure: Measure, tokens: int) -> dict[str, SpeedResult | Failure]:
        """Name -> what came out at one length, fastest first, failures last."""
        missing = Failure("Missing", f"not measured at {tokens:,} tokens")
        found: dict[str, SpeedResult | Failure] = {}
        for name, each in self.rows.items():
            if measure in each:
                found[name] = each[measure].get(tokens, missing)
        return dict(sorted(found.items(), key=lambda item: _median(item[1])))


def _outcome(record: Record) -> SpeedResult | Failure:
    outcome = record.failure or record.result
    assert isinstance(outcome, SpeedResult | Failure)
    return outcome


def _median(outcome: SpeedResult | Failure) -> float:
    return outcome.times.median if isinstance(outcome, SpeedResult) else math.inf


def speed_tables(records: Iterable[Record], names: Mapping[Identity, str]) -> list[SpeedTable]:
    """One table for each setting and machine."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[SpeedJob, Record]]] = defaultdict(list)
    for record in records:
        if isinstance(job := record.job, SpeedJob):
            found[_facts(job), machine_facts(record)].append((job, record))
    shared = set.intersection(*({*facts, *machine} for facts, machine in found)) if found else set()
    tables = []
    for (facts, machine), group in found.items():
        rows: dict[str, dict[Measure, dict[int, SpeedResult | Failure]]] = defaultdict(lambda: defaultdict(dict))
        for job, record in group:
            rows[names[identity(job)]][job.measure][math.prod(job.grid)] = _outcome(record)
        elsewhere = [fact for fact in machine if fact not in shared]
        apart = [facts[0], *(fact for fact in facts[1:] if fact not in shared), *elsewhere]
        tables.append(SpeedTable([*facts, *elsewhere], ", ".join(apart), rows))
    return tables


def _facts(job: SpeedJob) -> tuple[str, ...]:
    """The setting in words; two jobs of one machine are comparable when these are the same."""
    pattern = "causal" if job.causal else "noncausal"
    axes = ("sequences", "planes", "volumes")[len(job.grid) - 1]
    threads = _counted(job.threads, "thread")
    return f"{pattern}, {axes}", f"batch {job.batch}", f"{job.dim} channels", f"{job.heads} heads", job.dtype, threads


def machine_facts(record: Record) -> tuple[str, ...]:
    """The machine in words, without the threads, which every job says for itself."""
    return tuple(f"{fact} {value}" for fact, value in sorted(record.machine.items()) if fact != "threads")


@dataclass(frozen=True)
class Efficiency:
    """From which length a mechanism pays off, and how its time grows.

    Attributes:
        name: of the row.
        measure: of what call.
        lengths: (quantity, baseline) -> the length, for "time" and "memory" where both were measured.
        exponent: of time in tokens; None at a single length.
    """

    name: str
    measure: Measure
    lengths: Mapping[tuple[str, str], EfficiencyLength]
    exponent: float | None


def _length(each: Efficiency, baseline: str) -> float:
    found = each.lengths.get(("time", baseline))
    return math.inf if found is None else found.length


def _efficiency(table: SpeedTable, name: str, measure: Measure) -> Efficiency:
    ours = table.results(name, measure)
    lengths = {}
    for baseline in (FUSED, MATERIALISED):
        theirs = table.results(baseline, measure) if baseline in table.rows else {}
        for quantity, curve in (("time", time_curve), ("memory", memory_curve)):
            pair = [{n: c for n, c in curve(each).items() if c.lower > 0} for each in (ours, theirs)]
            if pair[0].keys() & pair[1].keys():
                lengths[quantity, baseline] = efficiency_length(*pair)
    exponent = scaling_exponent(time_curve(ours)) if len(ours) > 1 else None
    return Efficiency(name, measure, lengths, exponent)


# -- networks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkTable:
    """Networks measured at one setting on one machine, fastest first.

    Attributes:
        setting: in words.
        batch: pictures at a time.
        rows: name -> what came out.
    """

    setting: str
    batch: int
    rows: Mapping[str, NetworkResult | Failure]

    @property
    def measured(self) -> dict[str, NetworkResult]:
        """Those that gave figures."""
        return {name: row for name, row in self.rows.items() if isinstance(row, NetworkResult)}

    def images_per_second(self, name: str) -> float:
        """Throughput at the batch."""
        return self.batch / self.measured[name].batched.median


def network_tables(records: Iterable[Record]) -> list[NetworkTable]:
    """One table for each setting and machine."""
    found: dict[Any, dict[str, NetworkResult | Failure]] = defaultdict(dict)
    for record in records:
        job = record.job
        if isinstance(job, NetworkJob):
            outcome = record.result if isinstance(record.result, NetworkResult) else record.failure
            assert outcome is not None
            threads = _counted(job.threads, "thread")
            words = f"pictures of {job.side} x {job.side}, {job.dtype}, {threads}, batch {job.batch}"
            found[words, job.batch, machine_facts(record)][job.network] = outcome

    def slowness(row: NetworkResult | Failure) -> float:
        return row.batched.median if isinstance(row, NetworkResult) else math.inf

    shared = set.intersection(*(set(machine) for _, _, machine in found)) if found else set()
    return [
        NetworkTable(
            ", ".join([words, *(fact for fact in machine if fact not in shared)]),
            batch,
            dict(sorted(rows.items(), key=lambda item: slowness(item[1]))),
        )
        for (words, batch, machine), rows in found.items()
    ]


# -- names -----------------------------------------------------------------------------------------------


def _setting(job: QualityJob | SpeedJob, *without: str) -> str:
    """Everything of a job but some of its fields, as a key."""
    return json.dumps({k: v for k, v in vars(job).items() if k not in without}, sort_keys=True)


def identity(job: QualityJob | SpeedJob) -> Identity:
    """What makes two jobs one row."""
    params = json.dumps(job.params, sort_keys=True)
    if isinstance(job, SpeedJob):
        return "speed", job.mechanism, job.backend, params
    return "quality", job.mechanism, job.label, params


def row_names(records: Iterable[Record]) -> dict[Identity, str]:
    """A name for each row, short, and different from any other row's of its kind."""
    jobs = {identity(record.job): record.job for record in records if not isinstance(record.job, NetworkJob)}
    names = {}
    for key, job in jobs.items():
        if isinstance(job, QualityJob):
            names[key] = job.label
        elif (job.mechanism, job.backend) in BASELINES and not job.params:
            names[key] = (MATERIALISED, FUSED)[BASELINES.index((job.mechanism, job.backend))]
        else:
            names[key] = job.mechanism if job.backend == "auto" else f"{job.mechanism}, {job.backend}"
    shared = Counter((key[0], name) for key, name in names.items())
    for key, job in jobs.items():
        if shared[key[0], names[key]] > 1 and job.params:
            names[key] += _settings(job.params)
    return names


def _settings(params: Mapping[str, Any]) -> str:
    """Settings behind a name, " (window=7)"."""
    return f" ({', '.join(f'{k}={v}' for k, v in sorted(params.items()))})" if params else ""


def styles(names: Iterable[str], controls: Mapping[str, str]) -> dict[str, Style]:
    """The look of every name: softmax in ink, the others in alphabetical order, a control like what it controls.

    Args:
        names: of all rows.
        controls: name of a noise control -> name of its baseline.
    """
    looks = {
        BASELINES[0][0]: Style(0, "circle"),
        FUSED: Style(0, "square"),
        MATERIALISED: Style(0, "square", hollow=True),
    }
    looks = {name: look for name, look in looks.items() if name in set(names)}
    others = sorted(set(names) - looks.keys() - controls.keys())
    looks |= {name: Style.number(index) for index, name in enumerate(others)}
    looks |= {name: replace(looks[baseline], hollow=True) for name, baseline in controls.items()}
    return dict(sorted(looks.items(), key=lambda item: item[1].colour != 0))


# -- the whole -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A mechanism whose mask is to be shown, and where; `row` is a row that it stands in."""

    row: str
    mechanism: str
    causal: bool
    grid: tuple[int, ...]
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The mechanism with its settings."""
        return self.mechanism + _settings(self.params)


PICTURED = {1: (48,), 2: (8, 8), 3: (4, 4, 4)}
"""Axes -> a grid that is large enough to show a structure and small enough to see it."""


@dataclass(frozen=True)
class Finding:
    """A sentence, and what it is about."""

    about: str
    text: str


class Digest:
    """Everything that a report shows.

    Args:
        records: of speed and quality, in any mixture; failures included.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.names = row_names(records)
        self.quality = quality_tables(records, self.names)
        self.indices = composite_indices(self.quality)
        self.speed = speed_tables(records, self.names)
        self.networks = network_tables(records)
        controls = {
            row.name: table.baseline.name
            for table in self.quality
            for row in table.rows
            if row.role == "noise control" and table.baseline
        }
        self.styles = styles(self.names.values(), controls)

    @property
    def scope(self) -> str:
        """What was compared, on what."""
        parts = []
        if self.quality:
            tasks = list(dict.fromkeys(table.job.task for table in self.quality))
            seeds = max((len(row.runs) for table in self.quality for row in table.ranked), default=0)
            rows = {row.name for table in self.quality for row in table.rows if row.role != "noise control"}
            parts.append(
                f"{_counted(len(rows), 'model')} trained on {_listed(tasks)} with {_counted(seeds, 'seed')} each"
            )
        if self.speed:
            lengths = [n for t in self.speed for each in t.rows.values() for m in each.values() for n in m]
            rows = {name for table in self.speed for name in table.rows if name not in (FUSED, MATERIALISED)}
            span = f"{min(lengths):,} to {max(lengths):,}" if min(lengths) < max(lengths) else f"{lengths[0]:,}"
            parts.append(f"speed of {_counted(len(rows), 'mechanism')} at {span} tokens")
        if self.networks:
            names = {name for table in self.networks for name in table.rows}
            parts.append(f"speed and memory of {_counted(len(names), 'network')}")
        text = "; ".join(parts) or "no records"
        return text[0].upper() + text[1:] + "."

    @cached_property
    def findings(self) -> list[Finding]:
        """What the data say, one sentence each."""
        found = [f for table in self.quality for f in _quality_findings(table)]
        found += [f for table in self.speed for f in _speed_findings(table)]
        found += [f for table in self.networks for f in _network_findings(table)]
        failures = Counter(record.failure.error for record in self.records if record.failure)
        if failures:
            kinds = ", ".join(f"{count} {error}" for error, count in failures.most_common())
            found.append(
                Finding(
                    "without a result",
                    f"{failures.total()} of {_counted(len(self.records), 'job')} gave none: {kinds}. "
                    "The tables say why.",
                )
            )
        return found

    @property
    def pictures(self) -> list[Picture]:
        """One for each mechanism that ran, its settings, pattern and number of axes."""
        pictures: dict[Any, Picture] = {}
        for record in self.records:
            job = record.job
            if isinstance(job, NetworkJob) or is_network(job.mechanism):
                continue
            place = _place(job)
            if record.failure is not None or place is None:
                continue
            causal, axes = place
            key = axes, not causal, job.mechanism, json.dumps(job.params, sort_keys=True)
            row = self.names[identity(job)]
            pictures.setdefault(key, Picture(row, job.mechanism, causal, PICTURED[axes], job.params))
        return [pictures[key] for key in sorted(pictures)]


def _place(job: SpeedJob | QualityJob) -> tuple[bool, int] | None:
    """Whether a job is causal and on how many axes; None for a task that this version cannot make."""
    if isinstance(job, SpeedJob):
        return job.causal, len(job.grid)
    try:
        task = task_named(job.task)(job.length)
    except AttlasError:
        return None
    return task.causal, len(task.grid)


def _quality_findings(table: QualityTable) -> Iterable[Finding]:
    """Who is best among those that compete, who cannot be told from it, and how large the noise is."""
    ranked = [row for row in table.ranked if row.role != "noise control"]
    if not ranked:
        return
    best, places = ranked[0], numbers.places_for([row.value.half for row in ranked if row.value])
    assert best.value is not None
    spread = "" if best.value.half is None else f" ± {best.value.half:.{places}f}"
    text = f"{best.name} is best: {best.value.mean:.{places}f}{spread} {table.metric}"
    tied = [row.name for row in ranked[1:] if table.noisy(difference(row.values, best.values))]
    if best.value.half is not None and tied:
        text += f"; within noise of it: {_listed(tied)}"
    gap = table.control.gap if table.control else None
    if gap is not None:
        text += f". The same mathematics with other seeds differs by {numbers.signed(gap.mean, places)}"
        if gap.half is not None:
            text += f" ± {gap.half:.{places}f}, so read nothing into less than {max(-gap.low, gap.high):.{places}f}"
    yield Finding(table.job.task, text + ".")


def _speed_findings(table: SpeedTable) -> Iterable[Finding]:
    """Who is fastest at the largest length, and from which length each pays off."""
    own = [name for name in table.rows if name not in (BASELINES[0][0], FUSED, MATERIALISED)]
    fastest = []
    for measure in table.measures:
        times = {
            name: outcome.times.median
            for name, outcome in table.at(measure, table.shown(measure)).items()
            if isinstance(outcome, SpeedResult)
        }
        first = next((name for name in times if name in own), None)
        if first is not None:
            dense = f" (SDPA {numbers.seconds(times[FUSED])})" if FUSED in times else ""
            fastest.append(f"{measure} {first} with {numbers.seconds(times[first])}{dense}")
    said = []
    if fastest:
        said.append(f"Fastest at {max(map(table.shown, table.measures)):,} tokens: {', '.join(fastest)}.")
    for measure in table.measures[:1]:
        lengths = {
            each.name: each.lengths["time", FUSED]
            for each in table.efficiencies(measure)
            if each.name in own and ("time", FUSED) in each.lengths
        }
        always = [name for name, found in lengths.items() if found.always]
        never = [name for name, found in lengths.items() if found.never]
        later = sorted(lengths.keys() - {*always, *never}, key=lambda name: lengths[name].length)
        parts = [f"at every length {_listed(always)}"] if always else []
        parts += [f"{name} from {lengths[name].length:,.0f} tokens" for name in later]
        parts += (
            [f"not up to {max(lengths[name].longest for name in never):,} tokens {_listed(never)}"] if never else []
        )
        if parts:
            said.append(f"{measure.capitalize()} pays off against SDPA: {'; '.join(parts)}.")
    if said:
        yield Finding(table.apart, " ".join(said))


def _network_findings(table: NetworkTable) -> Iterable[Finding]:
    """Who is fastest among those of about one size."""
    said = []
    for low, high in ((0, 10e6), (10e6, 30e6), (30e6, 60e6), (60e6, 120e6)):
        sized = [name for name, row in table.measured.items() if low <= row.parameters < high]
        if len(sized) > 1:
            best = sized[0]
            rate = numbers.digits(table.images_per_second(best))
            said.append(f"{low / 1e6:.0f} to {high / 1e6:.0f} M parameters {best} with {rate} images/s")
    if said:
        yield Finding("networks", f"Fastest at {table.setting}: {'; '.join(said)}.")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
