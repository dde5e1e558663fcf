// y = x @ weight.T for few rows: each weight is read once from memory, widened in registers and used for all rows.
#pragma once
#include "vector.h"

// O outputs of MT rows at once; weights [O, I] of kind K; x [MT, I] floats; sums[o][m].
template <class K, int O, int MT>
static inline void dot(const typename K::T* w, const float* x, long I, float sums[O][MT]) {
  Floats acc[O][MT] = {};
  long i = 0;
  for (; i + W <= I; i += W) {
    Floats xs[MT];
    for (int m = 0; m < MT; m++) xs[m] = load<Floats>(x + m * I + i);
    for (int o = 0; o < O; o++) {
      Floats ws = K::read(w + o * I + i);
      for (int m = 0; m < MT; m++) acc[o][m] += ws * xs[m];
    }
  }
  for (int o = 0; o < O; o++)
    for (int m = 0; m < MT; m++) {
      float s = sum(acc[o][m]);
      for (long j = i; j < I; j++) s += K::read1(w + o * I + j) * x[m * I + j];
      sums[o][m] = s;
    }
}

template <class K, int O, int MT>
static void rows_of(const typename K::T* w, const float* x, const float* scales, const float* bias, float* y, long first,
                    long last, long outputs, long I) {
  for (long o = first; o + O <= last; o += O) {
    float sums[O][MT];
    dot<K, O, MT>(w + o * I, x, I, sums);
    for (int k = 0; k < O; k++)
      for (int m = 0; m < MT; m++)
        y[m * outputs + o + k] = sums[k][m] * (scales ? scales[o + k] : 1.0f) + (bias ? bias[o + k] : 0.0f);
  }
}

template <class K, int MT>
static void tile(const void* weight, const float* x, const float* scales, const float* bias, float* y, long first,
                 long last, long outputs, long I) {
  const typename K::T* w = (const typename K::T*)weight;
  constexpr int O = MT <= 2 ? 4 : 2;
  long middle = first + (last - first) / O * O;
  rows_of<K, O, MT>(w, x, scales, bias, y, first, middle, outputs, I);
  rows_of<K, 1, MT>(w, x, scales, bias, y, middle, last, outputs, I);
}

template <class K>
static void multiply(const void* weight, const float* x, const float* scales, const float* bias, float* y, long M,
                     long outputs, long I, int threads) {
  constexpr long BLOCK = 32;  // outputs whose weights stay in the first cache while the rows pass
#pragma omp parallel for num_threads(threads) schedule(static) if (outputs * I > 20000)
  for (long first = 0; first < outputs; first += BLOCK) {
    long last = first + BLOCK < outputs ? first + BLOCK : outputs, m = 0;
    for (; m + 4 <= M; m += 4) tile<K, 4>(weight, x + m * I, scales, bias, y + m * outputs, first, last, outputs, I);
    for (; m + 2 <= M; m += 2) tile<K, 2>(weight, x + m * I, scales, bias, y + m * outputs, first, last, outputs, I);
    if (m < M) tile<K, 1>(weight, x + m * I, scales, bias, y + m * outputs, first, last, outputs, I);
  }
}
