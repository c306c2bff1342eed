"""Which keys each query sees, and its pictures."""

import re
from xml.etree import ElementTree

import pytest
import torch

import attlas
from attlas.analysis.visible import (
    draw_svg,
    draw_text,
    middle,
    share_of_draws,
    specimen,
    svg,
    token_at,
    tokens_of_image,
    visible_pairs,
)
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.core.mask import Mask


def filled(picture, opacity="1"):
    """The cells that an SVG fills, as (x, y, width) of its pieces."""
    paths = re.findall(rf'<path d="([^"]*)" fill="#4457c2" opacity="{opacity}"/>', picture)
    return [tuple(map(int, piece)) for piece in re.findall(r"M(\d+) (\d+)h(\d+)v", "".join(paths))]


def test_a_window_is_the_mask_of_its_rule():
    layer = attlas.mixer("neighborhood", 16, 4, kv_heads=2, causal=True, window=5)
    seen = visible_pairs(layer, torch.randn(2, 12, 16))
    assert seen.shape == (2, 4, 12, 12)
    assert torch.equal(seen, Mask.window(4, 0).with_(causal=True).pairs(12, 12).expand_as(seen))


def test_rows_can_be_chosen_and_chunks_change_nothing(monkeypatch):
    layer, x = attlas.mixer("criss_cross", 16, 2, recurrence=1), torch.randn(1, 20, 16)
    torch.nn.init.ones_(layer.gamma)
    whole = visible_pairs(layer, x, grid=(4, 5))
    place = Grid((4, 5)).places()
    assert torch.equal(whole[0, 0], (place.unsqueeze(1) == place).any(-1))
    assert torch.equal(visible_pairs(layer, x, grid=(4, 5), queries=[7, 3]), whole[:, :, [7, 3]])
    told = []
    monkeypatch.setattr(attlas.analysis.visible, "ENTRIES", 2 * 20 * 20 * 3)
    assert torch.equal(visible_pairs(layer, x, grid=(4, 5), progress=lambda *each: told.append(each)), whole)
    assert told == [(min(done, 20), 20) for done in range(3, 23, 3)]


def test_the_values_are_asked_where_there_are_any_else_the_tokens():
    moved = attlas.mixer("softmax", 8, 2)
    torch.nn.init.zeros_(moved.v_proj.weight)  # outputs then depend on no token, but on values still
    assert visible_pairs(moved, grid=(5,)).all()
    still = attlas.mixer("criss_cross", 8)  # γ starts at 0
    assert torch.equal(visible_pairs(still, grid=(2, 3))[0, 0], torch.eye(6, dtype=torch.bool))


def test_each_head_has_its_own_row_and_queries_do_not_count():
    layer = attlas.mixer("softmax", 12, 3)
    keep = torch.tensor([[True, True, False, True], [True, False, False, True]])
    seen = visible_pairs(layer, torch.randn(2, 4, 12), keep=keep)
    assert torch.equal(seen, keep[:, None, None].expand(2, 3, 4, 4))


def test_keys_of_another_sequence():
    seen = visible_pairs(attlas.mixer("softmax", 8, 2), torch.randn(1, 3, 8), context_BMC=torch.randn(1, 5, 8))
    assert seen.shape == (1, 2, 3, 5)
    assert seen.all()


def test_the_choice_of_content_is_that_of_the_tokens_given():
    layer = attlas.mixer("dcal_global_local", 16, 2, share=0.25)
    first, second = (visible_pairs(layer, torch.randn(1, 17, 16), grid=Grid((16,), prefix=1)) for _ in range(2))
    assert first.sum() == second.sum() == 2 * 5 * 17  # the rows that are chosen see all
    assert not torch.equal(first, second)


def test_neither_the_layer_nor_the_random_state_is_touched():
    layer = attlas.mixer("softmax", 8, 2).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    visible_pairs(layer, grid=(4,))
    specimen("softmax")
    assert torch.equal(torch.rand(3), expected)
    assert layer.training
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in layer.parameters())
    assert not layer.attend._forward_hooks
    assert not layer.attend._forward_pre_hooks


