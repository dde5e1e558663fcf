// Attention of rows that decode, straight from the pages: nothing is gathered, every key and value is read once.
//
// A context is cut every SPLIT tokens, wherever it belongs, so that a row's result does not depend on the batch; the
// parts are merged by their largest score and sum (Milakov and Gimelshein 2018, arXiv 1805.02867).
#pragma once
#include <cmath>
#include <vector>

#include "vector.h"

struct AttentionCall {
  void* out;               // [T, H, D]
  const void* query;       // [T, H, D], query_stride elements from token to token
  const void* pages;       // one layer's view [P, 2, N, K, D] with these strides, in elements
  const int32_t* table;    // [B, table_stride]
  const int32_t* lengths;  // [B]
  const int64_t* rows;     // [n, 2]: row and token of each that decodes
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

// GT query heads that share a key head, at once: a key is widened once for all of them.
template <class E, int GT>
static inline int score_heads(const typename E::T* keys, long stride, const float* query, long D, long count,
                              float (*scores)[CHUNK]) {
  for (long n = 0; n < count; n++) {
    const typename E::T* key = keys + n * stride;
    Floats acc[GT] = {};
    long d = 0;
    for (; d + W <= D; d += W) {
      Floats k = E::read(key + d);
      for (int g = 0; g < GT; g++) acc[g] += k * load<Floats>(query + g * D + d);
    }
    for (int g = 0; g < GT; g++) {
      float s = sum(acc[g]);
      for (long j = d; j < D; j++) s += E::read1(key + j) * query[g * D + j];
      scores[g][n] = s;
    }
  }
  return GT;
}

template <class E, int GT>
static inline int mix_heads(const typename E::T* values, long stride, float* mixed, long D, long count,
                            const float (*scores)[CHUNK]) {
  long d = 0;
  for (; d + W <= D; d += W) {
    Floats acc[GT];
    for (int g = 0; g < GT; g++) acc[g] = load<Floats>(mixed + g * D + d);
    for (long n = 0; n < count; n++) {
      Floats v = E::read(values + n * stride + d);
      for (int g = 0; g < GT; g++) acc[g] += v * scores[g][n];
    }
    for (int g = 0; g < GT; g++) store(mixed + g * D + d, acc[g]);
  }
  for (; d < D; d++)
    for (int g = 0; g < GT; g++)
      for (long n = 0; n < count; n++) mixed[g * D + d] += E::read1(values + n * stride + d) * scores[g][n];
  return GT;
}

// Both return how many of the `left` heads they did.
template <class E>
static inline int score(const typename E::T* keys, long stride, const float* query, long D, long count,
                        float (*scores)[CHUNK], long left) {
  switch (left) {
    case 1: return score_heads<E, 1>(keys, stride, query, D, count, scores);
    case 2: return score_heads<E, 2>(keys, stride, query, D, count, scores);
    case 3: return score_heads<E, 3>(keys, stride, query, D, count, scores);
    default: return score_heads<E, 4>(keys, stride, query, D, count, scores);
  }
}

template <class E>
static inline int mix(const typename E::T* values, long stride, float* mixed, long D, long count,
                      const float (*scores)[CHUNK], long left) {
  switch (left) {
    case 1: return mix_heads<E, 1>(values, stride, mixed, D, count, scores);
    case 2: return mix_heads<E, 2>(values, stride, mixed, D, count, scores);
    case 3: return mix_heads<E, 3>(values, stride, mixed, D, count, scores);
    default: return mix_heads<E, 4>(values, stride, mixed, D, count, scores);
  }
}

// One head's new scores join its running peak and sum; they become weights in place. Returns what shrinks the old sums.
static inline float weigh(float* scores, long count, float soft_cap, float* peak, float* total) {
  for (long n = count; n < CHUNK; n++) scores[n] = -INFINITY;
  if (soft_cap > 0)
    for (long n = 0; n < CHUNK; n += W) store(scores + n, tanh(load<Floats>(scores + n) / soft_cap) * soft_cap);
  float most = *peak, added = 0;
  for (long n = 0; n < count; n++) most = scores[n] > most ? scores[n] : most;
  for (long n = 0; n < CHUNK; n += W) store(scores + n, exp(load<Floats>(scores + n) - most));
  for (long n = 0; n < count; n++) added += scores[n];
  float shrink = *peak == -INFINITY ? 0.0f : *peak == most ? 1.0f : expf(*peak - most);
  *total = *total * shrink + added;
  *peak = most;
  return shrink;
}

// state: [H, D] sums of values, then H peaks and H totals.
template <class E>
static void attend(const AttentionCall& c, const Part& part, float* state) {
  typedef typename E::T T;
  const long D = c.head_dim, H = c.num_heads, G = H / c.num_kv_heads, N = c.page_tokens;
  const T* q = (const T*)c.query + part.token * c.query_stride;
  const int32_t* pages = c.table + part.row * c.table_stride;
  std::vector<float> query(H * D), scores_(H * CHUNK);
  float(*scores)[CHUNK] = (float(*)[CHUNK])scores_.data();
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
    if (stop < part.last) {
      // Pages lie anywhere, so the processor cannot guess the next one.
      const T* next = (const T*)c.pages + pages[stop / N] * c.page_stride + (stop % N) * c.token_stride;
      for (long i = 0; i < count * c.token_stride; i += 64 / sizeof(T)) {
        __builtin_prefetch(next + i);
        __builtin_prefetch(next + c.part_stride + i);
      }
    }
    for (long h = 0; h < H;) {
      long left = G - h % G;
      h += score<E>(keys + h / G * D, c.token_stride, query.data() + h * D, D, count, scores + h, left);
    }
    for (long h = 0; h < H; h++) {
      float shrink = weigh(scores[h], count, c.soft_cap, peaks + h, totals + h);
      if (shrink != 1.0f)
        for (long d = 0; d < D; d++) mixed[h * D + d] *= shrink;
    }
    for (long h = 0; h < H;) {
      long left = G - h % G;
      h += mix<E>(values + h / G * D, c.token_stride, mixed + h * D, D, count, scores + h, left);
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
static void attention(const AttentionCall& c) {
  const long size = c.num_heads * (c.head_dim + 2);
  std::vector<Part> parts;
  std::vector<long> firsts;
  for (long r = 0; r < c.num_rows; r++) {
    long row = c.rows[2 * r], length = c.lengths[row];
    firsts.push_back(parts.size());
    for (long first = c.window && length > c.window ? length - c.window : 0; first < length;) {
      long last = (first / SPLIT + 1) * SPLIT;
      if (last > length) last = length;
      parts.push_back({row, (long)c.rows[2 * r + 1], first, last});
      first = last;
    }
  }
  firsts.push_back(parts.size());
  const long num_parts = parts.size();
  std::vector<float> states(num_parts * size);
#pragma omp parallel num_threads(c.threads) if (num_parts > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (long p = 0; p < num_parts; p++) attend<E>(c, parts[p], states.data() + p * size);
#pragma omp for schedule(static)
    for (long r = 0; r < c.num_rows; r++)
      merge<E>(c, parts[firsts[r]], firsts[r + 1] - firsts[r], states.data() + firsts[r] * size, size);
  }
}
