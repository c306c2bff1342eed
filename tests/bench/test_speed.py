"""Facts about what is measured; never a time."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attlas
from attlas.bench import machine, speed
from attlas.bench.records import SpeedJob, SpeedResult
from attlas.core import registry
from attlas.core.errors import BadInput, Unsupported
from attlas.core.spec import Spec
from attlas.mechanisms.conv.pool import SPEC as POOL_SPEC
from attlas.mechanisms.conv.pool import Pool
from tests.contract.checks import TOLERANCE

N, DIM, HEADS = 48, 32, 4
JOB = SpeedJob("softmax", "auto", True, "forward", (N,), 2, DIM, HEADS, "float32", 1)
CAUSAL_PAIRS = 2 * HEADS * N * (N + 1) // 2
LINEAR = 2 * N * 4 * 2 * DIM * DIM
"""FLOPs of the four projections of two sequences."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.0)


# -- jobs --------------------------------------------------------------------------------------------------


def test_jobs_are_every_combination_with_both_baselines():
    jobs = speed.speed_jobs(
        ["pool", "softmax:gqa"],
        [16, (4, 5)],
        measures=("forward", "decode"),
        dtypes=("float32", "bfloat16"),
        causal=(False, True),
        params={"pool": {"size": 5}},
        threads=1,
    )
    assert len(jobs) == len(set(jobs)) == 4 * 2 * 2 * 2 * 2
    assert [(job.mechanism, job.backend, job.params) for job in jobs[:4]] == [
        ("softmax", "oracle", {}),
        ("softmax", "torch", {}),
        ("pool", "auto", {"size": 5}),
        ("softmax:gqa", "auto", {}),
    ]
    assert {job.grid for job in jobs[:4]} == {(16,)}
    assert {job.grid for job in jobs[4:8]} == {(4, 5)}


def test_mechanisms_of_a_size_take_turns(monkeypatch):
    order = []
    turn = speed._Trial.turn

    def record(trial):
        order.append((trial.call.job.backend, trial.call.job.mechanism, trial.call.job.grid))
        return turn(trial)

    monkeypatch.setattr(speed._Trial, "turn", record)
    records = list(speed.sweep(speed.speed_jobs(["pool"], [16, 32], dim=DIM, heads=HEADS, threads=1)))
    assert [record.failure for record in records] == [None] * 6
    row = [("oracle", "softmax"), ("torch", "softmax"), ("auto", "pool")]
    assert order == [(*each, (size,)) for size in (16, 32) for _ in range(speed.TURNS) for each in row]
    assert all(record.result.times.runs == speed.TURNS for record in records)


def test_a_sweep_stops_growing_what_is_too_slow():
    jobs = speed.speed_jobs(["pool"], [16, 32, 64], dim=DIM, heads=HEADS, threads=1)
    records = list(speed.sweep(jobs, max_seconds=0.0))
    assert [record.job for record in records] == jobs
    assert all(record.result for record in records[:3])
    for record in records[3:]:
        assert record.failure.error == "OverTime"
        assert record.failure.message.startswith("over the time limit of 0 s: ")
        assert record.failure.message.endswith(" at 16 tokens")


