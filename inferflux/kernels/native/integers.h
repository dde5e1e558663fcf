// y = x @ weight.T for weights of 8 or 4 bits, computed in integers: twice the products per instruction that floats allow.
//
// Inputs are rounded to 16 bits, each BLOCK columns of a row to a scale of their own, so that neither another row nor an
// outlier far off costs digits: the error is 1/65534 of the block's largest input. Weights lie in panels of PANEL
// outputs, two columns of an output side by side, because the processor multiplies pairs and adds them to 32 bits.
#pragma once
#include <cmath>

#include "matmul.h"

constexpr long BLOCK = 512, INT4_GROUP = 32, STEPS = 32767;
static_assert(127 * STEPS * BLOCK < (1L << 31), "a block's sum must fit 32 bits");
// A tile's sums stay in registers: TILE rows of PANELS * VECTORS each. GOP/s of int8 [3072, 576] x 120 rows, one core of a
// Zen 3 EPYC: 4 rows 131, 5 rows 127, 6 rows 101 (float32 in oneDNN: 75). Fewer than MANY rows meet one panel at a time.
// [3072, 576] x 1, 4, 8, 32, 512 rows, two cores of a Zen 5 EPYC: 8 rows of 3 panels 105, 291, 494, 727, 898, 12 of 1 161,
// 432, 383, 586, 819; as it is, with the next panels fetched, 166, 450, 725, 842, 896.
constexpr int TILE = W == 16 ? 8 : 4, MANY = 5;
// While rows meet a panel, the next one is fetched; with AVX2 it comes by itself (fetching costs 32 rows 4 % there).
constexpr bool FETCHES = W == 16;
// Of the rounded rows as many as fit stay in the second cache while the panels pass.
constexpr long ROUNDED_BYTES = 192 * 1024;
typedef int16_t Shorts __attribute__((vector_size(4 * W)));

