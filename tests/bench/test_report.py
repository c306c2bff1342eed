"""The report: what it says is what the records say, in the terminal, in the file and in a browser."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attlas.bench.records import Failure, QualityJob, Record, SpeedJob, from_json
from attlas.bench.report import numbers, terminal_tables, write_html
from attlas.bench.report.digest import FUSED, MATERIALISED, Digest
from attlas.bench.report.svg import COLOURS, MARKERS, Axis, Point, Series, Style, _apart, chart, matrix
from attlas.bench.statistics import difference, interval
from tests.bench import records_made_up as made_up

COMMAND = "attlas compare 'soft*,pool' --task text,recall"


# -- reading a page --------------------------------------------------------------------------------------


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, kind: str | None = None, **attributes: str) -> list[Node]:
        wanted = {key.replace("_", "-"): value for key, value in attributes.items()}
        return [
            node
            for node in self.walk()
            if node.tag == tag
            and (kind is None or kind in (node.attributes.get("class") or "").split())
            and wanted.items() <= node.attributes.items()
        ]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Page(HTMLParser):
    """A tree of the page; tags that are not closed in order are an error, as in XML."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert [node.tag for node in self._open] == [""], "tags stay open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> comes twice"
        assert all(re.fullmatch(r"[a-z][\w-]*", name) for name, _ in attrs), f"text among the attributes of <{tag}>"
        node = Node(tag, dict(attrs))
        self._open[-1].children.append(node)
        if tag not in self.VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def written(records: list[Record], folder: Path, **changes: object) -> Node:
    given = {"command": COMMAND, "machine": made_up.MACHINE} | changes
    return Page(write_html(records, folder / "report.html", **given).read_text(encoding="utf-8")).root


def rows_of(table: Node) -> dict[str, list[str]]:
    """The mechanism's name (without its tag) -> the text of the cells behind it."""
    (body,) = table.all("tbody")
    return {
        row.attributes["data-name"]: [cell.text for cell in row.children[1:]]  # type: ignore[union-attr,misc]
        for row in body.all("tr")
    }


def printed(records: list[Record]) -> str:
    console = Console(width=100, file=io.StringIO())
    for table in terminal_tables(records):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def figure_called(page: Node, title: str) -> list[Node]:
    return [figure for figure in page.all("figure") if any(head.text == title for head in figure.all("h4"))]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return made_up.everything()


@pytest.fixture(scope="module")
def page(records, tmp_path_factory) -> Node:
    return written(records, tmp_path_factory.mktemp("report"))


def speed_results(records: list[Record], measure: str) -> list[Record]:
    return [r for r in records if isinstance(r.job, SpeedJob) and r.job.measure == measure and r.result]


# -- what it says ----------------------------------------------------------------------------------------


def test_quality_table_holds_the_statistics_of_the_records(page, records):
    values = defaultdict(list)
    for record in records:
        if isinstance(record.job, QualityJob) and record.job.task == "text" and record.result:
            values[record.job.label].append(record.result.value)
    rows = rows_of(page.all("table")[0])
    assert list(rows)[:-1] == sorted(values, key=lambda name: sum(values[name])), "best first"
    for name, seeds in values.items():
        mean, gap = interval(seeds), difference(seeds, values["softmax"])
        assert rows[name][0] == f"{mean.mean:.3f} ± {mean.half:.3f}"
        if name != "softmax":
            assert rows[name][2] == f"{gap.mean:+.3f} ± {gap.half:.3f}".replace("-", "−")
    assert rows["softmax"][2:4] == ["–", ""]
    assert rows["flow"][3] == "within noise"
    assert rows["pool"][3] == "worse"


def test_verdict_follows_the_direction_of_the_metric(tmp_path):
    records = [
        *made_up.quality("recall", "softmax", 0.5, higher=True),
        *made_up.quality("recall", "linear", 0.9, higher=True),
        *made_up.quality("recall", "pool", 0.1, higher=True),
    ]
    rows = rows_of(written(records, tmp_path).all("table")[0])
    assert [(name, cells[3]) for name, cells in rows.items()] == [
        ("linear", "better"),
        ("softmax", ""),
        ("pool", "worse"),
    ]


def test_roles_and_failures_are_rows(page):
    (table, *_) = page.all("table")
    tags = {row.attributes["data-name"]: [tag.text for tag in row.all("span", "tag")] for row in table.all("tr")[1:]}
    assert tags["softmax"] == ["baseline"]
    assert tags["softmax (again)"] == ["noise control"]
    (reason,) = rows_of(table)["agent"]
    assert reason == "Unsupported: agent does not serve causal use. Mechanisms that do: <linear> & softmax"


