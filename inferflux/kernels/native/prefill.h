// Attention of rows of several queries, a block of queries and a block of keys at a time: two small matrix products, with
// the softmax carried from block to block (Dao et al. 2022, arXiv 2205.14135, algorithm 1).
//
// Blocks of keys begin at multiples of KEYS, whoever asks, so that a query's result does not depend on what is computed
// beside it. A block's queries, those of all heads that share a key head, lie side by side, as do their scores: what the
// softmax does to one it does to a register of them. Buffers are padded so that the products' loops have no rest.
#pragma once
#include <omp.h>

#include "attention.h"

// Queries of a block and keys of one: with 64 columns the buffers fill the second cache by a sixth. 16 prompts of 128
// tokens, 9 heads of 64 over 3, float32, two cores of a Zen 3 EPYC: 5.4 ms; with 64 keys, of which more are hidden, 6.2 ms.
constexpr long QUERIES = 96, KEYS = 32;
// What stays in registers: scores of KT keys by QV registers of queries; sums of QT queries by DV registers of columns.
constexpr int KT = 4, QV = 3, QT = 6, DV = 2;
static_assert(KEYS % KT == 0 && QV * W % QT == 0, "the products' loops have no rest");

static inline long padded(long count, long to) { return (count + to - 1) / to * to; }

// Queries first..first+count-1 of a row, of which token `token` is the first; head: the key head.
struct Block {
  long row, token, first, count, head;
};

struct Buffers {
  long lanes, columns;  // queries and columns, padded
  // query [D, lanes], keys [KEYS, D], scores [KEYS, lanes], values [KEYS, columns], mixed [lanes, columns], the rest [lanes]
  std::vector<float> query, keys, scores, values, mixed, peaks, totals, shrinks;
  std::vector<int32_t> places;
  Buffers(long D, long queries)
      : lanes(padded(queries, QV * W)),
        columns(padded(D, DV * W)),
        query(D * lanes),
        keys(KEYS * D),
        scores(KEYS * lanes),
        values(KEYS * columns),
        mixed(lanes * columns),
        peaks(lanes),
        totals(lanes),
        shrinks(lanes),
        places(lanes) {}
};

// Where a key of the block's row lies, for its key head; its value lies part_stride further.
template <class E>
static inline const typename E::T* key_at(const AttentionCall& c, const Block& block, long place) {
  const int32_t* pages = c.table + block.row * c.table_stride;
  const long N = c.page_tokens;
  return (const typename E::T*)c.pages + pages[place / N] * c.page_stride + place % N * c.token_stride +
         block.head * c.head_dim;
}

template <class E>
static inline void read_row(float* to, const typename E::T* from, long count) {
  long i = 0;
  for (; i + W <= count; i += W) store(to + i, E::read(from + i));
  for (; i < count; i++) to[i] = E::read1(from + i);
}

// Keys first..first+KEYS-1 and their values; zeros where no query of the block sees them, before `seen` and from `last`
// on, since anything may stand there: a weight of 0 times what is no number is none.
template <class E>
static void fetch(const AttentionCall& c, const Block& block, long first, long seen, long last, Buffers& b) {
  const long D = c.head_dim;
  for (long n = 0; n < KEYS; n++) {
    float *key = b.keys.data() + n * D, *value = b.values.data() + n * b.columns;
    if (first + n < seen || first + n >= last) {
      std::fill(key, key + D, 0.0f);
      std::fill(value, value + D, 0.0f);
      continue;
    }
    const typename E::T* from = key_at<E>(c, block, first + n);
    read_row<E>(key, from, D);
    read_row<E>(value, from + c.part_stride, D);
  }
}

// scores = keys @ query. Has the keys from `next` on fetched meanwhile, of which there are `count`.
template <class E>
static void score_block(const AttentionCall& c, const Block& block, long next, long count, long lanes, Buffers& b) {
  const long D = c.head_dim, stride = b.lanes;
  for (long n = 0; n < KEYS; n += KT) {
    for (long k = n; k < n + KT && k < count; k++) {
      const typename E::T* key = key_at<E>(c, block, next + k);
      for (long d = 0; d < D; d += 64 / sizeof(*key)) {
        __builtin_prefetch(key + d);
        __builtin_prefetch(key + c.part_stride + d);
      }
    }
    for (long q = 0; q < lanes; q += QV * W) {
      const float *keys = b.keys.data() + n * D, *query = b.query.data() + q;
      Floats acc[KT][QV];
      for (int k = 0; k < KT; k++)
        for (int v = 0; v < QV; v++) acc[k][v] = Floats{};
      for (long d = 0; d < D; d++, keys++, query += stride) {
        Floats x[QV];
        for (int v = 0; v < QV; v++) {
          x[v] = load<Floats>(query + v * W);
          keep(x[v]);
        }
        for (int k = 0; k < KT; k++) {
          Floats a = splat(keys[k * D]);
          for (int v = 0; v < QV; v++) acc[k][v] += a * x[v];
        }
      }
      float* to = b.scores.data() + n * stride + q;
      for (int k = 0; k < KT; k++)
        for (int v = 0; v < QV; v++) store(to + k * stride + v * W, acc[k][v]);
    }
  }
}

