"""The CUDA kernel on fibers, its Python side with a stand-in driver, and NVRTC. What only a GPU shows is in test_cuda.py."""

import contextlib
import types
import warnings

import fibers
import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linprog

from Models.emd import ProblemError, SolverError, simplex_cuda
from Models.emd.simplex import solve_arrays

needs_compiler = pytest.mark.skipif(not fibers.has_compiler, reason="the fibers that stand in for a GPU need g++")
SIZES = [(1, 1), (1, 7), (7, 1), (9, 25), (25, 25), (33, 20), (40, 41)]
INVALID, UNEQUAL_TOTALS, NOT_CERTIFIED = 2, 3, 4


def highs(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> float:
    n, m = cost.shape
    sums = sparse.vstack([sparse.kron(sparse.eye(n), np.ones((1, m))), sparse.kron(np.ones((1, n)), sparse.eye(m))])
    return linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([supply, demand]), method="highs").fun


def problems(n: int, m: int, costs: str, weights: str, batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(n + 100 * m)
    cost = {
        "real": random.random((batch, n, m)) - 0.2,
        "tied": random.integers(0, 3, (batch, n, m)).astype(float),
        "constant": np.full((batch, n, m), 0.3),
        "forbidden": np.where(random.random((batch, n, m)) < 0.3, 1e13, random.random((batch, n, m))),
        "spread": 10.0 ** random.integers(-3, 9, (batch, n, m)) * random.random((batch, n, m)),
    }[costs]
    supply, demand = {
        "real": (random.random((batch, n)) + 0.01, random.random((batch, m)) + 0.01),
        "equal": (np.ones((batch, n)), np.ones((batch, m))),
        "integer": (random.integers(1, 4, (batch, n)).astype(float), random.integers(1, 4, (batch, m)).astype(float)),
        "zero": [random.integers(0, 3, (batch, k)) + (np.arange(k) == 0.0) for k in (n, m)],
    }[weights]
    return cost, supply, demand * (supply.sum(1) / demand.sum(1))[:, None]


def check(
    found: tuple[np.ndarray, ...], cost: np.ndarray, supply: np.ndarray, demand: np.ndarray, tolerance: float = 1e-12
):
    """Optimal by its own certificate: feasible flow, feasible duals, no gap between them. And the value is the flow's."""
    value, flow, u, v, _, status = found
    mass, dearest = supply.sum(1), (flow > 0).astype(float) * np.abs(cost)
    scale = np.maximum(dearest.max((1, 2)), np.median(np.abs(cost), (1, 2)))
    assert (status == 0).all()
    assert (flow >= 0).all()
    assert np.abs(flow.sum(2) - supply).max() <= tolerance * mass.max()
    assert np.abs(flow.sum(1) - demand).max() <= tolerance * mass.max()
    assert (u[:, :, None] + v[:, None] - cost <= 1e-5 * np.maximum(np.abs(cost), scale[:, None, None])).all()
    assert np.abs((cost * flow).sum((1, 2)) - value).max() <= tolerance * (scale * mass).max()
    assert (np.abs(value - (u * supply).sum(1) - (v * demand).sum(1)) <= 1e-5 * scale * mass).all()


@needs_compiler
@pytest.mark.parametrize("weights", ["real", "equal", "integer", "zero"])
@pytest.mark.parametrize("costs", ["real", "tied", "constant", "forbidden", "spread"])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_kernel_finds_the_optimum(n, m, costs, weights):
    given = problems(n, m, costs, weights)
    found = fibers.solve(*given)
    check(found, *given)
    for index, one in enumerate(zip(*given, strict=True)):
        assert found[0][index] == pytest.approx(highs(*one), rel=1e-7, abs=1e-12)


@needs_compiler
@pytest.mark.parametrize("costs", ["real", "tied"])
def test_the_kernel_agrees_with_the_one_on_the_cpu(costs):
    given = problems(25, 25, costs, "real", batch=20)
    value, flow, *_ = fibers.solve(*given)
    expected = solve_arrays(*given)
    assert value == pytest.approx(expected[0], rel=1e-13)
    if costs == "real":  # the optimum is unique
        assert flow == pytest.approx(expected[1], abs=1e-12)


@needs_compiler
@pytest.mark.parametrize("price", [1e3, 1e6, 1e20])
@pytest.mark.parametrize("real", ["float", "double"])
def test_rounding_of_the_weights_crosses_no_forbidden_cell(real, price):
    """Groups of the same mass, forbidden to each other, whose weights add up to the same only but for rounding."""
    dtype = np.float32 if real == "float" else np.float64
    cost, *weights = (part.astype(dtype) for part in problems(24, 24, "real", "real"))
    groups = np.arange(24) // 6
    cost[:, groups[:, None] != groups] = price
    weights = [(part.reshape(2, 4, 6) / part.reshape(2, 4, 6).sum(2, keepdims=True)).reshape(2, 24) for part in weights]
    value, flow, *_ = fibers.solve(cost, *weights, real=real)
    precision = np.finfo(dtype).eps
    doubles = [part.astype(float) for part in (cost, *weights)]
    assert value == pytest.approx(solve_arrays(*doubles, precision=precision)[0], rel=10 * precision)
    assert not flow[:, groups[:, None] != groups].any()


@needs_compiler
def test_prices_that_a_far_cheaper_unused_cell_hides_are_not_certified():
    cost, supply, demand = problems(9, 25, "real", "real")
    cost[1, 3], supply[1, 3] = -1e8, 0
    demand[1] *= supply[1].sum() / demand[1].sum()
    assert fibers.solve(cost, supply, demand)[-1].tolist() == [0, NOT_CERTIFIED]


@needs_compiler
@pytest.mark.parametrize("variant", [{"architecture": 750}, {"shared": True}, {"architecture": 750, "shared": True}])
def test_every_variant_takes_the_same_pivots(variant):
    """To the bit: with or without reductions in hardware, the tile in registers or in shared memory."""
    given = problems(9, 25, "real", "integer", batch=5)
    for expected, found in zip(fibers.solve(*given), fibers.solve(*given, **variant), strict=True):
        assert np.array_equal(expected, found)


@needs_compiler
def test_float32_stays_float32():
    cost, supply, demand = (part.astype(np.float32) for part in problems(25, 25, "real", "real"))
    found = fibers.solve(cost, supply, demand, real="float")
    assert all(part.dtype == np.float32 for part in found[:4])
    assert found[0] == pytest.approx(fibers.solve(cost, supply, demand)[0], rel=1e-6)


@needs_compiler
@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        (0, np.nan, INVALID),
        (0, np.inf, INVALID),
        (0, -np.inf, INVALID),
        (1, -0.1, INVALID),
        (1, np.nan, INVALID),
        (2, np.inf, INVALID),
        (2, 100.0, UNEQUAL_TOTALS),
    ],
)
def test_a_fault_spoils_its_own_problem_only(part, value, expected):
    given = problems(9, 25, "real", "real", batch=3)
    given[part][1].flat[2] = value
    found = fibers.solve(*given)
    assert found[-1].tolist() == [0, expected, 0]
    for answer in found[:4]:
        assert np.isnan(answer[1]).all()
        assert np.isfinite(answer[[0, 2]]).all()