def test_a_seed_that_failed_is_told_and_not_counted(tmp_path):
    good = list(made_up.quality("text", "softmax", 2.0))
    bad = list(made_up.quality("text", "linear", 2.5))
    bad[1] = replace(bad[1], result=None, failure=Failure("Diverged", "loss is nan at step 7"))
    page = written(good + bad, tmp_path)
    kept = interval([bad[0].result.value, bad[2].result.value])
    assert rows_of(page.all("table")[0])["linear"][0].startswith(f"{kept.mean:.2f}")
    assert [p.text for p in page.all("p", "note")] == ["linear: 1 of 3 seeds failed (Diverged: loss is nan at step 7)."]


def test_the_baseline_need_not_be_softmax(tmp_path):
    records = [
        *made_up.quality("text", "linear", 2.5),
        *made_up.quality("text", "linear (again)", 2.5, mechanism="linear"),
        *made_up.quality("text", "softmax", 2.0),
    ]
    page = written(records, tmp_path)
    assert rows_of(page.all("table")[0])["softmax"][3] == "better"
    looks = Digest(records).styles
    assert looks["linear (again)"] == replace(looks["linear"], hollow=True)


def test_speed_table_is_at_the_largest_common_length(page, records):
    at_length = page.all("table")[3]
    rows = rows_of(at_length)
    results = {r.job.mechanism: r.result for r in speed_results(records, "forward") if r.job.grid == (16384,)}
    assert list(rows)[:-1] == sorted(
        (name if name != "softmax" else FUSED for name in results),
        key=lambda name: results["softmax" if name == FUSED else name].times.median,
    ), "fastest first"
    assert rows[MATERIALISED] == ["OutOfMemory: 8.0 GiB of scores do not fit"]
    lightning, dense = results["lightning"], results["softmax"]
    assert rows["lightning"][0] == numbers.milliseconds(lightning.times.median)
    assert rows["lightning"][2] == numbers.ratio(dense.times.median / lightning.times.median)
    assert rows["lightning"][4] == f"{lightning.flops / lightning.times.median / made_up.GEMM:.0%}".replace("%", " %")


def test_a_length_that_one_mechanism_did_not_reach_is_not_common():
    gone = ("lightning", (16384,))
    records = [r for r in made_up.speed_sweep() if (r.job.mechanism, r.job.grid) != gone or r.job.measure != "forward"]
    (sweep,) = Digest(records).speed
    assert sweep.shown("forward") == 8192
    assert sweep.shown("decode") == 16384


def test_efficiency_lengths_are_where_the_lines_cross(page):
    rows = rows_of(page.all("table")[7])
    assert rows["pool"][0] == "≤ 256"
    low, high, length = (int(part.replace(",", "")) for part in re.findall(r"[\d,]+", rows["neighborhood"][0]))
    assert low < length < high

    # What the layers cost by construction: the two lines cross where their FLOPs per rate reached agree.
    def cost(name: str, reached: float, n: int) -> float:
        return made_up.flops(name, "forward", n) / made_up.GEMM / reached

    crossing = next(n for n in range(256, 16384) if cost("softmax", 0.85, n) > cost("neighborhood", 0.3, n))
    assert length == pytest.approx(crossing, rel=0.1)


def test_records_of_different_settings_or_machines_are_not_mixed():
    first = list(made_up.speed_sweep())
    other = [replace(r, job=replace(r.job, dtype="bfloat16")) for r in first]
    moved = [replace(r, machine=r.machine | {"processor": "another"}) for r in first]
    longer = [replace(r, machine=r.machine | {"threads": "7"}) for r in first[:1]]
    speed = Digest([*first, *other, *moved, *longer]).speed
    assert [table.apart for table in speed] == [
        "causal, sequences, float32, processor Some Processor with 2 cores",
        "causal, sequences, bfloat16, processor Some Processor with 2 cores",
        "causal, sequences, float32, processor another",
    ]


def test_settings_of_one_mechanism_are_rows_of_their_own():
    job = SpeedJob("neighborhood", "auto", True, "forward", (256,), params={"window": 3})
    records = [
        replace(record, job=j) for record in list(made_up.speed_sweep())[:1] for j in (job, replace(job, params={}))
    ]
    (sweep,) = Digest(records).speed
    assert sorted(sweep.rows) == ["neighborhood", "neighborhood (window=3)"]


