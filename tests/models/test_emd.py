"""The EMD layer: known answers, properties, gradients, errors."""

import importlib
import inspect
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from fractions import Fraction

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
from Models.emd.forms import FORMS

EVERY = list(SOLVERS)
REGULARISED = [name for name in SOLVERS if "l2_strength" in SOLVERS[name].options]
EXACT = [name for name in SOLVERS if name not in REGULARISED]
# float32 arithmetic inside cv2; the quadratic term of ipm; qpth stops near 1e-4 of the mass
TOLERANCE = dict.fromkeys(SOLVERS, 1e-5) | {"simplex": 1e-7, "qpth": 2e-3}


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
    @pytest.mark.parametrize("solver", EVERY)
    def test_gradients_are_those_that_the_table_declares(self, solver):
        # The weights are scaled inside, because the problem is defined for equal totals only. The values of exact solvers
        # are piecewise linear, with exact finite differences between kinks; a strong quadratic term smooths the others.
        options = {"l2_strength": 0.3} if solver in REGULARISED else {}

        def value(**inputs):
            supply, demand = scale_to_mass(inputs["supply"], 3), scale_to_mass(inputs["demand"], 3)
            return emd(inputs["cost"], supply, demand, solver=solver, **options).value.sum()

        inputs = dict(zip(("cost", "supply", "demand"), problem(3, 4, seed=2, batch=2), strict=True))
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        value(**leaves).backward()
        assert {name for name in leaves if leaves[name].grad is not None} == set(SOLVERS[solver].differentiable)
        for name in SOLVERS[solver].differentiable:
            found, step = leaves[name].grad.flatten(), 1e-3
            for k in range(len(found)):
                change = torch.zeros_like(inputs[name])
                change.view(-1)[k] = step
                ends = (value(**inputs | {name: inputs[name] + sign * change}) for sign in (1, -1))
                assert abs((next(ends) - next(ends)) / (2 * step) - found[k]) < 5e-3, (name, k)

    def test_opencv_is_the_flow_and_nothing_else(self):
        cost, supply, demand = (tensor.requires_grad_() for tensor in problem(4, 5))
        result = emd(cost, supply, demand, solver="opencv")
        result.value.sum().backward()
        torch.testing.assert_close(cost.grad, result.flow)

    def test_qpth_reaches_cost_and_weights_in_form_qp(self):
        def value(cost, supply, demand):
            return emd(cost, scale_to_mass(supply, 3), scale_to_mass(demand, 3), solver="qpth", form="QP").value

        inputs = tuple(tensor.clone().requires_grad_() for tensor in problem(3, 3, seed=2))
        assert torch.autograd.gradcheck(value, inputs, eps=1e-4, atol=2e-2)

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
            ({0: torch.rand(4)}, "cost must be"),
            ({1: torch.ones(2, 4)}, r"supply must be \(2, 3\)"),
            ({2: torch.ones(4)}, r"demand must be \(2, 4\)"),
            ({0: torch.full((2, 3, 4), math.nan)}, "problem 0 of 2: cost has entries that are not finite"),
            ({1: torch.tensor([[1.0, 1, 1], [4, -1, 0]])}, "problem 1 of 2: supply .* negative"),
            ({2: torch.full((2, 4), math.inf)}, "demand .* not finite"),
            ({2: torch.ones(2, 4)}, r"different totals; scale both with scale_to_mass \(3 and 4\)"),
            ({0: [[1.0]]}, "cost must be a tensor; it is a list"),
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
        with pytest.raises(ProblemError, match="no solver 'no such solver'; choose one of opencv, "):
            emd(*self.ok, solver="no such solver")
        with pytest.raises(ProblemError, match="does not take the option 'form'"):
            emd(*self.ok, solver="opencv", form="L2")
        for solver in ("qpth", "ipm"):
            with pytest.raises(ProblemError, match="unknown form 'LP'; choose one of L2, QP"):
                emd(*self.ok, solver=solver, form="LP")
            with pytest.raises(ProblemError, match="l2_strength must be above 0"):
                emd(*self.ok, solver=solver, l2_strength=0)
        with pytest.raises(ProblemError, match="unknown gradient 'half'; choose one of full, cost"):
            emd(*self.ok, solver="simplex", gradient="half")
        with pytest.raises(ProblemError, match="mass must be positive"):
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

    def test_simplex_and_ipm_report_what_they_did_not_solve(self, monkeypatch):
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
        with pytest.raises(SolverError, match="simplex did not solve problem 1 of 2"):
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