@needs_compiler
@pytest.mark.parametrize("size", [(9, 25), (25, 25)])
def test_masses_and_costs_too_small_for_their_powers_of_two_come_to_an_end(size):
    cost, supply, demand = problems(*size, "real", "real")
    flow = fibers.solve(cost, supply, demand)[1]
    small = fibers.solve(cost, supply * 1e-305, demand * 1e-305)
    assert not small[-1].any()
    assert small[1] == pytest.approx(flow * 1e-305, rel=1e-6, abs=1e-315)
    assert fibers.solve(cost * 1e-305, supply, demand)[-1].tolist() == [NOT_CERTIFIED] * 2


@needs_compiler
def test_costs_whose_range_is_too_large_are_invalid():
    cost, supply, demand = problems(9, 25, "real", "real")
    cost[1, 0, 0], cost[1, 1, 1] = 1.7e308, -1.7e308
    assert fibers.solve(cost, supply, demand)[-1].tolist() == [0, INVALID]


@needs_compiler
def test_no_mass_moves_nothing():
    cost = problems(9, 25, "real", "real")[0]
    value, flow, u, v, _, status = fibers.solve(cost, np.zeros((2, 9)), np.zeros((2, 25)))
    assert (status == 0).all()
    assert not value.any()
    assert not flow.any()
    assert (u[:, :, None] + v[:, None] <= cost + 1e-6).all()


