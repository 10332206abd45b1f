"""The EMD layer: known answers, properties, gradients, errors."""

import importlib
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

import Models.emd
from Models.emd import (
    SOLVERS,
    MissingLibraryError,
    ProblemError,
    SolverError,
    emd,
    interior_point,
    on_cpu,
    scale_to_mass,
)

EXACT = ["opencv", "simplex"]
EVERY = list(SOLVERS)
# float32 arithmetic inside cv2; the quadratic term of ipm; qpth stops near 1e-4 of the mass
TOLERANCE = {"opencv": 1e-5, "simplex": 1e-7, "ipm": 1e-5, "qpth": 2e-3}


def problem(n: int, m: int, seed: int = 0, batch: int = 1, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, n, m, generator=random, dtype=dtype)
    supply = scale_to_mass(torch.rand(batch, n, generator=random, dtype=dtype) + 0.05, n)
    demand = scale_to_mass(torch.rand(batch, m, generator=random, dtype=dtype) + 0.05, n)
    return cost, supply, demand


def highs(cost: torch.Tensor, supply: torch.Tensor, demand: torch.Tensor) -> float:
    n, m = cost.shape
    cells = np.eye(n * m).reshape(n, m, n * m)
    # The last constraint follows from the others, and rounding would make it contradict them.
    constraints, bounds = np.concatenate([cells.sum(1), cells.sum(0)])[:-1], np.concatenate([supply, demand])[:-1]
    return linprog(cost.flatten(), A_eq=constraints, b_eq=bounds, method="highs").fun


@pytest.mark.parametrize("solver", EVERY)
class TestKnownAnswers:
    def test_one_cell(self, solver):
        result = emd(torch.tensor([[0.25]]), torch.tensor([2.0]), torch.tensor([2.0]), solver=solver)
        torch.testing.assert_close(result.value, torch.tensor(0.5), atol=1e-4, rtol=0)
        torch.testing.assert_close(result.flow, torch.tensor([[2.0]]), atol=1e-4, rtol=0)

    def test_planted_permutation(self, solver):
        order = torch.tensor([2, 0, 3, 1])
        cost = torch.ones(4, 4)
        cost[torch.arange(4), order] = 0.1
        result = emd(cost, torch.ones(4), torch.ones(4), solver=solver)
        assert abs(result.value.item() - 0.4) < 4 * TOLERANCE[solver]
        assert result.flow.argmax(1).tolist() == order.tolist()

    def test_points_on_a_line(self, solver):
        # Between sorted samples of equal weight, the i-th goes to the i-th.
        random = np.random.RandomState(3)
        left, right = np.sort(random.rand(5)), np.sort(random.rand(5))
        cost = torch.from_numpy(np.abs(left[:, None] - right[None]))
        weight = torch.ones(5, dtype=torch.float64)
        assert abs(emd(cost, weight, weight, solver=solver).value - np.abs(left - right).sum()) < 5 * TOLERANCE[solver]

    def test_identical_distributions(self, solver):
        points = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
        weight = scale_to_mass(torch.arange(1.0, 6.0), 5)
        assert (
            emd(torch.cdist(points, points), weight, weight, solver=solver).value.abs() < 5 * TOLERANCE[solver] + 1e-3
        )

    def test_one_source(self, solver):
        cost, demand = torch.tensor([[0.3, 0.1, 0.9]]), torch.tensor([0.5, 0.25, 0.25])
        result = emd(cost, torch.ones(1), demand, solver=solver)
        torch.testing.assert_close(result.flow[0], demand, atol=2e-3, rtol=0)

    def test_uniform_weights_are_an_assignment(self, solver):
        cost, _, _ = problem(5, 5, seed=4)
        ones = torch.ones(1, 5, dtype=torch.float64)
        rows, columns = linear_sum_assignment(cost[0])
        expected = float(cost[0][rows, columns].sum())
        assert abs(emd(cost, ones, ones, solver=solver).value.item() - expected) < 5 * TOLERANCE[solver]

    @pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 5), (5, 2), (5, 5)])
    def test_against_highs(self, solver, n, m):
        cost, supply, demand = problem(n, m, seed=n + 10 * m, batch=3)
        values = emd(cost, supply, demand, solver=solver).value
        for k in range(3):
            assert abs(values[k].item() - highs(cost[k], supply[k], demand[k])) < n * TOLERANCE[solver]


