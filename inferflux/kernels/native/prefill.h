// Attention of rows of several queries, a block of queries and a block of keys at a time: two small matrix products, with
// the softmax carried from block to block (Dao et al. 2022, arXiv 2205.14135, algorithm 1).
//
// Blocks of keys begin at multiples of KEYS, whoever asks, so that a query's result does not depend on what is computed
// beside it. A block's queries, those of all heads that share a key head, lie side by side, as do their scores: what the
// softmax does to one it does to a register of them. Buffers are padded so that the products' loops have no rest.
#pragma once
#include "attention.h"

// Queries of a block and keys of one. 16 prompts of 128 tokens, 9 heads of 64 over 3, float32, two cores of a Zen 3 EPYC:
// 5.4 ms; with 64 keys, of which more are hidden, 6.2 ms. One of 1024 on two cores of a Zen 5 EPYC in float32 and bfloat16:
// 3.15 and 1.81 ms, with 96 queries 3.34 and 1.86, with 64 keys 3.10 and 1.76, but 32 rows of 5 tokens then 345 us, not 314.
constexpr long QUERIES = W == 16 ? 192 : 96, KEYS = 32;
// What stays in registers: scores of KT keys by QV registers of queries; sums of QT queries by DV registers of columns. QV
// registers of queries are a panel: it meets a block's keys while they, its scores and what it mixes are in the first cache.
constexpr int KT = W == 16 ? 8 : 4, QV = 3, QT = W == 16 ? 12 : 6, DV = 2;
constexpr long PANEL_QUERIES = QV * W;
static_assert(KEYS % KT == 0 && KT % 2 == 0 && PANEL_QUERIES % QT == 0, "the products' loops have no rest");

// Queries first..first+count-1 of a row, of which token `token` is the first; head: the key head.
struct Block {
  long row, token, first, count, head;
};

// What a block is computed with; `units` and `columns` of a head and `lanes` of queries, padded. In units of E (see
// Operands): query [lanes / PANEL_QUERIES, units, PANEL_QUERIES], keys [KEYS, units], weights [KEYS / TOGETHER,
// PANEL_QUERIES] in the place of scores [KEYS, PANEL_QUERIES], values [KEYS / TOGETHER, columns]. mixed [lanes, columns],
// peaks, totals, places (of queries, in their row) [lanes], shrinks [PANEL_QUERIES]. If keys and values are codes: their
// scales.
template <class E> struct Buffers {
  long lanes, units, columns;
  std::unique_ptr<Line[]> memory;
  float *query, *keys, *scores, *values, *mixed, *peaks, *totals, *shrinks;
  float key_scales[KEYS], value_scales[KEYS];
  int32_t* places;
  Buffers(long D, long queries)
      : lanes(padded(queries, PANEL_QUERIES)),
        units(padded(D, Operands<E>::COUNT) / Operands<E>::TOGETHER),
        columns(padded(D, DV * W)),
        memory(new Line[(lanes * (units + columns + 3) + KEYS * (units + columns + PANEL_QUERIES) + PANEL_QUERIES) /
                            LINE_FLOATS + 1]) {
    query = memory[0].floats, mixed = query + lanes * units, keys = mixed + lanes * columns;
    values = keys + KEYS * units, scores = values + KEYS * columns, shrinks = scores + KEYS * PANEL_QUERIES;
    peaks = shrinks + PANEL_QUERIES, totals = peaks + lanes, places = (int32_t*)(totals + lanes);
  }
};

// Where a key of the block's row lies, for its key head; its value lies part_stride further.
template <class P>
static inline const P* key_at(const AttentionCall& c, const Block& block, long position) {
  return place_of<P>(c, block.row, position) + block.head * head_size<P>(c.head_dim);
}

// Number r of a block's queries, counted token by token: its token in the row, and its place in the step's query or output.
struct Query {
  long token, offset;
};
static inline Query query_at(const AttentionCall& c, const Block& block, long r, long stride) {
  const long G = c.num_heads / c.num_kv_heads;
  return {block.first + r / G, (block.token + r / G) * stride + (block.head * G + r % G) * c.head_dim};
}

