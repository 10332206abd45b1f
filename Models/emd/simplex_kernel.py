"""The compiled part of :mod:`Models.emd.simplex`: a network simplex for one dense transportation problem after another.

A basis is a spanning tree of the bipartite graph of rows (nodes 0 .. n-1) and columns (nodes n .. n+m-1). For every node
but the root the tree holds its parent, the flow on the edge to it, its depth, and the list of its children; ``potential``
holds the duals u (rows) and v (columns), with u_i + v_j = cost_ij on every edge of the tree.

Masses are integers. A degenerate basis could make the method cycle. To rule it out, every row gets slightly more than its
mass and one column takes the surplus (Orden's perturbation): masses are multiplied by ``2 (n + 1)``, then 1 is added to each
row and n to the last column. Every flow in a basis then differs from a multiple of ``2 (n + 1)`` by 1 to n (either way), so
it is never zero and rounds back to the exact flow. Each pivot lowers the cost strictly.
"""

import math

import numpy as np
from numba import njit

SOLVED, TOO_MANY_PIVOTS = 0, 1


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
def _integer_masses(weight, b, members, count, total, mass, offset):
    """Scale the weights of the members to integers that sum to ``total``."""
    weight_sum = 0.0
    for k in range(count):
        weight_sum += weight[b, members[k]]
    unit = total / weight_sum
    left, largest = total, offset
    for k in range(count):
        mass[offset + k] = int(weight[b, members[k]] * unit)
        left -= mass[offset + k]
        if mass[offset + k] > mass[largest]:
            largest = offset + k
    mass[largest] += left  # the remainder of rounding down: less than one per node


@njit(**FLAGS)
def _least_cost_tree(cost, n, m, mass, blocked, row_best, row_choice, order, parent, flow):
    """The initial basis: repeatedly send as much as possible over the cheapest open cell.

    The node that this exhausts is closed and becomes a child of the other. Returns the root, the node that stays open.
    """
    for j in range(m):
        blocked[j] = 0.0
    for i in range(n):
        row_best[i] = _smallest_difference(cost, i, blocked, 0, m)
        row_choice[i] = _find_difference(cost, i, blocked, 0, m, row_best[i])
    root = n
    for step in range(n + m - 1):
        i = 0
        best = row_best[0]
        for k in range(1, n):
            if row_best[k] < best:
                best = row_best[k]
                i = k
        j = row_choice[i]
        if mass[i] < mass[n + j] or step == n + m - 2:
            parent[i], flow[i], order[step] = n + j, mass[i], i
            mass[n + j] -= mass[i]
            row_best[i] = math.inf
            root = n + j
        else:
            parent[n + j], flow[n + j], order[step] = i, mass[n + j], n + j
            mass[i] -= mass[n + j]
            blocked[j] = -math.inf
            for k in range(n):
                if row_choice[k] == j and row_best[k] < math.inf:
                    row_best[k] = _smallest_difference(cost, k, blocked, 0, m)
                    row_choice[k] = _find_difference(cost, k, blocked, 0, m, row_best[k])
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
def _pivot(i, j, reduced, n, parent, flow, depth, potential, first_child, next_sibling, previous_sibling):
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
    if on_row_side:
        below, above, row_change = row, column, reduced
    else:
        below, above, row_change = column, row, -reduced
    x, to, carried = below, above, theta
    while True:
        up, own = parent[x], flow[x]
        _detach(x, parent, first_child, next_sibling, previous_sibling)
        _attach(x, to, parent, first_child, next_sibling, previous_sibling)
        flow[x] = carried
        if x == leaving:
            break
        x, to, carried = up, x, own

    x = below
    while True:
        depth[x] = depth[parent[x]] + 1
        potential[x] += row_change if x < n else -row_change
        if first_child[x] >= 0:
            x = first_child[x]
            continue
        while x != below and next_sibling[x] < 0:
            x = parent[x]
        if x == below:
            break
        x = next_sibling[x]