@pytest.mark.parametrize("solver", EVERY)
class TestProperties:
    def test_marginals(self, solver):
        cost, supply, demand = problem(4, 5, batch=3)
        flow = emd(cost, supply, demand, solver=solver).flow
        torch.testing.assert_close(flow.sum(2), supply, atol=5e-3, rtol=0)
        torch.testing.assert_close(flow.sum(1), demand, atol=5e-3, rtol=0)
        assert flow.min() > -1e-3

    def test_symmetry_linearity_shift(self, solver):
        cost, supply, demand = problem(4, 4, seed=5)
        value = emd(cost, supply, demand, solver=solver).value
        close = {"atol": 4 * TOLERANCE[solver], "rtol": 0}
        torch.testing.assert_close(emd(cost.mT, demand, supply, solver=solver).value, value, **close)
        torch.testing.assert_close(emd(2 * cost, supply, demand, solver=solver).value, 2 * value, **close)
        torch.testing.assert_close(emd(cost + 0.5, supply, demand, solver=solver).value, value + 0.5 * 4, **close)

    def test_batch_equals_loop(self, solver):
        cost, supply, demand = problem(4, 3, batch=40)
        together = emd(cost, supply, demand, solver=solver)
        for k in (0, 17, 39):
            alone = emd(cost[k], supply[k], demand[k], solver=solver)
            torch.testing.assert_close(alone.value, together.value[k], atol=4 * TOLERANCE[solver], rtol=0)

    def test_leading_axes_dtype_and_purity(self, solver):
        cost, supply, demand = problem(3, 4, batch=6, dtype=torch.float32)
        before = [tensor.clone() for tensor in (cost, supply, demand)]
        value, flow = emd(cost.view(2, 3, 3, 4), supply.view(2, 3, 3), demand.view(2, 3, 4), solver=solver)
        assert value.shape == (2, 3)
        assert flow.shape == (2, 3, 3, 4)
        assert value.dtype == flow.dtype == torch.float32
        assert not flow.requires_grad
        assert emd(cost.double(), supply.double(), demand.double(), solver=solver).value.dtype == torch.float64
        for tensor, copy in zip((cost, supply, demand), before, strict=True):
            assert torch.equal(tensor, copy)

    def test_empty_batch(self, solver):
        cost = torch.zeros(0, 3, 4, requires_grad=True)
        value, flow = emd(cost, torch.zeros(0, 3), torch.zeros(0, 4), solver=solver)
        assert value.shape == (0,)
        assert flow.shape == (0, 3, 4)
        value.sum().backward()
        assert cost.grad.shape == (0, 3, 4)

    def test_no_grad_and_autocast(self, solver):
        cost, supply, demand = problem(3, 3, dtype=torch.float32)
        expected = emd(cost, supply, demand, solver=solver).value
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = emd(cost, supply, demand, solver=solver).value
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, atol=0, rtol=0)

    def test_from_threads(self, solver):
        cost, supply, demand = problem(4, 4, batch=40)
        expected = emd(cost, supply, demand, solver=solver).value
        found = {}

        def work(number):
            found[number] = emd(cost, supply, demand, solver=solver).value

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(4):
            torch.testing.assert_close(found[number], expected, atol=1e-6, rtol=0)


