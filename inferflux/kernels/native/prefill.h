// Attention of rows of several queries, a block of queries and a block of keys at a time: two small matrix products, with
// the softmax carried from block to block (Dao et al. 2022, arXiv 2205.14135, algorithm 1).
//
// Blocks of keys begin at multiples of KEYS, whoever asks, so that a query's result does not depend on what is computed
// beside it. Rows of a block are the queries of all heads that share a key head; buffers are padded so that no loop has a
// rest.
#pragma once
#include "attention.h"

// Rows of a block and keys of one: with 64 columns the buffers fill the second cache by a quarter. MR rows by NV registers
// of sums stay in registers.
constexpr long ROWS = 96, KEYS = 64;
constexpr int MR = 6, NV = 2;

static inline long padded(long count, long to) { return (count + to - 1) / to * to; }

// Queries first..first+count-1 of a row, of which token `token` is the first; head: the key head.
struct Block {
  long row, token, first, count, head;
};

struct Buffers {
  long columns;  // of mixed and values
  std::vector<float> query, scores, mixed, keys, values, peaks, totals, shrinks;
  explicit Buffers(long D)
      : columns(padded(D, NV * W)),
        query((ROWS + MR) * D),
        scores((ROWS + MR) * KEYS),
        mixed((ROWS + MR) * columns),
        keys(D * KEYS),
        values(KEYS * columns),
        peaks(ROWS + MR),
        totals(ROWS + MR),
        shrinks(ROWS + MR) {}
};

// to[rows, width] = to * shrink + from[rows, depth] @ by[depth, width]; rows and width without a rest. shrinks null: 0.
static inline void multiply_add(float* to, const float* shrinks, const float* from, const float* by, long rows, long depth,
                                long width) {
  for (long c = 0; c < width; c += NV * W)
    for (long r = 0; r < rows; r += MR) {
      Floats acc[MR][NV] = {};
      for (int m = 0; shrinks && m < MR; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = load<Floats>(to + (r + m) * width + c + v * W) * shrinks[r + m];
      for (long k = 0; k < depth; k++) {
        Floats b[NV];
        for (int v = 0; v < NV; v++) {
          b[v] = load<Floats>(by + k * width + c + v * W);
          keep(b[v]);
        }
        for (int m = 0; m < MR; m++) {
          Floats a = splat(from[(r + m) * depth + k]);
          for (int v = 0; v < NV; v++) acc[m][v] += a * b[v];
        }
      }
      for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) store(to + (r + m) * width + c + v * W, acc[m][v]);
    }
}

// Keys first..first+KEYS-1 as columns, their values as rows; zeros where no query of the block sees them, before `seen` and
// from `last` on, since anything may stand there: a weight of 0 times what is no number is none.
template <class E>
static void fetch(const AttentionCall& c, const Block& block, long first, long seen, long last, Buffers& b) {
  typedef typename E::T T;
  const long D = c.head_dim, N = c.page_tokens;
  const int32_t* pages = c.table + block.row * c.table_stride;
  for (long n = 0; n < KEYS; n++) {
    float* value = b.values.data() + n * b.columns;
    if (first + n < seen || first + n >= last) {
      for (long d = 0; d < D; d++) b.keys[d * KEYS + n] = value[d] = 0;
      continue;
    }
    const long place = first + n;
    const T* key = (const T*)c.pages + pages[place / N] * c.page_stride + place % N * c.token_stride + block.head * D;
    for (long d = 0; d < D; d++) b.keys[d * KEYS + n] = E::read1(key + d);
    for (long d = 0; d < D; d++) value[d] = E::read1(key + c.part_stride + d);
  }
}

// Hides the keys of first..first+KEYS-1 that the query at `place` does not see.
static inline void hide(float* scores, long place, long first, long window) {
  for (long n = place < first ? 0 : place - first + 1; n < KEYS; n++) scores[n] = -INFINITY;
  for (long n = 0; window && n < KEYS && first + n <= place - window; n++) scores[n] = -INFINITY;
}

template <class E>
static void attend_block(const AttentionCall& c, const Block& block, Buffers& b) {
  typedef typename E::T T;
  const long D = c.head_dim, G = c.num_heads / c.num_kv_heads, used = G * block.count, rows = padded(used, MR);
  const long last = block.first + block.count;
  const long seen = c.window && block.first >= c.window ? block.first - c.window + 1 : 0;
  std::fill(b.query.begin(), b.query.end(), 0.0f);
  std::fill(b.mixed.begin(), b.mixed.end(), 0.0f);
  std::fill(b.peaks.begin(), b.peaks.end(), -INFINITY);
  std::fill(b.totals.begin(), b.totals.end(), 0.0f);
  for (long r = 0; r < used; r++) {
    const T* from = (const T*)c.query + (block.token + r % block.count) * c.query_stride;
    for (long d = 0; d < D; d++)
      b.query[r * D + d] = E::read1(from + (block.head * G + r / block.count) * D + d) * c.scale;
  }
  for (long first = seen / KEYS * KEYS; first < last; first += KEYS) {
    fetch<E>(c, block, first, seen, last, b);
    multiply_add(b.scores.data(), nullptr, b.query.data(), b.keys.data(), rows, D, KEYS);
    const bool all_seen = first + KEYS <= block.first + 1 && (!c.window || first > last - 1 - c.window);
    for (long r = 0; r < used; r++) {
      float* scores = b.scores.data() + r * KEYS;
      if (c.soft_cap > 0)
        for (long n = 0; n < KEYS; n += W) store(scores + n, tanh(load<Floats>(scores + n) / c.soft_cap) * c.soft_cap);
      if (!all_seen) hide(scores, block.first + r % block.count, first, c.window);
      b.shrinks[r] = weigh<KEYS>(scores, KEYS, &b.peaks[r], &b.totals[r]);
    }
    multiply_add(b.mixed.data(), b.shrinks.data(), b.scores.data(), b.values.data(), rows, KEYS, b.columns);
  }
  for (long r = 0; r < used; r++) {
    T* to = (T*)c.out + ((block.token + r % block.count) * c.num_heads + block.head * G + r / block.count) * D;
    for (long d = 0; d < D; d++) E::write1(to + d, b.mixed[r * b.columns + d] / b.totals[r]);
  }
}

template <class E>
static void prefill(const AttentionCall& c) {
  const long G = c.num_heads / c.num_kv_heads, most = ROWS / G > 0 ? ROWS / G : 1;
  std::vector<Block> blocks;
  for (long r = 0; r < c.num_rows; r++) {
    const long token = c.starts[r], count = c.starts[r + 1] - token;
    for (long q = 0; count > 1 && q < count; q += most)
      for (long head = 0; head < c.num_kv_heads; head++)
        blocks.push_back({r, token + q, c.lengths[r] - count + q, count - q < most ? count - q : most, head});
  }
  const long num_blocks = blocks.size();
  if (!num_blocks) return;
#pragma omp parallel num_threads(c.threads) if (num_blocks > 1)
  {
    Buffers buffers(c.head_dim);
    // The last see most.
#pragma omp for schedule(dynamic, 1)
    for (long i = num_blocks - 1; i >= 0; i--) attend_block<E>(c, blocks[i], buffers);
  }
}