// The block's queries, as they are; zeros in lanes behind the last.
template <class E>
static void fetch_queries(const AttentionCall& c, const Block& block, long used, Buffers<E>& b) {
  const long D = c.head_dim;
  for (long q = 0; q < padded(used, PANEL_QUERIES); q += W) {
    const typename E::T* from[W];
    for (long i = 0; i < W; i++) {
      const Query query = query_at(c, block, q + i, c.query_stride);
      from[i] = q + i < used ? (const typename E::T*)c.query + query.offset : nullptr;
      b.places[q + i] = (int32_t)query.token;
    }
    float* to = b.query + q / PANEL_QUERIES * PANEL_QUERIES * b.units + q % PANEL_QUERIES;
    for (long d = 0; d < D; d += Operands<E>::COUNT, to += W * PANEL_QUERIES) {
      Floats v[W];
      for (long i = 0; i < W; i++) v[i] = from[i] ? read_up_to<E>(from[i] + d, D - d) : Floats{};
      transpose(v);
      for (long i = 0; i < W; i++) store(to + i * PANEL_QUERIES, v[i]);
    }
  }
}

// Keys first..first+KEYS-1 and their values; zeros where no query of the block sees them, before `seen` and from `last`
// on, since anything may stand there: a weight of 0 times what is no number is none.
template <class E, class P>
static void fetch(const AttentionCall& c, const Block& block, long first, long seen, long last, Buffers<E>& b) {
  typedef Operands<E> O;
  const long D = c.head_dim;
  for (long n = 0; n < KEYS && n < padded(last - first, KT); n += O::TOGETHER) {
    float *key = b.keys + n * b.units, *value = b.values + n / O::TOGETHER * b.columns;
    const P* from[O::TOGETHER];
    for (int i = 0; i < O::TOGETHER; i++) {
      from[i] = first + n + i < seen || first + n + i >= last ? nullptr : key_at<P>(c, block, first + n + i);
      if (!IS_CODE<P>) continue;
      b.key_scales[n + i] = b.value_scales[n + i] = 0;
      if (!from[i]) continue;
      memcpy(b.key_scales + n + i, from[i] + D, sizeof(float));
      memcpy(b.value_scales + n + i, from[i] + c.part_stride + D, sizeof(float));
    }
    for (long d = 0; d < D; d += O::COUNT, key += W, value += O::COUNT) {
      Floats rows[O::TOGETHER], columns[O::TOGETHER];
      for (int i = 0; i < O::TOGETHER; i++) {
        store(key + i * b.units, from[i] ? read_up_to<E>(from[i] + d, D - d) : Floats{});
        rows[i] = from[i] ? read_up_to<E>(from[i] + c.part_stride + d, D - d) : Floats{};
      }
      O::pair(rows, columns);
      for (int i = 0; i < O::TOGETHER; i++) store(value + i * W, columns[i]);
    }
  }
}

// scores = keys @ query, of KT keys and the queries of a panel.
template <class E, class P>
static inline void score_tile(const float* keys, const float* key_scales, const float* query, long units, float* scores) {
  Floats acc[KT][QV];
  UNROLLED for (int k = 0; k < KT; k++)
    UNROLLED for (int v = 0; v < QV; v++) acc[k][v] = Floats{};
  for (long d = 0; d < units; d++, query += PANEL_QUERIES) {
    Floats x[QV];
    UNROLLED for (int v = 0; v < QV; v++) {
      x[v] = load<Floats>(query + v * W);
      hold(x[v]);
    }
    UNROLLED for (int k = 0; k < KT; k++) {
      const Floats a = splat_unit(keys + k * units + d);
      UNROLLED for (int v = 0; v < QV; v++) acc[k][v] = Operands<E>::add(acc[k][v], a, x[v]);
    }
  }
  UNROLLED for (int k = 0; k < KT; k++)
    UNROLLED for (int v = 0; v < QV; v++)
      store(scores + k * PANEL_QUERIES + v * W, IS_CODE<P> ? acc[k][v] * key_scales[k] : acc[k][v]);
}

