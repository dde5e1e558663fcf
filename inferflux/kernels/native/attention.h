// Attention of rows that decode, straight from the pages: nothing is gathered, every key and value is read once.
//
// A context is cut every SPLIT tokens, wherever it belongs, so that a row's result does not depend on the batch; the
// parts are merged by their largest score and sum (Milakov and Gimelshein 2018, arXiv 1805.02867).
#pragma once
#include <omp.h>

#include <cmath>
#include <vector>

#include "vector.h"

struct AttentionCall {
  void* out;               // [T, H, D]
  const void* query;       // [T, H, D], query_stride elements from token to token
  const void* pages;       // one layer's view [P, 2, N, K, D] with these strides, in elements
  const int32_t* table;    // [B, table_stride]
  const int32_t* lengths;  // [B]
  const int32_t* starts;   // [B + 1]: each row's first token
  int64_t query_stride, page_stride, part_stride, token_stride, table_stride;
  int64_t num_rows, num_heads, num_kv_heads, head_dim, page_tokens, window;  // window 0: all
  float scale, soft_cap;  // soft_cap 0: off
  int32_t threads;
};

constexpr long SPLIT = 128, CHUNK = 16, MAX_HEAD_DIM = 256;

// Positions first..last-1 of one row, for all its heads: a page's keys and values lie together and are read in order.
struct Part {
  long row, token, first, last;
};

// How many registers of sums a loop holds: of 16, some are for what is added.
constexpr int SUMS = W == 16 ? 24 : 12;

// What is read next, fetched in the order of its addresses, some of it with each piece of work: asked for all at once, it
// would be waited for. 32 rows of 208 tokens, 9 heads of 64 over 3, float32, two cores of a Zen 3 EPYC: 750 us, 900 when
// fetched in the order in which it is read, head by head.
struct Ahead {
  const char *next, *end;
  inline void fetch(long bytes) {
    const char* stop = end - next < bytes ? end : next + bytes;
    for (; next < stop; next += 64) __builtin_prefetch(next);
  }
};

// NT keys against GT query heads that share a key head, at once: a key is widened once for all of them, and enough sums
// grow side by side that none waits for the one before. scores[g][n].
template <class E, int GT, int NT>
static inline void score_keys(const typename E::T* keys, long stride, Ahead& ahead, const float* query, long D,
                              float (*scores)[CHUNK], long first) {
  Floats acc[GT][NT] = {};
  ahead.fetch(NT * D * sizeof(typename E::T));
  long d = 0;
  for (; d + W <= D; d += W) {
    Floats k[NT];
    for (int n = 0; n < NT; n++) {
      const typename E::T* key = keys + (first + n) * stride + d;
      k[n] = E::read(key);
    }
    for (int g = 0; g < GT; g++) {
      Floats q = load<Floats>(query + g * D + d);
      for (int n = 0; n < NT; n++) acc[g][n] += k[n] * q;
    }
  }
  for (int g = 0; g < GT; g++) sum_each<NT>(acc[g], scores[g] + first);
  for (; d < D; d++)
    for (int g = 0; g < GT; g++)
      for (int n = 0; n < NT; n++)
        scores[g][first + n] += E::read1(keys + (first + n) * stride + d) * query[g * D + d];
}

template <class E, int GT>
static inline int score_heads(const typename E::T* keys, long stride, Ahead& ahead, const float* query, long D, long count,
                              float (*scores)[CHUNK]) {
  constexpr int NT = SUMS / GT < 4 ? 2 : 4;
  long n = 0;
  for (; n + NT <= count; n += NT) score_keys<E, GT, NT>(keys, stride, ahead, query, D, scores, n);
  for (; n < count; n++) score_keys<E, GT, 1>(keys, stride, ahead, query, D, scores, n);
  return GT;
}

// DT registers' worth of each value, from column d on.
template <class E, int GT, int DT>
static inline void mix_columns(const typename E::T* values, long stride, Ahead& ahead, float* mixed, long D,
                               long count, const float (*scores)[CHUNK], long d) {
  Floats acc[GT][DT];
  for (int g = 0; g < GT; g++)
    for (int i = 0; i < DT; i++) acc[g][i] = load<Floats>(mixed + g * D + d + i * W);
  for (long n = 0; n < count; n++) {
    ahead.fetch(DT * W * sizeof(typename E::T));
    Floats v[DT];
    for (int i = 0; i < DT; i++) {
      const typename E::T* value = values + n * stride + d + i * W;
      v[i] = E::read(value);
    }
    for (int g = 0; g < GT; g++) {
      Floats weight = splat(scores[g][n]);
      for (int i = 0; i < DT; i++) acc[g][i] += v[i] * weight;
    }
  }
  for (int g = 0; g < GT; g++)
    for (int i = 0; i < DT; i++) store(mixed + g * D + d + i * W, acc[g][i]);
}