# -- what a result says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_forward_counts(causal):
    pairs = CAUSAL_PAIRS if causal else 2 * HEADS * N * N
    result = speed.measure(replace(JOB, causal=causal))
    assert result.pairs == pairs
    assert result.flops == LINEAR + 4 * pairs * (DIM // HEADS)
    assert result.executed == LINEAR + 4 * 2 * N * N * DIM
    assert result.backends == {"softmax_attention": "torch"}
    assert result.state_bytes == 0
    assert 0 <= result.oracle_error < 2e-5
    assert 0 < result.times.lower <= result.times.median <= result.times.upper
    assert min(result.gemm_rate, result.bandwidth) > 0


def test_backward_counts():
    """The field's 2.5 forwards for pairs, two for products; what ran is counted."""
    job = replace(JOB, backend="oracle", measure="forward+backward")
    result = speed.measure(job)
    attend = 4 * CAUSAL_PAIRS * (DIM // HEADS)
    assert result.flops == 3 * LINEAR + attend * 7 // 2
    assert result.executed == 3 * (LINEAR + 4 * 2 * N * N * DIM)
    assert result.backends == {"softmax_attention": "oracle"}


def test_a_layer_without_pairs_or_parameters():
    result = speed.measure(replace(JOB, mechanism="pool", measure="forward+backward"))
    assert (result.executed, result.pairs, result.backends) == (0, 0, {})
    assert result.flops == 3 * 2 * DIM * (3 * N - 3)


@pytest.mark.parametrize("measure", ["prefill", "decode"])
def test_the_state_behind_the_sequence(measure):
    cache = 2 * N * 2 * DIM * 4
    assert speed.measure(replace(JOB, measure=measure)).state_bytes == cache
    window = 2 * 2 * (DIM * 4 + 1)
    assert speed.measure(replace(JOB, mechanism="pool", measure=measure)).state_bytes == window


def test_decoding_counts_what_one_more_token_adds():
    result = speed.measure(replace(JOB, measure="decode"))
    assert result.pairs == 2 * HEADS * (N + 1)
    assert result.flops == LINEAR // N + 4 * result.pairs * (DIM // HEADS)
    assert result.executed == result.flops


def test_decoding_stays_behind_the_state():
    """Each chain starts behind N tokens, ends N / 32 later and grows one cache in place."""
    call = speed._call(replace(JOB, measure="decode", grid=(1600,)))
    for _ in range(2):
        call.rewind()
        assert call.state.position == call.chained.position == 1600
        storage = call.chained.attend.k._storage
        for _ in range(call.steps):
            call.step()
        assert call.chained.position == 1650
        assert call.chained.attend.k._storage is storage
        assert storage.data.shape[2] == 2 * 1599
        assert attlas.state_bytes(call.state) == 2 * 1600 * 2 * DIM * 4


def test_bytes_of_known_tensors():
    class Known:
        def rewind(self):
            self.kept = torch.zeros(500)

        def step(self):
            first = torch.zeros(1000)
            second = torch.zeros(2000)
            del first
            self.kept = torch.zeros(3000)  # what stood before gives nothing back
            del second

    assert speed.observe(Known()).peak_bytes == 4 * 5000


def test_bytes_inside_of_operators_are_seen():
    class Inside:
        x = torch.randn(1, 2, 64, 16)  # (B, H, N, D)

        def rewind(self):
            """There is no state to take back."""

        def step(self):
            with sdpa_kernel(SDPBackend.MATH):
                F.scaled_dot_product_attention(self.x, self.x, self.x)

    scores, tokens = 4 * 2 * 64 * 64, 4 * 2 * 64 * 16
    assert speed.observe(Inside()).peak_bytes == pytest.approx(2 * scores + 2 * tokens, rel=0.1)


def test_bytes_of_materialised_and_fused_attention():
    tokens = 4 * 256 * DIM
    scores = 4 * HEADS * 256 * 256
    long = replace(JOB, causal=False, grid=(256,), batch=1)
    materialised = speed.measure(replace(long, backend="oracle")).peak_bytes
    fused = speed.measure(replace(long, backend="torch")).peak_bytes
    assert materialised == pytest.approx(3 * tokens + 2 * scores, abs=64)
    assert fused < 3 * tokens + scores / 2


def test_the_prediction_of_bytes_holds():
    long = replace(JOB, backend="oracle", grid=(1280,))
    for job in (long, replace(long, measure="forward+backward"), replace(long, mechanism="pool")):
        seen = speed.observe(speed._call(job)).peak_bytes
        assert speed.predicted_bytes(job) == pytest.approx(seen, rel=0.02)


def test_threads_and_random_numbers_are_given_back():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    speed.measure(replace(JOB, threads=2))
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.rand(3), expected)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def oddities():
    """Three mechanisms, each wrong in one place, and one that rounding makes choose, while the test runs."""

    class WrongValues(Pool):
        def compute(self, x_BNC, context_BMC, call):
            return super().compute(x_BNC, context_BMC, call) * 1.001

    class WrongGradients(Pool):
        def compute(self, x_BNC, context_BMC, call):
            y = super().compute(x_BNC, context_BMC, call)
            return y.detach() + 0.999 * (y - y.detach())

    class WrongSteps(Pool):
        def advance(self, x_BNC, state, keep):
            y, after = super().advance(x_BNC, state, keep)
            return (y * 1.001 if x_BNC.shape[1] == 1 else y), after

    class Chooses(Pool):
        def compute(self, x_BNC, context_BMC, call):
            return super().compute(x_BNC, context_BMC, call).round()

        def oracle(self, x_BNC, context_BMC, call):
            return super().oracle(x_BNC, context_BMC, call).round()

    names = []
    for cls in (WrongValues, WrongGradients, WrongSteps, Chooses):
        spec = Spec(**{**vars(POOL_SPEC), "name": cls.__name__})
        registry.register(spec)(cls)
        names.append(spec.name)
    yield
    for name in names:
        del registry._mechanisms[name]


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("WrongValues", {"forward", "forward+backward", "prefill", "decode"}),
        ("WrongGradients", {"forward+backward"}),
        ("WrongSteps", {"decode"}),
    ],
)
@pytest.mark.usefixtures("oddities")
def test_a_red_oracle_refuses_what_it_touches(name, refused):
    measures = ("forward", "forward+backward", "prefill", "decode")
    for measure in measures:
        job = replace(JOB, mechanism=name, measure=measure)
        if measure in refused:
            with pytest.raises(speed.OracleMismatch, match=rf"refusing to report the .* speed of '{name}'"):
                speed.measure(job)
        else:
            assert isinstance(speed.measure(job), SpeedResult)