class TestGradients:
    def test_opencv_is_the_flow_and_nothing_else(self):
        cost, supply, demand = (tensor.requires_grad_() for tensor in problem(4, 5))
        result = emd(cost, supply, demand, solver="opencv")
        result.value.sum().backward()
        torch.testing.assert_close(cost.grad, result.flow)
        assert supply.grad is None
        assert demand.grad is None

    @pytest.mark.parametrize("form", ["L2", "QP"])
    def test_qpth_reaches_cost_and_weights(self, form):
        # A strong quadratic term, so that the solution is smooth and a finite difference means something. The weights
        # are scaled inside, because the problem is defined for equal totals only.
        cost, supply, demand = problem(3, 3, seed=2)
        options = {"form": form, "l2_strength": 0.3} if form == "L2" else {"form": form}

        def value(cost, supply, demand):
            return emd(cost, scale_to_mass(supply, 3), scale_to_mass(demand, 3), solver="qpth", **options).value

        inputs = tuple(tensor.clone().requires_grad_() for tensor in (cost, supply, demand))
        assert torch.autograd.gradcheck(value, inputs, eps=1e-4, atol=2e-2 if form == "QP" else 2e-3)

    def test_simplex_cost_gradient_is_that_of_opencv(self):
        cost, supply, demand = (tensor.requires_grad_() for tensor in problem(4, 5, batch=2))
        emd(cost, supply, demand, solver="simplex", gradient="cost").value.sum().backward()
        assert supply.grad is None
        assert demand.grad is None
        expected = torch.autograd.grad(emd(cost, supply, demand, solver="opencv").value.sum(), cost)[0]
        torch.testing.assert_close(cost.grad, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 4), (5, 3), (1, 3), (4, 1)])
    def test_simplex_by_finite_differences(self, n, m):
        # The value is piecewise linear in each argument: between kinks a finite difference is exact.
        def value(cost, supply, demand):
            return emd(cost, scale_to_mass(supply, 2), scale_to_mass(demand, 2), solver="simplex").value

        inputs = tuple(tensor.requires_grad_() for tensor in problem(n, m, seed=n, batch=2))
        assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-6)

    @pytest.mark.parametrize("form", ["L2", "QP"])
    @pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 4), (4, 2)])
    def test_ipm_by_finite_differences(self, form, n, m):
        options = {"form": form, "l2_strength": 0.3} if form == "L2" else {"form": form}

        def both(cost, supply, demand):
            weights = scale_to_mass(supply, 2), scale_to_mass(demand, 2)
            return tuple(emd(cost, *weights, solver="ipm", differentiable_flow=True, **options))

        inputs = tuple(tensor.requires_grad_() for tensor in problem(n, m, seed=3, batch=2))
        assert torch.autograd.gradcheck(both, inputs, eps=1e-5, atol=1e-3 if form == "QP" else 1e-4)

    @pytest.mark.parametrize("form", ["L2", "QP"])
    @pytest.mark.parametrize(
        ("n", "m"),
        [(3, 3), (5, 4), pytest.param(13, 13, marks=pytest.mark.slow), pytest.param(25, 25, marks=pytest.mark.slow)],
    )
    def test_ipm_is_qpth(self, form, n, m):
        found = {}
        for solver in ("qpth", "ipm"):
            cost, supply, demand = (tensor.requires_grad_() for tensor in problem(n, m, seed=1, batch=2))
            # A quadratic term that matters, so that both solve a problem that is not the linear one.
            weights = scale_to_mass(supply, n), scale_to_mass(demand, n)
            value = emd(cost, *weights, solver=solver, form=form, l2_strength=0.1).value
            value.sum().backward()
            found[solver] = value.detach(), cost.grad, supply.grad, demand.grad
        torch.testing.assert_close(found["ipm"][0], found["qpth"][0], atol=1e-4 * n, rtol=0)
        for ours, theirs in zip(found["ipm"][1:], found["qpth"][1:], strict=True):
            assert (ours - theirs).norm() < 5e-3 * theirs.norm()

    def test_simplex_is_the_limit_of_ipm(self):
        cost, supply, demand = problem(8, 8, seed=6, batch=4)
        exact = emd(cost, supply, demand, solver="simplex").value
        gaps = [
            (emd(cost, supply, demand, solver="ipm", l2_strength=strength).value - exact).abs().max().item()
            for strength in (1e-1, 1e-3, 1e-6)
        ]
        assert gaps[0] > gaps[1] >= gaps[2] - 1e-9
        assert gaps[2] < 1e-6

    def test_subgradient_inequality_where_the_optimum_is_not_unique(self):
        # Ties everywhere. The value is concave in the cost and convex in the weights, so a linear model with the
        # gradient given must bound it from above in the one, from below in the other.
        random = torch.Generator().manual_seed(0)
        for seed in range(20):
            cost = torch.randint(0, 3, (5, 5), generator=random).double()
            one = torch.ones(5, dtype=torch.float64)
            inputs = [cost.clone().requires_grad_(), one.clone().requires_grad_(), one.clone().requires_grad_()]
            value = emd(*inputs, solver="simplex").value
            value.backward()
            other_cost, other_supply, other_demand = (tensor[0] for tensor in problem(5, 5, seed=seed))
            at_other_cost = emd(other_cost, one, one, solver="simplex").value
            assert at_other_cost <= value + (inputs[0].grad * (other_cost - cost)).sum() + 1e-9
            at_others = emd(cost, other_supply, other_demand, solver="simplex").value
            change = inputs[1].grad @ (other_supply - one) + inputs[2].grad @ (other_demand - one)
            assert at_others >= value + change - 1e-9

    def test_qpth_gradient_can_be_taken_twice(self):
        cost, supply, demand = problem(3, 3)
        cost.requires_grad_()
        value = emd(cost, supply, demand, solver="qpth").value.sum()
        first = torch.autograd.grad(value, cost, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(value, cost)[0])


