import itertools
import math
import sys

import pytest
import torch

from attlas.bench.extras import MissingExtra
from attlas.bench.tasks import TASKS, corpus, digits, task_named
from attlas.bench.tasks.base import ACCURACY, IGNORED, Batch, asked, bits, hits, loss
from attlas.bench.tasks.recall import KEYS, PAIRS, VALUES
from attlas.core.errors import AttlasError, BadInput, UnknownName


def made(name):
    return TASKS[name](TASKS[name].setting.length)


def first(task, seed, count=3):
    return list(itertools.islice(task.batches(seed, 5), count))


def same(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_batches_have_the_declared_form_and_hang_on_the_seed_alone(name):
    task = made(name)
    batches = first(task, 1)
    assert same(batches, first(task, 1))
    assert not same(batches, first(task, 2))
    for batch in batches + [b for part in task.held_out().values() for b in part]:
        rows = len(batch.inputs)
        if task.vocabulary:
            assert batch.inputs.shape == (rows, task.length)
            assert batch.inputs.min() >= 0
            assert batch.inputs.max() < task.vocabulary
        else:
            assert batch.inputs.shape == (rows, task.length, task.features)
        assert batch.targets.shape == ((rows,) if task.per_sequence else (rows, task.length))
        where = batch.targets != IGNORED
        assert where.any()
        assert batch.targets[where].min() >= 0
        assert batch.targets.max() < task.classes
    assert math.prod(task.grid) == task.length


@pytest.mark.parametrize("name", TASKS)
def test_held_out_data_is_always_the_same(name):
    one, other = made(name).held_out(), made(name).held_out()
    assert one.keys() == other.keys()
    assert all(same(one[part], other[part]) for part in one)


def test_the_corpus_is_split_by_file():
    files = corpus.source_files()
    held_out = [file for file in files if corpus.is_held_out(file)]
    assert len(files) > 200
    assert 0.05 < len(held_out) / len(files) < 0.15
    assert not [file for file in files if {"test", "tests", "site-packages", "idlelib"} & set(file.parts)]
    train, tested = corpus.corpus()
    assert len(train) + len(tested) == sum((corpus.stdlib() / file).stat().st_size for file in files)
    assert bytes(tested[:200].tolist()) in (corpus.stdlib() / held_out[0]).read_bytes()


def test_text_asks_for_the_next_byte_of_held_out_files():
    task = made("text")
    assert all(torch.equal(b.inputs[:, 1:], b.targets[:, :-1]) for b in first(task, 0))
    _, held_out = corpus.corpus()
    ends = task.held_out()["all"]
    assert torch.equal(ends[0].inputs[0], held_out[: task.length].long())
    assert int(ends[-1].targets[-1, -1]) == int(held_out[-1])
    assert 4 < task.chance() < 5


def test_masked_text_hides_15_percent_and_never_the_rest():
    batch = next(made("masked_text").batches(0, 400))
    where = batch.targets != IGNORED
    shown = batch.inputs[where]
    assert where.any(-1).all()
    assert where.float().mean() == pytest.approx(0.15, abs=0.01)
    assert (shown == 256).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == batch.targets[where]).float().mean() == pytest.approx(0.1, abs=0.02)
    assert (batch.inputs[~where] < 256).all()


def test_digits_are_split_by_image_with_the_same_share_of_each():
    train, held_out = digits.split()
    assert (len(train.inputs), len(held_out.inputs)) == (1437, 360)
    assert torch.bincount(held_out.targets).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    both = torch.cat([train.inputs, held_out.inputs])
    assert len(both) == 1797
    assert both.min() == -1
    assert both.max() == 1
    with pytest.raises(BadInput, match="8 x 8 = 64 pixels, got length=49"):
        TASKS["digits"](49)


def test_recall_asks_for_values_that_were_shown():
    task = made("recall")
    assert list(task.held_out()) == [f"{pairs} pairs" for pairs in PAIRS]
    for pairs, batch in zip(PAIRS, first(task, 0), strict=True):
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            memory = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
            assert len(memory) == pairs
            assert max(memory) < KEYS
            assert targets[: 2 * pairs] == [IGNORED] * 2 * pairs
            assert [KEYS + target for target in targets[2 * pairs :]] == [memory[key] for key in row[2 * pairs :]]
    with pytest.raises(BadInput, match="length above 32, got 32"):
        TASKS["recall"](32)


def test_recall_chance_is_what_guessing_a_shown_value_reaches():
    task = made("recall")

    class Guess(torch.nn.Module):
        def forward(self, inputs):
            pairs = int((inputs[0] >= KEYS).sum())
            values = inputs[:, 1 : 2 * pairs : 2] - KEYS
            chosen = torch.randint(pairs, (len(inputs), task.length))
            return torch.nn.functional.one_hot(values.gather(1, chosen), VALUES).float()

    accuracy, parts = task.evaluate(Guess())
    # Two keys may share a value, which helps the guess by at most one in VALUES.
    assert task.chance() <= accuracy + 0.01
    assert accuracy < task.chance() + 1 / VALUES + 0.01
    assert parts["4 pairs"] > parts["8 pairs"] > parts["16 pairs"]


def test_scores_and_loss_look_at_the_questions_alone():
    logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]])
    targets = torch.tensor([[1, IGNORED, 1]])
    assert bits(*asked(logits, targets))[0] == pytest.approx(1.0)
    assert hits(*asked(logits, targets)).tolist() == [0.0, 1.0]
    assert loss(logits, targets) == pytest.approx((math.log(2) + math.log1p(math.exp(-9))) / 2, rel=1e-5)
    assert ACCURACY.higher_is_better


def test_evaluate_weighs_every_question_alike():
    class Two(TASKS["recall"]):
        def held_out(self):
            answer = Batch(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[1, IGNORED]]))
            return {"few": [answer], "many": [Batch(answer.inputs, torch.tensor([[0, 0]]))] * 2}

    class Zero(torch.nn.Module):
        def forward(self, inputs):
            return torch.nn.functional.one_hot(torch.zeros_like(inputs), 2).float()

    assert Two(40).evaluate(Zero()) == (pytest.approx(4 / 5), {"few": 0.0, "many": 1.0})


def test_errors_name_the_cure(monkeypatch, tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'recall'"):
        task_named("recal")
    with pytest.raises(BadInput, match="at least one token"):
        TASKS["text"](0)
    with pytest.raises(BadInput, match="does not fit"):
        next(TASKS["text"](10**8).batches(0, 1))
    monkeypatch.setattr(corpus, "stdlib", lambda: tmp_path)
    with pytest.raises(AttlasError, match="use a full Python"):
        corpus.source_files()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"digits task needs scikit-learn: pip install 'attlas\[bench\]'"):
        made("digits")