def test_specimens_follow_the_pattern_the_grid_and_the_settings():
    assert specimen("lightning").layer.site.causal
    assert specimen("video_ccam").context is not None
    assert specimen("crossvit").grid == Grid((8, 8), prefix=1)
    assert specimen("convit", (3, 5)).grid == Grid((3, 5))
    made = specimen("softmax", (6,), heads=4, causal=True)
    assert made.pairs().shape == (1, 4, 6, 6)
    assert (specimen("crossvit").query(), made.query()) == (0, 3)
    assert int(specimen("neighborhood", (9,), params={"window": 3}).pairs()[0, 0].sum()) == 27
    with pytest.raises(BadInput, match="window 9 with dilation 1 spans 9"):
        specimen("neighborhood", (8,), params={"window": 9})
    with pytest.raises(Unsupported, match="does not serve causal"):
        specimen("convit", causal=True)


def test_settings_of_a_specimen_are_those_given_the_own_ones_or_those_of_the_example():
    assert specimen("biformer", (14, 14), params={}).layer.attend.regions == 7
    assert specimen("biformer").layer.attend.regions == 2
    assert specimen("biformer", params={"regions": 4}).settings == {"regions": 4}
    with pytest.raises(BadInput, match="top is 99 regions and the grid 8x8 has"):
        specimen("biformer", params={"top": 99})  # not what the example's grid would say


@pytest.mark.parametrize("causal", [True, False])
def test_all_draws_of_softmax_see_the_mask(causal):
    ones = torch.ones(6, 6, dtype=torch.float64)
    assert torch.equal(share_of_draws("softmax", causal, (6,)), ones.tril() if causal else ones)


def test_all_draws_of_pooling_see_the_window_on_the_grid():
    place = Grid((4, 5)).places()
    near = (place.unsqueeze(0) - place.unsqueeze(1)).abs().amax(-1) <= 1
    assert torch.equal(share_of_draws("pool", False, (4, 5), params={}), near.double())


def test_what_depends_on_content_is_a_share_of_draws():
    share = share_of_draws("routing", True, (16,), draws=4)
    assert not share.triu(1).any()
    assert ((share > 0) & (share < 1)).any()


def test_draws_leave_the_random_state_alone_and_take_variants():
    before = torch.get_rng_state()
    assert torch.equal(share_of_draws("softmax:xsqa", True, (5,)), torch.ones(5, 5, dtype=torch.float64).tril())
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_see_through_layers_that_start_at_zero(monkeypatch):
    def zeros(*args, **settings):
        layer = attlas.mixer(*args, **settings)
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
        return layer

    monkeypatch.setattr(attlas.analysis.visible, "mixer", zeros)
    assert share_of_draws("pool", False, (3, 3)).all(-1)[4]
    assert specimen("criss_cross", (3, 3)).pairs()[0, 0].all()


def test_what_cannot_be_drawn_raises():
    with pytest.raises(Unsupported, match="does not serve causal"):
        share_of_draws("agent", True, (6,))


def test_peaked_weights_are_seen_until_they_are_called_rounding():
    torch.manual_seed(0)
    layer, x = attlas.mixer("softmax", 64, 1), 10 * torch.randn(1, 60, 64)
    assert visible_pairs(layer, x).all()
    assert visible_pairs(layer, x, rounding=1e-14).double().mean() < 0.3


