"""The compiled part of :mod:`Models.emd.simplex`: a network simplex for one dense transportation problem after another.

A basis is a spanning tree of the bipartite graph of rows (nodes 0 .. n-1) and columns (nodes n .. n+m-1). For every node
but the root the tree holds its parent, the flow on the edge to it, its depth, and the list of its children; ``potential``
holds the duals u (rows) and v (columns), with u_i + v_j = cost_ij on every edge of the tree.

Masses are integers. A degenerate basis could make the method cycle. To rule it out, every row gets slightly more than its
mass and one column takes the surplus (Orden's perturbation): masses are multiplied by ``2 (n + 1)``, then 1 is added to each
row and n to the last column. Every flow in a basis then differs from a multiple of ``2 (n + 1)`` by 1 to n (either way), so
it is never zero and rounds back to the exact flow. Each pivot lowers the cost strictly.

Reduced costs are compared with a tolerance relative to the largest cost. Where costs span many orders of magnitude (cells
that are forbidden by a huge cost, say) this is too coarse for the others, and :func:`_sharpen` restates the problem.
"""

import math

import numpy as np
from numba import njit

SOLVED, TOO_MANY_PIVOTS = 0, 1
# Reduced costs down to minus this, relative to the largest cost, count as rounding.
TOLERANCE = 1e-13
# A problem whose costs other than zero span more than this is restated until they do not, so that the tolerance is at most
# 1e-8 of the smallest. Each restatement takes off more than ten orders of magnitude, of the 600 that there are.
WIDE, MAX_RESTATEMENTS = 1e5, 100


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
def _initial_tree(cost, n, m, mass, column_mean, row_mean, row_best, row_choice, order, parent, flow):
    """The initial basis: repeatedly send as much as possible over the open cell that is cheapest for its row and column.

    A cell is judged by its cost minus the means of its row and of its column, weighted by the masses: this takes half as
    many pivots afterwards as judging it by the cost alone. The node that is exhausted is closed and becomes a child of the
    other. Returns the root, the node that stays open.
    """
    total = 0
    for i in range(n):
        total += mass[i]
    for j in range(m):
        column_mean[j] = 0.0
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
def _set_potentials(cost, n, root, parent, depth, potential, first_child, next_sibling):
    """Depths and potentials of the whole tree, from the root down."""
    depth[root], potential[root] = 0, 0.0
    x = first_child[root]
    while x >= 0:
        to = parent[x]
        depth[x] = depth[to] + 1
        potential[x] = (cost[x, to - n] if x < n else cost[to, x - n]) - potential[to]
        if first_child[x] >= 0:
            x = first_child[x]
            continue
        while x != root and next_sibling[x] < 0:
            x = parent[x]
        if x == root:
            break
        x = next_sibling[x]


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
            reduced = cost[i, j] - potential[i] - potential[n + j]
            _pivot(i, j, reduced, n, parent, flow, depth, potential, first_child, next_sibling, previous_sibling)
            unsuccessful = 0
            pivots += 1
    return pivots


@njit(**FLAGS)
def _sharpen(cost, n, m, root, parent, flow, dust, largest, potential, dual):
    """Restate a solved problem with smaller costs and the same optimal flows. Returns its largest cost.

    First by a ceiling. Let a feasible flow use no cell above ``used``, and ``lowest`` be the least cost. An optimal flow
    that uses a cell dearer than ``used + (k - 1) (used - lowest)``, k the smaller number of nodes, differs from that flow by
    cycles of at most k cells on either side, and one of those would make it cheaper. So dearer cells can be cut down to
    that price: they stay unused, and duals that are feasible below the ceiling are feasible above it.

    Where the ceiling cuts nothing off, by the duals: costs become reduced costs, which leave every flow as good as it was
    in comparison with the others. Those of the flow's own cells become zero but for rounding, so that the next ceiling cuts
    all others down to the scale of that rounding. Differences are taken in twice the precision of a double. What has been
    taken off is kept in ``dual``.
    """
    used = lowest = math.inf
    for i in range(n):
        for j in range(m):
            lowest = min(lowest, cost[i, j])
    used = lowest
    for x in range(n + m):
        if x != root and flow[x] > dust:
            used = max(used, cost[x, parent[x] - n] if x < n else cost[parent[x], x - n])
    ceiling = used + (min(n, m) - 1) * (used - lowest)
    bound = max(abs(ceiling), abs(lowest))
    if bound > largest / 2:
        ceiling, bound = math.inf, 0.0
        for x in range(n + m):
            dual[x] += potential[x]
    for i in range(n):
        for j in range(m):
            if ceiling < math.inf:
                cost[i, j] = min(cost[i, j], ceiling)
            else:
                # Two differences, each with its rounding error (Knuth's two-sum).
                a, b = cost[i, j], -potential[i]
                first = a + b
                error = (a - (first - (first - a))) + (b - (first - a))
                a, b = first, -potential[n + j]
                second = a + b
                error += (a - (second - (second - a))) + (b - (second - a))
                cost[i, j] = second + error
            bound = max(bound, abs(cost[i, j])) if ceiling == math.inf else bound
    return bound


@njit(inline="always", **FLAGS)
def _nodes_with_mass(weight, b, total, members):
    """List the nodes whose weight does not round to zero where ``total`` integers stand for the sum, and count them."""
    weight_sum, count = 0.0, 0
    for k in range(weight.shape[1]):
        weight_sum += weight[b, k]
    for k in range(weight.shape[1]):
        if weight[b, k] * total >= weight_sum and weight_sum > 0:
            members[count] = k
            count += 1
    return count, weight_sum