// New scores join the running peaks and totals, and become weights in place. all_seen: no query lacks one of these keys.
// Lanes behind the last query hold what nobody reads.
static void weigh_block(const AttentionCall& c, long first, bool all_seen, long lanes, Buffers& b) {
  const int32_t window = c.window < INT32_MAX ? (int32_t)c.window : 0;
  for (long q = 0; q < lanes; q += W) {
    float* scores = b.scores.data() + q;
    const Floats peak = load<Floats>(b.peaks.data() + q);
    const Ints places = load<Ints>(b.places.data() + q);
    Floats most = peak, added = {};
    for (long n = 0; n < KEYS; n++) {
      Floats s = load<Floats>(scores + n * b.lanes);
      if (c.soft_cap > 0) s = tanh(s / c.soft_cap) * c.soft_cap;
      if (!all_seen) {
        const int32_t place = (int32_t)(first + n);
        s = places < place ? splat(-INFINITY) : s;
        if (window) s = places - window >= place ? splat(-INFINITY) : s;
      }
      if (c.soft_cap > 0 || !all_seen) store(scores + n * b.lanes, s);
      most = s > most ? s : most;
    }
    // Nothing was seen yet: all weights are 0, not 0 / 0.
    const Floats from = most == -INFINITY ? Floats{} : most, shrink = exp(peak - from);
    for (long n = 0; n < KEYS; n++) {
      Floats weights = exp(load<Floats>(scores + n * b.lanes) - from);
      store(scores + n * b.lanes, weights);
      added += weights;
    }
    store(b.totals.data() + q, load<Floats>(b.totals.data() + q) * shrink + added);
    store(b.peaks.data() + q, most);
    store(b.shrinks.data() + q, shrink);
  }
}

// mixed = mixed * shrinks + weights.T @ values
static void mix_block(long lanes, Buffers& b) {
  const long stride = b.lanes, columns = b.columns;
  for (long d = 0; d < columns; d += DV * W)
    for (long q = 0; q < lanes; q += QT) {
      float* to = b.mixed.data() + q * columns + d;
      const float *weights = b.scores.data() + q, *values = b.values.data() + d;
      Floats acc[QT][DV];
      for (int m = 0; m < QT; m++)
        for (int v = 0; v < DV; v++) acc[m][v] = load<Floats>(to + m * columns + v * W) * b.shrinks[q + m];
      for (long n = 0; n < KEYS; n++, weights += stride, values += columns) {
        Floats x[DV];
        for (int v = 0; v < DV; v++) {
          x[v] = load<Floats>(values + v * W);
          keep(x[v]);
        }
        for (int m = 0; m < QT; m++) {
          Floats a = splat(weights[m]);
          for (int v = 0; v < DV; v++) acc[m][v] += a * x[v];
        }
      }
      for (int m = 0; m < QT; m++)
        for (int v = 0; v < DV; v++) store(to + m * columns + v * W, acc[m][v]);
    }
}

template <class E>
static void attend_block(const AttentionCall& c, const Block& block, Buffers& b) {
  typedef typename E::T T;
  const long D = c.head_dim, G = c.num_heads / c.num_kv_heads, used = G * block.count, lanes = padded(used, QV * W);
  const long last = block.first + block.count;
  const long seen = c.window && block.first >= c.window ? block.first - c.window + 1 : 0;
  std::fill(b.query.begin(), b.query.end(), 0.0f);
  std::fill(b.mixed.begin(), b.mixed.end(), 0.0f);
  std::fill(b.peaks.begin(), b.peaks.end(), -INFINITY);
  std::fill(b.totals.begin(), b.totals.end(), 0.0f);
  for (long r = 0; r < used; r++) {
    const T* from = (const T*)c.query + (block.token + r % block.count) * c.query_stride;
    from += (block.head * G + r / block.count) * D;
    for (long d = 0; d < D; d++) b.query[d * b.lanes + r] = E::read1(from + d) * c.scale;
    b.places[r] = (int32_t)(block.first + r % block.count);
  }
  for (long first = seen / KEYS * KEYS; first < last; first += KEYS) {
    fetch<E>(c, block, first, seen, last, b);
    score_block<E>(c, block, first + KEYS, last - first - KEYS, lanes, b);
    weigh_block(c, first, first + KEYS <= block.first + 1 && (!c.window || first > last - 1 - c.window), lanes, b);
    mix_block(padded(used, QT), b);
  }
  for (long r = 0; r < used; r++) {
    T* to = (T*)c.out + ((block.token + r % block.count) * c.num_heads + block.head * G + r / block.count) * D;
    const float* mixed = b.mixed.data() + r * b.columns;
    for (long d = 0; d < D; d++) E::write1(to + d, mixed[d] / b.totals[r]);
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
  std::vector<Buffers> buffers(num_blocks > 1 ? c.threads : 1, Buffers(c.head_dim, most * G));
  // The last see most.
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 1) if (num_blocks > 1)
  for (long i = num_blocks - 1; i >= 0; i--) attend_block<E>(c, blocks[i], buffers[omp_get_thread_num()]);
}