# --- The Python side ---------------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")  # the first stands in for the second
ANY_CUDA = torch.device("cuda")


@pytest.fixture
def stand_in(monkeypatch):
    """NVRTC as it is, and a driver that launches on fibers. Compiling needs no GPU."""
    try:
        nvrtc = simplex_cuda._load_nvrtc()
    except (OSError, AttributeError):
        pytest.skip("this build of PyTorch has no NVRTC")

    class StandIn(simplex_cuda.Libraries):
        def __init__(self):
            self.nvrtc, self.driver, self.launches = nvrtc, None, 0

        def launch(self, kernel, stream, problems, arguments):
            cost = arguments[0]
            real = "double" if cost.dtype == torch.float64 else "float"
            self.driver = fibers.build(*cost.shape[1:], real)
            self.launches += 1
            super().launch(kernel._replace(function=kernel.function or 1), stream, problems, arguments)

        def load(self, image):
            self.driver = fibers.build(9, 25)
            return super().load(image)

    libraries = StandIn()
    monkeypatch.setattr(simplex_cuda, "_libraries", lambda: libraries)
    monkeypatch.setattr(simplex_cuda, "_fault_counters", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    real_device = torch.device
    monkeypatch.setattr(simplex_cuda.torch, "device", lambda *name: CPU if name[0] == "cuda" else real_device(*name))
    for cached in (simplex_cuda._kernel, simplex_cuda._try, simplex_cuda._warn_once):
        cached.cache_clear()
    yield libraries
    for cached in (simplex_cuda._kernel, simplex_cuda._try, simplex_cuda._warn_once):
        cached.cache_clear()


def tensors(*size: str | int, batch: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.from_numpy(part).to(dtype) for part in problems(*size, batch=batch)]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_call_compiles_launches_and_returns_the_optimum(stand_in, dtype):
    given = tensors(9, 25, "real", "real", batch=6, dtype=dtype)  # six problems, four in a block
    found = simplex_cuda.solve_tensors(*given)
    assert {part.dtype for part in found[:4]} == {dtype}
    expected = solve_arrays(*(part.double().numpy() for part in given))
    assert found.value.numpy() == pytest.approx(expected[0], rel=1e-6)
    simplex_cuda.settle(CPU)


@needs_compiler
@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [(0, np.nan, ProblemError, "not finite"), (2, 9.0, ProblemError, "different totals")],
)
def test_settle_raises_what_the_device_met_and_forgets_it(stand_in, part, value, error, message):
    simplex_cuda.settle(CPU)
    given = tensors(9, 25, "real", "real")
    given[part][1].flatten()[0] = value
    assert simplex_cuda.solve_tensors(*given).value.isnan().tolist() == [False, True, False]
    with pytest.raises(error, match=message):
        simplex_cuda.settle(CPU)
    simplex_cuda.settle(CPU)