def test_findings(records):
    found = {each.about: each.text for each in Digest(records).findings}
    assert found["text"].startswith("softmax is best: 2.31")
    assert "within noise of it: flow. The same mathematics with other seeds differs by" in found["text"]
    assert found["causal, sequences"].startswith("Fastest at 16,384 tokens: forward pool with ")
    assert "pays off against SDPA: at every length pool; lightning from " in found["causal, sequences"]
    assert found["without a result"].startswith("9 of 241 jobs gave none: 6 OutOfMemory, 3 Unsupported")


def test_noise_control_never_wins():
    records = [
        *made_up.quality("text", "softmax", 2.3),
        *made_up.quality("text", "softmax (again)", 1.9, mechanism="softmax"),
    ]
    (finding,) = Digest(records).findings
    assert finding.text.startswith("softmax is best")


def test_index_over_tasks_of_one_pattern(page):
    (heading,) = [head for head in page.all("h3") if "tasks together" in head.text]
    assert heading.text == "All causal tasks together"
    rows = rows_of(page.all("table")[2])
    assert list(rows)[-1] == "pool"
    assert "agent" not in rows


# -- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["forward", "forward+backward", "prefill", "decode"])
def test_time_chart_has_a_mark_for_every_result(page, records, measure):
    (figure,) = figure_called(page, f"Time, {measure}")
    marks = figure.all("use", "mark")
    assert len(marks) == len(speed_results(records, measure))
    assert all(mark.attributes["data-tip"] for mark in marks)


def test_time_is_drawn_against_pairs(page, records):
    (figure,) = figure_called(page, "Time against visible pairs, forward")
    names = {("softmax", "torch"): FUSED, ("softmax", "oracle"): MATERIALISED}
    pairs_of = {}
    for record in speed_results(records, "forward"):
        job, result = record.job, record.result
        took, low, high = (numbers.seconds(x) for x in (result.times.median, result.times.lower, result.times.upper))
        name, tokens = names.get((job.mechanism, job.backend), job.mechanism), math.prod(job.grid)
        tip = f"{name}\n{tokens:,} tokens\n{took} ({low} to {high})\n{result.pairs:,} visible pairs"
        pairs_of[tip] = result.pairs
    at = {mark.attributes["data-tip"]: float(mark.attributes["x"]) for mark in figure.all("use", "mark")}
    assert at.keys() == pairs_of.keys()
    least, most = (extreme(pairs_of, key=pairs_of.get) for extreme in (min, max))
    wide = math.log(pairs_of[most] / pairs_of[least])
    for tip, pairs in pairs_of.items():
        share = math.log(pairs / pairs_of[least]) / wide
        assert at[tip] == pytest.approx(at[least] + share * (at[most] - at[least]), abs=0.2)


def test_quality_charts(page):
    for title in ("Bits per byte against training time", "Accuracy against state per sequence"):
        (figure,) = figure_called(page, title)
        assert len(figure.all("use", "mark")) == 7
        assert len(figure.all("g", "label")) == 7
        assert figure.all("path", "error")
    for figure in figure_called(page, "Training curves"):
        assert len(figure.all("path", "line")) == len(figure.all("path", "band")) == 7


def test_rings_mark_the_efficiency_lengths(page):
    (figure,) = figure_called(page, "Time, forward")
    rings = {ring.attributes["data-name"] for ring in figure.all("g", "ring")}
    assert rings == {"lightning", "linear", "flow", "neighborhood"}, "pool always pays off"
    marks = {group.attributes["data-name"]: group.all("use", "mark") for group in figure.all("g", "series")}
    for ring in figure.all("g", "ring"):
        (circle,) = ring.all("circle")
        x, y = float(circle.attributes["cx"]), float(circle.attributes["cy"])
        places = [(float(m.attributes["x"]), float(m.attributes["y"])) for m in marks[ring.attributes["data-name"]]]
        (x0, y0), (x1, y1) = next(pair for pair in pairwise(places) if pair[0][0] <= x <= pair[1][0])
        assert y == pytest.approx(y0 + (x - x0) / (x1 - x0) * (y1 - y0), abs=0.3), "it stands on its line"


