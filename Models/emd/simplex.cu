// The transportation problem on a GPU: one warp solves one problem by the primal network simplex.
//
// Compiled with these macros defined: N, M (nodes a side, 64 at most), real (float or double), WARPS (problems per block),
// SHARED (1 keeps the reduced costs in shared memory, 0 in registers).
//
// Lane l looks after the rows, columns and tree edges l, l + 32, ... Each node stores its path to the root as two sets of
// edges: those that the path crosses from their row to their column (ahead) and the others (back). These sets are the rows
// of the inverse of the basis, so that a pivot never walks through the tree:
//
//     cycle of the entering cell (i, j) = the edges on exactly one of path(i) and path(j)
//     nodes that move                   = those whose path has the edge that leaves
//     their new path                    = to the end of the entering cell on their side, across it, then the path of its other end
//
// Every decision is taken on integers. Costs have COST_BITS bits: for up to 32 nodes, this is exact for costs 1 - cosine in
// float32, which are multiples of 2^-24. Masses have 60 bits, perturbed as in simplex_kernel.py (Orden): no basis is
// degenerate, each pivot lowers the cost, no basis occurs twice. Hence the method ends, with the same basis on every machine.

typedef unsigned int word;
typedef long long mass_t;

#define ROWS ((N + 31) / 32)           // per lane
#define COLUMNS ((M + 31) / 32)
#define WORDS ((N + M - 1 + 31) / 32)  // of a set of edges; edges per lane
#define COST_BITS (N <= 32 || M <= 32 ? 25 : 24)  // a reduced cost is at most min(N, M) costs either way: fits 31 bits
#define LIMIT (100 * (N + M))          // pivots: a guard; a hundredth of it is typical
#define CERTIFIED 1e-6                 // largest duality gap, in units of the largest cost times the mass
#define RESOLVED 1e-4                  // prices below this times the largest cost cannot be told apart
#define ROUNDING (sizeof(real) == 4 ? 1.2e-7 : 2.2e-16)
#define PASSES 12                      // see REACH
// Cells that cost more than this many times the dearest cell of any feasible plan are in no optimal plan: exchanging flow
// around a cycle of at most min(N, M) other cells would be cheaper. Twice that, so that they never tie either.
#define REACH (2.0 * (N < M ? N : M))
#define NONE 0x7fffffff
#define ALL 0xffffffffu
#define FN static __device__ __forceinline__

enum { SOLVED, TOO_MANY_PIVOTS, INVALID, UNEQUAL_TOTALS, NOT_CERTIFIED };

// --- Operations of a whole warp ----------------------------------------------------------------------------------------

template <class T> FN T from(T x, int lane) { return __shfl_sync(ALL, x, lane); }
FN int first(bool is) { return __ffs((int)__ballot_sync(ALL, is)) - 1; }  // lane; -1 if none
template <class T> FN T sum(T x) { for (int d = 16; d; d /= 2) x += __shfl_xor_sync(ALL, x, d); return x; }
FN double least(double x) { for (int d = 16; d; d /= 2) x = fmin(x, __shfl_xor_sync(ALL, x, d)); return x; }
#if __CUDA_ARCH__ >= 800
FN int sum(int x) { return __reduce_add_sync(ALL, x); }
FN int least(int x) { return __reduce_min_sync(ALL, x); }
FN word least(word x) { return __reduce_min_sync(ALL, x); }
#else
template <class T> FN T least(T x) {
  for (int d = 16; d; d /= 2) { T y = __shfl_xor_sync(ALL, x, d); x = y < x ? y : x; }
  return x;
}
#endif
FN mass_t least(mass_t x) {
  int high = least((int)(x >> 32));
  return ((mass_t)high << 32) | least((int)(x >> 32) == high ? (word)x : ALL);
}

// Element `which` of an array that is spread over the lanes.
template <class T, int COUNT> FN T element(const T (&x)[COUNT], int which) {
  T y = x[0];
  for (int k = 1; k < COUNT; k++) if (which / 32 == k) y = x[k];
  return from(y, which & 31);
}
template <int COUNT> FN bool has(const word (&set)[COUNT], int which) {
  word y = set[0];
  for (int k = 1; k < COUNT; k++) if (which / 32 == k) y = set[k];
  return (y >> (which & 31)) & 1;
}

// --- Paths -------------------------------------------------------------------------------------------------------------

struct Path {
  word ahead[WORDS], back[WORDS];
  __device__ __forceinline__ word both(int w) const { return ahead[w] | back[w]; }
};