template <class E, int GT>
static inline int mix_heads(const typename E::T* values, long stride, Ahead& ahead, float* mixed, long D, long count,
                            const float (*scores)[CHUNK]) {
  constexpr int DT = SUMS / GT < 4 ? 2 : 4;
  long d = 0;
  for (; d + DT * W <= D; d += DT * W) mix_columns<E, GT, DT>(values, stride, ahead, mixed, D, count, scores, d);
  for (; d + W <= D; d += W) mix_columns<E, GT, 1>(values, stride, ahead, mixed, D, count, scores, d);
  for (; d < D; d++)
    for (int g = 0; g < GT; g++)
      for (long n = 0; n < count; n++) mixed[g * D + d] += E::read1(values + n * stride + d) * scores[g][n];
  return GT;
}

// Both return how many of the `left` heads they did.
template <class E>
static inline int score(const typename E::T* keys, long stride, Ahead& ahead, const float* query, long D, long count,
                        float (*scores)[CHUNK], long left) {
  switch (left) {
    case 1: return score_heads<E, 1>(keys, stride, ahead, query, D, count, scores);
    case 2: return score_heads<E, 2>(keys, stride, ahead, query, D, count, scores);
    case 3: return score_heads<E, 3>(keys, stride, ahead, query, D, count, scores);
    default: return score_heads<E, 4>(keys, stride, ahead, query, D, count, scores);
  }
}

template <class E>
static inline int mix(const typename E::T* values, long stride, Ahead& ahead, float* mixed, long D, long count,
                      const float (*scores)[CHUNK], long left) {
  switch (left) {
    case 1: return mix_heads<E, 1>(values, stride, ahead, mixed, D, count, scores);
    case 2: return mix_heads<E, 2>(values, stride, ahead, mixed, D, count, scores);
    case 3: return mix_heads<E, 3>(values, stride, ahead, mixed, D, count, scores);
    default: return mix_heads<E, 4>(values, stride, ahead, mixed, D, count, scores);
  }
}

// One head's new scores, -infinity where nothing is seen, join its running peak and sum; they become weights in place.
// Returns what shrinks the old sums.
template <long MOST> static inline float weigh(float* scores, long count, float* peak, float* total) {
  for (long n = count; n < MOST; n++) scores[n] = -INFINITY;
  Floats mosts = splat(*peak);
  for (long n = 0; n < MOST; n += W) mosts = larger(load<Floats>(scores + n), mosts);
  const float most = largest(mosts);
  Floats added = {};
  // Nothing was seen yet: all weights are 0, not 0 / 0.
  const float from = most == -INFINITY ? 0.0f : most;
  for (long n = 0; n < MOST; n += W) {
    Floats weights = exp(load<Floats>(scores + n) - from);
    store(scores + n, weights);
    added += weights;
  }
  float shrink = *peak == most ? 1.0f : *peak == -INFINITY ? 0.0f : expf(*peak - most);
  *total = *total * shrink + sum(added);
  *peak = most;
  return shrink;
}