def test_a_mechanism_looks_alike_everywhere_and_like_no_other(page, records):
    looks = defaultdict(set)
    for group in page.all("g", "series"):
        kinds = frozenset((group.attributes["class"] or "").split()) - {"series"}
        marks = {use.attributes["href"] for use in group.all("use")}
        looks[group.attributes.get("data-name")].add((kinds, *marks) if marks else (kinds,))
    styles = Digest(records).styles
    assert len({(s.colour, s.marker, s.hollow) for s in styles.values()}) == len(styles)
    for name, style in styles.items():
        assert {look[0] for look in looks[name]} <= {
            frozenset({f"c{style.colour}", f"d{style.dash}"} | ({"hollow"} if style.hollow else set()))
        }
        assert {look[1] for look in looks[name] if len(look) > 1} <= {f"#marker-{style.marker}"}
    assert len({Style.number(n) for n in range(COLOURS * (len(MARKERS) - 1))}) == COLOURS * (len(MARKERS) - 1)


def test_labels_at_line_ends_do_not_overlap(page):
    for svg in page.all("svg", "chart"):
        ends = [text for group in svg.all("g", "label") for text in group.all("text", text_anchor="start")]
        columns = defaultdict(list)
        for text in ends:
            columns[text.attributes["x"]].append(float(text.attributes["y"]))
        for heights in columns.values():
            assert all(b - a >= 12 for a, b in pairwise(sorted(heights)))


def test_apart():
    assert _apart([10.0, 50.0], 10, 0, 100) == [10.0, 50.0], "what has room stays"
    assert _apart([50.0, 50.0, 50.0], 10, 0, 100) == [40.0, 50.0, 60.0]
    assert _apart([0.0, 1.0], 10, 0, 100) == [0.0, 10.0]
    assert _apart([98.0, 99.0, 100.0], 10, 0, 100) == [80.0, 90.0, 100.0]
    torch.manual_seed(0)
    wanted = sorted((torch.rand(9) * 100).tolist())
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(_apart(wanted, 10, 0, 100)))


def test_chart_leaves_out_what_a_log_axis_cannot_show():
    points = [Point(0, 1), Point(1, 0), Point(10, -1), Point(10, 2), Point(100, float("nan")), Point(100, 4)]
    svg = chart(
        [Series("a", Style(1, "square"), points)], Axis("x", log=True), Axis("y", log=True), title="", description=""
    )
    assert svg.count('class="mark"') == 2
    assert "nan" not in svg


def test_places_in_a_chart_follow_the_axis():
    points = [Point(x, 1.0 + x) for x in (1, 10, 100)]
    svg = chart([Series("a", Style(1, "square"), points)], Axis("x", log=True), Axis("y"), title="", description="")
    at = [float(x) for x in re.findall(r'class="mark"[^>]* x="([\d.]+)"', svg)]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.2)
    heights = [float(y) for y in re.findall(r'class="mark"[^>]* y="([\d.]+)"', svg)]
    assert (heights[0] - heights[1]) / (heights[0] - heights[2]) == pytest.approx(9 / 99, abs=0.01)


def test_matrix_draws_every_cell_once():
    torch.manual_seed(0)
    share = torch.randint(0, 6, (7, 9)) / 5
    svg = Page(matrix(share, title="<&>")).root
    drawn = torch.zeros(7, 9)
    for path in svg.all("path"):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", path.attributes["d"]):
            drawn[int(y), int(x) : int(x) + int(width)] += float(path.attributes["fill-opacity"])
    assert torch.equal(drawn, share)


# -- who sees whom ---------------------------------------------------------------------------------------


def test_page_pictures_each_mechanism_that_ran(page):
    shown = [figure.attributes["data-name"] for figure in page.all("figure", "mask")]
    assert shown == ["flow", "lightning", "linear", "neighborhood", "pool", "softmax"]
    assert any("depends on the key's value" in p.text for p in page.all("p", "soft"))


# -- robustness ------------------------------------------------------------------------------------------

