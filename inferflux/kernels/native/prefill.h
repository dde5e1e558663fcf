// Attention of rows of several queries, a block of queries and a block of keys at a time: two small matrix products, with
// the softmax carried from block to block (Dao et al. 2022, arXiv 2205.14135, algorithm 1).
//
// Blocks of keys begin at multiples of KEYS, whoever asks, so that a query's result does not depend on what is computed
// beside it. A block's queries, those of all heads that share a key head, lie side by side, as do their scores: what the
// softmax does to one it does to a register of them. Buffers are padded so that the products' loops have no rest.
#pragma once
#include "attention.h"

// Queries of a block and keys of one: with 64 columns the buffers fill the second cache by a sixth. 16 prompts of 128
// tokens, 9 heads of 64 over 3, float32, two cores of a Zen 3 EPYC: 5.4 ms; with 64 keys, of which more are hidden, 6.2 ms.
constexpr long QUERIES = 96, KEYS = 32;
// What stays in registers: scores of KT keys by QV registers of queries; sums of QT queries by DV registers of columns.
constexpr int KT = W == 16 ? 8 : 4, QV = 3, QT = W == 16 ? 12 : 6, DV = 2;
constexpr long PANEL_QUERIES = QV * W;
static_assert(KEYS % KT == 0 && PANEL_QUERIES % QT == 0 && KEYS % 2 == 0, "the products' loops have no rest");

// Queries first..first+count-1 of a row, of which token `token` is the first; head: the key head.
struct Block {
  long row, token, first, count, head;
};

// What a block is computed with; `units` and `columns` of a head and `lanes` of queries, padded. In units of E (see
// Operands): query [lanes / PANEL_QUERIES, units, PANEL_QUERIES], keys [KEYS, units], weights [KEYS / TOGETHER, lanes] in
// the place of scores [KEYS, lanes], values [KEYS / TOGETHER, columns]. mixed [lanes, columns], the rest [lanes].
template <class E> struct Buffers {
  long lanes, units, columns;
  std::unique_ptr<Line[]> memory;
  float *query, *keys, *scores, *values, *mixed, *peaks, *totals, *shrinks;
  int32_t* places;
  Buffers(long D, long queries)
      : lanes(padded(queries, PANEL_QUERIES)),
        units(padded(D, Operands<E>::COUNT) / Operands<E>::TOGETHER),
        columns(padded(D, DV * W)),
        memory(new Line[(lanes * (units + KEYS + columns + 4) + KEYS * (units + columns)) / LINE_FLOATS + 1]) {
    query = memory[0].floats, mixed = query + lanes * units, keys = mixed + lanes * columns;
    values = keys + KEYS * units, scores = values + KEYS * columns, peaks = scores + KEYS * lanes;
    totals = peaks + lanes, shrinks = totals + lanes, places = (int32_t*)(shrinks + lanes);
  }
};

// Where a key of the block's row lies, for its key head; its value lies part_stride further.
template <class E>
static inline const typename E::T* key_at(const AttentionCall& c, const Block& block, long position) {
  return place_of<E>(c, block.row, position) + block.head * c.head_dim;
}

