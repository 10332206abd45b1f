"""The compiled part of :mod:`Models.emd.simplex`: a network simplex for one dense transportation problem after another.

A basis is a spanning tree of the bipartite graph of rows (nodes 0 .. n-1) and columns (nodes n .. n+m-1). For every node
but the root the tree holds its parent, the flow on the edge to it, its depth, and the list of its children; ``potential``
holds the duals u (rows) and v (columns), with u_i + v_j = cost_ij on every edge of the tree.

Masses are integers. A degenerate basis could make the method cycle. To rule it out, masses are perturbed (Orden): they are
multiplied by ``unit = 2 (n m + 1)``, then m is added to each row, 1 to each column, and the rest to the last column. A part of
the rows and a part of the columns never have equal masses, so no flow in a basis is zero and each pivot lowers the cost
strictly. Every flow differs from a multiple of ``unit`` by at most n m, and so rounds back to the exact one. Nodes without
mass need no care: they are in the tree, and their duals are the slopes of the value at a small mass.

Reduced costs are compared with a tolerance relative to the largest cost. Cells dearer than ``2 min(n, m)`` times the dearest
cell that some plan uses (prices above the lowest) are in no optimal plan, because exchanging flow around a cycle of other
cells is cheaper. Where that is far below the largest cost (forbidden cells), costs are cut there and the problem is solved on.
"""

import math

import numpy as np
from numba import njit

SOLVED, TOO_MANY_PIVOTS, TOO_WIDE = 0, 1, 2
# Reduced costs down to minus this, relative to the largest cost, count as rounding.
TOLERANCE = 1e-13
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
# Allows the compiler to reorder, and so to vectorise, a minimum. Infinities occur, NaN does not.
VECTORISE = {"nnan", "nsz", "reassoc"}


@njit(fastmath=VECTORISE, inline="always", **FLAGS)
def _smallest_difference(cost, i, less, offset, count):
    """min_j (cost[i, j] - less[offset + j]). Takes whole arrays: slicing costs more than the loop."""
    best = math.inf
    for j in range(count):
        value = cost[i, j] - less[offset + j]
        best = value if value < best else best
    return best