class TestErrors:
    ok = (torch.rand(2, 3, 4), torch.ones(2, 3), torch.full((2, 4), 0.75))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: torch.rand(2, 3, 4).half()}, "float32 or float64"),
            ({0: torch.rand(4)}, "expected cost"),
            ({1: torch.ones(2, 4)}, r"expected supply \(2, 3\)"),
            ({2: torch.ones(4)}, r"expected demand \(2, 4\)"),
            ({0: torch.full((2, 3, 4), math.nan)}, "problem 0 of 2: cost has entries that are not finite"),
            ({1: torch.tensor([[1.0, 1, 1], [4, -1, 0]])}, "problem 1 of 2: supply .* negative"),
            ({2: torch.full((2, 4), math.inf)}, "demand .* not finite"),
            ({2: torch.ones(2, 4)}, r"different totals; scale both with scale_to_mass \(3 and 4\)"),
            ({0: [[1.0]]}, "expected cost to be a tensor; got list"),
        ],
    )
    @pytest.mark.parametrize("solver", EVERY)
    def test_bad_problem(self, solver, change, message):
        given_ = [change.get(k, tensor) for k, tensor in enumerate(self.ok)]
        with pytest.raises(ProblemError, match=message):
            emd(*given_, solver=solver)

    @pytest.mark.parametrize("solver", EVERY)
    def test_values_are_checked_once_and_by_the_flattened_index(self, solver, monkeypatch):
        cost, supply, demand = (tensor.unflatten(0, (2, 3)) for tensor in problem(3, 4, batch=6))
        checked = []
        for module in (Models.emd, on_cpu):
            real = module.check_values
            monkeypatch.setattr(module, "check_values", lambda *given_, real=real: (checked.append(1), real(*given_)))
        emd(cost, supply, demand, solver=solver)
        assert checked == [1]
        supply[1, 2, 0] = -1
        with pytest.raises(ProblemError, match="problem 5 of 6: supply has entries that are negative"):
            emd(cost, supply, demand, solver=solver)

    def test_bad_names(self):
        with pytest.raises(ProblemError, match="one of opencv, .*got 'sinkhorn'"):
            emd(*self.ok, solver="sinkhorn")
        with pytest.raises(ProblemError, match="does not take the option 'form'"):
            emd(*self.ok, solver="opencv", form="L2")
        for solver in ("qpth", "ipm"):
            with pytest.raises(ProblemError, match="form to be one of L2, QP"):
                emd(*self.ok, solver=solver, form="LP")
            with pytest.raises(ProblemError, match="positive l2_strength"):
                emd(*self.ok, solver=solver, l2_strength=0)
        with pytest.raises(ProblemError, match="gradient to be one of full, cost"):
            emd(*self.ok, solver="simplex", gradient="half")
        with pytest.raises(ProblemError, match="positive mass"):
            scale_to_mass(torch.ones(3), 0)

    def test_a_failing_solver_names_the_problem(self, monkeypatch):
        import cv2

        calls = itertools.count()
        real = cv2.EMD

        def fails_on_the_second(*args):
            if next(calls) == 1:
                raise cv2.error("broken")
            return real(*args)

        monkeypatch.setattr(cv2, "EMD", fails_on_the_second)
        with pytest.raises(SolverError, match="problem 1 of 2.*broken"):
            emd(*self.ok, solver="opencv")

    def test_a_wrong_flow_is_not_passed_on(self, monkeypatch):
        import cv2

        monkeypatch.setattr(cv2, "EMD", lambda *args: (0.0, None, np.zeros((3, 4), np.float32)))
        with pytest.raises(SolverError, match="did not solve problem 0 of 2"):
            emd(*self.ok, solver="opencv")

    def test_simplex_and_ipm_say_when_they_do_not_end(self, monkeypatch):
        from Models.emd import simplex

        monkeypatch.setattr(interior_point, "MAX_ITERATIONS", 2)
        with pytest.raises(SolverError, match="ipm did not converge on problem 0 of 2"):
            emd(*self.ok, solver="ipm")
        kernel = simplex._kernel()
        real = kernel.solve_range

        class GivesUp:
            SOLVED = kernel.SOLVED

            @staticmethod
            def solve_range(*args):
                real(*args)
                args[-2][1] = kernel.TOO_MANY_PIVOTS

        monkeypatch.setattr(simplex, "_kernel", lambda: GivesUp)
        with pytest.raises(SolverError, match="simplex did not end on problem 1 of 2"):
            emd(*self.ok, solver="simplex")

    def test_missing_libgl_names_the_cure(self, monkeypatch):
        import builtins

        from Models.emd import opencv

        real = builtins.__import__

        def without_libgl(name, *args, **kwargs):
            if name == "cv2":
                raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_libgl)
        opencv._import_cv2.cache_clear()
        with pytest.raises(MissingLibraryError, match="apt-get install libgl1"):
            emd(*self.ok, solver="opencv")
        opencv._import_cv2.cache_clear()


