import copy
import pickle

import pytest
import torch

import attlas
from attlas import Grid
from attlas.core.errors import BadInput, UnknownName, Unsupported
from attlas.core.state import KVCache, Rows


def test_a_grid_splits_and_lays_out():
    grid = Grid((2, 3), prefix=1)
    x = torch.arange(7.0).view(1, 7, 1)
    prefix, rest = grid.split(x)
    assert prefix.flatten().tolist() == [0]
    assert grid.unflatten(rest)[0, :, :, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert grid.places().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert str(grid) == "grid 2x3 after 1 prefix tokens"


def test_grids_that_do_not_fit_are_named():
    with pytest.raises(BadInput, match=r"has 6 tokens but the sequence has 7; .* Grid\(\(2, 3\), prefix=1\)"):
        Grid.of((2, 3), 7)
    with pytest.raises(BadInput, match="one to three axes"):
        Grid((2, 3, 4, 5))
    with pytest.raises(BadInput, match="cannot be negative"):
        Grid((2,), prefix=-1)


def test_rows_branch_and_grow():
    rows = Rows(torch.zeros(1, 1, 0, 2))
    history = []
    for step in range(40):
        rows = rows.append(torch.full((1, 1, 1, 2), float(step)))
        history.append(rows)
    assert rows.rows[0, 0, :, 0].tolist() == list(range(40))
    other = history[9].append(torch.full((1, 1, 1, 2), -1.0))
    assert other.rows[0, 0, -1, 0] == -1
    assert rows.rows[0, 0, 10, 0] == 10
    assert rows.nbytes == 40 * 2 * 4


def test_appending_rows_copies_seldom():
    rows = Rows(torch.zeros(1, 1, 0, 1))
    pointers = set()
    for _ in range(1000):
        rows = rows.append(torch.ones(1, 1, 1, 1))
        pointers.add(rows.rows.data_ptr())
    assert len(pointers) <= 12


def test_rows_keep_gradients():
    new = torch.ones(1, 1, 1, 2, requires_grad=True)
    rows = Rows(torch.zeros(1, 1, 1, 2)).append(new)
    rows.rows.sum().backward()
    assert new.grad.sum() == 2


def test_a_graph_may_keep_flags_that_are_appended_to():
    x = torch.ones(1, 1, 1, 2, requires_grad=True)
    cache, total = KVCache.empty(1, 1, 2, 2, x), 0
    for _ in range(5):
        cache = cache.append(x, x, torch.ones(1, 1, dtype=torch.bool))
        total = total + (cache.k.rows * cache.keys[:, None, :, None]).sum()
    total.backward()
    assert x.grad.sum() == 2 * (1 + 2 + 3 + 4 + 5)


def test_state_bytes_count_everything():
    cache = KVCache.empty(2, 3, 4, 5, torch.empty(0, dtype=torch.bfloat16))
    cache = cache.append(*(torch.zeros(2, 3, 7, d, dtype=torch.bfloat16) for d in (4, 5)), None)
    assert attlas.state_bytes(cache) == 2 * 3 * 7 * (4 + 5) * 2
    padded = cache.append(
        *(torch.zeros(2, 3, 1, d, dtype=torch.bfloat16) for d in (4, 5)), torch.zeros(2, 1, dtype=torch.bool)
    )
    assert padded.keep.rows.sum() == 2 * 7
    assert attlas.state_bytes((cache, 5, (torch.zeros(3),))) == attlas.state_bytes(cache) + 12


def test_names_filters_and_nearest():
    assert "softmax" in attlas.mechanisms("soft*,pool")
    assert attlas.mechanisms("softmax", pattern="causal cross", mask="bias", grid=2) == ["softmax"]
    assert "pool" not in attlas.mechanisms(pattern="noncausal cross")
    assert attlas.mechanisms("po*", family="conv") == ["pool"]
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        attlas.mixer("sofmax", 8)
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        attlas.mechanisms("sofmax")
    with pytest.raises(UnknownName, match="family"):
        attlas.mechanisms(family="sofmax")
    with pytest.raises(BadInput, match="'causal self'"):
        attlas.mechanisms(pattern="causl self")


def test_what_cannot_be_done_is_said_before_any_work():
    x = torch.randn(1, 6, 8)
    with pytest.raises(BadInput, match="8 channels do not split into 3 heads"):
        attlas.mixer("softmax", 8, 3)
    with pytest.raises(BadInput, match="3 query heads and 2 key/value heads"):
        attlas.mixer("softmax", 8, 4, query_heads=3, kv_heads=2)
    with pytest.raises(BadInput, match="no setting 'windw'"):
        attlas.mixer("softmax", 8, 2, windw=3)
    with pytest.raises(BadInput, match="no variant 'xsq'; did you mean 'xsqa'"):
        attlas.mixer("softmax:xsq", 8, 2)
    with pytest.raises(Unsupported, match=r"pool does not serve noncausal cross.*softmax"):
        attlas.mixer("pool", 8)(x, x)
    with pytest.raises(Unsupported, match="pool does not serve a mask with pairs"):
        attlas.mixer("pool", 8)(x, mask=attlas.Mask.window(1))
    with pytest.raises(BadInput, match=r"x is \(batch, tokens, 8 channels\), got \(1, 6, 9\)"):
        attlas.mixer("softmax", 8, 2)(torch.randn(1, 6, 9))
    with pytest.raises(BadInput, match="padding mask is"):
        attlas.mixer("softmax", 8, 2)(x, mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(BadInput, match="build softmax with causal=True"):
        attlas.mixer("softmax", 8, 2).initial_state(1)
    with pytest.raises(BadInput, match="needs a causal layer"):
        attlas.mixer("pool", 8)(x, mask=attlas.Mask.causal_())
    with pytest.raises(BadInput, match="one floating dtype"):
        attlas.attend(*(torch.zeros(1, 1, 2, 2, dtype=t) for t in (torch.int64,) * 3))


def test_an_error_names_a_few_that_can_and_where_to_find_all():
    with pytest.raises(attlas.core.errors.Unsupported) as caught:
        attlas.mixer("criss_cross", 8)(torch.randn(1, 6, 8), grid=(6,))
    named, more = str(caught.value).split("Mechanisms that do: ")[1].split(" and ")
    able = attlas.mechanisms(grid=1)
    assert named.split(", ") == able[:8]
    assert more == f"{len(able) - 8} more: attlas.mechanisms(grid=1)"


def test_an_explicit_backend_never_falls_back():
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    with pytest.raises(attlas.core.errors.BackendUnavailable, match="torch: not asked for"):
        attlas.mixer("softmax", 8, 2, backend="cpu").double()(x)


def test_registering_a_name_twice_is_an_error():
    spec = attlas.core.registry.mechanism("pool").spec
    with pytest.raises(BadInput, match="'pool' is already the name of"):
        attlas.register(spec)(type("Other", (attlas.Mixer,), {}))


def test_a_trained_layer_can_be_copied_and_pickled():
    layer = attlas.mixer("softmax", 8, 2)
    layer.auxiliary = (torch.ones(1, requires_grad=True) * 2).sum()
    assert attlas.auxiliary_loss(layer) == 2
    assert attlas.auxiliary_loss(copy.deepcopy(layer)) == 0
    assert attlas.auxiliary_loss(pickle.loads(pickle.dumps(layer))) == 0
