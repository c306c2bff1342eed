"""The page of what every mechanism sees."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

_spec = importlib.util.spec_from_file_location("masks", Path(__file__).parent.parent / "docs" / "figures" / "masks.py")
masks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(masks)


def test_the_page_shows_each_mechanism_with_its_own_small_picture(tmp_path):
    folder = tmp_path / "figures" / "masks"
    folder.mkdir(parents=True)
    (folder / "gone.svg").touch()
    names = ["criss_cross", "lightning", "video_ccam", "crossvit"]
    masks.write(tmp_path, names)
    page = (tmp_path / "masks.md").read_text()
    assert sorted(path.stem for path in folder.iterdir()) == sorted(names)
    for name in names:
        assert f"(figures/masks/{name}.svg)" in page
        text = (folder / f"{name}.svg").read_text()
        assert ElementTree.fromstring(text).attrib["aria-label"] == f"visible pairs of {name}"
        assert len(text) < 20_000
    assert page.index("## linear") < page.index("lightning.svg") < page.index("## local sparse")
    assert "noncausal, grid 8x8, 2 heads<br>`recurrence=1`" in page
    # One pass of criss-cross sees the row and the column of the query, one piece each line.
    drawn = (folder / "criss_cross.svg").read_text()
    assert drawn.count("h160v20") == 1
    assert drawn.count("h20v20") == 7