def test_options_are_the_keyword_arguments_of_solve():
    assert {name: SOLVERS[name].options for name in SOLVERS} == {
        "opencv": (),
        "simplex": ("gradient",),
        "ipm": ("form", "l2_strength", "differentiable_flow"),
        "qpth": ("form", "l2_strength"),
    }
    assert {name: SOLVERS[name].device for name in SOLVERS} == {
        "opencv": "cpu",
        "simplex": "cpu",
        "ipm": "any",
        "qpth": "any",
    }


def test_the_first_use_of_linear_algebra_is_by_one_thread(monkeypatch):
    """On CUDA torch loads it then, and fails if a second thread comes in the middle."""
    real, calls, failures = torch.linalg.cholesky_ex, [], []
    is_loaded = threading.Event()

    def loads_on_first_use(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            time.sleep(0.2)
            is_loaded.set()
        elif not is_loaded.is_set():
            failures.append("lazy wrapper should be called at most once")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", loads_on_first_use)
    monkeypatch.setattr(interior_point, "_warm_devices", set())
    threads = [threading.Thread(target=emd, args=problem(3, 3), kwargs={"solver": "ipm"}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) > 3
    assert not failures


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_as_many_workers_as_torch_has_threads(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        meeting = threading.Barrier(threads)  # passed only by so many at the same time
        on_cpu.in_threads(
            lambda first, last, meeting=meeting: meeting.wait(timeout=10), np.empty((8, 1, on_cpu.CELLS_PER_THREAD))
        )


class SolvesInItsWorker(torch.utils.data.Dataset):
    """An item is a value that the worker process computed, with two threads where the solver brings its own."""

    def __init__(self, solver):
        # Enough cells for two threads, too few for torch's own, which do not survive a fork either.
        self.solver, self.problems = solver, problem(25, 25, batch=50)
        assert 2 * on_cpu.CELLS_PER_THREAD <= self.problems[0].numel() < 32768

    def __getitem__(self, index):
        if SOLVERS[self.solver].device == "cpu":
            torch.set_num_threads(2)
        return emd(*self.problems, solver=self.solver).value


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("solver", ["opencv", "simplex", "ipm"])
def test_in_a_forked_worker_after_use_in_the_parent(solver):
    data = SolvesInItsWorker(solver)
    expected = data[0]
    loader = torch.utils.data.DataLoader(
        data, sampler=[0, 1], num_workers=1, timeout=30, multiprocessing_context="fork"
    )
    for found in loader:
        torch.testing.assert_close(found[0], expected, atol=1e-9, rtol=0)


def test_the_folder_can_be_lifted_out_and_be_read_only(tmp_path):
    """Copied under another name, with nothing of this project beside it and no folder where numba could keep a cache."""
    shutil.copytree(ROOT / "Models" / "emd", tmp_path / "transport", ignore=shutil.ignore_patterns("__pycache__"))
    # A file where a folder is needed stops even root, whom permissions do not stop.
    for file in (tmp_path / "transport" / "__pycache__", tmp_path / "home"):
        file.touch()
    nowhere = {
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "home" / "cache"),
        "NUMBA_CACHE_DIR": "",
    }
    code = (
        "import torch; from transport import SOLVERS, emd\n"
        "for solver in SOLVERS: assert emd(torch.eye(2), torch.ones(2), torch.ones(2), solver=solver).value.abs() < 1e-3"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | nowhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "set NUMBA_CACHE_DIR to a writable folder" in done.stderr


def test_only_the_chosen_solver_is_imported():
    code = (
        "import sys; from Models.emd import SOLVERS; from Models.emd.forms import FORMS\n"
        "from Models.emd.simplex import GRADIENTS\n"
        "assert [name for name in SOLVERS if SOLVERS[name].options] == ['simplex', 'ipm', 'qpth']\n"
        "print([name for name in ('cv2', 'qpth', 'numba') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-nodes 0", "from 1 to 1000, separated by commas; got '0'"),
        ("-nodes 9,-1", "got '9,-1'"),
        ("-nodes nine", "got 'nine'"),
        ("-nodes 2.5", "got '2.5'"),
        ("-nodes 9,", "got '9,'"),
        ("-nodes 1e9", "got '1e9'"),
        ("-nodes 1000000000000000000000", "got '1000000000000000000000'"),
        ("-solvers opencv,sinkhorn", "expected solvers out of opencv, simplex, ipm, qpth; got 'sinkhorn'"),
        ("-memory_of simplex;9;0", "got '0'"),
        ("-memory_of simplex;9", "invalid memory_job value: 'simplex;9'"),
    ],
)
def test_the_benchmark_refuses_bad_flags_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["emd.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("emd").main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    seed=st.integers(0, 2**16),
    levels=st.sampled_from([1, 2, 3, 1000]),
    empty=st.booleans(),
    solver=st.sampled_from(EXACT),
)
def test_exact_solvers_on_ties_and_empty_nodes(n, m, seed, levels, empty, solver):
    random = torch.Generator().manual_seed(seed)
    cost = torch.randint(0, levels, (n, m), generator=random).double() / levels
    supply, demand = (torch.randint(0 if empty else 1, 4, (size,), generator=random).double() for size in (n, m))
    supply[0], demand[0] = supply[0] + 1, demand[0] + 1
    supply, demand = scale_to_mass(supply, 5), scale_to_mass(demand, 5)
    result = emd(cost, supply, demand, solver=solver)
    assert abs(result.value.item() - highs(cost, supply, demand)) < 1e-4


def certify(cost, supply, demand):
    """The simplex's flow and duals prove each other optimal."""
    from Models.emd.simplex import solve_arrays

    value, flow, u, v = solve_arrays(cost, supply, demand)
    size = max(1.0, np.abs(cost).max()) * max(1.0, supply.sum(1).max())
    assert flow.min() >= 0
    assert np.abs(flow.sum(2) - supply).max() < 1e-12 * size
    assert np.abs(flow.sum(1) - demand).max() < 1e-12 * size
    assert (cost - u[:, :, None] - v[:, None, :]).min() > -1e-12 * size
    gap = (cost * flow).sum((1, 2)) - (supply * u).sum(1) - (demand * v).sum(1)
    assert np.abs(gap).max() < 1e-11 * size
    assert np.abs(value - (cost * flow).sum((1, 2))).max() < 1e-12 * size


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    seed=st.integers(0, 2**16),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    masses=st.sampled_from([1, 2, 4, 10**6]),
    empty=st.booleans(),
    repeat=st.booleans(),
    scale=st.sampled_from([1e-8, 1.0, 1e6]),
)
def test_simplex_certificate(n, m, seed, levels, masses, empty, repeat, scale):
    random = np.random.default_rng(seed)
    cost = (random.integers(0, levels, (3, n, m)) - levels // 2) / levels * scale
    if repeat:
        cost[:, -1] = cost[:, 0]
    supply, demand = (random.integers(0 if empty else 1, masses + 1, (3, size)).astype(float) for size in (n, m))
    supply[:, 0] += 1
    demand[:, -1] += 1
    demand *= (supply.sum(1) / demand.sum(1))[:, None]
    certify(cost, supply, demand)


@pytest.mark.slow
@pytest.mark.usefixtures("restored_threads")
def test_a_thousand_random_problems():
    torch.set_num_threads(1)  # the problems are small
    random = np.random.default_rng(0)
    for number in range(1000):
        n, m = random.integers(2, 41, 2)
        cost, supply, demand = random.random((1, n, m)), random.random((1, n)), random.random((1, m))
        if number % 4 == 0:  # as patches that repeat give it
            cost, supply = np.round(cost, 1), np.round(supply + 0.1, 1)
        supply *= n / supply.sum()
        demand *= n / demand.sum()
        certify(cost, supply, demand)
        if number % 10 == 0:
            problem = [torch.from_numpy(array) for array in (cost, supply, demand)]
            exact = emd(*problem, solver="simplex").value
            assert abs(exact.item() - highs(*(tensor[0] for tensor in problem))) < 1e-7
            assert abs(exact.item() - emd(*problem, solver="ipm").value.item()) < 1e-5