// state: [H, D] sums of values, then H peaks and H totals. query: [H, D], scores: [H, CHUNK], both to compute with.
template <class E>
static void attend(const AttentionCall& c, const Part& part, float* state, float* query, float (*scores)[CHUNK]) {
  typedef typename E::T T;
  const long D = c.head_dim, H = c.num_heads, G = H / c.num_kv_heads, N = c.page_tokens;
  const T* q = (const T*)c.query + part.token * c.query_stride;
  const int32_t* pages = c.table + part.row * c.table_stride;
  float *mixed = state, *peaks = state + H * D, *totals = peaks + H;
  for (long i = 0; i < H * D; i++) query[i] = E::read1(q + i) * c.scale, mixed[i] = 0;
  for (long h = 0; h < H; h++) peaks[h] = -INFINITY, totals[h] = 0;
  for (long start = part.first, stop; start < part.last; start = stop) {
    // A chunk lies in one page.
    stop = (start / N + 1) * N;
    if (stop > start + CHUNK) stop = start + CHUNK;
    if (stop > part.last) stop = part.last;
    const long count = stop - start;
    const T* keys = (const T*)c.pages + pages[start / N] * c.page_stride + (start % N) * c.token_stride;
    const T* values = keys + c.part_stride;
    // Pages lie anywhere, so the processor cannot guess the next one.
    const long after = stop < part.last ? stop : start, bytes = count * c.token_stride * sizeof(T);
    const char* next = (const char*)((const T*)c.pages + pages[after / N] * c.page_stride + after % N * c.token_stride);
    Ahead ahead_values{(const char*)values, (const char*)values + bytes}, ahead_keys{next, next + bytes};
    for (long h = 0; h < H;) {
      long left = G - h % G;
      h += score<E>(keys + h / G * D, c.token_stride, ahead_values, query + h * D, D, count, scores + h, left);
    }
    for (long h = 0; h < H; h++) {
      if (c.soft_cap > 0)
        for (long n = 0; n < CHUNK; n += W)
          store(scores[h] + n, tanh(load<Floats>(scores[h] + n) / c.soft_cap) * c.soft_cap);
      float shrink = weigh<CHUNK>(scores[h], count, peaks + h, totals + h);
      if (shrink != 1.0f)
        for (long d = 0; d < D; d++) mixed[h * D + d] *= shrink;
    }
    for (long h = 0; h < H;) {
      long left = G - h % G;
      h += mix<E>(values + h / G * D, c.token_stride, ahead_keys, mixed + h * D, D, count, scores + h, left);
    }
  }
}

template <class E>
static void merge(const AttentionCall& c, const Part& part, long count, const float* states, long size) {
  const long D = c.head_dim, H = c.num_heads;
  typename E::T* out = (typename E::T*)c.out + part.token * H * D;
  for (long h = 0; h < H; h++) {
    float peak = -INFINITY, total = 0, mixed[MAX_HEAD_DIM] = {};
    for (long p = 0; p < count; p++) peak = fmaxf(peak, states[p * size + H * D + h]);
    for (long p = 0; p < count; p++) {
      const float* state = states + p * size;
      float weight = expf(state[H * D + h] - peak);
      total += weight * state[H * D + H + h];
      for (long d = 0; d < D; d++) mixed[d] += weight * state[h * D + d];
    }
    for (long d = 0; d < D; d++) E::write1(out + h * D + d, mixed[d] / total);
  }
}

template <class E>
static void decode(const AttentionCall& c) {
  const long size = c.num_heads * (c.head_dim + 2);
  std::vector<Part> parts;
  std::vector<long> firsts;
  for (long r = 0; r < c.num_rows; r++) {
    const long length = c.lengths[r];
    if (c.starts[r + 1] - c.starts[r] != 1) continue;
    firsts.push_back(parts.size());
    for (long first = c.window && length > c.window ? length - c.window : 0; first < length;) {
      long last = (first / SPLIT + 1) * SPLIT;
      if (last > length) last = length;
      parts.push_back({r, c.starts[r], first, last});
      first = last;
    }
  }
  firsts.push_back(parts.size());
  const long num_parts = parts.size(), num_rows = firsts.size() - 1;
  if (!num_rows) return;
  std::vector<float> states(num_parts * size);
  // Each thread's. They are made here, because a thread that finds no memory can only end the process.
  const long query_size = c.num_heads * c.head_dim, buffer_size = query_size + c.num_heads * CHUNK;
  std::vector<float> buffers((num_parts > 1 ? c.threads : 1) * buffer_size);
#pragma omp parallel num_threads(c.threads) if (num_parts > 1)
  {
    float* query = buffers.data() + omp_get_thread_num() * buffer_size;
#pragma omp for schedule(dynamic, 1)
    for (long p = 0; p < num_parts; p++)
      attend<E>(c, parts[p], states.data() + p * size, query, (float(*)[CHUNK])(query + query_size));
#pragma omp for schedule(static)
    for (long r = 0; r < num_rows; r++)
      merge<E>(c, parts[firsts[r]], firsts[r + 1] - firsts[r], states.data() + firsts[r] * size, size);
  }
}