// New scores of `count` keys join the running peaks and totals of the panel that begins at q, and become weights in place.
// all_seen: no query lacks one of these keys. Lanes behind the last query hold what nobody reads.
template <class E, class P>
static void weigh_panel(const AttentionCall& c, long first, long count, bool all_seen, long q, Buffers<E>& b) {
  typedef Operands<E> O;
  const int32_t window = c.window < INT32_MAX ? (int32_t)c.window : 0;
  const float factor = c.soft_cap > 0 ? 1.0f : c.scale * LOG2_E;
  for (long v = 0; v < PANEL_QUERIES; v += W) {
    float *scores = b.scores + v, *peaks = b.peaks + q + v, *totals = b.totals + q + v;
    const Floats peak = load<Floats>(peaks);
    const Ints places = load<Ints>(b.places + q + v);
    Floats most = splat(-INFINITY);
    for (long n = 0; n < count; n++) {
      Floats s = load<Floats>(scores + n * PANEL_QUERIES);
      if (c.soft_cap > 0) s = capped(c, s);
      if (!all_seen) {
        const int32_t place = (int32_t)(first + n);
        s = places < place ? splat(-INFINITY) : s;
        if (window) s = places - window >= place ? splat(-INFINITY) : s;
      }
      if (c.soft_cap > 0 || !all_seen) store(scores + n * PANEL_QUERIES, s);
      most = larger(s, most);
    }
    most = larger(most * factor, peak);
    // Nothing was seen yet: all weights are 0, not 0 / 0.
    const Floats from = most == -INFINITY ? Floats{} : most, shrink = exp2(peak - from);
    Floats added = {};
    for (long n = 0; n < count; n += O::TOGETHER) {
      Floats rows[O::TOGETHER];
      for (int i = 0; i < O::TOGETHER; i++) {
        rows[i] = exp2(load<Floats>(scores + (n + i) * PANEL_QUERIES) * factor - from);
        if (IS_CODE<P>) added += rows[i], rows[i] *= b.value_scales[n + i];
      }
      const Floats weights = O::round(rows);
      store(scores + n / O::TOGETHER * PANEL_QUERIES, weights);
      if (!IS_CODE<P>) added = O::add_up(added, weights);
    }
    store(totals, load<Floats>(totals) * shrink + added);
    store(peaks, most);
    store(b.shrinks + v, shrink);
  }
}

// mixed = mixed * shrinks + weights.T @ values, of QT queries from lane m of a panel on, and DV registers of columns from
// d on. mixed: of the panel; count: of rows of units.
template <class E>
static inline void mix_tile(const Buffers<E>& b, float* mixed, long count, long m, long d) {
  const long columns = b.columns;
  const float *weights = b.scores + m, *values = b.values + d, *shrinks = b.shrinks + m;
  mixed += m * columns + d;
  Floats acc[QT][DV];
  UNROLLED for (int m = 0; m < QT; m++)
    UNROLLED for (int v = 0; v < DV; v++) acc[m][v] = load<Floats>(mixed + m * columns + v * W) * shrinks[m];
  for (long n = 0; n < count; n++, weights += PANEL_QUERIES, values += columns) {
    Floats x[DV];
    UNROLLED for (int v = 0; v < DV; v++) {
      x[v] = load<Floats>(values + v * W);
      hold(x[v]);
    }
    UNROLLED for (int m = 0; m < QT; m++) {
      const Floats a = splat_unit(weights + m);
      UNROLLED for (int v = 0; v < DV; v++) acc[m][v] = Operands<E>::add(acc[m][v], a, x[v]);
    }
  }
  UNROLLED for (int m = 0; m < QT; m++)
    UNROLLED for (int v = 0; v < DV; v++) store(mixed + m * columns + v * W, acc[m][v]);
}

