// y = x @ weight.T for weights of 8 or 4 bits, computed in integers: twice or four times the products per instruction that
// floats allow.
//
// Inputs are rounded, each block of a row's columns to a scale of their own, so that neither another row nor an outlier far
// off costs digits; so finely that the weights' own error is what is left. Weights lie in panels of PANEL outputs, a few
// columns of an output side by side, because the processor adds the products of so many to 32 bits at once.
#pragma once
#include <cmath>

#include "matmul.h"

constexpr long INT4_GROUP = 32;
// A tile's sums stay in registers: TILE rows of PANELS * VECTORS each. GOP/s of int8 [3072, 576] x 120 rows, one core of a
// Zen 3 EPYC: 4 rows 131, 5 rows 127, 6 rows 101 (float32 in oneDNN: 75). Fewer than MANY rows meet one panel at a time.
// [3072, 576] x 1, 4, 8, 32, 512 rows, two cores of a Zen 5 EPYC: 8 rows of 3 panels 105, 291, 494, 727, 898, 12 of 1 161,
// 432, 383, 586, 819; as it is, with the next panels fetched, 166, 450, 725, 842, 896.
constexpr int TILE = W == 16 ? 8 : 4, MANY = 5;
// While the first rows meet a panel, the next one is fetched; with AVX-512 while all do. [3072, 576] x 1, 8, 32 rows, one core
// of a Zen 5 EPYC held to AVX2: int8 91, 159, 175 GOP/s without, 112, 192, 194 with; int4 149, 262, 264 and 173, 294, 294.
// Zen 3 guesses itself what comes next: fetched with all of 32 rows it cost 4 % there.
constexpr bool ALWAYS_FETCHES = W == 16;
// Of the rounded rows as many as fit stay in the second cache while the panels pass.
constexpr long ROUNDED_BYTES = 192 * 1024;
typedef int16_t Shorts __attribute__((vector_size(4 * W)));

// Inputs of 16 bits, two columns at once: the error is 1/65534 of the block's largest input.
struct Inputs16 {
  typedef int16_t T;
  static constexpr long TOGETHER = 2, BLOCK = 512, STEPS = 32767;
  static_assert(127 * STEPS * BLOCK < (1L << 31), "a block's sum must fit 32 bits");
};
// Inputs of 8 bits, four columns at once: 1/254.
struct Inputs8 {
  typedef int8_t T;
  static constexpr long TOGETHER = 4, BLOCK = INT4_GROUP, STEPS = 127;
};