template <int COUNT> FN Path path_of(const Path (&nodes)[COUNT], int which) {
  Path path;
  for (int w = 0; w < WORDS; w++) {
    word a = nodes[0].ahead[w], b = nodes[0].back[w];
    for (int k = 1; k < COUNT; k++) if (which / 32 == k) { a = nodes[k].ahead[w]; b = nodes[k].back[w]; }
    path.ahead[w] = from(a, which & 31);
    path.back[w] = from(b, which & 31);
  }
  return path;
}

// `far` includes the entering edge. What is on both paths is above both nodes, or the edge that leaves: it drops out.
FN bool move(Path& own, const Path& near, const Path& far, const word (&leaving)[WORDS]) {
  word hit = 0;
  for (int w = 0; w < WORDS; w++) hit |= own.both(w) & leaving[w];
  for (int w = 0; w < WORDS; w++) {
    word a = own.ahead[w], b = own.back[w], both = a | b, other = near.both(w);
    own.ahead[w] = hit ? (a & ~other) | (near.back[w] & ~both) | far.ahead[w] : a;
    own.back[w] = hit ? (b & ~other) | (near.ahead[w] & ~both) | far.back[w] : b;
  }
  return hit != 0;
}

// --- One problem -------------------------------------------------------------------------------------------------------

#if SHARED
#define TILE(i, k) tile[((i) * COLUMNS + (k)) * 32]
#else
#define TILE(i, k) tile[i][k]
#endif

// Masses as integers that sum to `whole`: rounded down, and the first of the largest takes the rest.
template <int COUNT> FN void integer_masses(const double (&weight)[COUNT], double total, mass_t whole, mass_t (&mass)[COUNT]) {
  mass_t rest = whole, most = -1;
  for (int k = 0; k < COUNT; k++) {
    mass[k] = (mass_t)(total > 0 ? weight[k] / total * (double)whole : 0.0);
    rest -= sum(mass[k]);
    mass_t x = -least(-mass[k]);
    most = x > most ? x : most;
  }
  bool given = false;
  for (int k = 0; k < COUNT; k++) {
    int lane = first(mass[k] == most);
    if (lane >= 0 && !given) { mass[k] += (threadIdx.x & 31) == lane ? rest : 0; given = true; }
  }
}

FN int solve_one(const real* cost, const real* supply, const real* demand, real* value, real* flow, real* u_out, real* v_out,
                 int* pivots, int* tile_in_shared) {
  const int lane = threadIdx.x & 31;
#if SHARED
  int* tile = tile_in_shared + lane;
#else
  int tile[N][COLUMNS];  // reduced costs: lane + 32 k is the column
#endif

  double low = 1e300, high = -1e300, not_finite = 0;
  for (int k = 0; k < COLUMNS; k++)
    for (int i = 0; i < N; i++)
      if (lane + 32 * k < M) {
        double c = cost[i * M + 32 * k + lane];
        low = fmin(low, c); high = fmax(high, c); not_finite += c * 0.0;
      }
  low = least(low); high = -least(-high);
  double s[ROWS], d[COLUMNS], supply_sum = 0, demand_sum = 0, lightest = 0;
  for (int k = 0; k < ROWS; k++) {
    s[k] = lane + 32 * k < N ? (double)supply[32 * k + lane] : 0.0;
    supply_sum += sum(s[k]); lightest = fmin(lightest, s[k]); not_finite += s[k] * 0.0;
  }
  for (int k = 0; k < COLUMNS; k++) {
    d[k] = lane + 32 * k < M ? (double)demand[32 * k + lane] : 0.0;
    demand_sum += sum(d[k]); lightest = fmin(lightest, d[k]); not_finite += d[k] * 0.0;
  }
  if (!(sum(not_finite) == 0.0) || least(lightest) < 0.0 || high - low > 1e300) return INVALID;
  if (!(fabs(supply_sum - demand_sum) <= 1e-4 * fmax(supply_sum, demand_sum))) return UNEQUAL_TOTALS;

  // Usually one pass. Where the plan uses cells that are far cheaper than the largest cost (forbidden cells, say), costs are
  // cut off where no optimal plan needs them, which leaves more bits for the others, and the problem is solved again.
  int u[ROWS], v[COLUMNS], cell[WORDS], pass = 0, pivot_count = 0;
  double unit;
  word massive[COLUMNS];
  mass_t amount[WORDS], whole = 1;
  const mass_t step = 2 * (N + 1);
  while (whole < ((mass_t)1 << 59) / step) whole *= 2;
  // Flows that rounding of the weights may cause, where forbidden cells separate nodes whose weights add up to the same.
  const mass_t dust = (mass_t)((N + M) * (ROUNDING * (double)whole + 1)) * step;
again:
  // Costs as integers: less the smallest, times a power of two.
  unit = 1.0;
  if (high > low) { int exponent; frexp(high - low, &exponent); unit = ldexp(1.0, exponent < -900 ? 900 : COST_BITS - exponent); }

  // The key of the start is the cost less the means of its row and its column; u and v are these means.
  for (int k = 0; k < ROWS; k++) u[k] = 0;
  for (int k = 0; k < COLUMNS; k++) v[k] = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    int total = 0;
    for (int k = 0; k < COLUMNS; k++) {
      int c = lane + 32 * k < M ? __double2int_rn((fmin((double)cost[i * M + 32 * k + lane], high) - low) * unit) : 0;
      c = c < 1 << COST_BITS ? c : (1 << COST_BITS) - 1;  // so that 64 of them fit an int
      TILE(i, k) = c; v[k] += c; total += sum(c);
    }
    for (int k = 0; k < ROWS; k++) if (lane + 32 * k == i) u[k] = total / M;
    for (int k = 0; k < COLUMNS; k++) TILE(i, k) -= total / M;
  }
  for (int k = 0; k < COLUMNS; k++) v[k] /= N;