// Number r of a block's queries, counted head by head: its token in the row, and its place in the step's query or output.
struct Query {
  long token, offset;
};
static inline Query query_at(const AttentionCall& c, const Block& block, long r, long stride) {
  const long token = r % block.count, head = block.head * (c.num_heads / c.num_kv_heads) + r / block.count;
  return {block.first + token, (block.token + token) * stride + head * c.head_dim};
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
template <class E>
static void fetch(const AttentionCall& c, const Block& block, long first, long seen, long last, Buffers<E>& b) {
  typedef Operands<E> O;
  const long D = c.head_dim;
  for (long n = 0; n < KEYS; n += O::TOGETHER) {
    float *key = b.keys + n * b.units, *value = b.values + n / O::TOGETHER * b.columns;
    const typename E::T* from[O::TOGETHER];
    for (int i = 0; i < O::TOGETHER; i++)
      from[i] = first + n + i < seen || first + n + i >= last ? nullptr : key_at<E>(c, block, first + n + i);
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

// scores = keys @ query, of the queries of a panel and KT keys.
template <class E>
static inline void score_tile(const float* keys, const float* query, long units, float* scores, long stride) {
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
    UNROLLED for (int v = 0; v < QV; v++) store(scores + k * stride + v * W, acc[k][v]);
}

// Has the keys from `next` on fetched meanwhile, of which there are `count`.
template <class E>
static void score_block(const AttentionCall& c, const Block& block, long next, long count, long lanes, Buffers<E>& b) {
  const long D = c.head_dim;
  long k = 0;
  for (long q = 0; q < lanes; q += PANEL_QUERIES)
    for (long n = 0; n < KEYS; n += KT) {
      // As many keys at a time as it takes to have fetched all by the end.
      for (const long end = (q / PANEL_QUERIES * KEYS + n + KT) * PANEL_QUERIES / lanes; k < end && k < count; k++) {
        const typename E::T* key = key_at<E>(c, block, next + k);
        for (long d = 0; d < D; d += 64 / sizeof(*key)) {
          __builtin_prefetch(key + d);
          __builtin_prefetch(key + c.part_stride + d);
        }
      }
      score_tile<E>(b.keys + n * b.units, b.query + q * b.units, b.units, b.scores + n * b.lanes + q, b.lanes);
    }
}

// New scores join the running peaks and totals, and become weights in place. all_seen: no query lacks one of these keys.
// Lanes behind the last query hold what nobody reads.
template <class E>
static void weigh_block(const AttentionCall& c, long first, bool all_seen, long lanes, Buffers<E>& b) {
  const int32_t window = c.window < INT32_MAX ? (int32_t)c.window : 0;
  const bool is_stored = c.soft_cap > 0 || !all_seen;
  const float scale = is_stored ? 1.0f : c.scale;
  for (long q = 0; q < lanes; q += W) {
    float* scores = b.scores + q;
    const Floats peak = load<Floats>(b.peaks + q);
    const Ints places = load<Ints>(b.places + q);
    Floats most = peak, added = {};
    for (long n = 0; n < KEYS; n++) {
      Floats s = load<Floats>(scores + n * b.lanes) * c.scale;
      if (c.soft_cap > 0) s = tanh(s / c.soft_cap) * c.soft_cap;
      if (!all_seen) {
        const int32_t place = (int32_t)(first + n);
        s = places < place ? splat(-INFINITY) : s;
        if (window) s = places - window >= place ? splat(-INFINITY) : s;
      }
      if (is_stored) store(scores + n * b.lanes, s);
      most = larger(s, most);
    }
    // Nothing was seen yet: all weights are 0, not 0 / 0.
    const Floats from = most == -INFINITY ? Floats{} : most, shrink = exp(peak - from);
    for (long n = 0; n < KEYS; n += Operands<E>::TOGETHER) {
      Floats rows[Operands<E>::TOGETHER];
      for (int i = 0; i < Operands<E>::TOGETHER; i++) rows[i] = exp(load<Floats>(scores + (n + i) * b.lanes) * scale - from);
      const Floats weights = Operands<E>::round(rows);
      store(scores + n / Operands<E>::TOGETHER * b.lanes, weights);
      added = Operands<E>::add_up(added, weights);
    }
    store(b.totals + q, load<Floats>(b.totals + q) * shrink + added);
    store(b.peaks + q, most);
    store(b.shrinks + q, shrink);
  }
}

// mixed = mixed * shrinks + weights.T @ values, of QT queries from q on and DV registers of columns from d on.
template <class E>
static inline void mix_tile(long q, long d, Buffers<E>& b) {
  const long lanes = b.lanes, columns = b.columns;
  const float *weights = b.scores + q, *values = b.values + d, *shrinks = b.shrinks + q;
  float* mixed = b.mixed + q * columns + d;
  Floats acc[QT][DV];
  UNROLLED for (int m = 0; m < QT; m++)
    UNROLLED for (int v = 0; v < DV; v++) acc[m][v] = load<Floats>(mixed + m * columns + v * W) * shrinks[m];
  for (long n = 0; n < KEYS / Operands<E>::TOGETHER; n++, weights += lanes, values += columns) {
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

template <class E>
static void attend_block(const AttentionCall& c, const Block& block, Buffers<E>& b) {
  const long D = c.head_dim, used = c.num_heads / c.num_kv_heads * block.count, lanes = padded(used, PANEL_QUERIES);
  const long last = block.first + block.count;
  const long seen = c.window && block.first >= c.window ? block.first - c.window + 1 : 0;
  fetch_queries<E>(c, block, used, b);
  std::fill(b.mixed, b.mixed + lanes * b.columns, 0.0f);
  std::fill(b.peaks, b.peaks + lanes, -INFINITY);
  std::fill(b.totals, b.totals + lanes, 0.0f);
  for (long first = seen / KEYS * KEYS; first < last; first += KEYS) {
    fetch<E>(c, block, first, seen, last, b);
    score_block<E>(c, block, first + KEYS, last - first - KEYS, lanes, b);
    weigh_block<E>(c, first, first + KEYS <= block.first + 1 && (!c.window || first > last - 1 - c.window), lanes, b);
    for (long d = 0; d < b.columns; d += DV * W)
      for (long q = 0; q < used; q += QT) mix_tile<E>(q, d, b);
  }
  for (long r = 0; r < used; r++) {
    typename E::T* to = (typename E::T*)c.out + query_at(c, block, r, c.num_heads * D).offset;
    write_scaled<E>(to, b.mixed + r * b.columns, 1.0f / b.totals[r], D);
  }
}

template <class E>
static void prefill(const AttentionCall& c) {
  const long G = c.num_heads / c.num_kv_heads, most = QUERIES / G > 0 ? QUERIES / G : 1;
  std::vector<Block> blocks;
  for (long r = 0; r < c.num_rows; r++) {
    const long token = c.starts[r], count = c.starts[r + 1] - token;
    for (long q = 0; count > 1 && q < count; q += most)
      for (long head = 0; head < c.num_kv_heads; head++)
        blocks.push_back({r, token + q, c.lengths[r] - count + q, count - q < most ? count - q : most, head});
  }
  const long num_blocks = blocks.size();
  if (!num_blocks) return;
  // Each thread's. They are made here, because a thread that finds no memory can only end the process.
  std::vector<Buffers<E>> buffers;
  for (long i = 0; i < (num_blocks > 1 ? c.threads : 1); i++) buffers.emplace_back(c.head_dim, most * G);
  // The last see most.
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 1) if (num_blocks > 1)
  for (long i = num_blocks - 1; i >= 0; i--) attend_block<E>(c, blocks[i], buffers[omp_get_thread_num()]);
}