// FEW: sums are so few that each waits for itself, 5 cycles for VNNI's instruction that does both, 1 for an addition.
constexpr int FEW = 4;
#if defined(__AVX512BW__)
template <bool IS_FEW> static inline Ints add_products(Ints to, int16_t, Ints x, Shorts weight) {
#if defined(__AVX512VNNI__)
  if constexpr (!IS_FEW) return (Ints)_mm512_dpwssd_epi32((__m512i)to, (__m512i)x, (__m512i)weight);
#endif
  return to + (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)weight);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <bool IS_FEW> static inline Ints add_products(Ints to, int16_t, Ints x, Shorts weight) {
#if defined(__AVXVNNI__)
  if constexpr (!IS_FEW) return (Ints)_mm256_dpwssd_avx_epi32((__m256i)to, (__m256i)x, (__m256i)weight);
#endif
  return to + (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)weight);
}
#else
template <bool> static inline Ints add_products(Ints to, int16_t, Ints x, Shorts weight) {
  Ints w = (Ints)weight;
  return to + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
}
#endif
// weight: bytes of 0 to 15. Without VNNI, products of bytes are added up in 16 bits, twice as many at once as in 32. GOP/s of
// int4 [3072, 576] x 1, 8, 512 rows, one core of a Zen 5 EPYC held to AVX2: inputs of 16 bits 92, 146, 153, of 8 173, 294, 294.
#if defined(__AVX512VNNI__)
template <bool> static inline Ints add_products(Ints to, int8_t, Ints x, Ints weight) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)to, (__m512i)weight, (__m512i)x);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
template <bool> static inline Ints add_products(Ints to, int8_t, Ints x, Ints weight) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)to, (__m256i)weight, (__m256i)x);
}
#elif defined(__AVX512BW__)
#define ADDS_HALVES
template <bool> static inline Ints add_products(Ints to, int8_t, Ints x, Ints weight) {
  return (Ints)((Shorts)to + (Shorts)_mm512_maddubs_epi16((__m512i)weight, (__m512i)x));
}
static inline Ints add_halves(Ints sums) { return (Ints)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define ADDS_HALVES
template <bool> static inline Ints add_products(Ints to, int8_t, Ints x, Ints weight) {
  return (Ints)((Shorts)to + (Shorts)_mm256_maddubs_epi16((__m256i)weight, (__m256i)x));
}
static inline Ints add_halves(Ints sums) { return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#else
template <bool> static inline Ints add_products(Ints to, int8_t, Ints x, Ints weight) {
  for (int shift = 24; shift >= 0; shift -= 8) to += (x << shift >> 24) * (weight << shift >> 24);
  return to;
}
#endif
// What a block's sums begin with, of what each lane's columns give; and what they come to. Where two columns of each four are
// added up in 16 bits, these always fit: a column brings -8 times its input at the start, and later up to 15 times.
#if defined(ADDS_HALVES)
static_assert(INT4_GROUP / 2 * 8 * Inputs8::STEPS < (1L << 15), "half a block's sum must fit 16 bits");
static inline Ints block_sums(int8_t, Ints sums) { return add_halves(sums); }
static inline int32_t block_start(Ints sums) {
  const int32_t first = sum(LANES & 2 ? Ints{} : sums), second = sum(LANES & 2 ? sums : Ints{});
  return (first & 0xffff) | second << 16;
}
#else
static inline Ints block_sums(int8_t, Ints sums) { return sums; }
static inline int32_t block_start(Ints sums) { return sum(sums); }
#endif
static inline Ints block_sums(int16_t, Ints sums) { return sums; }

#if defined(__AVX512BW__)
static inline Shorts widen_pairs(const int8_t* p) { return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
static inline Shorts widen_pairs(const int8_t* p) { return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
#else
typedef int8_t BytePairs __attribute__((vector_size(2 * W)));
static inline Shorts widen_pairs(const int8_t* p) { return __builtin_convertvector(load<BytePairs>(p), Shorts); }
#endif

// How a panel holds 2 * X::TOGETHER columns in BYTES, as halves 0 and 1. SUMMED: columns whose products are added before they
// are scaled. GROUPED: as many share a scale of the weights; else a row does. ZERO: what is added to a weight.
struct Packed8 {
  typedef Inputs16 X;
  typedef Shorts Weights;
  static constexpr bool GROUPED = false;
  static constexpr long BYTES = 4 * PANEL, SUMMED = X::BLOCK, ZERO = 0;
  template <int HALF> static inline Weights read(const uint8_t* p, int v) {
    return widen_pairs((const int8_t*)p + HALF * 2 * PANEL + v * 2 * W);
  }
};
struct Packed4 {  // half 0 in the low halves of the bytes, 1 in the high ones
  typedef Inputs8 X;
  typedef Ints Weights;
  static constexpr bool GROUPED = true;
  static constexpr long BYTES = 4 * PANEL, SUMMED = INT4_GROUP, ZERO = 8;
  template <int HALF> static inline Weights read(const uint8_t* p, int v) {
    Ints both = load<Ints>(p + v * 4 * W);
    return (HALF ? both >> 4 : both) & 0x0f0f0f0f;
  }
};

// Of a ProductCall with integers for weights, uint8 [panels, columns / (2 * X::TOGETHER), K::BYTES], and scales
// [panels, groups, PANEL].
static inline long columns_of(const ProductCall& c) { return (c.inputs + INT4_GROUP - 1) / INT4_GROUP * INT4_GROUP; }

template <class K> static inline long groups_of(long columns) { return K::GROUPED ? columns / K::SUMMED : 1; }

// zero: what a sum of the block begins with, since each weight is K::ZERO too large.
struct BlockScale {
  float scale;
  int32_t zero;
};

// values [rows, columns], scales [rows, blocks].
template <class K> struct RoundedRows {
  typedef typename K::X X;
  const long columns, blocks;
  std::unique_ptr<typename X::T[]> values;
  std::unique_ptr<BlockScale[]> scales;
  RoundedRows(long rows, long columns_)
      : columns(columns_),
        blocks((columns + X::BLOCK - 1) / X::BLOCK),
        values(new typename X::T[rows * columns]),
        scales(new BlockScale[rows * blocks]) {}
};

// Returns the largest size among x[0..count); not a number if any is not one, or infinite.
template <class E> static inline float largest_of(const typename E::T* x, long count) {
  // As integers, sizes are ordered alike; infinity is larger than every number, and what is no number larger still.
  Ints sizes = {};
  long i = 0;
  for (; i + W <= count; i += W) sizes = larger(sizes, bits(E::read(x + i)) & 0x7fffffff);
  if (i < count) {
    typename E::T rest[W] = {};
    memcpy(rest, x + i, (count - i) * sizeof(*x));
    sizes = larger(sizes, bits(E::read(rest)) & 0x7fffffff);
  }
  const int32_t size = largest(sizes);
  float largest;
  memcpy(&largest, &size, sizeof size);
  return largest + largest * 0.0f;
}

// A block that holds no number, or an infinity, gets a scale that is none either, whatever its steps are.
template <class K, class E>
static void round_row(const typename E::T* x, long inputs, const RoundedRows<K>& rows, long row) {
  typedef typename K::X X;
  typename X::T* to = rows.values.get() + row * rows.columns;
  BlockScale* scales = rows.scales.get() + row * rows.blocks;
  for (long first = 0; first < rows.columns; first += X::BLOCK) {
    const long last = first + X::BLOCK < rows.columns ? first + X::BLOCK : rows.columns, end = last < inputs ? last : inputs;
    const float largest = largest_of<E>(x + first, end - first), steps = largest > 1e-30f ? X::STEPS / largest : 0.0f;
    Ints sums = {};
    auto round = [&](const typename E::T* from, typename X::T* rounded) {
      Floats step = E::read(from) * steps;
      Ints whole = __builtin_convertvector(step + (step < 0 ? splat(-0.5f) : splat(0.5f)), Ints);
      narrow(rounded, whole);
      if (K::ZERO) sums += whole;
    };
    long i = first;
    for (; i + W <= end; i += W) round(x + i, to + i);
    for (; i < last; i += W) {  // blocks are multiples of W
      typename E::T rest[W] = {};
      if (i < end) memcpy(rest, x + i, (end - i) * sizeof(*x));
      round(rest, to + i);
    }
    *scales++ = {largest / X::STEPS, K::ZERO && steps > 0 ? block_start(-(int32_t)K::ZERO * sums) : 0};
  }
}

template <class K, int NUM, int ROWS, bool FETCHES>
static inline void sum_tile(const uint8_t* panel, const float* scales, const RoundedRows<K>& x, long row,
                            Floats sums[ROWS][NUM * VECTORS]) {
  typedef typename K::X X;
  constexpr int NUM_V = NUM * VECTORS;
  constexpr long EACH = 2 * X::TOGETHER;
  const long columns = x.columns, groups = groups_of<K>(columns), bytes = columns / EACH * K::BYTES;
  const BlockScale* x_scales = x.scales.get() + row * x.blocks;
  for (long first = 0, last; first < columns; first = last) {
    last = first + K::SUMMED < columns ? first + K::SUMMED : columns;
    Ints acc[ROWS][NUM_V];
    UNROLLED for (int m = 0; m < ROWS; m++)
      UNROLLED for (int v = 0; v < NUM_V; v++) acc[m][v] = Ints{} + x_scales[m * x.blocks + first / X::BLOCK].zero;
    TileRows<typename X::T, ROWS> rows(x.values.get() + row * columns + first, columns);
    for (const uint8_t *p = panel + first / EACH * K::BYTES, *end = panel + last / EACH * K::BYTES; p < end; p += K::BYTES) {
      if (FETCHES)
        UNROLLED for (int v = 0; v < NUM; v++) __builtin_prefetch(p + (v + NUM) * bytes);
      UNROLLED for (int half = 0; half < 2; half++) {
        typename K::Weights w[NUM_V];
        UNROLLED for (int v = 0; v < NUM_V; v++) {
          const uint8_t* from = p + v / VECTORS * bytes;
          w[v] = half ? K::template read<1>(from, v % VECTORS) : K::template read<0>(from, v % VECTORS);
        }
        UNROLLED for (int m = 0; m < ROWS; m++) {
          Ints both = Ints{} + load<int32_t>(rows.at(m, half * X::TOGETHER));
          UNROLLED for (int v = 0; v < NUM_V; v++) {
            acc[m][v] = add_products<(ROWS < FEW)>(acc[m][v], typename X::T{}, both, w[v]);
            keep(acc[m][v]);
          }
        }
      }
      rows.move(EACH);
    }
    UNROLLED for (int m = 0; m < ROWS; m++)
      UNROLLED for (int v = 0; v < NUM_V; v++) {
        Floats scale = splat(x_scales[m * x.blocks + first / X::BLOCK].scale);
        if (K::GROUPED)
          scale *= load<Floats>(scales + (v / VECTORS * groups + first / K::SUMMED) * PANEL + v % VECTORS * W);
        sums[m][v] = fused(__builtin_convertvector(block_sums(typename X::T{}, acc[m][v]), Floats), scale, sums[m][v]);
      }
  }
}

template <class K, class E, int NUM, int ROWS, bool FETCHES>
static void store_tile(const ProductCall& c, long p, const RoundedRows<K>& x, long row) {
  typedef typename E::T T;
  constexpr int NUM_V = NUM * VECTORS;
  const long columns = x.columns, first = p * PANEL, bytes = columns / (2 * K::X::TOGETHER) * K::BYTES;
  const float* scales = c.scales + p * groups_of<K>(columns) * PANEL;
  Floats sums[ROWS][NUM_V] = {};
  sum_tile<K, NUM, ROWS, FETCHES>((const uint8_t*)c.weight + p * bytes, scales, x, row, sums);
  const long count = c.outputs - first < NUM * PANEL ? c.outputs - first : NUM * PANEL;
  T bias[NUM * PANEL] = {}, part[NUM * PANEL];
  if (c.bias) memcpy(bias, (const T*)c.bias + first, count * sizeof(T));
  for (int m = 0; m < ROWS; m++) {
    T* y = (T*)c.y + (row + m) * c.outputs + first;
    T* to = count < NUM * PANEL ? part : y;
    for (int v = 0; v < NUM_V; v++) {
      const Floats added = E::read(bias + v * W);
      E::write(to + v * W, K::GROUPED ? sums[m][v] + added : fused(sums[m][v], load<Floats>(scales + v * W), added));
    }
    if (count < NUM * PANEL) memcpy(y, part, count * sizeof(T));
  }
}

template <class K, class E, int NUM, bool FETCHES, int ROWS = TILE>
static void store_rows(const ProductCall& c, long p, const RoundedRows<K>& x, long row, long count) {
  if (count == ROWS)
    store_tile<K, E, NUM, ROWS, FETCHES>(c, p, x, row);
  else if constexpr (ROWS > 1)
    store_rows<K, E, NUM, FETCHES, ROWS - 1>(c, p, x, row, count);
}

template <class K, class E, int NUM>
static void store_all(const ProductCall& c, long p, const RoundedRows<K>& x, long first, long rows) {
  const long tiles = tiles_of(rows, TILE);
  for (long t = 0, m = first, end; t < tiles; t++, m = end) {
    end = first + (t + 1) * rows / tiles;
    (t ? store_rows<K, E, NUM, ALWAYS_FETCHES> : store_rows<K, E, NUM, true>)(c, p, x, m, end - m);
  }
}

// E: what bias, x and y are made of.
template <class K, class E>
static void multiply_integers(const ProductCall& c, Team& team) {
  const long columns = columns_of(c), panels = (c.outputs + PANEL - 1) / PANEL;
  const long near = ROUNDED_BYTES / (columns * (long)sizeof(typename K::X::T)) / TILE * TILE, most = near < TILE ? TILE : near;
  RoundedRows<K> x(c.rows, columns);
  const bool together = c.rows * c.outputs * c.inputs > 40000;
  team.share(c.rows, together ? team.slice(c.rows) : c.rows, [&](long first, long last, long) {
    for (long m = first; m < last; m++) round_row<K, E>((const typename E::T*)c.x + m * c.inputs, c.inputs, x, m);
  });
  for (long row = 0; row < c.rows; row += most) {
    const long rows = row + most < c.rows ? most : c.rows - row;
    team.share(panels, together ? PANELS : panels, [&](long first, long last, long) {
      for (long p = first, next; p < last; p = next) {
        next = rows >= MANY && p + PANELS <= last ? p + PANELS : p + 1;
        (next == p + PANELS ? store_all<K, E, PANELS> : store_all<K, E, 1>)(c, p, x, row, rows);
      }
    });
  }
}