#pragma unroll
  for (int i = 0; i < N; i++)
    for (int k = 0; k < COLUMNS; k++) TILE(i, k) -= v[k];

  // Masses. Rows get one more than their share, the first of the heaviest columns takes the surplus.
  mass_t row_mass[ROWS], column_mass[COLUMNS];
  integer_masses(s, supply_sum, whole, row_mass);
  integer_masses(d, demand_sum, whole, column_mass);
  word open_rows[ROWS], open_columns[COLUMNS];
  int nodes = N;
  mass_t most = 0;
  for (int k = 0; k < ROWS; k++) {
    row_mass[k] = row_mass[k] * step + 1;
    open_rows[k] = N >= 32 * (k + 1) ? ALL : (1u << (N & 31)) - 1;
  }
  for (int k = 0; k < COLUMNS; k++) { mass_t x = -least(-column_mass[k]); most = x > most ? x : most; }
  bool given = false;
  for (int k = 0; k < COLUMNS; k++) {
    int heaviest = first(column_mass[k] == most);
    column_mass[k] *= step;
    if (heaviest >= 0 && !given) { column_mass[k] += lane == heaviest ? N : 0; given = true; }
    massive[k] = open_columns[k] = __ballot_sync(ALL, column_mass[k] > 0);  // columns without mass stay out of the tree
    nodes += __popc(massive[k]);
  }

  // Start: send as much as possible over the open cell of the least key. The node that this exhausts is closed and hangs, with
  // its tree, from the other.
  Path rows[ROWS], columns[COLUMNS];
  int row_root[ROWS], column_root[COLUMNS], u_change[ROWS], v_change[COLUMNS], best[COLUMNS], at[COLUMNS];
  for (int k = 0; k < ROWS; k++) { row_root[k] = lane + 32 * k; u_change[k] = 0; }
  for (int k = 0; k < COLUMNS; k++) { column_root[k] = N + lane + 32 * k; v_change[k] = 0; }
  for (int w = 0; w < WORDS; w++) {
    amount[w] = 0; cell[w] = -1;
    for (int k = 0; k < ROWS; k++) rows[k].ahead[w] = rows[k].back[w] = 0;
    for (int k = 0; k < COLUMNS; k++) columns[k].ahead[w] = columns[k].back[w] = 0;
  }
  bool stale = true;
  for (int edge = 0; edge < nodes - 1;) {
    if (stale)
#pragma unroll
      for (int k = 0; k < COLUMNS; k++) {
        best[k] = NONE; at[k] = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
          bool lower = ((open_rows[i / 32] >> (i & 31)) & 1) & (TILE(i, k) < best[k]);
          best[k] = lower ? TILE(i, k) : best[k];
          at[k] = lower ? i : at[k];
        }
      }
    int x = NONE, row = 0, part = 0;
    for (int k = 0; k < COLUMNS; k++)
      if ((open_columns[k] >> lane) & 1 && best[k] < x) { x = best[k]; row = at[k]; part = k; }
    int lowest = least(x), owner = first(x == lowest);
    if (lowest == NONE) return TOO_MANY_PIVOTS;  // no open cell, which exact masses rule out; better NaN than a hang
    int i = from(row, owner), j = owner + 32 * from(part, owner);
    stale = !has(open_rows, i);  // closed since: what the column holds is only a lower bound
    if (stale) continue;
    mass_t have = element(row_mass, i), want = element(column_mass, j);
    bool closes_row = have < want;
    mass_t moved = closes_row ? have : want;
    int closed = closes_row ? i : N + j, to = closes_row ? N + j : i, change = closes_row ? lowest : -lowest;
    for (int k = 0; k < ROWS; k++) {
      bool in = row_root[k] == closed;
      if (in) { row_root[k] = to; u_change[k] += change; }
      if (!closes_row && lane + 32 * k == i) row_mass[k] -= moved;
      if (closes_row && i / 32 == k) open_rows[k] &= ~(1u << (i & 31));
      for (int w = 0; w < WORDS; w++) {
        word mark = in && edge / 32 == w ? 1u << (edge & 31) : 0;
        rows[k].ahead[w] |= closes_row ? mark : 0; rows[k].back[w] |= closes_row ? 0 : mark;
      }
    }
    for (int k = 0; k < COLUMNS; k++) {
      bool in = column_root[k] == closed;
      if (in) { column_root[k] = to; v_change[k] -= change; }
      if (closes_row && lane + 32 * k == j) column_mass[k] -= moved;
      if (!closes_row && j / 32 == k) open_columns[k] &= ~(1u << (j & 31));
      for (int w = 0; w < WORDS; w++) {
        word mark = in && edge / 32 == w ? 1u << (edge & 31) : 0;
        columns[k].ahead[w] |= closes_row ? mark : 0; columns[k].back[w] |= closes_row ? 0 : mark;
      }
    }
    for (int w = 0; w < WORDS; w++) if (lane + 32 * w == edge) { amount[w] = moved; cell[w] = i * M + j; }
    edge++;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    int change = from(u_change[i / 32], i & 31);
    for (int k = 0; k < COLUMNS; k++) TILE(i, k) -= change + v_change[k];
  }
  for (int k = 0; k < ROWS; k++) u[k] += u_change[k];
  for (int k = 0; k < COLUMNS; k++) v[k] += v_change[k];

  // Pivots: the cell of the least reduced cost enters.
  for (int count = 0;; count++) {
    int x = NONE, row = 0, part = 0;
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) {
      int y = NONE, own = 0;
#pragma unroll
      for (int i = 0; i < N; i++) if (TILE(i, k) < y) { y = TILE(i, k); own = i; }
      if ((massive[k] >> lane) & 1 && y < x) { x = y; row = own; part = k; }
    }
    int lowest = least(x);
    *pivots = pivot_count + count;
    if (lowest >= 0) { pivot_count += count; break; }
    if (count == LIMIT) return TOO_MANY_PIVOTS;
    int owner = first(x == lowest);
    int i = from(row, owner), j = owner + 32 * from(part, owner);
    Path p = path_of(rows, i), q = path_of(columns, j);

    // The flow falls on the edges of the cycle passed ahead from i and back from j, and rises on the others.
    word falls[WORDS], rises[WORDS];
    mass_t smallest = 0x7fffffffffffffffLL;
    int slot = 0;
    for (int w = 0; w < WORDS; w++) {
      falls[w] = (p.ahead[w] & ~q.both(w)) | (q.back[w] & ~p.both(w));
      rises[w] = (p.both(w) ^ q.both(w)) & ~falls[w];
      if ((falls[w] >> lane) & 1 && amount[w] < smallest) { smallest = amount[w]; slot = w; }
    }
    mass_t theta = least(smallest);
    owner = first(smallest == theta);
    slot = from(slot, owner);
    word leaving[WORDS], on_row_side = 0;
    for (int w = 0; w < WORDS; w++) {
      leaving[w] = slot == w ? 1u << owner : 0;
      on_row_side |= p.both(w) & leaving[w];
      amount[w] += ((rises[w] >> lane) & 1 ? theta : 0) - ((falls[w] >> lane) & 1 ? theta : 0);
      if ((leaving[w] >> lane) & 1) { amount[w] = theta; cell[w] = i * M + j; }
    }
    Path near = on_row_side ? p : q, far = on_row_side ? q : p;
    for (int w = 0; w < WORDS; w++) { if (on_row_side) far.ahead[w] |= leaving[w]; else far.back[w] |= leaving[w]; }
    int change = on_row_side ? lowest : -lowest, column_change[COLUMNS];
    word moved_rows[ROWS];
    for (int k = 0; k < ROWS; k++) {
      bool in = move(rows[k], near, far, leaving);
      moved_rows[k] = __ballot_sync(ALL, in);
      u[k] += in ? change : 0;
    }
    for (int k = 0; k < COLUMNS; k++) {
      column_change[k] = move(columns[k], near, far, leaving) ? change : 0;
      v[k] -= column_change[k];
    }