FAILED = Failure("Unsupported", "no")
PARTS: dict[str, Callable[[], list[Record]]] = {
    "nothing": list,
    "quality": lambda: list(made_up.text_task()),
    "speed": lambda: list(made_up.speed_sweep()),
    "one seed": lambda: [r for r in made_up.text_task() if r.job.seed == 0],
    "one row": lambda: list(made_up.quality("text", "pool", 2.0, seeds=1)),
    "no baseline": lambda: [r for r in made_up.everything() if r.job.mechanism != "softmax"],
    "one length": lambda: [r for r in made_up.speed_sweep() if r.job.grid == (256,)],
    "no common length": lambda: [
        r for r in made_up.speed_sweep() if (r.job.grid == (256,)) == (r.job.mechanism == "pool")
    ],
    "all failed": lambda: [replace(r, result=None, failure=FAILED) for r in made_up.everything()],
    "unknown task": lambda: [replace(r, job=replace(r.job, task="gone")) for r in made_up.text_task()],
    "task of another version": lambda: [replace(r, job=replace(r.job, task="digits")) for r in made_up.text_task()],
    "unknown mechanism": lambda: [
        replace(r, job=replace(r.job, mechanism="gone")) for r in made_up.everything() if r.job.mechanism == "pool"
    ],
    "equal values": lambda: [replace(r, result=replace(r.result, value=2.0)) for r in made_up.text_task() if r.result],
    "planes": lambda: [
        replace(r, job=replace(r.job, causal=False, grid=(r.job.grid[0] // 16, 16))) for r in made_up.speed_sweep()
    ],
}


@pytest.mark.parametrize("part", PARTS)
def test_partial_records_make_a_whole_page(part, tmp_path):
    records = PARTS[part]()
    page = written(records, tmp_path)
    assert not re.search(r"\b(nan|inf|None)\b", "".join(n.text for n in page.all("main")).replace("info", ""))
    names = {node.attributes.get("data-name") for node in page.all("button")}
    assert names - {None} == set(Digest(records).styles)
    text = printed(records)
    assert all(name.split()[0] in text for name in Digest(records).names.values())


def test_one_seed_has_no_interval(tmp_path):
    rows = rows_of(written(PARTS["one seed"](), tmp_path).all("table")[0])
    assert "±" not in "".join(rows["flow"])
    assert rows["flow"][3] == "one seed"


def test_everything_is_escaped(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>\"'&"
    records = [
        replace(r, job=replace(r.job, label=evil), machine={evil: evil}) for r in made_up.quality("text", "pool", 2.0)
    ]
    records += [
        replace(r, job=replace(r.job, task=evil), failure=Failure(evil, evil), result=None)
        for r in made_up.quality("text", "linear", 2.0)
    ]
    page = written(records, tmp_path, command=evil, machine={evil: evil}, title=evil)
    assert not page.all("img")
    tips = [use.attributes["data-tip"] for use in page.all("use", "mark") if "data-tip" in use.attributes]
    assert tips
    assert all(tip.startswith(evil) for tip in tips)
    assert len(page.all("script")) == 2
    assert page.all("h1")[0].text == page.all("pre")[0].text == page.all("title")[0].text == evil
    assert {button.text for button in page.all("button") if "data-name" in button.attributes} == {"linear", evil}


def test_page_carries_its_records(page, records):
    (data,) = page.all("script", id="records")
    assert [from_json(each) for each in json.loads(data.text)] == records


def test_page_needs_nothing_else(page):
    for node in page.walk():
        for attribute in ("src", "href"):
            value = node.attributes.get(attribute)
            assert value is None or value.startswith("#") or value == "data:,", value
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    text = "".join(part for part in style.text.splitlines())
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text)), "a colour is missing"


def test_page_says_where_and_how(page):
    (section,) = page.all("section", id="reproduce")
    assert section.all("pre")[0].text == COMMAND
    facts = [node.text for node in section.all("dt")], [node.text for node in section.all("dd")]
    assert dict(zip(*facts, strict=True)) == made_up.MACHINE


def test_terminal_tables(records):
    text = printed(records)
    (line,) = re.findall(r"^flow +2\.31.*$", text, re.M)
    assert "within noise" in line
    assert re.search(r"^softmax \(again\) .*noise control", text, re.M)
    assert "agent: Unsupported: agent does not serve causal use." in text
    (line, *_) = re.findall(r"^pool .*≤ 256.*$", text, re.M)
    assert "320 MiB" in line
    assert "materialised: OutOfMemory: 8.0 GiB of scores do not fit" in text


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (numbers.digits(0.012345), "0.0123"),
        (numbers.digits(1234567), "1,230,000"),
        (numbers.digits(0.9999), "1.00"),
        (numbers.digits(0), "0"),
        (numbers.seconds(0.00123), "1.23 ms"),
        (numbers.seconds(0.99999), "1.00 s"),
        (numbers.seconds(200), "3 min 20 s"),
        (numbers.memory(1536), "1.50 KiB"),
        (numbers.memory(12), "12 B"),
        (numbers.count(1_500_000), "1.50 M"),
        (numbers.count(7), "7"),
        (numbers.tokens(16384), "16k"),
        (numbers.tokens(1000), "1,000"),
        (numbers.percent(0.004), "0.4 %"),
        (numbers.percent(0.123), "12 %"),
        (numbers.signed(-0.5, 2), "−0.50"),
        (numbers.short_seconds(0.1), "100 ms"),
        (numbers.short_memory(65536), "64 KiB"),
        (numbers.places_for([0.0123, None, 0.0456]), 3),
        (numbers.places_for([None]), 3),
        (numbers.ratio(146.7), "150"),
    ],
)
def test_numbers(said, expected):
    assert said == expected


