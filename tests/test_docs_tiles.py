"""The page of what tiled kernels can keep says what the simulator says."""

from pathlib import Path

from attlas.analysis.tiles import Tiling

PAGE = (Path(__file__).parent.parent / "docs" / "pages" / "tiles.md").read_text()


def test_every_row_of_the_table_is_what_is_counted():
    video = Tiling.of((30, 48, 80), (18, 24, 24), query_tile=(4, 8, 8), key_tile=(2, 8, 8))
    rows = [line.replace("*", "").strip("| ").split(" | ") for line in PAGE.splitlines() if line.endswith("% |")]
    assert len(rows) == 7
    for stride, *numbers in rows:
        tiling = video.with_strides([int(part) for part in stride.split("x")])
        share = tiling.bound() / tiling.flop_bound()
        assert numbers == [f"{tiling.visited():,}", f"{tiling.tiles():,}", f"{tiling.bound():.2f}", f"{share:.0%}"]


def test_the_python_of_the_page_runs():
    code = PAGE.split("```python\n")[1].split("```")[0]
    names = {}
    exec(compile(code, "tiles.md", "exec"), names)
    assert names["video"].smallest_stride() == (16, 8, 8)
