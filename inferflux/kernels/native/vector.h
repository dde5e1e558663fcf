// What every kernel here is made of: as many floats as a register holds, and the ways weights become floats.
// Written with GCC's vector extensions, so that one source serves AVX2, AVX-512 and NEON. Knows no op.
#pragma once
#include <cstdint>
#include <cstring>

#include "team.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

// GCC 12 keeps sums in registers only if every loop over them is unrolled before it looks: else it stores all of them in each
// round (products of bfloat16 in pairs: 947 to 652 GFLOP/s).
#define UNROLLED _Pragma("GCC unroll 32")

template <class V> static inline V load(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
// Small integers from memory to a register of 32-bit ones. GCC 12 takes __builtin_convertvector apart byte by byte: 790 us
// against 170 for int8 [3072, 576] x 1 row, one core of a Zen 3 EPYC.
#if defined(__AVX512F__)
static inline Ints widen(const uint16_t* p) { return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
static inline Ints widen(const uint16_t* p) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#else
static inline Ints widen(const uint16_t* p) { return __builtin_convertvector(load<Halves>(p), Ints); }
#endif
// The low halves or quarters of 32-bit integers, to memory.
#if defined(__AVX512F__)
static inline void narrow(int8_t* p, Ints v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
static inline void narrow(uint16_t* p, Ints v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v)); }
#elif defined(__AVX2__)
static inline void narrow(uint16_t* p, Ints v) {
  __m256i low = (__m256i)(v & 0xffff);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
static inline void narrow(int8_t* p, Ints v) {
  const __m256i quarters = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(quarters, _mm256_set1_epi64x(4L << 32))));
}
#else
static inline void narrow(int8_t* p, Ints v) {
  for (int i = 0; i < W; i++) p[i] = (int8_t)v[i];
}
static inline void narrow(uint16_t* p, Ints v) {
  for (int i = 0; i < W; i++) p[i] = (uint16_t)v[i];
}
#endif
static inline void narrow(int16_t* p, Ints v) { narrow((uint16_t*)p, v); }
static inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
static inline Floats splat(float x) { return x - Floats{}; }  // x + 0 would be an addition: -0 + 0 is 0
// Has the compiler hold a value in a register here. GCC 12 else reads a factor from memory at each use, and puts sums aside
// to load ahead (integers.h, AVX2: 101 against 131 GOP/s).
#if defined(__AVX2__) && !defined(__AVX512F__)
template <class V> static inline void keep(V& v) { asm("" : "+x"(v)); }
#else
template <class V> static inline void keep(V&) {}
#endif
// The same in AVX-512's registers too, where reads from memory are what there is least of: attention in float32, one core
// of a Zen 5 EPYC: 4.3 to 3.7 us. (In the products of matmul.h it costs 12 %.)
#if defined(__AVX512F__)
template <class V> static inline void hold(V& v) { asm("" : "+v"(v)); }
#else
template <class V> static inline void hold(V& v) { keep(v); }
#endif
// Has the compiler take a pointer for one that has nothing to do with others (matmul.h).
#if defined(__AVX512F__)
template <class T> static inline void keep_apart(const T*& p) { asm("" : "+r"(p)); }
#else
template <class T> static inline void keep_apart(const T*&) {}
#endif
static inline Ints bits(Floats v) { return (Ints)v; }
// a * b + c, rounded once. Written so, the compiler may round twice, and GCC 12 does in some tiles of a product alone.
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

template <class V> static inline auto sum(V v) {
#if defined(__AVX512F__)
  v += __builtin_shuffle(v, Ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  v += __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  v += __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
#else
  v += __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3});
  v += __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5});
#endif
  return v[0] + v[1];
}

template <class V> static inline V larger(V a, V b) { return a > b ? a : b; }
// The largest of v, none of which is not a number.
template <class V> static inline auto largest(V v) {
#if defined(__AVX512F__)
  v = larger(v, __builtin_shuffle(v, Ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = larger(v, __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = larger(v, __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
#else
  v = larger(v, __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3}));
  v = larger(v, __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5}));
#endif
  return v[0] > v[1] ? v[0] : v[1];
}

static inline Floats added(Floats a, Floats b) { return a + b; }

#if defined(__AVX512F__)
constexpr Ints LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr Ints LANES = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

