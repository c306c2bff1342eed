"""Whole image networks in the workbench: counted, measured, trained on pictures, reported."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import attlas
from attlas import models
from attlas.bench import machine, networks
from attlas.bench.macs import macs
from attlas.bench.memory import peak_memory
from attlas.bench.network import PictureNetwork, count_parameters
from attlas.bench.networks import measure, network_jobs, oracle_error, sweep
from attlas.bench.records import Failure, NetworkJob, NetworkResult, QualityJob, Record, Times, from_json, key, to_json
from attlas.bench.report.digest import Digest
from attlas.bench.report.html import write_html
from attlas.bench.runner import compare_jobs
from attlas.bench.tasks import TASKS
from attlas.bench.tasks.images import DIGIT, SIDE, Images
from attlas.bench.training import train
from attlas.core.errors import BadInput
from attlas.core.mechanism import Mechanism

TINY = NetworkJob("vit_micro", side=32, batch=2, threads=1)


def test_macs_count_mechanisms_by_formula_and_all_else_as_it_multiplies():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 2, 2, bias=False)
            self.mix = attlas.mixer("softmax", 8, 2)

        def forward(self, x):
            return self.mix(self.conv(x).flatten(2).transpose(1, 2))

    model = Two()
    projections, pairs = 4 * 16 * 8 * 8, 2 * 16 * 16 * 8
    assert macs(model, torch.zeros(1, 3, 8, 8)) == 16 * 8 * 12 + projections + pairs
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 16, 8), "it runs as before"


def test_a_network_is_measured():
    result = measure(TINY)
    net = models.create("vit_micro", img_size=32)
    assert result.parameters == count_parameters(net)
    assert result.macs == macs(net, torch.zeros(1, 3, 32, 32))
    assert 0 < result.single.lower <= result.single.median <= result.single.upper
    assert result.single.runs >= networks.LEAST
    assert result.peak_bytes >= 17 * 64 * 4, "the tokens at least"
    assert result.oracle_error < 1e-5


def test_a_family_that_is_off_its_oracle_is_not_measured(monkeypatch):
    monkeypatch.setattr(networks, "oracle_error", lambda name: 0.1)
    (record,) = sweep([TINY])
    assert record.failure.error == "OracleMismatch"
    assert record.result is None


def test_oracle_error_sees_a_wrong_mechanism(monkeypatch):
    from attlas.mechanisms.softmax.softmax import Softmax

    right = Softmax.compute
    monkeypatch.setattr(Softmax, "compute", lambda self, *args: 1.1 * right(self, *args))
    oracle_error.cache_clear()
    assert oracle_error("vit_micro") > networks.ALLOWED
    oracle_error.cache_clear()


def test_every_small_size_of_the_family_clears_a_network(monkeypatch):
    from attlas.mechanisms.conv.pool import Pool

    right = Pool.compute
    monkeypatch.setattr(Pool, "compute", lambda self, *args: 5 * right(self, *args))
    oracle_error.cache_clear()
    (record,) = sweep([NetworkJob("poolformer_s12", side=32, batch=1, threads=1)])
    oracle_error.cache_clear()
    assert record.failure.error == "OracleMismatch"


def test_the_small_sizes_hold_every_mechanism_of_the_published_ones():
    def inside(name):
        with torch.device("meta"):
            net = models.create(name)
        return {module.spec.name for module in net.modules() if isinstance(module, Mechanism)}

    published = [name for name in models.models(task="classification") if name in models.figures()]
    for name in {models.model(name).build: name for name in published}.values():
        missing = inside(name).difference(*map(inside, networks._smallest(name)))
        assert not missing, f"{name} has {missing}, which no small size of its family proves"


def test_counting_leaves_every_part_in_its_mode():
    net = models.create("resnet_micro").train()
    frozen = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    macs(net, torch.zeros(1, 3, 64, 64))
    assert net.training
    assert not frozen.training


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 10_000)
    (record,) = sweep([TINY])
    assert record.failure.error == "OutOfMemory"


def test_jobs_without_a_meaning():
    with pytest.raises(BadInput, match="float32 or bfloat16"):
        network_jobs(["vit_micro"], dtype="float64")
    for given in ({"batch": 0}, {"side": 0}, {"threads": 0}):
        with pytest.raises(BadInput, match="at least 1"):
            network_jobs(["vit_micro"], **given)


def test_records_come_back_as_they_were():
    record = Record(TINY, measure(TINY), None, machine.describe())
    assert from_json(json.loads(json.dumps(to_json(record)))) == record
    assert key(TINY) != key(replace(TINY, side=64))


def made_up(name, parameters, seconds):
    times = Times(seconds, 0.9 * seconds, 1.1 * seconds, 5)
    result = NetworkResult(parameters, 2 * 10**9, times, replace(times, median=8 * seconds), 2**20, 1e-6)
    return Record(NetworkJob(name), result, None, {"torch": "2.15.0"})


def test_the_report_ranks_draws_and_finds(tmp_path):
    failed = Record(NetworkJob("vit_large"), None, Failure("OutOfMemory", "too <large>"), {"torch": "2.15.0"})
    records = [made_up("vit_tiny", 5_000_000, 0.02), made_up("poolformer_s12", 9_000_000, 0.01), failed]
    digest = Digest(records)
    (table,) = digest.networks
    assert list(table.rows) == ["poolformer_s12", "vit_tiny", "vit_large"]
    assert table.images_per_second("vit_tiny") == pytest.approx(50)
    assert "0 to 10 M parameters poolformer_s12 with 100 images/s" in digest.findings[0].text
    page = write_html(records, tmp_path / "r.html", command="x", machine={}).read_text()
    assert "vit_tiny: 50.0 images/s, 5.00 M parameters, 2.00 GMACs" in page
    assert "OutOfMemory: too &lt;large&gt;" in page
    assert "77.2" in page, "published accuracy"


def test_a_network_that_is_gone_does_not_cost_the_report(tmp_path):
    gone = replace(made_up("x", 1_000_000, 0.1), job=NetworkJob("gone_tiny"))
    assert "gone_tiny" in write_html([gone], tmp_path / "r.html", command="x", machine={}).read_text()


def test_peak_memory_of_known_allocations():
    with peak_memory() as peak:
        a = torch.zeros(1 << 18)
        b = torch.zeros(1 << 18)
        del a
        c = torch.zeros(1 << 18)
    assert peak.bytes == 2 << 20
    assert b.sum() + c.sum() == 0


def test_pictures_are_digits_on_photographs():
    task = Images()
    batch = next(task.batches(0, 6))
    pictures = task.pictures(batch.inputs)
    assert pictures.shape == (6, 3, SIDE, SIDE)
    again = task.pictures(next(task.batches(0, 6)).inputs)
    assert torch.equal(pictures, again)
    bright = (pictures * 0.25 + 0.5 > 0.51).all(1)  # backgrounds are darkened by half
    assert (bright.flatten(1).sum(1) > 20).all()
    for picture in bright:
        rows, columns = picture.nonzero().unbind(1)
        assert max(rows.max() - rows.min(), columns.max() - columns.min()) < DIGIT
    held_out = task.held_out()["all"][0]
    assert len(held_out.inputs) == 2 * 360
    assert held_out.targets.bincount().min() > 60


def quality(name, **changes):
    sizes = {"steps": 3, "batch": 2, "length": 256, "dim": 16, "heads": 2, "layers": 1, "parameters": 0}
    return QualityJob(mechanism=name, task="images", seed=0, label=name, **sizes | changes)


def test_a_network_is_trained_on_pictures_as_it_is():
    result = train(quality("poolformer_micro"))
    net = models.create("poolformer_micro", num_classes=10, img_size=SIDE)
    assert result.parameters == count_parameters(net)
    assert result.mixer_parameters == 0
    assert 0 <= result.value <= 1
    assert train(quality("vit_micro")).mixer_parameters == 4 * 4 * (64 * 64 + 64)


def test_networks_are_compared_with_networks_and_refused_where_there_are_no_pictures():
    jobs = compare_jobs(["poolformer_micro"], ["images"], baseline="vit_micro", seeds=1)
    assert [job.label for job in jobs] == ["vit_micro", "poolformer_micro", "vit_micro (again)"]
    assert {job.parameters for job in jobs} == {
        count_parameters(models.create("vit_micro", num_classes=10, img_size=SIDE))
    }
    with pytest.raises(BadInput, match="the text task has none of; take images"):
        PictureNetwork(TASKS["text"](64), "vit_micro")
    with pytest.raises(BadInput, match="no pictures"):
        TASKS["text"](64).pictures(torch.zeros(1, 1, 1))
    with pytest.raises(BadInput, match="16 x 16 patches"):
        Images(64)
