import math
from dataclasses import replace

import pytest
import torch

import attlas
from attlas.bench.network import Network, Stem, count_parameters
from attlas.bench.records import QualityJob
from attlas.bench.tasks import TASKS
from attlas.bench.tasks.base import Task, loss
from attlas.bench.training import Diverged, rate, train
from attlas.core.errors import BadInput, UnknownName, Unsupported
from attlas.core.registry import mechanism
from attlas.core.spec import Pattern

TINY = QualityJob(
    mechanism="softmax",
    task="recall",
    seed=0,
    label="softmax",
    steps=40,
    batch=8,
    length=40,
    dim=32,
    heads=2,
    layers=2,
    parameters=20_000,
    learning_rate=1e-2,
)


def network(task="recall", mechanism="softmax", **sizes):
    sizes = {"dim": 16, "heads": 2, "layers": 2, "parameters": 9_000} | sizes
    return Network(TASKS[task](40 if task == "recall" else 64), mechanism, **sizes)


def test_training_reduces_the_loss_and_reports_what_it_did():
    steps = []
    result = train(TINY, steps.append)
    assert steps == list(range(1, 41))
    assert [step for step, _ in result.curve] == steps
    first, last = (sum(loss for _, loss in part) / 5 for part in (result.curve[:5], result.curve[-5:]))
    assert first == pytest.approx(math.log(32), abs=0.5)
    assert last < first - 0.2
    assert (result.metric, result.higher_is_better) == ("accuracy", True)
    assert set(result.details) == {"4 pairs", "8 pairs", "16 pairs"}
    assert min(result.details.values()) < result.value < max(result.details.values())
    assert result.state_bytes == 2 * 2 * 40 * 32 * 4  # layers, keys and values, tokens, channels, float32
    assert result.mixer_parameters == 2 * 4 * (32 * 32 + 32)
    assert result.tokens_per_second == pytest.approx(40 * 8 * 40 / result.seconds)


def test_softmax_recalls_what_pooling_cannot():
    job = replace(TINY, steps=200, batch=16)
    recalled, pooled = (train(replace(job, mechanism=name)) for name in ("softmax", "pool"))
    chance = TASKS["recall"](40).chance()
    assert recalled.details["4 pairs"] > 0.9
    assert recalled.value > chance + 0.3
    assert pooled.value < chance + 0.05
    assert recalled.state_bytes > 10 * pooled.state_bytes


def test_text_is_learned_beyond_the_frequencies_of_bytes():
    job = replace(TINY, task="text", steps=60, length=64, parameters=40_000)
    result = train(job)
    assert result.metric == "bits per byte"
    assert result.value < TASKS["text"](64).chance() - 0.3
    assert result.curve[-1][1] / math.log(2) == pytest.approx(result.value, abs=0.8)


def test_the_same_job_gives_the_same_numbers_and_leaves_the_caller_alone():
    job = replace(TINY, steps=5)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = train(job)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(6)
    again, other = train(job), train(replace(job, seed=1))
    assert (again.curve, again.value) == (first.curve, first.value)
    assert other.curve != first.curve


def test_long_curves_are_thinned_to_means():
    result = train(replace(TINY, steps=101, batch=1, layers=1))
    assert [step for step, _ in result.curve] == [*range(2, 101, 2), 101]


def test_a_loss_that_is_no_number_is_an_error_with_its_step():
    with pytest.raises(Diverged, match=r"softmax on recall, seed 0: the loss is nan at step \d+; try a learning rate"):
        train(replace(TINY, learning_rate=1e20))