// Four registers in one: of each four lanes the first is what those of v[0] come to, the second those of v[1], and so on.
// COMBINE: of two numbers one, such as their sum.
template <Floats COMBINE(Floats, Floats)> static inline Floats fold(const Floats (&v)[4]) {
  const Ints even = (LANES & ~3) + ((LANES & 3) >> 1) + (LANES & 1) * W, odd = even + 2;
  const Ints lows = (LANES & ~3) + (LANES & 1) + ((LANES & 3) >> 1) * W, highs = lows + 2;
  const Floats first = COMBINE(__builtin_shuffle(v[0], v[1], even), __builtin_shuffle(v[0], v[1], odd));
  const Floats second = COMBINE(__builtin_shuffle(v[2], v[3], even), __builtin_shuffle(v[2], v[3], odd));
  return COMBINE(__builtin_shuffle(first, second, lows), __builtin_shuffle(first, second, highs));
}

// What is left to do of W / 4 such registers: lane i of the result is what the i-th register came to.
template <Floats COMBINE(Floats, Floats)> static inline Floats join(const Floats (&v)[W / 4]) {
  const Ints halves = (LANES & 3) + (LANES & (W / 2)) / (W / 2) * W;
#if defined(__AVX512F__)
  const Ints low = (LANES & 7) + (LANES >> 3) * W, quarters = halves + (LANES & 4) * 2;
  const Floats first = COMBINE(__builtin_shuffle(v[0], v[1], low), __builtin_shuffle(v[0], v[1], low + 8));
  const Floats second = COMBINE(__builtin_shuffle(v[2], v[3], low), __builtin_shuffle(v[2], v[3], low + 8));
  return COMBINE(__builtin_shuffle(first, second, quarters), __builtin_shuffle(first, second, quarters + 4));
#else
  return COMBINE(__builtin_shuffle(v[0], v[1], halves), __builtin_shuffle(v[0], v[1], halves + 4));
#endif
}