@njit(**FLAGS)
def solve_range(cost, supply, demand, first, last, block, value, flow, u, v, status, pivots):
    """Solve problems ``first .. last - 1`` of ``cost (B,N,M), supply (B,N), demand (B,M)``, all float64 and contiguous.

    Writes ``value (B,)``, ``flow (B,N,M)``, the duals ``u (B,N)`` and ``v (B,M)``, and the status and number of pivots of
    each problem. Prices ``block`` rows at a time.
    """
    all_n, all_m = cost.shape[1], cost.shape[2]
    nodes = all_n + all_m
    rows, columns = np.empty(all_n, np.int64), np.empty(all_m, np.int64)
    c = np.empty((all_n, all_m), np.float64)
    mass, edge = np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    parent, depth, order = np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    first_child, next_sibling = np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    previous_sibling = np.empty(nodes, np.int32)
    potential, blocked = np.empty(nodes, np.float64), np.empty(all_m, np.float64)
    row_best, row_choice = np.empty(all_n, np.float64), np.empty(all_n, np.int32)

    # As large as 64 bits allow, so that rounding to integers loses less than the rounding of the weights themselves.
    total = np.int64(2) ** (60 - int(math.ceil(math.log2(2 * (all_n + 1)))))

    for b in range(first, last):
        status[b], pivots[b], value[b] = SOLVED, 0, 0.0
        supply_sum = demand_sum = 0.0
        for i in range(all_n):
            supply_sum += supply[b, i]
            for j in range(all_m):
                flow[b, i, j] = 0.0
        for j in range(all_m):
            demand_sum += demand[b, j]
        n = m = 0
        for i in range(all_n):
            if supply[b, i] * total >= supply_sum and supply_sum > 0:
                rows[n] = i
                n += 1
        for j in range(all_m):
            if demand[b, j] * total >= demand_sum and demand_sum > 0:
                columns[m] = j
                m += 1
        if n == 0 or m == 0:  # no mass at all
            for i in range(all_n):
                u[b, i] = cost[b, i].min()
            v[b] = 0.0
            continue

        largest = 0.0
        for i in range(n):
            for j in range(m):
                c[i, j] = cost[b, rows[i], columns[j]]
                largest = max(largest, abs(c[i, j]))
        _integer_masses(supply, b, rows, n, total, mass, 0)
        _integer_masses(demand, b, columns, m, total, mass, n)
        unit = 2 * (n + 1)
        for k in range(n + m):
            mass[k] = mass[k] * unit + (1 if k < n else 0)
        mass[n + m - 1] += n

        root = _least_cost_tree(c, n, m, mass, blocked, row_best, row_choice, order, parent, edge)
        for k in range(n + m):
            first_child[k] = -1
        potential[root], depth[root] = 0.0, 0
        for step in range(n + m - 2, -1, -1):
            x = order[step]
            to = parent[x]
            _attach(x, to, parent, first_child, next_sibling, previous_sibling)
            depth[x] = depth[to] + 1
            potential[x] = (c[x, to - n] if x < n else c[to, x - n]) - potential[to]

        tolerance = 1e-13 * largest
        limit = 1000 + 20 * (n + m) * (n + m)
        start, unsuccessful = 0, 0
        while unsuccessful < n:
            best, best_row, best_difference = -tolerance, -1, 0.0
            for _ in range(min(block, n - unsuccessful)):
                difference = _smallest_difference(c, start, potential, n, m)
                if difference - potential[start] < best:
                    best, best_row, best_difference = difference - potential[start], start, difference
                start = start + 1 if start + 1 < n else 0
                unsuccessful += 1
            if best_row >= 0:
                column = _find_difference(c, best_row, potential, n, m, best_difference)
                reduced = c[best_row, column] - potential[best_row] - potential[n + column]
                _pivot(
                    best_row,
                    column,
                    reduced,
                    n,
                    parent,
                    edge,
                    depth,
                    potential,
                    first_child,
                    next_sibling,
                    previous_sibling,
                )
                unsuccessful = 0
                pivots[b] += 1
                if pivots[b] > limit:
                    status[b] = TOO_MANY_PIVOTS
                    break

        scale = supply_sum / total
        for x in range(n + m):
            if x != root:
                i, j = (x, parent[x] - n) if x < n else (parent[x], x - n)
                moved = ((edge[x] + n + 1) // unit) * scale
                flow[b, rows[i], columns[j]] = moved
                value[b] += moved * c[i, j]
        # Nodes without mass carry no flow; their duals are the largest feasible ones.
        for j in range(all_m):
            v[b, j] = math.inf
        for j in range(m):
            v[b, columns[j]] = potential[n + j]
        if m < all_m:
            for j in range(all_m):
                if v[b, j] == math.inf:
                    for i in range(n):
                        v[b, j] = min(v[b, j], cost[b, rows[i], j] - potential[i])
        for i in range(all_n):
            u[b, i] = math.inf
        for i in range(n):
            u[b, rows[i]] = potential[i]
        if n < all_n:
            for i in range(all_n):
                if u[b, i] == math.inf:
                    for j in range(all_m):
                        u[b, i] = min(u[b, i], cost[b, i, j] - v[b, j])