def test_what_has_no_meaning_is_refused():
    layer = attlas.mixer("softmax", 8, 2)
    with pytest.raises(BadInput, match="pass x or grid"):
        visible_pairs(layer)
    with pytest.raises(BadInput, match="in a sequence of 4 tokens"):
        visible_pairs(layer, grid=(4,), queries=[4])
    for wrong in (torch.randn(5, 16), torch.randn(0, 5, 16), torch.randn(16)):
        with pytest.raises(BadInput, match=r"tokens are \(B, N, C\) of at least one sequence, got \("):
            visible_pairs(layer, wrong)
    with pytest.raises(BadInput, match=r"at least one sequence, got \(2, 3, 8\) and \(1, 5, 8\)"):
        visible_pairs(layer, torch.randn(2, 3, 8), context_BMC=torch.randn(1, 5, 8))
    with pytest.raises(BadInput, match="query 9 is outside of the 9 tokens"):
        token_at(Grid((3, 3)), 9)
    with pytest.raises(BadInput, match="2 coordinates inside of it"):
        token_at(Grid((3, 3)), (0, 3))
    with pytest.raises(BadInput, match="shows one sequence, got 2"):
        svg(torch.ones(2, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(BadInput, match="has 4 tokens, the row 5 keys"):
        svg(torch.ones(5), grid=(2, 2))
    with pytest.raises(BadInput, match="has 9 tokens, the pairs 3 queries and 4 keys"):
        svg(torch.ones(3, 4), grid=(3, 3))


def test_pairs_of_two_sequences_are_drawn_whole():
    pairs = torch.ones(3, 4, dtype=torch.bool).tril()
    for grid in (None, (4,), (2, 2), (3,)):  # of keys or of queries
        assert draw_text(pairs, grid=grid).splitlines() == ["█▄··", "▀▀▀·"]
        assert [width // 12 for _, _, width in filled(svg(pairs, grid=grid, query=2))] == [1, 2, 3]
        with pytest.raises(BadInput, match="query 3 is outside of the 3 tokens"):
            svg(pairs, grid=grid, query=3)
    wide = torch.ones(2, 6, 4, dtype=torch.bool)
    assert svg(wide, grid=(2, 2), query=5) != svg(wide, grid=(2, 2))
    assert svg(wide, grid=(2, 3), query=(1, 2)) == svg(wide, grid=(2, 3), query=5)


def test_the_matrix_is_drawn_in_both_forms():
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert draw_text(causal).splitlines() == ["█▄··", "███▄"]
    picture = svg(causal, query=2)
    sheet = ElementTree.fromstring(picture)
    assert sheet.attrib["aria-label"] == "visible pairs"
    assert [width // 12 for _, _, width in filled(picture)] == [1, 2, 3, 4]
    assert "the query" in picture
    assert "by some heads" not in picture


def test_wide_matrices_keep_their_thin_lines():
    text = draw_text(torch.eye(500, dtype=torch.bool), width=50)
    assert len(text.splitlines()) == 25
    assert all(len(line) == 50 and line.count("·") == 48 for line in text.splitlines())


def test_a_grid_shows_what_one_query_sees_and_how_many_heads():
    pairs = torch.zeros(2, 6, 6, dtype=torch.bool)
    pairs[:, 4, 3] = pairs[0, 4, 0] = True
    assert draw_text(pairs, grid=(2, 3), query=(1, 1)).splitlines() == ["▒▒· · ", "██<>· "]
    picture = svg(pairs, grid=(2, 3), query=(1, 1))
    assert filled(picture) == [(0, 20, 20)]
    assert filled(picture, ".45") == [(0, 0, 20)]
    assert middle(Grid((2, 3))) == 4
    assert svg(pairs, grid=(2, 3)) == picture == svg((pairs.double().mean(0))[4], grid=(2, 3), query=4)


def test_frames_and_prefix_tokens_have_panels():
    row = torch.zeros(13, dtype=torch.bool)
    row[[0, 5, 11]] = True
    grid = Grid((3, 2, 2), prefix=1)
    text = draw_text(row, grid=grid, query=(1, 0, 1))
    assert text.splitlines() == [
        "prefix ██", "frame 0", "· · ", "· · ", "frame 1", "██<>", "· · ", "frame 2", "· · ", "██· ",
    ]  # fmt: skip
    picture = svg(row, grid=grid, query=(1, 0, 1))
    assert [f"frame {frame}" in picture for frame in range(4)] == [True, True, True, False]
    assert len(filled(picture)) == 3
    ElementTree.fromstring(picture)


def test_files_are_small_svgs(tmp_path):
    made = specimen("neighborhood", (8, 8), params={"window": 3})
    draw_svg(made.pairs(), tmp_path / "new" / "seen.svg", grid=made.grid, title='a "b" & c')
    text = (tmp_path / "new" / "seen.svg").read_text()
    assert ElementTree.fromstring(text).attrib["aria-label"] == 'a "b" & c'
    assert len(text) < 3000
    with pytest.raises(BadInput, match=r"is an \.svg, got 'seen.png'"):
        draw_svg(made.pairs(), tmp_path / "seen.png")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="could not be written"):
        draw_svg(made.pairs(), tmp_path / "file" / "seen.svg")


def test_tokens_of_a_picture_are_alike_where_it_is():
    image = torch.zeros(40, 60, 3)
    image[:, 30:] = 200
    tokens = tokens_of_image(image, (4, 6), 16, prefix=1)
    assert tokens.shape == (1, 25, 16)
    left, right = tokens[0, 1:].view(4, 6, 16).split(3, 1)
    assert (left - left[0, 0]).abs().max() < 1e-5 < 0.1 < (left - right).norm(dim=-1).min()
    with pytest.raises(BadInput, match="a picture lies on two axes, the grid 24 has 1"):
        tokens_of_image(image, (24,), 16)
    with pytest.raises(BadInput, match="height, width, colours"):
        tokens_of_image(image[..., 0], (4, 6), 16)