@needs_compiler
def test_settle_asks_every_device_unless_one_is_named(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    given = tensors(9, 25, "real", "real")
    given[0][1, 0, 0] = torch.nan
    for device in (None, ANY_CUDA):
        simplex_cuda.solve_tensors(*given)
        simplex_cuda.settle(CUDA)
        with pytest.raises(ProblemError, match="not finite"):
            simplex_cuda.settle(device)


def test_a_first_use_inside_a_capture_is_an_error_and_not_remembered(stand_in, monkeypatch):
    def capturing(*given):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(simplex_cuda, "solve_tensors", capturing)
        with pytest.raises(SolverError, match="9 x 25 nodes by simplex before a CUDA graph .*is capturing"):
            simplex_cuda.is_usable(CUDA, 9, 25, torch.float64)
    monkeypatch.setattr(simplex_cuda, "certificate_fault", lambda *given: None)
    monkeypatch.setattr(simplex_cuda, "solve_tensors", lambda *given: None)
    assert simplex_cuda.is_usable(CUDA, 9, 25, torch.float64)


@needs_compiler
def test_a_size_is_tried_once_before_it_is_used(stand_in, recwarn):
    assert simplex_cuda.is_usable(CUDA, 9, 25, torch.float64)
    assert simplex_cuda.is_usable(CUDA, 9, 25, torch.float64)
    assert stand_in.launches == 1
    assert not recwarn.list


@needs_compiler
@pytest.mark.parametrize("fault", ["flow", "u", "value", "status"])
def test_wrong_answers_at_first_use_are_reported_once_and_the_cpu_takes_over(stand_in, monkeypatch, fault):
    real = simplex_cuda.solve_tensors

    def wrong(*given):
        if fault == "status":
            given[0][0, 0, 0] = torch.nan
        solution = real(*given)
        return solution._replace(**{fault: getattr(solution, fault) * 1.001})

    monkeypatch.setattr(simplex_cuda, "solve_tensors", wrong)
    with pytest.warns(RuntimeWarning, match="simplex runs on the CPU: .*wrong answers"):
        assert not simplex_cuda.is_usable(CUDA, 9, 25, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not simplex_cuda.is_usable(CUDA, 9, 25, torch.float64)
    simplex_cuda.settle()  # the trial is no problem of the caller


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (lambda patch: None, (65, 9), "more than 64 nodes"),
        (lambda patch: patch.setattr(torch.version, "cuda", None), (9, 9), "no CUDA"),
        (
            lambda patch: patch.setattr(simplex_cuda, "source", lambda: "no CUDA text"),
            (9, 9),
            "cannot be built or started",
        ),
        (
            lambda patch: patch.setattr(simplex_cuda, "_libraries", lambda: simplex_cuda.ctypes.CDLL("libmissing.so")),
            (9, 9),
            "libmissing",
        ),
    ],
)
def test_what_is_missing_is_reported_and_the_cpu_takes_over(stand_in, monkeypatch, change, size, message):
    change(monkeypatch)
    with pytest.warns(RuntimeWarning, match=message):
        assert not simplex_cuda.is_usable(CUDA, *size, torch.float64)


SIZED = [*((f"sm_{number}", (9, 25)) for number in (75, 80, 90, 100, 120)), ("sm_90", (41, 64))]


@pytest.mark.parametrize(("architecture", "size"), SIZED)
def test_nvrtc_compiles_for_every_architecture(stand_in, architecture, size):
    options, _ = simplex_cuda.compile_options(architecture, *size, torch.float32)
    assert stand_in.compile(simplex_cuda.source(), options)[:4] == b"\x7fELF"


@needs_compiler
def test_a_certificate_proves_optimality_and_nothing_else_passes():
    given = tensors(9, 25, "real", "real")
    answer = simplex_cuda.Solution(
        *(torch.from_numpy(part) for part in fibers.solve(*(part.numpy() for part in given)))
    )
    assert simplex_cuda.certificate_fault(*given, answer) is None
    spread = given[1].unsqueeze(2) * given[2].unsqueeze(1) / given[1].sum(1)[:, None, None]  # feasible, and dear
    dear = answer._replace(flow=spread, value=(spread * given[0]).sum((1, 2)))
    assert simplex_cuda.certificate_fault(*given, dear) == "duality gap"
    assert simplex_cuda.certificate_fault(*given, answer._replace(u=answer.u + 1e-3)) == "duals, duality gap"