// Queries from q on meet the keys that were fetched, of which those from `first` on are seen by some of them.
template <class E, class P>
static void attend_panel(const AttentionCall& c, const Block& block, long first, long q, Buffers<E>& b) {
  const long G = c.num_heads / c.num_kv_heads, used = G * block.count, lanes = padded(used, PANEL_QUERIES);
  const long last_lane = q + PANEL_QUERIES < used ? q + PANEL_QUERIES - 1 : used - 1;
  const long first_token = block.first + q / G, last_token = block.first + last_lane / G;
  const long last = block.first + block.count;
  // Keys behind the last query's own are seen by none.
  const long seen = last_token - first + 1, count = seen < KEYS ? padded(seen, KT) : KEYS;
  if (seen <= 0) return;
  long next = first + KEYS + q * KEYS / lanes;
  for (long n = 0; n < count; n += KT) {
    // Of the next keys, too, each panel's share has been fetched when it is done.
    const long end = first + KEYS + (q * count + (n + KT) * PANEL_QUERIES) * KEYS / (lanes * count);
    for (; next < end && next < last; next++) {
      const P* key = key_at<P>(c, block, next);
      for (long d = 0; d < c.head_dim; d += 64 / sizeof(*key)) {
        __builtin_prefetch(key + d);
        __builtin_prefetch(key + c.part_stride + d);
      }
    }
    float* scores = b.scores + n * PANEL_QUERIES;
    score_tile<E, P>(b.keys + n * b.units, b.key_scales + n, b.query + q * b.units, b.units, scores);
  }
  const bool all_seen = first + count <= first_token + 1 && (!c.window || first > last_token - c.window);
  weigh_panel<E, P>(c, first, count, all_seen, q, b);
  for (long d = 0; d < b.columns; d += DV * W)
    for (long m = 0; m < PANEL_QUERIES && q + m < used; m += QT)
      mix_tile<E>(b, b.mixed + q * b.columns, count / Operands<E>::TOGETHER, m, d);
}

template <class E, class P>
static void attend_block(const AttentionCall& c, const Block& block, Buffers<E>& b) {
  const long D = c.head_dim, used = c.num_heads / c.num_kv_heads * block.count, lanes = padded(used, PANEL_QUERIES);
  const long last = block.first + block.count;
  const long seen = c.window && block.first >= c.window ? block.first - c.window + 1 : 0;
  fetch_queries<E>(c, block, used, b);
  std::fill(b.mixed, b.mixed + lanes * b.columns, 0.0f);
  std::fill(b.peaks, b.peaks + lanes, -INFINITY);
  std::fill(b.totals, b.totals + lanes, 0.0f);
  for (long first = seen / KEYS * KEYS; first < last; first += KEYS) {
    fetch<E, P>(c, block, first, seen, last, b);
    for (long q = 0; q < lanes; q += PANEL_QUERIES) attend_panel<E, P>(c, block, first, q, b);
  }
  for (long r = 0; r < used; r++) {
    typename E::T* to = (typename E::T*)c.out + query_at(c, block, r, c.num_heads * D).offset;
    write_scaled<E>(to, b.mixed + r * b.columns, 1.0f / b.totals[r], D);
  }
}

template <class E, class P>
static void prefill(const AttentionCall& c, Team& team) {
  const long G = c.num_heads / c.num_kv_heads, K = c.num_kv_heads;
  long num_tokens = 0, most = QUERIES / G;
  for (long r = 0; r < c.num_rows; r++)
    if (c.starts[r + 1] - c.starts[r] > 1) num_tokens += c.starts[r + 1] - c.starts[r];
  // Smaller blocks where threads would have few each, and wait for the last.
  while (most * G > PANEL_QUERIES && num_tokens * K < most * team.size() * 4) most /= 2;
  std::vector<Block> blocks;
  for (long r = 0; r < c.num_rows; r++) {
    const long token = c.starts[r], count = c.starts[r + 1] - token;
    for (long q = 0; count > 1 && q < count; q += most)
      for (long head = 0; head < K; head++)
        blocks.push_back({r, token + q, c.lengths[r] - count + q, count - q < most ? count - q : most, head});
  }
  const long num_blocks = blocks.size();
  if (!num_blocks) return;
  // Each thread's. They are made here, because a thread that finds no memory can only end the process.
  std::vector<Buffers<E>> buffers;
  for (long i = 0; i < (num_blocks > 1 ? team.size() : 1); i++) buffers.emplace_back(c.head_dim, most * G);
  // The last see most.
  std::atomic<long> left(num_blocks);
  team.share(buffers.size(), 1, [&](long thread, long, long) {
    for (long i; (i = --left) >= 0;) attend_block<E, P>(c, blocks[i], buffers[thread]);
  });
}