#pragma unroll
    for (int i2 = 0; i2 < N; i2++) {
      int row_change = (moved_rows[i2 / 32] >> (i2 & 31)) & 1 ? change : 0;
      for (int k = 0; k < COLUMNS; k++) TILE(i2, k) += column_change[k] - row_change;
    }
  }

  double dearest = 0, paid = 0;
  for (int w = 0; w < WORDS; w++)
    if (cell[w] >= 0 && amount[w] > dust) {
      double c = cost[cell[w]];
      dearest = fmax(dearest, c - low); paid = fmax(paid, fabs(c));
    }
  dearest = -least(-dearest) * REACH; paid = -least(-paid);
  if (dearest > 0 && dearest > 1e-13 * fabs(low) && 16 * dearest < high - low && ++pass < PASSES) { high = low + dearest; goto again; }

  // Results.
#pragma unroll
  for (int k = 0; k < COLUMNS; k++)
#pragma unroll 4
    for (int i = 0; i < N; i++) if (lane + 32 * k < M) flow[i * M + 32 * k + lane] = 0;
  __syncwarp();
  double total = 0, primal = 0, dual = 0;  // these two of the problem with costs cut
  for (int w = 0; w < WORDS; w++)
    if (cell[w] >= 0) {
      double c = cost[cell[w]], moved = (double)((amount[w] + N + 1) / step) / (double)whole * supply_sum;
      primal += moved * fmin(c, high);
      if (amount[w] > dust || c - low <= dearest) { flow[cell[w]] = moved; total += moved * c; }
    }
  for (int k = 0; k < ROWS; k++)
    if (lane + 32 * k < N) { double x = u[k] / unit + low; u_out[32 * k + lane] = x; dual += x * s[k]; }
  for (int k = 0; k < COLUMNS; k++) {
    int slack = NONE;  // a column without mass takes the largest feasible dual
#pragma unroll
    for (int i = 0; i < N; i++) slack = TILE(i, k) < slack ? TILE(i, k) : slack;
    double x = (v[k] + ((massive[k] >> lane) & 1 ? 0 : slack)) / unit;
    if (lane + 32 * k < M) { v_out[32 * k + lane] = x; dual += x * d[k] * (demand_sum > 0 ? supply_sum / demand_sum : 0.0); }
  }
  primal = sum(primal); dual = sum(dual);
  *value = sum(total);
  const double largest = fmax(fabs(low), fabs(high));
  const bool resolved = dearest == 0 || paid >= RESOLVED * largest;
  return resolved && fabs(primal - dual) <= CERTIFIED * largest * supply_sum ? SOLVED : NOT_CERTIFIED;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
solve(const real* cost, const real* supply, const real* demand, long long batch, real* value, real* flow, real* u, real* v,
      int* pivots, int* status, int* fault) {
#if SHARED
  __shared__ int tiles[WARPS][N * COLUMNS * 32];
  int* tile = tiles[threadIdx.x / 32];
#else
  int* tile = 0;
#endif
  long long b = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (b >= batch) return;
  int result = solve_one(cost + b * N * M, supply + b * N, demand + b * M, value + b, flow + b * N * M, u + b * N, v + b * M,
                         pivots + b, tile);
  status[b] = result;
  if (result == SOLVED) return;
  // Seen where the results are used, without waiting for the device here.
  const int lane = threadIdx.x & 31;
  const real nan = (real)(0.0 / 0.0);
  __syncwarp();  // other lanes may have written where this one writes now
  for (int k = lane; k < N * M; k += 32) flow[b * N * M + k] = nan;
  for (int k = lane; k < N; k += 32) u[b * N + k] = nan;
  for (int k = lane; k < M; k += 32) v[b * M + k] = nan;
  if (lane == 0) { value[b] = nan; atomicMax(fault, result); }
}