// Lane i of v[j] and lane j of v[i] change places.
static inline void transpose(Floats (&v)[W]) {
  UNROLLED for (int s = 1; s < W; s *= 2) {
    const Ints low = LANES + (((LANES & s) != 0) & (W - s)), high = low + s;
    UNROLLED for (int i = 0; i < W; i++) {
      if (i & s) continue;
      const Floats a = v[i], b = v[i + s];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

// e^x to 2 units in the last place for x <= 88; 0 far below: under -87, with AVX-512 -104 (Cephes' polynomial).
static inline Floats exp(Floats x) {
#if defined(__AVX512F__)
  // One instruction each to round, and to multiply by 2^n, whatever that comes to: half as many as below.
  x = larger(splat(-104.0f), x);
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Floats low = splat(-87.0f);
  Ints tiny = x < low;
  x = tiny ? low : x;
  Floats n = x * 1.44269504f + (x < 0 ? splat(-0.5f) : splat(0.5f));
  Ints whole = __builtin_convertvector(n, Ints);
  n = __builtin_convertvector(whole, Floats);
#endif
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  p = (Floats)(bits(p) + (whole << 23));
  return tiny ? Floats{} : p;
#endif
}

// 2^x for x <= 0 to 2e-7 of it, if x is exact; 0 far below: under -126, with AVX-512 -150. In a softmax what x is rounded
// by does not matter: it counts for little where x is large.
static inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
#if defined(__AVX512DQ__)
  const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n = x - rest;
#else
  x = larger(splat(-150.0f), x);
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = x - n;
#endif
#else
  const Floats low = splat(-126.0f);
  const Ints tiny = x < low, whole = __builtin_convertvector((tiny ? low : x) - 0.5f, Ints);
  const Floats rest = x - __builtin_convertvector(whole, Floats);
#endif
  Floats p = splat(1.3276471e-3f);
  p = p * rest + 9.6755410e-3f;
  p = p * rest + 5.5507131e-2f;
  p = p * rest + 2.4022120e-1f;
  p = p * rest + 6.9314694e-1f;
  p = p * rest + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return tiny ? Floats{} : (Floats)(bits(p) + (whole << 23));
#endif
}

static inline Floats tanh(Floats x) {
  Ints negative = x < 0;
  Floats size = negative ? -x : x;
  // Near zero 1 - 2 / (e^2x + 1) would lose digits: the odd series does not.
  Floats square = x * x;
  Floats series = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
  Floats capped = size > 20.0f ? splat(20.0f) : size;
  Floats far = 1.0f - 2.0f / (exp(capped * 2.0f) + 1.0f);
  far = negative ? -far : far;
  return size < 0.15f ? series : far;
}

// Element types in memory: read() and write() convert W of them at once from and to floats, read1() and write1() one.
struct F32 {
  typedef float T;
  static inline Floats read(const T* p) { return ::load<Floats>(p); }
  static inline float read1(const T* p) { return *p; }
  static inline void write(T* p, Floats v) { ::store(p, v); }
  static inline void write1(T* p, float x) { *p = x; }
};
struct BF16 {
  typedef uint16_t T;
  static inline Floats read(const T* p) { return (Floats)(widen(p) << 16); }
  static inline float read1(const T* p) {
    uint32_t u = (uint32_t)*p << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
  // Rounds to nearest, ties to even; NaN stays NaN.
  static inline void write(T* p, Floats v) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &rounded, sizeof rounded);
#else
    Ints u = bits(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    narrow(p, v != v ? Ints{} + 0x7fc0 : rounded);
#endif
  }
  static inline void write1(T* p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    *p = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};
// Elements as they are multiplied with others: in units of 32 bits, TOGETHER of them in each.
template <class E> struct Operands {
  typedef typename E::T T;
  static constexpr int TOGETHER = 1, COUNT = W;  // COUNT: in a register
  static inline Floats read(const T* p) { return E::read(p); }
  // `count` elements, and zeros behind them.
  static inline Floats read(const T* p, long count) {
    T some[COUNT] = {};
    memcpy(some, p, count * sizeof(T));
    return E::read(some);
  }
  // The sum of what a unit's elements come to with those of another.
  static inline Floats add(Floats sum, Floats a, Floats b) { return sum + a * b; }
  // TOGETHER rows, column by column: each unit holds a column's elements.
  static inline void pair(const Floats (&rows)[1], Floats (&columns)[1]) { columns[0] = rows[0]; }
  // The same of rows of floats, rounded; and one row of floats as units, with zeros behind them.
  static inline Floats round(const Floats (&rows)[1]) { return rows[0]; }
  static inline Floats round_row(Floats row) { return row; }
  static inline Floats add_up(Floats sum, Floats units) { return sum + units; }
};
#if defined(__AVX512BF16__)
template <> struct Operands<BF16> {
  typedef BF16::T T;
  static constexpr int TOGETHER = 2, COUNT = 2 * W;
  static inline Floats read(const T* p) { return load<Floats>(p); }
  static inline Floats read(const T* p, long count) {
    return (Floats)_mm512_maskz_loadu_epi16(count < COUNT ? (1u << count) - 1 : ~0u, p);
  }
  static inline Floats add(Floats sum, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static inline void pair(const Floats (&rows)[2], Floats (&columns)[2]) {
    const Ints first = LANES + ((LANES + 32) << 16), second = first + (16 | 16 << 16);
    columns[0] = (Floats)_mm512_permutex2var_epi16((__m512i)rows[0], (__m512i)first, (__m512i)rows[1]);
    columns[1] = (Floats)_mm512_permutex2var_epi16((__m512i)rows[0], (__m512i)second, (__m512i)rows[1]);
  }
  static inline Floats round(const Floats (&rows)[2]) {
    const __m512i one_by_one = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
    return (Floats)_mm512_permutexvar_epi16((__m512i)(LANES + ((LANES + 16) << 16)), one_by_one);
  }
  static inline Floats round_row(Floats row) {
    return (Floats)_mm512_zextsi256_si512((__m256i)_mm512_cvtneps_pbh((__m512)row));
  }
  static inline Floats add_up(Floats sum, Floats units) { return add(sum, units, (Floats)(Ints{} + 0x3f803f80)); }
};
#endif

// The unit at p in all lanes.
static inline Floats splat_unit(const float* p) { return (Floats)(load<int32_t>(p) - Ints{}); }

// to[i] = from[i] * factor
template <class E> static inline void write_scaled(typename E::T* to, const float* from, float factor, long count) {
  long i = 0;
  for (; i + W <= count; i += W) E::write(to + i, load<Floats>(from + i) * factor);
  for (; i < count; i++) E::write1(to + i, from[i] * factor);
}

// Memory of floats begins where a line of the cache does: a register that lies in two lines takes twice as long to read.
constexpr long LINE_FLOATS = 16;
struct alignas(64) Line {
  float floats[LINE_FLOATS];
};

static inline long padded(long count, long to) { return (count + to - 1) / to * to; }

// to[i] = from[i], in another type.
template <class FROM, class TO> static void convert(void* to_, const void* from_, long count, Team& team) {
  typedef typename FROM::T From;
  typedef typename TO::T To;
  const From* from = (const From*)from_;
  To* to = (To*)to_;
  const long whole = count / W;
  team.share(whole, count > 32768 ? team.slice(whole) : whole, [=](long first, long last, long) {
    for (long i = first * W; i < last * W; i += W) TO::write(to + i, FROM::read(from + i));
  });
  for (long i = whole * W; i < count; i++) TO::write1(to + i, FROM::read1(from + i));
}