@pytest.mark.usefixtures("oddities")
def test_a_refusal_is_recorded_and_the_rest_is_measured():
    jobs = [replace(JOB, mechanism=name) for name in ("WrongValues", "softmax")]
    refused, measured = speed.sweep(jobs)
    assert refused.result is None
    assert refused.failure.error == "OracleMismatch"
    assert measured.failure is None
    assert measured.machine == machine.describe()


@pytest.mark.usefixtures("oddities")
def test_rounding_may_move_a_choice_as_far_as_it_moves_the_oracle():
    job = replace(JOB, mechanism="Chooses", dtype="bfloat16", grid=(128,))
    error = speed.measure(job).oracle_error
    assert error > TOLERANCE[torch.bfloat16]
    assert 2 * speed.measure(replace(job, backend="oracle")).oracle_error >= error


def test_tolerances_are_those_of_the_contract():
    assert speed.TOLERANCE == TOLERANCE


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"measure": "decode", "causal": False}, BadInput, "only a causal layer streams"),
        ({"measure": "prefill", "grid": (6, 8)}, BadInput, "prefill runs along one axis"),
        ({"mechanism": "pool", "grid": (6, 8)}, BadInput, "causal pooling runs along one axis"),
        ({"dtype": "int8"}, BadInput, "dtype is one of float64, float32, bfloat16, float16, got 'int8'"),
        ({"measure": "backward"}, BadInput, "measure is one of forward, .* got 'backward'"),
        ({"heads": 5}, BadInput, "heads must divide dim"),
        ({"mechanism": "sotfmax"}, attlas.core.errors.UnknownName, "did you mean 'softmax'"),
        ({"grid": (2, 2, 2, 6)}, BadInput, "one to three axes"),
    ],
)
def test_what_cannot_be_done_has_a_reason(changes, error, reason):
    job = replace(JOB, **changes)
    with pytest.raises(error, match=reason):
        speed.measure(job)
    (record,) = speed.sweep([job])
    assert record.failure.error == error.__name__
    assert record.result is None


def test_streaming_that_is_not_served_names_who_serves_it(monkeypatch):
    monkeypatch.setattr(registry.mechanism("pool"), "spec", replace(POOL_SPEC, streams=False))
    with pytest.raises(Unsupported, match="pool does not serve streaming"):
        speed.measure(replace(JOB, mechanism="pool", measure="decode"))


def test_what_does_not_fit_into_memory_is_not_tried(monkeypatch):
    huge = replace(JOB, backend="oracle", grid=(4_000_000,))
    with pytest.raises(speed.OutOfMemory, match=r"4000000 tokens needs about \d+\.\d GiB"):
        speed.measure(huge)
    monkeypatch.setattr(machine, "available_memory", lambda: 8 * 2**20)
    long = replace(JOB, causal=False, grid=(1024,), batch=1)
    with pytest.raises(speed.OutOfMemory):
        speed.measure(replace(long, backend="oracle"))
    assert speed.measure(replace(long, backend="torch")).peak_bytes < 8 * 2**20


# -- the machine ---------------------------------------------------------------------------------------------


def test_the_machine_is_described_in_words():
    here = machine.describe()
    assert set(here) == set(
        "processor cores instructions memory system python torch attlas threads".split()  # noqa: SIM905
    )
    assert all(isinstance(value, str) and value for value in here.values())
    assert here["threads"] == "1"
    assert here["torch"] == torch.__version__


def test_available_memory_heeds_the_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\n")
    assert machine.available_memory(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert machine.available_memory(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("4000000\n")
    (group / "memory.current").write_text("3000000\n")
    assert machine.available_memory(tmp_path) == 1_000_000
    (group / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    assert machine.available_memory(tmp_path) == 1_500_000


def test_rates_are_measured_once():
    assert math.isfinite(machine.gemm_rate(torch.float32, 1))
    assert machine.gemm_rate(torch.float32, 1) == machine.gemm_rate(torch.float32, 1)
    assert machine.bandwidth(1) == machine.bandwidth(1)
    assert torch.get_num_threads() == 1
