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

constexpr long SPLIT = 256, CHUNK = 16, MAX_HEAD_DIM = 256, MAX_GROUP = 16;

struct Part {
  long row, token, head, first, last, slot;
};

template <class E>
static void attend(const AttentionCall& c, const Part& part, float* state) {
  typedef typename E::T T;
  const long D = c.head_dim, G = c.num_heads / c.num_kv_heads, N = c.page_tokens;
  const T* q = (const T*)c.query + part.token * c.query_stride + part.head * G * D;
  const int32_t* pages = c.table + part.row * c.table_stride;
  float query[MAX_GROUP * MAX_HEAD_DIM], scores[MAX_GROUP][CHUNK];
  for (long i = 0; i < G * D; i++) query[i] = E::read1(q + i) * c.scale;
  float *mixed = state, *peaks = state + G * D, *sums = peaks + G;
  for (long i = 0; i < G * D; i++) mixed[i] = 0;
  for (long g = 0; g < G; g++) peaks[g] = -INFINITY, sums[g] = 0;
  for (long start = part.first; start < part.last;) {
    // A chunk lies in one page.
    long stop = (start / N + 1) * N;
    if (stop > start + CHUNK) stop = start + CHUNK;
    if (stop > part.last) stop = part.last;
    const long count = stop - start;
    const T* keys =
        (const T*)c.pages + pages[start / N] * c.page_stride + (start % N) * c.token_stride + part.head * D;
    const T* values = keys + c.part_stride;
    for (long n = 0; n < count; n++) {
      const T* key = keys + n * c.token_stride;
      for (long g = 0; g < G; g++) {
        Floats acc = {};
        long d = 0;
        for (; d + W <= D; d += W) acc += E::read(key + d) * load<Floats>(query + g * D + d);
        float s = sum(acc);
        for (; d < D; d++) s += E::read1(key + d) * query[g * D + d];
        scores[g][n] = s;
      }
    }
    for (long g = 0; g < G; g++) {
      for (long n = count; n < CHUNK; n++) scores[g][n] = -INFINITY;
      float peak = peaks[g];
      if (c.soft_cap > 0)
        for (long n = 0; n < CHUNK; n += W)
          store(scores[g] + n, tanh(load<Floats>(scores[g] + n) / c.soft_cap) * c.soft_cap);
      for (long n = 0; n < count; n++) peak = scores[g][n] > peak ? scores[g][n] : peak;
      float shrink = peaks[g] == -INFINITY ? 0.0f : expf(peaks[g] - peak), total = 0;
      for (long n = 0; n < CHUNK; n += W) store(scores[g] + n, exp(load<Floats>(scores[g] + n) - peak));
      for (long n = 0; n < count; n++) total += scores[g][n];
      sums[g] = sums[g] * shrink + total;
      peaks[g] = peak;
      if (shrink != 1.0f)
        for (long d = 0; d < D; d++) mixed[g * D + d] *= shrink;
    }
    for (long g = 0; g < G; g++) {
      long d = 0;
      for (; d + W <= D; d += W) {
        Floats acc = load<Floats>(mixed + g * D + d);
        for (long n = 0; n < count; n++) acc += E::read(values + n * c.token_stride + d) * scores[g][n];
        store(mixed + g * D + d, acc);
      }
      for (; d < D; d++)
        for (long n = 0; n < count; n++) mixed[g * D + d] += E::read1(values + n * c.token_stride + d) * scores[g][n];
    }
    start = stop;
  }
}

template <class E>
static void merge(const AttentionCall& c, const Part* parts, long count, const float* states, long size) {
  const long D = c.head_dim, G = c.num_heads / c.num_kv_heads;
  typename E::T* out = (typename E::T*)c.out + (parts->token * c.num_heads + parts->head * G) * D;
  for (long g = 0; g < G; g++) {
    float peak = -INFINITY, total = 0, mixed[MAX_HEAD_DIM] = {};
    for (long p = 0; p < count; p++) peak = fmaxf(peak, states[p * size + G * D + g]);
    for (long p = 0; p < count; p++) {
      const float* state = states + p * size;
      float weight = expf(state[G * D + g] - peak);
      total += weight * state[G * D + G + g];
      for (long d = 0; d < D; d++) mixed[d] += weight * state[g * D + d];
    }
    for (long d = 0; d < D; d++) E::write1(out + g * D + d, mixed[d] / total);
  }
}

template <class E>
static void attention(const AttentionCall& c) {
  const long D = c.head_dim, G = c.num_heads / c.num_kv_heads, size = G * D + 2 * G;
  std::vector<Part> parts;
  std::vector<long> firsts;
  long work = 0;
  for (long r = 0; r < c.num_rows; r++) {
    long row = c.rows[2 * r], length = c.lengths[row];
    long seen = c.window && length > c.window ? length - c.window : 0;
    work += (length - seen) * c.num_heads * D;
    for (long head = 0; head < c.num_kv_heads; head++) {
      firsts.push_back(parts.size());
      for (long first = seen; first < length;) {
        long last = (first / SPLIT + 1) * SPLIT;
        if (last > length) last = length;
        parts.push_back({row, (long)c.rows[2 * r + 1], head, first, last, (long)parts.size()});
        first = last;
      }
    }
  }
  firsts.push_back(parts.size());
  std::vector<float> states(parts.size() * size);
  const long num_parts = parts.size(), num_heads = firsts.size() - 1;
#pragma omp parallel num_threads(c.threads) if (work > 50000)
  {
#pragma omp for schedule(dynamic, 1)
    for (long p = 0; p < num_parts; p++) attend<E>(c, parts[p], states.data() + p * size);
#pragma omp for schedule(static)
    for (long h = 0; h < num_heads; h++)
      merge<E>(c, &parts[firsts[h]], firsts[h + 1] - firsts[h], states.data() + firsts[h] * size, size);
  }
}