@njit(**FLAGS)
def _write_duals(cost, b, n, m, rows, columns, dual, u, v):
    """The duals of all nodes: the largest feasible ones where a node has no mass."""
    u[b], v[b] = math.inf, math.inf
    for i in range(n):
        u[b, rows[i]] = dual[i]
    for j in range(m):
        v[b, columns[j]] = dual[n + j]
    for j in range(v.shape[1]):
        if v[b, j] == math.inf:
            for i in range(n):
                v[b, j] = min(v[b, j], cost[b, rows[i], j] - dual[i])
            if n == 0:
                v[b, j] = 0.0
    for i in range(u.shape[1]):
        if u[b, i] == math.inf:
            for j in range(v.shape[1]):
                u[b, i] = min(u[b, i], cost[b, i, j] - v[b, j])


@njit(**FLAGS)
def solve_range(cost, supply, demand, first, last, precision, block, value, flow, u, v, status, pivots):
    """Solve problems ``first .. last - 1`` of ``cost (B,N,M), supply (B,N), demand (B,M)``, all float64 and contiguous.

    Writes ``value (B,)``, ``flow (B,N,M)``, the duals ``u (B,N)`` and ``v (B,M)``, and the status and number of pivots of
    each problem. Prices ``block`` rows at a time. ``precision`` is the relative error of the weights.
    """
    all_n, all_m = cost.shape[1], cost.shape[2]
    nodes = all_n + all_m
    rows, columns = np.empty(all_n, np.int64), np.empty(all_m, np.int64)
    c = np.empty((all_n, all_m), np.float64)
    mass, edge = np.empty(nodes, np.int64), np.empty(nodes, np.int64)
    parent, depth, order = np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    first_child, next_sibling = np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    previous_sibling = np.empty(nodes, np.int32)
    potential, dual, column_mean = np.empty(nodes), np.empty(nodes), np.empty(all_m)
    row_mean, row_best, row_choice = np.empty(all_n), np.empty(all_n), np.empty(all_n, np.int32)

    # As large as 64 bits allow, so that rounding to integers loses less than the rounding of the weights themselves.
    total = np.int64(2) ** (60 - int(math.ceil(math.log2(2 * (all_n + 1)))))

    for b in range(first, last):
        status[b], pivots[b], value[b] = SOLVED, 0, 0.0
        flow[b] = 0.0
        n, supply_sum = _nodes_with_mass(supply, b, total, rows)
        m, _ = _nodes_with_mass(demand, b, total, columns)
        if n == 0 or m == 0:  # no mass at all
            _write_duals(cost, b, 0, 0, rows, columns, dual, u, v)
            continue

        largest, smallest = 0.0, math.inf
        for i in range(n):
            for j in range(m):
                c[i, j] = cost[b, rows[i], columns[j]]
                size = abs(c[i, j])
                largest = max(largest, size)
                smallest = min(smallest, size if size > 0 else math.inf)
        _integer_masses(supply, b, rows, n, total, mass, 0)
        _integer_masses(demand, b, columns, m, total, mass, n)
        unit = 2 * (n + 1)
        for k in range(n + m):
            mass[k] = mass[k] * unit + (1 if k < n else 0)
        mass[n + m - 1] += n

        root = _initial_tree(c, n, m, mass, column_mean, row_mean, row_best, row_choice, order, parent, edge)
        for k in range(n + m):
            first_child[k] = -1
            dual[k] = 0.0
        for step in range(n + m - 2, -1, -1):
            _attach(order[step], parent[order[step]], parent, first_child, next_sibling, previous_sibling)

        # What the rounding of the weights alone can leave on a cell.
        dust = int((n + m) * (precision * total + 1)) * unit
        limit = 1000 + 20 * (n + m) * (n + m)
        for restatement in range(MAX_RESTATEMENTS):
            if restatement > 0:
                largest = _sharpen(c, n, m, root, parent, edge, dust, largest, potential, dual)
            _set_potentials(c, n, root, parent, depth, potential, first_child, next_sibling)
            pivots[b] += _optimise(
                c, n, m, block, TOLERANCE * largest, limit, parent, edge, depth, potential,
                first_child, next_sibling, previous_sibling,
            )  # fmt: skip
            if pivots[b] > limit or largest <= WIDE * smallest:
                break
        if pivots[b] > limit:
            status[b] = TOO_MANY_PIVOTS

        # Dust is swept off cells that cost more than all that a node can pay elsewhere, where costs are of many sizes.
        dearest = math.inf
        if restatement > 0:
            dearest = 0.0
            for x in range(n + m):
                if x != root and edge[x] > dust:
                    i, j = (x, parent[x] - n) if x < n else (parent[x], x - n)
                    dearest = max(dearest, nodes * abs(cost[b, rows[i], columns[j]]))
        scale = supply_sum / total
        for x in range(n + m):
            dual[x] += potential[x]
            if x != root:
                i, j = (x, parent[x] - n) if x < n else (parent[x], x - n)
                if edge[x] > dust or abs(cost[b, rows[i], columns[j]]) <= dearest:
                    moved = ((edge[x] + n + 1) // unit) * scale
                    flow[b, rows[i], columns[j]] = moved
                    value[b] += moved * cost[b, rows[i], columns[j]]
        _write_duals(cost, b, n, m, rows, columns, dual, u, v)