// IS_FEW: sums are so few that each waits for itself, 5 cycles for VNNI's instruction that does both, 1 for an addition.
constexpr int FEW = 4;
#if defined(__AVX512BW__)
template <bool IS_FEW> static inline Ints add_pairs(Ints to, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
  if constexpr (!IS_FEW) return (Ints)_mm512_dpwssd_epi32((__m512i)to, (__m512i)a, (__m512i)b);
#endif
  return to + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <bool> static inline Ints add_pairs(Ints to, Shorts a, Shorts b) {
  return to + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#else
template <bool> static inline Ints add_pairs(Ints to, Shorts a, Shorts b) {
  return to + ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
}
#endif

#if defined(__AVX512BW__)
static inline Shorts widen_pairs(const int8_t* p) { return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
static inline Shorts widen_pairs(const uint8_t* p) { return (Shorts)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
static inline Shorts widen_pairs(const int8_t* p) { return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
static inline Shorts widen_pairs(const uint8_t* p) { return (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
#else
typedef int8_t BytePairs __attribute__((vector_size(2 * W)));
typedef uint8_t UBytePairs __attribute__((vector_size(2 * W)));
static inline Shorts widen_pairs(const int8_t* p) { return __builtin_convertvector(load<BytePairs>(p), Shorts); }
static inline Shorts widen_pairs(const uint8_t* p) { return __builtin_convertvector(load<UBytePairs>(p), Shorts); }
#endif

// How a panel holds four columns, as pairs 0 and 1. SUMMED: columns whose products share the weights' scale.
struct Packed8 {
  static constexpr long BYTES = 4 * PANEL, SUMMED = BLOCK;
  template <int PAIR> static inline Shorts read(const uint8_t* p, int v) {
    return widen_pairs((const int8_t*)p + PAIR * 2 * PANEL + v * 2 * W);
  }
};
struct Packed4 {  // pair 0 in the low halves of the bytes, 1 in the high ones
  static constexpr long BYTES = 2 * PANEL, SUMMED = INT4_GROUP;
  template <int PAIR> static inline Shorts read(const uint8_t* p, int v) {
    Shorts both = widen_pairs(p + v * 2 * W);
    return (PAIR ? both >> 4 : both & 15) - 8;
  }
};

// Of a ProductCall with integers for weights, uint8 [panels, columns / 4, K::BYTES], and scales [panels, PANEL] (8 bits) or
// [panels, groups, PANEL] (4 bits).
static inline long columns_of(const ProductCall& c) { return (c.inputs + INT4_GROUP - 1) / INT4_GROUP * INT4_GROUP; }
static inline long blocks_of(const ProductCall& c) { return (c.inputs + BLOCK - 1) / BLOCK; }

// Returns the largest size among x[0..count); not a number if any is not one, or infinite.
static inline float largest_of(const float* x, long count) {
  Floats most = {}, nothing = {};
  long i = 0;
  for (; i + W <= count; i += W) {
    Floats v = load<Floats>(x + i), size = (Floats)(bits(v) & 0x7fffffff);
    most = size > most ? size : most;
    nothing += v * 0.0f;
  }
  float largest = 0, none = sum(nothing);
  for (int k = 0; k < W; k++) largest = fmaxf(largest, most[k]);
  for (; i < count; i++) largest = fmaxf(largest, fabsf(x[i])), none += x[i] * 0.0f;
  return largest + none;
}

// A block that holds no number, or an infinity, gets a scale that is none either, whatever its steps are.
static void round_row(const float* x, long inputs, long columns, int16_t* to, float* scales) {
  for (long first = 0; first < columns; first += BLOCK) {
    long last = first + BLOCK < columns ? first + BLOCK : columns, end = last < inputs ? last : inputs;
    float largest = largest_of(x + first, end - first), steps = largest > 1e-30f ? STEPS / largest : 0.0f;
    *scales++ = largest / STEPS;
    for (long i = first; i < end; i++) {
      float step = x[i] * steps;
      to[i] = (int16_t)(int32_t)(step + (step < 0 ? -0.5f : 0.5f));
    }
    for (long i = end; i < last; i++) to[i] = 0;
  }
}

template <class K, int NUM, int ROWS>
static inline void sum_tile(const uint8_t* panel, const float* scales, const int16_t* x, const float* x_scales, long columns,
                            long blocks, Floats sums[ROWS][NUM * VECTORS]) {
  constexpr int NUM_V = NUM * VECTORS;
  const long groups = K::SUMMED < BLOCK ? columns / K::SUMMED : 1, bytes = columns / 4 * K::BYTES;
  for (long first = 0, last; first < columns; first = last) {
    last = first + K::SUMMED < columns ? first + K::SUMMED : columns;
    Ints acc[ROWS][NUM_V];
    UNROLLED for (int m = 0; m < ROWS; m++)
      UNROLLED for (int v = 0; v < NUM_V; v++) acc[m][v] = Ints{};
    TileRows<int16_t, ROWS> rows(x + first, columns);
    for (const uint8_t *p = panel + first / 4 * K::BYTES, *end = panel + last / 4 * K::BYTES; p < end; p += K::BYTES) {
      if (FETCHES)
        UNROLLED for (int v = 0; v < NUM; v++) __builtin_prefetch(p + (v + NUM) * bytes);
      UNROLLED for (int pair = 0; pair < 2; pair++) {
        Shorts w[NUM_V];
        UNROLLED for (int v = 0; v < NUM_V; v++) {
          const uint8_t* from = p + v / VECTORS * bytes;
          w[v] = pair ? K::template read<1>(from, v % VECTORS) : K::template read<0>(from, v % VECTORS);
        }
        UNROLLED for (int m = 0; m < ROWS; m++) {
          Ints both = Ints{} + load<int32_t>(rows.at(m, 2 * pair));
          UNROLLED for (int v = 0; v < NUM_V; v++) {
            acc[m][v] = add_pairs<(ROWS < FEW)>(acc[m][v], (Shorts)both, w[v]);
            keep(acc[m][v]);
          }
        }
      }
      rows.move(4);
    }
    UNROLLED for (int m = 0; m < ROWS; m++)
      UNROLLED for (int v = 0; v < NUM_V; v++) {
        Floats scale = splat(x_scales[m * blocks + first / BLOCK]);
        if (K::SUMMED < BLOCK)
          scale *= load<Floats>(scales + (v / VECTORS * groups + first / K::SUMMED) * PANEL + v % VECTORS * W);
        sums[m][v] += __builtin_convertvector(acc[m][v], Floats) * scale;
      }
  }
}

template <class K, int NUM, int ROWS>
static void store_tile(const ProductCall& c, long p, long row, const int16_t* x, const float* x_scales) {
  constexpr int NUM_V = NUM * VECTORS;
  const long columns = columns_of(c), first = p * PANEL, groups = K::SUMMED < BLOCK ? columns / K::SUMMED : 1;
  const float* scales = c.scales + p * groups * PANEL;
  Floats sums[ROWS][NUM_V] = {};
  sum_tile<K, NUM, ROWS>((const uint8_t*)c.weight + p * columns / 4 * K::BYTES, scales, x + row * columns,
                         x_scales + row * blocks_of(c), columns, blocks_of(c), sums);
  const long count = c.outputs - first < NUM * PANEL ? c.outputs - first : NUM * PANEL;
  float bias[NUM * PANEL] = {}, part[NUM * PANEL];
  if (c.bias) memcpy(bias, c.bias + first, count * sizeof(float));
  for (int m = 0; m < ROWS; m++) {
    float* y = c.y + (row + m) * c.outputs + first;
    float* to = count < NUM * PANEL ? part : y;
    for (int v = 0; v < NUM_V; v++) {
      Floats sum = K::SUMMED < BLOCK ? sums[m][v] : sums[m][v] * load<Floats>(scales + v * W);
      store(to + v * W, sum + load<Floats>(bias + v * W));
    }
    if (count < NUM * PANEL) memcpy(y, part, count * sizeof(float));
  }
}

template <class K, int NUM, int ROWS = TILE>
static void store_rows(const ProductCall& c, long p, long row, long count, const int16_t* x, const float* x_scales) {
  if (count == ROWS)
    store_tile<K, NUM, ROWS>(c, p, row, x, x_scales);
  else if constexpr (ROWS > 1)
    store_rows<K, NUM, ROWS - 1>(c, p, row, count, x, x_scales);
}

template <class K, int NUM>
static void store_all(const ProductCall& c, long p, long first, long rows, const int16_t* x, const float* x_scales) {
  const long tiles = tiles_of(rows, TILE);
  for (long t = 0, m = first, end; t < tiles; t++, m = end) {
    end = first + (t + 1) * rows / tiles;
    store_rows<K, NUM>(c, p, m, end - m, x, x_scales);
  }
}

template <class K>
static void multiply_integers(const ProductCall& c) {
  const long columns = columns_of(c), panels = (c.outputs + PANEL - 1) / PANEL;
  const long near = ROUNDED_BYTES / (2 * columns) / TILE * TILE, most = near < TILE ? TILE : near;
  std::unique_ptr<int16_t[]> x(new int16_t[c.rows * columns]);
  std::unique_ptr<float[]> x_scales(new float[c.rows * blocks_of(c)]);
#pragma omp parallel num_threads(c.threads) if (c.rows * c.outputs * c.inputs > 40000)
  {
#pragma omp for schedule(static)
    for (long m = 0; m < c.rows; m++)
      round_row(c.x + m * c.inputs, c.inputs, columns, x.get() + m * columns, x_scales.get() + m * blocks_of(c));
    const Share own = share_of(panels);
    for (long first = 0; first < c.rows; first += most) {
      const long rows = first + most < c.rows ? most : c.rows - first;
      for (long p = own.first, next; p < own.last; p = next) {
        next = rows >= MANY && p + PANELS <= own.last ? p + PANELS : p + 1;
        (next == p + PANELS ? store_all<K, PANELS> : store_all<K, 1>)(c, p, first, rows, x.get(), x_scales.get());
      }
    }
  }
}