def with_costs_of_many_sizes(kind, seed):
    """A problem of small integer masses, some of whose cells cost 1e4 to 1e13 (or minus that) times as much as the others."""
    random = np.random.default_rng(seed)
    n, m = random.integers(3, 9, 2)
    cost, supply = random.random((n, m)) * random.choice([1, 1e-3]), random.integers(2, 9, n) + 0.0
    demand = 1.0 + random.multinomial(int(supply.sum()) - m, np.ones(m) / m)
    exponents = (
        np.full((n, m), random.choice([4, 6, 8, 11, 13])) if kind == "forbidden" else random.choice([4, 8, 13], (n, m))
    )
    sign = {"forbidden": 1, "mixed": 1, "wanted": -1, "both": random.choice([-1, 1], (n, m))}[kind]
    is_huge = random.random((n, m)) < random.choice([0.1, 0.4, 0.8])
    return np.where(is_huge, sign * 10.0**exponents, cost), supply, demand


def is_optimal_exactly(cost, flow, slack):
    """No cycle of the residual graph lowers the cost by more than ``slack`` a cell, in rational arithmetic (Bellman-Ford)."""
    n, m = cost.shape
    exact, slack = [[Fraction(float(c)) for c in row] for row in cost], Fraction(float(slack))
    u, v = [Fraction(0)] * n, [Fraction(0)] * m
    for _ in range(n + m + 1):
        before = u, v
        v = [min(v[j], min(u[i] + exact[i][j] + slack for i in range(n))) for j in range(m)]
        u = [min([u[i]] + [v[j] - exact[i][j] + slack for j in range(m) if flow[i, j] > 1e-9]) for i in range(n)]
        if (u, v) == before:
            return True
    return False