@pytest.mark.parametrize("name", attlas.mechanisms())
@pytest.mark.parametrize(
    "task",
    [pytest.param(name, marks=[pytest.mark.full] if name == "images" else []) for name in TASKS],  # digits, but longer
)
def test_every_mechanism_trains_on_every_task_that_it_serves(name, task, monkeypatch):
    def evaluate(self, model):
        assert not model.training
        batch = next(self.batches(1, 2))
        return loss(model(batch.inputs), batch.targets).item(), {}

    monkeypatch.setattr(Task, "evaluate", evaluate)
    spec = mechanism(name).spec
    made = TASKS[task](TASKS[task].setting.length if TASKS[task].picture else 64)
    job = replace(TINY, mechanism=name, task=task, steps=2, batch=2, length=made.length, layers=1, parameters=400_000)
    serves = Pattern.of(made.causal, cross=False) in spec.patterns and len(made.grid) in spec.grids
    if serves and not spec.class_token:
        result = train(job)
        assert math.isfinite(result.value)
        assert abs(result.parameters - job.parameters) <= job.dim + 1
        assert result.state_bytes == 0 or (made.causal and spec.streams)
    else:
        with pytest.raises(Unsupported, match=f"{name} does not serve"):
            train(job)


def test_auxiliary_losses_are_trained(monkeypatch):
    from attlas.bench import training

    asked = []
    monkeypatch.setattr(training, "auxiliary_loss", lambda model: asked.append(model) or torch.tensor(torch.nan))
    with pytest.raises(Diverged):
        train(TINY)
    assert len(asked) == 1


def test_every_model_meets_the_budget():
    for name in ("softmax", "pool", "sigmoid"):
        for budget in (9_000, 12_345):
            model = network(mechanism=name, parameters=budget)
            assert abs(count_parameters(model) - budget) <= 33  # half of what one hidden unit of both layers takes
    softmax, pool = (network(mechanism=name) for name in ("softmax", "pool"))
    assert pool.mlps[0][0].out_features > softmax.mlps[0][0].out_features
    least = count_parameters(network(hidden=1))
    with pytest.raises(BadInput, match=rf"100 parameters leave no MLP: with softmax .* at least {least:,}"):
        network(parameters=100)


def test_one_seed_draws_the_same_shared_weights_for_every_mechanism():
    models = []
    for name in ("softmax", "pool"):
        torch.manual_seed(3)
        models.append(network(mechanism=name))
    for part in ("stem", "positions", "head"):
        one, other = (list(getattr(model, part).parameters()) for model in models)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("task", ["recall", "masked_text", "digits"])
def test_the_stem_reads_direct_neighbours_on_the_grid_and_never_ahead_if_causal(task):
    made = TASKS[task](64)
    stem = Stem(made, 8)
    inputs = next(made.batches(0, 1)).inputs
    place = 27
    changed = inputs.clone()
    changed[:, place] = (inputs[:, place] + 1) % (made.vocabulary or 7)
    reached = (stem(inputs) != stem(changed)).any(-1)[0].nonzero()[:, 0].tolist()
    expected = {
        "recall": [27, 28, 29],
        "masked_text": [26, 27, 28],
        "digits": [18, 19, 20, 26, 27, 28, 34, 35, 36],
    }
    assert reached == expected[task]


def test_a_causal_model_does_not_look_ahead():
    model = network().eval()
    inputs = next(TASKS["recall"](40).batches(0, 2)).inputs
    changed = inputs.clone()
    changed[:, 20:] = (inputs[:, 20:] + 1) % 64
    assert torch.equal(model(inputs)[:, :20], model(changed)[:, :20])
    assert not torch.equal(model(inputs)[:, 20], model(changed)[:, 20])


def test_the_rate_rises_and_falls():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    assert rate(0, 1) == 1


def test_jobs_without_a_meaning_are_refused():
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        train(replace(TINY, mechanism="sofmax"))
    with pytest.raises(UnknownName, match="did you mean 'recall'"):
        train(replace(TINY, task="recal"))
    with pytest.raises(BadInput, match="at least 1"):
        train(replace(TINY, steps=0))
    with pytest.raises(BadInput, match="do not split into 3 heads"):
        train(replace(TINY, heads=3))