# -- in a browser ----------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

LISTENING = """<script>
  const wrong = [];
  addEventListener("error", (event) => wrong.push(event.message || `cannot load ${event.target.outerHTML}`), true);
  addEventListener("unhandledrejection", (event) => wrong.push(String(event.reason)));
  addEventListener("securitypolicyviolation", (event) => wrong.push(`blocked ${event.blockedURI}`));
  console.error = console.warn = (...parts) => wrong.push(parts.join(" "));
</script>"""

ASKING = """<script>
  const seen = (part) => part.getClientRects().length > 0;
  const lines = (name) => [...document.querySelectorAll(".chart .series")].filter((g) => g.dataset.name === name);
  const answers = { wrong, loaded: performance.getEntriesByType("resource").length };
  answers.marks = [...document.querySelectorAll(".chart .mark")].filter(seen).length;
  answers.sideways = document.documentElement.scrollWidth > innerWidth;

  const button = [...document.querySelectorAll(".legend button")].find((b) => b.dataset.name === "pool");
  button.click();
  answers.hidden = [button.getAttribute("aria-pressed"), lines("pool").some(seen), lines("flow").every(seen)];
  button.click();
  answers.shown = [button.getAttribute("aria-pressed"), lines("pool").every(seen)];

  button.dispatchEvent(new PointerEvent("pointerenter"));
  answers.dimmed = [lines("pool")[0].classList.contains("dim"), lines("flow")[0].classList.contains("dim")];
  button.dispatchEvent(new PointerEvent("pointerleave"));
  answers.undimmed = document.querySelectorAll(".dim").length;

  const table = document.querySelector("table");
  const names = () => [...table.tBodies[0].rows].map((row) => row.dataset.name);
  const head = [...table.querySelectorAll("thead button")].find((b) => b.textContent === "state");
  head.click();
  answers.rising = names();
  head.click();
  answers.falling = names();

  const mark = document.querySelector(".chart .mark");
  const { x, y, width, height } = mark.getBoundingClientRect();
  const at = { clientX: x + width / 2, clientY: y + height / 2, bubbles: true };
  mark.dispatchEvent(new PointerEvent("pointermove", at));
  answers.tip = document.getElementById("tip").textContent === mark.dataset.tip && seen(document.getElementById("tip"));
  mark.closest("svg").dispatchEvent(new PointerEvent("pointerleave"));
  answers.tipGone = !seen(document.getElementById("tip"));
  const after = document.createElement("p");
  after.id = "answers";
  after.textContent = JSON.stringify(answers);
  document.body.append(after);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_in_a_browser(page, records, tmp_path):
    path = write_html(records, tmp_path / "report.html", command=COMMAND, machine=made_up.MACHINE)
    text = path.read_text(encoding="utf-8")
    assert text.count("<style>") == text.count("</body>") == 1
    path.write_text(text.replace("<style>", LISTENING + "<style>").replace("</body>", ASKING), encoding="utf-8")
    quiet = ("no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update")
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            *(f"--{flag}" for flag in quiet),
            "--disable-sync",
            "--enable-logging=stderr",
            "--window-size=390,800",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = re.search(r'<p id="answers">(.*?)</p>', done.stdout, re.S)
    assert dom, "the page's script ended early"
    answers = json.loads(dom[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert answers.pop("marks") == sum(len(svg.all("use", "mark")) for svg in page.all("svg", "chart"))
    states = {r.job.label: r.result.state_bytes for r in made_up.text_task() if r.result}
    rising, falling = answers.pop("rising"), answers.pop("falling")
    assert [states[name] for name in rising[:-1]] == sorted(states.values())
    assert [states[name] for name in falling[:-1]] == sorted(states.values(), reverse=True)
    assert rising[-1] == falling[-1] == "agent", "rows without numbers stay last"
    assert answers == {
        "wrong": [],
        "loaded": 0,
        "sideways": False,
        "hidden": ["false", False, True],
        "shown": ["true", True],
        "dimmed": [False, True],
        "undimmed": 0,
        "tip": True,
        "tipGone": True,
    }