@njit(inline="always", **FLAGS)
def _find_difference(cost, i, less, offset, count, value):
    """The first j with cost[i, j] - less[offset + j] <= value."""
    for j in range(count):
        if cost[i, j] - less[offset + j] <= value:
            return j
    return count - 1


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
def _initial_tree(cost, n, m, mass, column_mean, row_mean, row_best, row_choice, order, parent, flow):
    """The initial basis: repeatedly send as much as possible over the open cell that is cheapest for its row and column.

    A cell is judged by its cost minus the means of its row and of its column, weighted by the masses, which halves the
    pivots. The node that is exhausted is closed and becomes a child of the other. Returns the root, which stays open.
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
        best = _smallest_difference(cost, i, column_mean, 0, m)
        row_choice[i] = _find_difference(cost, i, column_mean, 0, m, best)
        row_best[i] = best - row_mean[i]
    root = n
    for step in range(n + m - 1):
        i = np.argmin(row_best)
        j = row_choice[i]
        if mass[i] < mass[n + j] or step == n + m - 2:
            parent[i], flow[i], order[step] = n + j, mass[i], i
            mass[n + j] -= mass[i]
            row_best[i] = math.inf
            root = n + j
        else:
            parent[n + j], flow[n + j], order[step] = i, mass[n + j], n + j
            mass[i] -= mass[n + j]
            column_mean[j] = -math.inf  # closed
            for k in range(n):
                if row_choice[k] == j and row_best[k] < math.inf:
                    best = _smallest_difference(cost, k, column_mean, 0, m)
                    row_choice[k] = _find_difference(cost, k, column_mean, 0, m, best)
                    row_best[k] = best - row_mean[k]
    parent[root] = -1
    return root


@njit(inline="always", **FLAGS)
def _attach(node, to, parent, first_child, next_sibling, previous_sibling):
    parent[node] = to
    head = first_child[to]
    next_sibling[node] = head
    previous_sibling[node] = -1
    if head >= 0:
        previous_sibling[head] = node
    first_child[to] = node


@njit(inline="always", **FLAGS)
def _detach(node, parent, first_child, next_sibling, previous_sibling):
    before, after = previous_sibling[node], next_sibling[node]
    if before >= 0:
        next_sibling[before] = after
    else:
        first_child[parent[node]] = after
    if after >= 0:
        previous_sibling[after] = before


@njit(**FLAGS)
def _update_subtree(cost, n, top, parent, depth, potential, first_child, next_sibling):
    """Depths and potentials of ``top`` and all nodes below it, from those of its parent."""
    x = top
    while True:
        to = parent[x]
        if to < 0:
            depth[x], potential[x] = 0, 0.0
        else:
            depth[x] = depth[to] + 1
            potential[x] = (cost[x, to - n] if x < n else cost[to, x - n]) - potential[to]
        if first_child[x] >= 0:
            x = first_child[x]
            continue
        while x != top and next_sibling[x] < 0:
            x = parent[x]
        if x == top:
            break
        x = next_sibling[x]


@njit(**FLAGS)
def _pivot(i, j, cost, n, parent, flow, depth, potential, first_child, next_sibling, previous_sibling):
    """Bring cell (i, j), of negative reduced cost, into the tree and remove the edge that it empties."""
    row, column = i, n + j
    # Around the cycle, flow decreases on the edges that lead up from a row on i's side and from a column on j's side.
    x, y = row, column
    theta, leaving, on_row_side = np.int64(2**62), -1, True
    while x != y:
        if depth[x] >= depth[y]:
            if x < n and flow[x] < theta:
                theta, leaving, on_row_side = flow[x], x, True
            x = parent[x]
        else:
            if y >= n and flow[y] < theta:
                theta, leaving, on_row_side = flow[y], y, False
            y = parent[y]
    top = x
    x = row
    while x != top:
        flow[x] += -theta if x < n else theta
        x = parent[x]
    y = column
    while y != top:
        flow[y] += -theta if y >= n else theta
        y = parent[y]

    # The subtree below the leaving edge is attached to the entering edge, which reverses its path of parents.
    below, above = (row, column) if on_row_side else (column, row)
    x, to, carried = below, above, theta
    while True:
        up, own = parent[x], flow[x]
        _detach(x, parent, first_child, next_sibling, previous_sibling)
        _attach(x, to, parent, first_child, next_sibling, previous_sibling)
        flow[x] = carried
        if x == leaving:
            break
        x, to, carried = up, x, own
    _update_subtree(cost, n, below, parent, depth, potential, first_child, next_sibling)


@njit(**FLAGS)
def _optimise(
    cost, n, m, block, tolerance, limit, parent, flow, depth, potential, first_child, next_sibling, previous_sibling
):
    """Pivot until no reduced cost is below ``-tolerance``, pricing ``block`` rows at a time. Returns the number of pivots."""
    pivots, start, unsuccessful = 0, 0, 0
    while unsuccessful < n and pivots <= limit:
        best, best_row, best_difference = -tolerance, -1, 0.0
        for _ in range(min(block, n - unsuccessful)):
            difference = _smallest_difference(cost, start, potential, n, m)
            if difference - potential[start] < best:
                best, best_row, best_difference = difference - potential[start], start, difference
            start = start + 1 if start + 1 < n else 0
            unsuccessful += 1
        if best_row >= 0:
            i = best_row
            j = _find_difference(cost, i, potential, n, m, best_difference)
            _pivot(i, j, cost, n, parent, flow, depth, potential, first_child, next_sibling, previous_sibling)
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
    parent, depth, order = np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    first_child, next_sibling = np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    previous_sibling = np.empty(nodes, np.int32)
    potential, column_mean = np.empty(nodes), np.empty(m)
    row_mean, row_best, row_choice = np.empty(n), np.empty(n), np.empty(n, np.int32)

    # As large as 64 bits allow, so that rounding to integers loses less than the rounding of the weights themselves.
    unit = 2 * (n * m + 1)
    total = np.int64(2) ** (60 - int(math.ceil(math.log2(unit))))
    dust = int(nodes * (precision * total + 1)) * unit
    limit = 1000 + 20 * nodes * nodes

    for b in range(first, last):
        c = cost[b]
        low, high = c.min(), c.max()
        scale = _integer_masses(supply[b], total, mass[:n]) / total
        _integer_masses(demand[b], total, mass[n:])
        mass *= unit
        mass[:n] += m
        mass[n:] += 1
        mass[nodes - 1] += (n - 1) * m
        root = _initial_tree(c, n, m, mass, column_mean, row_mean, row_best, row_choice, order, parent, edge)
        first_child[:] = -1
        for step in range(nodes - 2, -1, -1):
            _attach(order[step], parent[order[step]], parent, first_child, next_sibling, previous_sibling)

        status[b], pivots[b] = SOLVED, 0
        while True:
            _update_subtree(c, n, root, parent, depth, potential, first_child, next_sibling)
            size = max(abs(low), abs(high))
            pivots[b] += _optimise(
                c, n, m, block, TOLERANCE * size, limit, parent, edge, depth, potential,
                first_child, next_sibling, previous_sibling,
            )  # fmt: skip
            dearest, paid = low, 0.0
            for x in range(nodes):
                if x != root and edge[x] > dust:
                    price = c[x, parent[x] - n] if x < n else c[parent[x], x - n]
                    dearest, paid = max(dearest, price), max(paid, abs(price))
            ceiling = low + 2 * min(n, m) * max(dearest - low, paid)
            if pivots[b] > limit or ceiling == low or 16 * (ceiling - low) > high - low:
                break
            high, c = ceiling, np.minimum(c, ceiling)
        if pivots[b] > limit:
            status[b] = TOO_MANY_PIVOTS
        elif dearest > low and paid < RESOLVED * size and np.any((c != 0) & (np.abs(c) < RESOLVED * size)):
            status[b] = TOO_WIDE

        flow[b], value[b] = 0.0, 0.0
        for x in range(nodes):
            i, j = (x, parent[x] - n) if x < n else (parent[x], x - n)
            if x != root and (edge[x] > dust or cost[b, i, j] <= ceiling):
                flow[b, i, j] = ((edge[x] + n * m) // unit) * scale
                value[b] += flow[b, i, j] * cost[b, i, j]
        u[b], v[b] = potential[:n], potential[n:]
