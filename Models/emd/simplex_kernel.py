"""The compiled part of :mod:`Models.emd.simplex`: a network simplex for one dense transportation problem after another.

A basis is a spanning tree of the bipartite graph of rows (nodes 0 .. n-1) and columns (nodes n .. n+m-1). For every node
but the root the tree holds its parent, and the flow and the cost of the edge to it. ``dual`` holds the duals u (rows) and v
(columns), with u_i + v_j = cost_ij on every edge of the tree. ``order`` lists the nodes in preorder, so that the ``size`` nodes
from the ``position`` of a node on are its subtree: a pivot moves one block of that list, and follows no pointers through it.

Masses are integers. A degenerate basis could make the method cycle. To rule it out, masses are perturbed (Orden): they are
multiplied by ``unit = 2 (n m + 1)``, then m is added to each row, 1 to each column, and the rest to the last column. A part of
the rows and a part of the columns never have equal masses, so no flow in a basis is zero and each pivot lowers the cost
strictly. Every flow differs from a multiple of ``unit`` by at most n m, and so rounds back to the exact one. Nodes without
mass need no care: they are in the tree, and their duals are the slopes of the value at a small mass.

Reduced costs are compared with a tolerance relative to the largest cost. A cell that costs more than ``2 min(n, m)`` times
the most expensive cell of some plan (costs above the lowest) is in no optimal plan, because exchanging flow around a cycle of
other cells is cheaper. Where that is far below the largest cost (forbidden cells), costs are cut there and pivoting continues.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

SOLVED, TOO_MANY_PIVOTS, TOO_WIDE = 0, 1, 2
# Reduced costs down to minus this, relative to the largest cost, count as rounding.
TOLERANCE = 1e-13
# Nodes and places in lists of them. Unsigned, as numba compiles signed indices with a test whether they count from the end,
# which took a quarter of the time; uint32 and int64 make int64, so that constants added to them are NODE(1).
NODE = np.uint32
# A plan whose prices are all below this fraction of the largest cost in size cannot be told from others.
RESOLVED = 1e-6


def _can_cache() -> bool:
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return False
    return True


CACHE = _can_cache()
FLAGS = {"cache": CACHE, "nogil": True, "error_model": "numpy"}


@intrinsic
def _lower(typing_context, x, y):
    """The lower of two numbers, none of which is NaN. Loops over it become vector instructions; over ``min`` they do not."""

    def generate(context, builder, signature, arguments):
        may_reorder = "nnan", "nsz"
        return builder.select(builder.fcmp_ordered("<", *arguments, flags=may_reorder), *arguments, flags=may_reorder)

    return types.float64(types.float64, types.float64), generate


@njit(inline="always", **FLAGS)
def _smallest(values, sign=1.0):
    """The smallest of ``sign`` times the values."""
    best = math.inf
    for k in range(len(values)):
        best = _lower(sign * values[k], best)
    return best


@njit(inline="always", **FLAGS)
def _smallest_difference(cost, i, less):
    """min_j (cost[i, j] - less[j]). Takes the whole matrix: slicing costs more than the loop."""
    best = math.inf
    for j in range(len(less)):
        best = _lower(cost[i, j] - less[j], best)
    return best


@njit(inline="always", **FLAGS)
def _find_difference(cost, i, less, value):
    """The first j with cost[i, j] - less[j] <= value."""
    for j in range(len(less)):
        if cost[i, j] - less[j] <= value:
            return j
    return len(less) - 1


@njit(**FLAGS)
def _integer_masses(weight, total, mass):
    """Scale the weights to integers that sum to ``total``. Returns the sum of the weights."""
    weight_sum = weight.sum()
    unit = total / weight_sum if weight_sum > 0 else 0.0
    for k in range(len(weight)):
        mass[k] = int(weight[k] * unit)
    mass[np.argmax(mass)] += total - mass.sum()  # the remainder of rounding down: less than one per node
    return weight_sum


@njit(**FLAGS)
def _initial_tree(cost, n, m, mass, column_mean, row_mean, row_best, row_choice, closed, parent, flow):
    """The initial basis: repeatedly send as much as possible over the open cell that is cheapest for its row and column.

    A cell is judged by its cost minus the means of its row and of its column, weighted by the masses, which halves the
    pivots. The node that is exhausted is closed and becomes a child of the other. Lists these in ``closed``; returns the
    root, which stays open.
    """
    total = mass[:n].sum()
    column_mean[:] = 0.0
    for i in range(n):
        row_sum, share = 0.0, mass[i] / total
        for j in range(m):
            row_sum += cost[i, j] * mass[n + j]
            column_mean[j] += cost[i, j] * share
        row_mean[i] = row_sum / total
    for i in range(n):
        best = _smallest_difference(cost, i, column_mean)
        row_choice[i] = _find_difference(cost, i, column_mean, best)
        row_best[i] = best - row_mean[i]
    root = n
    for step in range(n + m - 1):
        lowest, i = _smallest(row_best), 0
        while row_best[i] > lowest:
            i += 1
        j = row_choice[i]
        if mass[i] < mass[n + j] or step == n + m - 2:
            parent[i], flow[i], closed[step] = n + j, mass[i], i
            mass[n + j] -= mass[i]
            row_best[i] = math.inf
            root = n + j
        else:
            parent[n + j], flow[n + j], closed[step] = i, mass[n + j], n + j
            mass[i] -= mass[n + j]
            column_mean[j] = -math.inf  # closed
            for k in range(n):
                if row_choice[k] == j and row_best[k] < math.inf:
                    best = _smallest_difference(cost, k, column_mean)
                    row_choice[k] = _find_difference(cost, k, column_mean, best)
                    row_best[k] = best - row_mean[k]
    parent[root] = root
    return root


@njit(**FLAGS)
def _put_in_order(root, closed, parent, order, position, size, free):
    """List the nodes in preorder. ``closed`` has them in the sequence of the initial tree, children before their parents."""
    size[:] = 1
    for x in closed:
        size[parent[x]] += size[x]
    order[0], position[root], free[root] = root, 0, 1
    for x in closed[::-1]:
        place = free[parent[x]]
        free[parent[x]] += size[x]
        order[place], position[x], free[x] = x, place, place + 1


@njit(inline="always", **FLAGS)
def _set_duals(first, last, order, parent, price, dual):
    """The duals of the nodes at these places of the order, whose parents come before them."""
    for place in range(first, last):
        x = order[place]
        dual[x] = price[x] - dual[parent[x]]


@njit(**FLAGS)
def _pivot(i, j, cost, n, parent, flow, price, dual, order, position, size, moved):
    """Bring cell (i, j), of negative reduced cost, into the tree and remove the edge that it empties."""
    row, column = NODE(i), NODE(n + j)
    # Around the cycle, flow decreases on the edges that lead up from a row on i's side and from a column on j's side. The
    # sides meet in the first node above i whose subtree has j.
    theta, leaving, on_row_side = np.int64(2**62), row, True
    x, place = row, position[column]
    while not position[x] <= place < position[x] + size[x]:
        if x < n and flow[x] < theta:
            theta, leaving = flow[x], x
        x = parent[x]
    top, x = x, column
    while x != top:
        if x >= n and flow[x] < theta:
            theta, leaving, on_row_side = flow[x], x, False
        x = parent[x]

    count, gone = size[leaving], position[leaving]
    below, above = (row, column) if on_row_side else (column, row)
    x = row
    while x != top:
        flow[x] += -theta if x < n else theta
        x = parent[x]
    x = column
    while x != top:
        flow[x] += -theta if x >= n else theta
        x = parent[x]
    x = parent[leaving]
    while x != top:
        size[x] -= count
        x = parent[x]
    x = above
    while x != top:
        size[x] += count
        x = parent[x]

    # The subtree below the leaving edge is attached to the entering edge, which reverses its path of parents. In preorder,
    # a node of this path is followed by what was below it, less what was below the one before.
    x, to, carried, paid, filled = below, above, theta, cost[i, j], NODE(0)
    skip = resume = position[x] + size[x]
    while True:
        up, own_flow, own_price = parent[x], flow[x], price[x]
        first, last = position[x], position[x] + size[x]
        parent[x], flow[x], price[x], size[x] = to, carried, paid, count - filled
        for place in range(first, skip):
            moved[filled] = order[place]
            filled += NODE(1)
        for place in range(resume, last):
            moved[filled] = order[place]
            filled += NODE(1)
        if x == leaving:
            break
        x, to, carried, paid, skip, resume = up, x, own_flow, own_price, first, last

    # The block goes right behind its new parent, and the nodes between its old and its new place make room.
    goal = position[above] + NODE(1)
    if goal <= gone:
        first, last = goal, gone + count
        for back in range(NODE(1), gone - goal + NODE(1)):
            order[last - back] = order[gone - back]
    else:
        first, last = gone, goal
        for place in range(gone + count, goal):
            order[place - count] = order[place]
        goal -= count
    for place in range(count):
        order[goal + place] = moved[place]
    for place in range(first, last):
        position[order[place]] = place
    _set_duals(goal, goal + count, order, parent, price, dual)


@njit(**FLAGS)
def _optimise(cost, n, block, tolerance, limit, parent, flow, price, dual, order, position, size, moved):
    """Pivot until no reduced cost is below ``-tolerance``, pricing ``block`` rows at a time. Returns the number of pivots."""
    pivots, start, unsuccessful, v = 0, 0, 0, dual[n:]
    while unsuccessful < n and pivots <= limit:
        best, best_row, best_difference = -tolerance, -1, 0.0
        for _ in range(min(block, n - unsuccessful)):
            difference = _smallest_difference(cost, start, v)
            if difference - dual[start] < best:
                best, best_row, best_difference = difference - dual[start], start, difference
            start = start + 1 if start + 1 < n else 0
            unsuccessful += 1
        if best_row >= 0:
            j = _find_difference(cost, best_row, v, best_difference)
            _pivot(best_row, j, cost, n, parent, flow, price, dual, order, position, size, moved)
            unsuccessful = 0
            pivots += 1
    return pivots


@njit(**FLAGS)
def solve_range(cost, supply, demand, first, last, precision, block, value, flow, u, v, status, pivots):
    """Solve problems ``first .. last - 1`` of ``cost (B,N,M), supply (B,N), demand (B,M)``, all float64 and contiguous.

    Writes ``value (B,)``, ``flow (B,N,M)``, the duals ``u (B,N)`` and ``v (B,M)``, and the status and number of pivots of
    each problem. Prices ``block`` rows at a time. ``precision`` is the relative error of the weights: flows within it do not
    count as use of a cell, and are left out where no plan uses it.
    """
    n, m = cost.shape[1], cost.shape[2]
    nodes = n + m
    mass, edge = np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    parent, order, closed = np.empty(nodes, NODE), np.empty(nodes, NODE), np.empty(nodes - 1, NODE)
    position, size, moved = np.empty(nodes, NODE), np.empty(nodes, NODE), np.empty(nodes, NODE)
    price, dual, column_mean = np.empty(nodes), np.empty(nodes), np.empty(m)
    row_mean, row_best, row_choice = np.empty(n), np.empty(n), np.empty(n, np.int32)

    # As large as 64 bits allow, so that rounding to integers loses less than the rounding of the weights themselves.
    unit = 2 * (n * m + 1)
    total = np.int64(2) ** (60 - int(math.ceil(math.log2(unit))))
    dust = int(nodes * (precision * total + 1)) * unit
    limit = 1000 + 20 * nodes * nodes

    for b in range(first, last):
        c = cost[b]
        low, high = _smallest(c.ravel()), -_smallest(c.ravel(), -1.0)
        scale = _integer_masses(supply[b], total, mass[:n]) / total
        _integer_masses(demand[b], total, mass[n:])
        mass *= unit
        mass[:n] += m
        mass[n:] += 1
        mass[nodes - 1] += (n - 1) * m
        root = _initial_tree(c, n, m, mass, column_mean, row_mean, row_best, row_choice, closed, parent, edge)
        _put_in_order(root, closed, parent, order, position, size, moved)

        status[b], pivots[b] = SOLVED, 0
        while True:
            for x in range(nodes):
                if x != root:
                    price[x] = c[x, parent[x] - n] if x < n else c[parent[x], x - n]
            dual[root] = 0.0
            _set_duals(1, nodes, order, parent, price, dual)
            largest = max(abs(low), abs(high))
            pivots[b] += _optimise(
                c, n, block, TOLERANCE * largest, limit, parent, edge, price, dual, order, position, size, moved
            )
            dearest, paid = low, 0.0
            for x in range(nodes):
                if x != root and edge[x] > dust:
                    dearest, paid = max(dearest, price[x]), max(paid, abs(price[x]))
            ceiling = low + 2 * min(n, m) * max(dearest - low, paid)
            if pivots[b] > limit or ceiling == low or 16 * (ceiling - low) > high - low:
                break
            high, c = ceiling, np.minimum(c, ceiling)
        if pivots[b] > limit:
            status[b] = TOO_MANY_PIVOTS
        elif dearest > low and paid < RESOLVED * largest and np.any((c != 0) & (np.abs(c) < RESOLVED * largest)):
            status[b] = TOO_WIDE

        flow[b], value[b] = 0.0, 0.0
        for x in range(nodes):
            i, j = (x, parent[x] - n) if x < n else (parent[x], x - n)
            if x != root and (edge[x] > dust or cost[b, i, j] <= ceiling):
                flow[b, i, j] = ((edge[x] + n * m) // unit) * scale
                value[b] += flow[b, i, j] * cost[b, i, j]
        u[b], v[b] = dual[:n], dual[n:]