class TestCostsOfManySizes:
    @pytest.mark.parametrize("solver", ["ipm", "qpth"])
    def test_mass_that_must_cross_a_forbidden_cell_is_an_error(self, solver):
        """However little it is: a ten-thousandth of the mass costs more than all the rest."""
        cost = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cost[0, 1:] = 1e12  # row 0 has a little more than column 0 takes
        supply = torch.tensor([0.2501, 0.25, 0.25, 0.2499], dtype=torch.float64)
        demand = torch.tensor([0.25, 0.1, 0.2, 0.2, 0.25], dtype=torch.float64)
        with pytest.raises(SolverError, match="use simplex"):
            emd(cost, supply, demand, solver=solver)
        assert emd(cost, supply, demand, solver="simplex").value > 9e7

    @pytest.mark.parametrize("scale", [1, 1e3])
    @pytest.mark.parametrize("solver", ["ipm", "qpth"])
    def test_nodes_that_all_have_a_free_cell_may_need_others(self, solver, scale):
        """As between two weightings of the same points."""
        for seed in range(5):
            _, *weights = problem(6, 6, seed)
            points = scale * torch.rand(1, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            given_ = torch.cdist(points, points), *(scale_to_mass(weight, 1.0) for weight in weights)
            found, exact = (emd(*given_, solver=name).value.item() for name in (solver, "simplex"))
            assert abs(found - exact) < scale * TOLERANCE[solver]

    @pytest.mark.parametrize("kind", ["forbidden", "mixed", "wanted", "both"])
    def test_simplex_is_optimal_in_exact_arithmetic(self, kind):
        for seed in range(40):
            cost, supply, demand = with_costs_of_many_sizes(kind, seed)
            value, flow = emd(*map(torch.from_numpy, (cost, supply, demand)), solver="simplex")
            np.testing.assert_allclose(flow.sum(1), supply, atol=1e-12)
            # Prices are told apart to a billionth of what is paid on average, over the size of a plan's cycles.
            assert is_optimal_exactly(cost, flow.numpy(), 1e-9 * (np.abs(cost) * flow.numpy()).sum() / supply.sum()), (
                seed
            )
            cells = zip(cost.flat, flow.flatten().round().tolist(), strict=True)  # integer masses have integer flows
            exact = float(sum(Fraction(float(c)) * int(x) for c, x in cells))
            assert abs(value.item() - exact) <= 1e-12 * (np.abs(cost) * flow.numpy()).sum(), seed

    @pytest.mark.parametrize("kind", ["forbidden", "mixed", "wanted", "both"])
    @pytest.mark.parametrize("solver", [name for name in EVERY if name != "simplex"])
    def test_no_solver_returns_a_wrong_value(self, solver, kind):
        solved = 0
        for seed in range(8 if solver == "qpth" else 25):
            problem = [torch.from_numpy(array) for array in with_costs_of_many_sizes(kind, seed)]
            exact, flow = emd(*problem, solver="simplex")
            try:
                value = emd(*problem, solver=solver).value
            except SolverError:
                assert solver != "opencv"
                continue
            solved += 1
            tolerance = 0.02 if solver == "qpth" else 1e-4
            assert abs(value - exact) <= tolerance * (flow * problem[0].abs()).sum(), seed
        assert solved or solver != "ipm" or kind in ("wanted", "both")

    @pytest.mark.parametrize("solver", EVERY)
    def test_cells_that_no_flow_needs_may_be_forbidden_at_any_price(self, solver):
        cost, supply, demand = problem(5, 5, seed=7, batch=2)
        cost[:, 0, 1:3] = cost[:, 3, 4] = 20
        expected = emd(cost, supply, demand, solver="simplex").value
        for price in (1e4, 1e8, 1e13):
            found = emd(torch.where(cost == 20, price, cost), supply, demand, solver=solver).value
            torch.testing.assert_close(found, expected, atol=5 * TOLERANCE[solver], rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_weights_that_agree_but_for_rounding_need_no_forbidden_cell(self, dtype):
        cost = torch.full((6, 6), 1e13, dtype=dtype)
        cost[:3, :3] = cost[3:, 3:] = 1
        supply = scale_to_mass(torch.tensor([0.1, 0.2, 0.4, 0.1, 0.1, 0.1], dtype=dtype), 7.0)
        demand = scale_to_mass(torch.tensor([0.3, 0.3, 0.1, 0.15, 0.1, 0.05], dtype=dtype), 7.0)
        assert abs(emd(cost, supply, demand, solver="simplex").value.item() - 7) < 1e-4


def points_and_weights(n, seed, power):
    """Points in the plane, near each other in pairs, with weights that span orders of magnitude if ``power`` is large."""
    random = torch.Generator().manual_seed(seed)
    left, right = torch.rand(n, 2, generator=random), torch.rand(n, 2, generator=random)
    weights = (torch.rand(n, generator=random) ** power + 1e-3 for _ in range(2))
    return torch.cdist(left, right), *(scale_to_mass(weight, n) for weight in weights)


class TestLargeProblems:
    @pytest.mark.parametrize(("n", "m"), [(145, 145), (150, 140), (160, 160), (196, 49), (30, 200)])
    def test_opencv_is_optimal(self, n, m):
        for power in (1, 8):
            cost, supply, _ = points_and_weights(n, n, power)
            _, _, demand = points_and_weights(m, m, power)
            problem = cost.new_zeros(n, m), supply, scale_to_mass(demand, n)
            problem[0].copy_(torch.rand(n, m, generator=torch.Generator().manual_seed(m)))
            exact = emd(*problem, solver="simplex").value
            torch.testing.assert_close(emd(*problem, solver="opencv").value, exact, atol=0, rtol=2e-5)

    def test_the_flow_of_cv2_is_kept_up_to_150_nodes(self):
        import cv2

        cost, supply, demand = points_and_weights(100, 0, 1)
        flow = emd(cost, supply, demand, solver="opencv").flow
        theirs = cv2.EMD(supply.numpy()[:, None], demand.numpy()[:, None], cv2.DIST_USER, cost.numpy())[2]
        assert np.array_equal(flow.numpy(), theirs)

    def test_a_flow_that_is_not_optimal_is_not_passed_on(self, monkeypatch):
        import cv2

        def product_flow(supply, demand, _, cost):
            return 0.0, None, supply * demand.T / supply.sum()

        problem = points_and_weights(100, 1, 1)
        exact = emd(*problem, solver="opencv").value
        monkeypatch.setattr(cv2, "EMD", product_flow)
        torch.testing.assert_close(emd(*problem, solver="opencv").value, exact)

    def test_without_numba_the_error_tells_what_to_install(self, monkeypatch):
        from Models.emd import simplex

        simplex._kernel.cache_clear()
        monkeypatch.setitem(sys.modules, "numba", None)
        emd(*problem(5, 5), solver="opencv")  # needs none
        with pytest.raises(MissingLibraryError, match="151 and 151 nodes.*pip install numba"):
            emd(*problem(151, 151), solver="opencv")
        monkeypatch.undo()
        simplex._kernel.cache_clear()


class TestNodesWithoutMass:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (3, 4)])
    @pytest.mark.parametrize(
        ("solver", "form"), [(s, f) for s in EVERY for f in (FORMS if s in REGULARISED else [None])]
    )
    def test_no_mass_at_all_costs_nothing(self, solver, form, shape):
        n, m = shape
        inputs = torch.rand(2, n, m), torch.zeros(2, n), torch.zeros(2, m)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        value, flow = emd(*inputs, solver=solver, **({"form": form} if form else {}))
        assert not value.any()
        assert not flow.any()
        value.sum().backward()
        assert all(torch.isfinite(tensor.grad).all() for tensor in inputs if tensor.grad is not None)

    @pytest.mark.parametrize("solver", EVERY)
    @pytest.mark.parametrize("nodes", [1, 3])
    def test_they_change_nothing_but_the_flow_has_zeros(self, solver, nodes):
        # Different nodes in every problem; `nodes` of five have mass.
        random = torch.Generator().manual_seed(nodes)
        cost = torch.rand(4, 5, 6, generator=random, dtype=torch.float64)
        supply, demand = (torch.zeros(4, size, dtype=torch.float64) for size in (5, 6))
        for k in range(4):
            for weight in (supply[k], demand[k]):
                chosen = torch.randperm(len(weight), generator=random)[:nodes]
                weight[chosen] = torch.rand(nodes, generator=random, dtype=torch.float64) + 0.1
        supply, demand = scale_to_mass(supply, 2), scale_to_mass(demand, 2)
        exact = emd(cost, supply, demand, solver="simplex")
        value, flow = emd(cost, supply, demand, solver=solver)
        torch.testing.assert_close(value, exact.value, atol=5 * TOLERANCE[solver], rtol=0)
        torch.testing.assert_close(flow, exact.flow, atol=2e-2 if solver == "qpth" else 1e-4, rtol=0)

    def test_the_gradients_of_ipm_for_costs_and_for_the_other_weights_are_those_of_simplex(self):
        cost, supply, demand = problem(7, 6, seed=8, batch=3)
        supply[:, 2] = supply[1, 4] = demand[0, 5] = demand[2, 0] = 0
        supply, demand = scale_to_mass(supply, 1), scale_to_mass(demand, 1)
        found = {}
        for solver in ("simplex", "ipm"):
            inputs = [tensor.clone().requires_grad_() for tensor in (cost, supply, demand)]
            emd(*inputs, solver=solver).value.sum().backward()
            # Duals are determined up to a constant that moves from one side to the other.
            shift = inputs[1].grad[:, :1]
            duals = (inputs[1].grad - shift) * (supply > 0), (inputs[2].grad + shift) * (demand > 0)
            found[solver] = inputs[0].grad, *duals
        for ours, theirs in zip(found["ipm"], found["simplex"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


class TestInteriorPoint:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("n", "m"), [(6, 4), (25, 40)])
    def test_equal_weights_on_different_numbers_of_nodes_have_the_cost_gradient_of_simplex(self, n, m, dtype):
        # The optimum has fewer cells than a basis, so that duals are not unique; the flow is.
        cost, _, _ = problem(n, m, seed=n, batch=20, dtype=dtype)
        found = {}
        for solver in ("simplex", "ipm"):
            inputs = [cost.clone(), torch.full((20, n), 1 / n, dtype=dtype), torch.full((20, m), 1 / m, dtype=dtype)]
            inputs = [tensor.requires_grad_() for tensor in inputs]
            emd(*inputs, solver=solver).value.sum().backward()
            found[solver] = [tensor.grad for tensor in inputs]
        torch.testing.assert_close(found["ipm"][0], found["simplex"][0], atol=1e-5, rtol=0)
        assert all(torch.isfinite(gradient).all() for gradient in found["ipm"])

    @pytest.mark.parametrize("which", ["complementarity", "stationarity", "rows", "columns"])
    def test_every_residual_is_checked(self, which):
        residuals = {name: torch.zeros(2) for name in ("complementarity", "stationarity", "rows", "columns")}
        interior_point._check_optimality(**residuals)
        for bad in (1e-6, math.nan):
            residuals[which] = torch.tensor([0.0, bad])
            with pytest.raises(SolverError, match=f"converge on problem 1 of 2 within .*{which} "):
                interior_point._check_optimality(**residuals)

    @pytest.mark.parametrize("fault", ["stationarity", "rows", "columns"])
    def test_a_wrong_step_shows_in_its_residual(self, fault, monkeypatch):
        real = interior_point._newton

        def wrong(*args):
            dx, du, dv = real(*args)
            if fault == "stationarity":
                return dx, du + 1e-3, dv
            # Flows that miss the sums of one side only.
            change = torch.zeros_like(dx)
            change[:, 0, 0] = 1e-3
            change[(slice(None), 1, 0) if fault == "rows" else (slice(None), 0, 1)] = -1e-3
            return dx + change, du, dv

        seen = {}
        monkeypatch.setattr(interior_point, "_newton", wrong)
        monkeypatch.setattr(interior_point, "_check_optimality", lambda **residuals: seen.update(residuals))
        emd(*problem(4, 4), solver="ipm")
        assert seen[fault] > 1e-6

    def test_a_singular_system_in_the_gradient_is_reported(self, monkeypatch):
        cost, supply, demand = problem(4, 4, batch=2)
        value = emd(cost.requires_grad_(), supply, demand, solver="ipm").value.sum()
        real = interior_point._factorise

        def singular(*args):
            factors = real(*args)
            return factors._replace(is_sound=torch.tensor([True, False]))

        monkeypatch.setattr(interior_point, "_factorise", singular)
        with pytest.raises(SolverError, match="singular system in the gradient of problem 1 of 2"):
            value.backward()


def test_qpth_does_not_return_a_value_that_no_flow_has(monkeypatch):
    from Models.emd import qpth_qp

    cost, supply, demand = problem(3, 3)
    flow = emd(cost, supply, demand, solver="simplex").flow.clone()
    qpth_qp._check_flow(flow, cost, supply, demand, "L2")
    flow[:, 0, 0] += 1e3  # a cycle: no sum changes
    flow[:, 1, 1] += 1e3
    flow[:, 0, 1] -= 1e3
    flow[:, 1, 0] -= 1e3
    with pytest.raises(SolverError, match="qpth did not converge on problem 0 of 1 .*costs .* per unit of mass"):
        qpth_qp._check_flow(flow, cost, supply, demand, "L2")


@pytest.mark.parametrize("solver", EVERY)
def test_totals_may_differ_by_rounding_only(solver):
    cost, supply, demand = problem(3, 3)
    emd(cost, supply, demand * (1 + 1e-5), solver=solver)
    for factor in (0.99, 1.001):
        with pytest.raises(ProblemError, match="different totals"):
            emd(cost, supply, demand * factor, solver=solver)


def test_simplex_resolves_differences_of_a_billionth():
    random = np.random.default_rng(0)
    certify(1 + 1e-8 * random.random((3, 12, 12)), np.ones((3, 12)), np.ones((3, 12)))


@pytest.mark.parametrize("solver", EVERY)
def test_options_are_the_keyword_arguments_of_solve(solver):
    parameters = inspect.signature(SOLVERS[solver].solve).parameters.values()
    assert SOLVERS[solver].options == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


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
    on_cpu.set_threads(None)  # a model that was built before has set its own number
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
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "qpth"])  # its MKL does not survive a fork
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
        "assert SOLVERS['qpth'].options['form'] in FORMS and SOLVERS['simplex'].options['gradient'] in GRADIENTS\n"
        "print([name for name in ('cv2', 'qpth', 'numba') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-nodes 0", "'0' is not whole numbers above 0 joined by commas, as in 2,3"),
        ("-nodes 9,-1", "'9,-1' is not whole numbers"),
        ("-nodes nine", "'nine' is not whole numbers"),
        ("-nodes 2.5", "'2.5' is not whole numbers"),
        ("-nodes 9,", "'9,' is not whole numbers"),
        ("-nodes 1e9", "'1e9' is not whole numbers"),
        ("-nodes 1000000000000000000000", "'1000000000000000000000' is not whole numbers"),
        ("-solvers opencv,no-solver", "unknown solver 'no-solver'; choose one of "),
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
