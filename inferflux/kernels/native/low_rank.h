// What low-rank adapters add to a product: y += up (down x), each row's by its own adapter.
// A row's sums grow in the same order whatever else is in the batch.
#pragma once
#include <memory>

#include "vector.h"

// Outputs that are added to at once, side by side in `up`; and rows that meet what was read of an adapter.
constexpr long WIDE = 64, ROWS_AT_ONCE = 16;

struct LowRank {
  const void* down;  // [rank, inputs]
  const void* up;    // [panels, rank, WIDE], filled up with zeros
  int64_t rank;
};

struct LowRankCall {
  void* y;                  // [rows, outputs]
  const void* x;            // [rows, inputs]
  const int32_t* adapters;  // [rows]
  const LowRank* pairs;     // by adapter; further ones add nothing
  int64_t num_pairs, rows, outputs, inputs, most;  // most: the largest rank
};

template <class E>
static float dot(const typename E::T* a, const typename E::T* b, long count) {
  Floats even = {}, odd = {};
  float rest = 0;
  long i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    even += E::read(a + i) * E::read(b + i);
    odd += E::read(a + i + W) * E::read(b + i + W);
  }
  for (; i < count; i++) rest += E::read1(a + i) * E::read1(b + i);
  return sum(even + odd) + rest;
}

// to[i] += the sum of factors[j] * up[j][i], of one panel.
template <class E>
static void add_panel(const typename E::T* up, const float* factors, long rank, typename E::T* to, long count) {
  Floats sums[WIDE / W] = {};
  for (long j = 0; j < rank; j++, up += WIDE)
    for (long v = 0; v < WIDE / W; v++) sums[v] += factors[j] * E::read(up + v * W);
  long i = 0;
  for (; i + W <= count; i += W) E::write(to + i, E::read(to + i) + sums[i / W]);
  for (; i < count; i++) E::write1(to + i, E::read1(to + i) + sums[i / W][i % W]);
}

template <class E>
static void add_low_ranks(const LowRankCall& c, Team& team) {
  typedef typename E::T T;
  const long panels = (c.outputs + WIDE - 1) / WIDE, blocks = (c.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  const LowRank none = {};
  auto pair_of = [&](long row) -> const LowRank& {
    const long adapter = c.adapters[row];
    return adapter < c.num_pairs ? c.pairs[adapter] : none;
  };
  std::unique_ptr<float[]> inner(new float[c.rows * c.most]);
  const auto each = [&](long count) {
    return c.rows * c.most * (c.inputs + c.outputs) > 20000 ? team.slice(count) : count;
  };
  team.share(blocks * c.most, each(blocks * c.most), [&](long begin, long end, long) {
    for (long t = begin; t < end; t++)
      for (long j = t % c.most, r = t / c.most * ROWS_AT_ONCE, last = r + ROWS_AT_ONCE; r < last && r < c.rows; r++) {
        const LowRank& pair = pair_of(r);
        if (j >= pair.rank) continue;
        inner[r * c.most + j] = dot<E>((const T*)c.x + r * c.inputs, (const T*)pair.down + j * c.inputs, c.inputs);
      }
  });
  team.share(blocks * panels, each(blocks * panels), [&](long begin, long end, long) {
    for (long t = begin; t < end; t++)
      for (long p = t % panels, r = t / panels * ROWS_AT_ONCE, last = r + ROWS_AT_ONCE; r < last && r < c.rows; r++) {
        const LowRank& pair = pair_of(r);
        const long first = p * WIDE, count = c.outputs - first < WIDE ? c.outputs - first : WIDE;
        const T* up = (const T*)pair.up + p * pair.rank * WIDE;
        if (pair.rank) add_panel<E>(up, &inner[r * c.most], pair.rank, (T*)c.y + r * c.outputs + first, count);
      }
  });
}
