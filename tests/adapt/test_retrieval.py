"""Reading a text's past by its landmarks: what is read, at which places, and what comes of it."""

import copy

import pytest
import torch
from torch import nn

import attlas
from attlas.adapt.retrieval import SELECTIONS, Reader, applied
from attlas.core.errors import BadInput, Unsupported

EVERY = 3
PERIOD = EVERY + 1


def layer(heads=4, kv_heads=2, **settings):
    torch.manual_seed(0)
    settings = {"position": attlas.positions.Rotary(4)} | settings
    return attlas.mixer("landmark", 16, heads, kv_heads=kv_heads, causal=True, mem_freq=EVERY, **settings).double()


def text(tokens, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, tokens, 16, dtype=torch.float64)


def read(reader, x, *sizes):
    return torch.cat([reader(chunk) for chunk in x.split(list(sizes) or 1, 1)], 1)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("sizes", [(35,), (10, 5, 1, 1, 18), (4, 8, 3, 20), ()])
@pytest.mark.parametrize("position", [None, attlas.positions.Rotary(4), attlas.positions.PartRotary(2, 2)])
def test_reading_every_block_is_the_layer_itself(selection, sizes, position):
    whole, x = layer(position=position), text(35)
    reader = Reader(whole, top_k=35 // PERIOD, blocks=35 // PERIOD, selection=selection)
    with torch.no_grad():
        torch.testing.assert_close(read(reader, x, *sizes), whole(x), rtol=0, atol=1e-12)


def literal(source, x_past, x_new, top_k, selection):
    """Two chunks of one sequence: the second reads from the first. Head by head, query by query. Outputs and shares."""
    heads, size = source.site.heads, source.site.head_dim
    joint = torch.cat([x_past, x_new], 1)
    q, k, v = (
        p(joint)[0].unflatten(-1, (-1, size)).transpose(0, 1) for p in (source.q_proj, source.k_proj, source.v_proj)
    )
    k, v = (t.repeat_interleave(heads // t.shape[0], 0) for t in (k, v))

    def turn(row, place):
        return source.position.rotate(row.view(1, 1, 1, size), place).flatten()

    count = x_past.shape[1] // PERIOD
    news = range(x_past.shape[1], joint.shape[1])
    begin = (top_k + 1) * PERIOD  # of what is at hand: the block that is not full, then the chunk
    at_hand = range(count * PERIOD, joint.shape[1])
    shares = torch.zeros(heads, len(news), count, dtype=x_new.dtype)
    for h in range(heads):
        for n, i in enumerate(news):
            asks = turn(q[h, i], begin + i - count * PERIOD)
            slots = [max(block - (count - top_k) + 1, 0) for block in range(count)]
            marks = [turn(k[h, block * PERIOD + EVERY], slots[block] * PERIOD + EVERY) for block in range(count)]
            shares[h, n] = (torch.stack(marks) @ asks / size**0.5).softmax(0)
    if selection == "max_over_heads":
        shares = shares.amax(0, keepdim=True).expand_as(shares)
    if selection == "max_over_tokens":
        shares = shares.amax(1, keepdim=True).expand_as(shares)
    out = torch.zeros(heads, len(news), size, dtype=x_new.dtype)
    for h in range(heads):
        for n, i in enumerate(news):
            asks = turn(q[h, i], begin + i - count * PERIOD)
            chosen = sorted(shares[h, n].topk(top_k).indices.tolist())
            groups, rows = [], {}
            for t, block in enumerate(chosen):
                late = PERIOD if block >= count - top_k else 0
                for place in range(PERIOD):
                    rows[block * PERIOD + place] = turn(k[h, block * PERIOD + place], t * PERIOD + late + place)
                groups.append(block)
            for j in at_hand:
                rows[j] = turn(k[h, j], begin + j - count * PERIOD)
            groups += range(count, i // PERIOD)
            score = {j: row @ asks / size**0.5 for j, row in rows.items() if j <= i}
            own = [j for j in range(i // PERIOD * PERIOD, i + 1) if j % PERIOD < EVERY]
            gates = [block * PERIOD + EVERY for block in groups]
            local = torch.stack([score[j] for j in own + gates]).softmax(0)
            out[h, n] = local[: len(own)] @ v[h, own]
            for share, gate in zip(local[len(own) :], gates, strict=True):
                tokens = list(range(gate - EVERY, gate))
                out[h, n] += share * (torch.stack([score[j] for j in tokens]).softmax(0) @ v[h, tokens])
    return source.out_proj(out.transpose(0, 1).flatten(1)), shares


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("past", "new"), [(24, 3), (26, 7), (27, 1)])
def test_choice_places_and_softmax_are_the_published_ones(selection, past, new):
    source, x = layer(), text(past + new, batch=1)
    reader = Reader(source, top_k=2, selection=selection)
    with torch.no_grad():
        reader(x[:, :past])
        expected, shares = literal(source, x[:, :past], x[:, past:], 2, selection)
        torch.testing.assert_close(reader(x[:, past:])[0], expected, rtol=0, atol=1e-12)
    assert reader.shares.shape[2] == (1 if selection == "max_over_tokens" else new)
    torch.testing.assert_close(reader.shares[0].expand_as(shares), shares, rtol=0, atol=1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_who_has_a_say_in_what_is_read(selection):
    source, past, x = layer(), text(40), 3 * text(8)
    other = x.clone()
    other[:, 4:] = 3 * torch.randn(2, 4, 16, dtype=torch.float64)
    outputs = []
    for chunk in (x, other):
        reader = Reader(source, top_k=2, selection=selection)
        reader(past)
        outputs.append(reader(chunk)[:, :4])
    assert torch.equal(*outputs) == (selection != "max_over_tokens")


@pytest.mark.parametrize(("dtype", "size", "tolerance"), [(torch.float16, 60, 1e-3), (torch.bfloat16, 1, 6e-3)])
def test_half_precision_neither_overflows_nor_rounds_scores(dtype, size, tolerance):
    torch.manual_seed(0)
    source = attlas.mixer("landmark", 64, 1, causal=True, mem_freq=EVERY)
    with torch.no_grad():
        source.q_proj.weight.mul_(size)
        source.k_proj.weight.mul_(size)
    source, x = source.to(dtype), torch.randn(1, 400, 64).to(dtype)
    exact = copy.deepcopy(source).double()
    # Queries, keys and values as the layer rounds them.
    for name in ("q_proj", "k_proj", "v_proj"):
        made = getattr(source, name)
        getattr(exact, name).forward = lambda x, made=made: made(x.to(dtype)).double()
    near, far = Reader(source, top_k=2), Reader(exact, top_k=2)
    got, expected = read(near, x, 390, 10), read(far, x.double(), 390, 10)
    assert (got - expected).norm() < tolerance * expected.norm()
    assert near.shares.dtype == torch.float32
    torch.testing.assert_close(near.shares.double(), far.shares, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_chosen_blocks_are_read(selection, tmp_path):
    for place in ({}, {"path": tmp_path / "store.bin"}):
        reader = Reader(layer(), top_k=2, blocks=20, selection=selection, **place)
        x = text(60)
        read(reader, x[:, :50], 25, 25)
        twin, before = copy.deepcopy(reader), reader.bytes_read
        expected = reader(x[:, 50:])
        chosen = torch.zeros(2, 2, 20, dtype=torch.bool)  # per sequence and key/value head
        for b in range(2):
            for h in range(4):
                chosen[b, h // 2, reader.chosen[b, h].flatten()] = True
        assert 0 < chosen[:, :, :12].sum() < chosen[:, :, :12].numel()
        block_bytes = PERIOD * (4 + 4) * 8
        assert reader.bytes_read - before == int(chosen.sum()) * block_bytes
        twin.store[~chosen] = torch.nan
        torch.testing.assert_close(twin(x[:, 50:]), expected, rtol=0, atol=0)


def test_rows_read_per_token():
    """A landmark for each block, and the rows of the chosen: N / F + top_k (F + 1) per head."""
    ordinary, top_k = 30, 3
    reader = Reader(layer(heads=2, kv_heads=2, position=attlas.positions.Rotary(8)), top_k=top_k)
    x = text(ordinary // EVERY * PERIOD + 1, batch=1)
    reader(x[:, :-1])
    rows = []
    reader.layer.position.rotate = lambda x, start: rows.append(x.shape[:3].numel()) or x
    before = reader.bytes_read
    reader(x[:, -1:])
    landmarks = rows[2:-2]  # after the query and the keys at hand, before the blocks at their two places
    heads = 2
    assert sum(landmarks) == heads * ordinary // EVERY
    read_rows = (reader.bytes_read - before) // (8 * (8 + 8))
    assert read_rows == heads * top_k * PERIOD


def test_places_stay_in_the_range_of_training():
    source, top_k, chunk = layer(), 2, 6
    places = []
    turn = source.position.rotate
    source.position.rotate = lambda x, start: places.append(start + x.shape[2] - 1) or turn(x, start)
    read(Reader(source, top_k=top_k), text(60, batch=1), *[chunk] * 10)
    assert max(places) < (top_k + 1) * PERIOD + EVERY + chunk


def test_the_ring_forgets_the_oldest_block():
    x, small = text(60), Reader(layer(), top_k=2, blocks=5)
    read(small, x)
    assert small.chosen.min() >= 60 // PERIOD - 1 - 5
    kept = Reader(layer(), top_k=2, blocks=5)
    kept(x[:, : 9 * PERIOD])  # the last five of nine blocks stay
    again = Reader(layer(), top_k=2, blocks=5)
    read(again, x[:, : 9 * PERIOD], 17, 19)
    slots = torch.arange(5)
    assert torch.equal(kept.store[:, :, slots], again.store[:, :, slots])
    torch.testing.assert_close(kept(x[:, 36:40]), again(x[:, 36:40]), rtol=0, atol=1e-12)


def test_a_file_is_as_good_as_memory(tmp_path):
    x = text(60).float()
    for dtype in (torch.float32, torch.bfloat16):
        source = layer().to(dtype)
        near = Reader(source, top_k=2, blocks=8)
        far = Reader(source, top_k=2, blocks=8, path=tmp_path / f"{dtype}.bin")
        assert torch.equal(read(near, x.to(dtype), 30, 30), read(far, x.to(dtype), 30, 30))
        assert (tmp_path / f"{dtype}.bin").stat().st_size == far.store.nbytes
        assert near.bytes_read == far.bytes_read > 0


def test_the_rest_of_a_chunk_does_not_keep_it_alive():
    reader = Reader(layer(), top_k=2, blocks=5)
    reader(text(203))
    for rest in (reader.last_k, reader.last_v):
        assert rest.untyped_storage().nbytes() == rest.nbytes > 0


def test_clear_begins_another_text(tmp_path):
    for place in ({}, {"path": tmp_path / "store"}):
        reader, x = Reader(layer(), top_k=2, **place), text(30)
        reader(x[:, :20])
        assert reader.chosen is reader.shares is None
        reader(x[:, 20:])
        kept = reader.chosen, reader.bytes_read
        with pytest.raises(BadInput, match="2 sequences, got 1"):
            reader(x[:1])
        reader.clear()
        assert (reader.chosen, reader.shares, reader.store, reader.bytes_read) == (None, None, None, 0)
        again = read(reader, x, 20, 0, 10)
        assert torch.equal(again, read(Reader(layer(), top_k=2), x, 20, 10))
        assert torch.equal(reader.chosen, kept[0])
        assert reader.bytes_read == kept[1] > 0


def test_a_store_overwrites_no_file(tmp_path):
    mine, missing = tmp_path / "thesis", tmp_path / "none" / "store"
    mine.write_bytes(b"precious")
    for path in (mine, tmp_path):
        with pytest.raises(BadInput, match="is there already"):
            Reader(layer(), path=path)
    assert mine.read_bytes() == b"precious"
    with pytest.raises(BadInput, match=r"no store can be made .* in a folder"):
        Reader(layer(), path=missing)
    Reader(layer(), path=tmp_path / "one")  # nor that of another Reader, before or after its first chunk
    with pytest.raises(BadInput, match="is there already"):
        Reader(layer(), path=tmp_path / "one")


def test_readers_stand_for_the_layers_of_a_model_and_leave(tmp_path):
    model = nn.Sequential(layer(), nn.GELU(), nn.Sequential(layer()))
    first, second, x = model[0], model[2][0], text(40)
    with torch.no_grad(), applied(model, top_k=10, path=tmp_path / "new") as readers:
        assert [model[0], model[2][0]] == readers
        got = read(model, x, 16, 24)
        assert all(reader.bytes_read for reader in readers)
    assert (model[0], model[2][0]) == (first, second)
    assert len(list((tmp_path / "new").iterdir())) == 2
    torch.testing.assert_close(got, model(x), rtol=0, atol=1e-12)


def test_layers_come_back_after_an_error(tmp_path):
    model = nn.Sequential(layer(), nn.GELU(), layer())
    before = list(model)
    with pytest.raises(KeyError), applied(model):
        raise KeyError
    assert list(model) == before
    (tmp_path / "layer1.bin").touch()
    with pytest.raises(BadInput, match=r"layer1\.bin is there already"), applied(model, path=tmp_path):
        pass
    assert list(model) == before


def test_a_layer_at_two_places_reads_two_texts():
    shared, x = layer(), text(40)
    model = nn.Sequential(shared, nn.GELU(), shared)
    with torch.no_grad(), applied(model, top_k=10) as readers:
        assert [model[0], model[2]] == readers
        got = read(model, x, 16, 24)
    assert model[0] is model[2] is shared
    torch.testing.assert_close(got, model(x), rtol=0, atol=1e-12)
    block = nn.Sequential(layer())
    with pytest.raises(BadInput, match=r"used at two places.*deepcopy"), applied(nn.Sequential(block, block)):
        pass


def test_a_reader_is_called_like_the_layer():
    reader, x = Reader(layer(), top_k=2), text(8)
    expected = reader(x)
    reader.clear()
    assert torch.equal(reader(x, None, mask=None, grid=(8,)), expected)
    for wrong in ({"mask": torch.ones(2, 8, dtype=torch.bool)}, {"context_BMC": x}):
        with pytest.raises(BadInput, match="neither a context nor a mask"):
            reader(x, **wrong)
    with pytest.raises(Unsupported, match="grid"):
        reader(x, grid=(2, 4))


def test_bad_inputs():
    with pytest.raises(BadInput, match="made of a landmark layer"):
        Reader(attlas.mixer("softmax", 16, 2, causal=True))
    with pytest.raises(BadInput, match="Learned cannot give"):
        Reader(layer(position=attlas.positions.Learned(16, 8)))
    with pytest.raises(BadInput, match="16 channels"):
        Reader(layer())(torch.zeros(1, 3, 15))
    with pytest.raises(BadInput, match="selection is one of per_token"):
        Reader(layer(), selection="best")
    with pytest.raises(BadInput, match="at most the 3 blocks of the store, got 4"):
        Reader(layer(), top_k=4, blocks=3)
    with pytest.raises(BadInput, match="on a device or in a file"):
        Reader(layer(), device="cpu", path="x")
    with pytest.raises(BadInput, match="holds no landmark layer"), applied(nn.Linear(2, 2)):
        pass
    with pytest.raises(BadInput, match=r"is a landmark layer.*call Reader"), applied(layer()):
        pass
    model = nn.Sequential(layer())
    with applied(model), pytest.raises(BadInput, match="leave the other `applied` first"), applied(model):
        pass
