// What every kernel here is made of: as many floats as a register holds, and the ways weights become floats.
// Written with GCC's vector extensions, so that one source serves AVX2, AVX-512 and NEON. Knows no op.
#pragma once
#include <cstdint>
#include <cstring>
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
typedef int8_t Bytes __attribute__((vector_size(W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

template <class V> static inline V load(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
// Small integers from memory to a register of 32-bit ones. GCC 12 takes __builtin_convertvector apart byte by byte: 790 us
// against 170 for int8 [3072, 576] x 1 row, one core of a Zen 3 EPYC.
#if defined(__AVX512F__)
static inline Ints widen(const int8_t* p) { return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline Ints widen(const uint16_t* p) { return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
static inline Ints widen(const int8_t* p) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline Ints widen(const uint16_t* p) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#else
static inline Ints widen(const int8_t* p) { return __builtin_convertvector(load<Bytes>(p), Ints); }
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
#else
static inline void narrow(uint16_t* p, Ints v) {
  for (int i = 0; i < W; i++) p[i] = (uint16_t)v[i];
}
#endif
#if !defined(__AVX512F__)
static inline void narrow(int8_t* p, Ints v) {
  for (int i = 0; i < W; i++) p[i] = (int8_t)v[i];
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
// Has the compiler take a pointer for one that has nothing to do with others (matmul.h).
#if defined(__AVX512F__)
template <class T> static inline void keep_apart(const T*& p) { asm("" : "+r"(p)); }
#else
template <class T> static inline void keep_apart(const T*&) {}
#endif
static inline Ints bits(Floats v) { return (Ints)v; }

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

// out[i] = sum(v[i]).
template <int N> static inline void sum_each(const Floats* v, float* out) {
#if defined(__AVX512F__)
  if constexpr (N == 4) {
    // Half as many shuffles as four sums take, which cost more than the products they add.
    const Ints low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}, high = low + 2;
    const Ints lows = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, highs = lows + 2;
    Floats first = __builtin_shuffle(v[0], v[1], low) + __builtin_shuffle(v[0], v[1], high);
    Floats second = __builtin_shuffle(v[2], v[3], low) + __builtin_shuffle(v[2], v[3], high);
    Floats all = __builtin_shuffle(first, second, lows) + __builtin_shuffle(first, second, highs);
    all += __builtin_shuffle(all, Ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    all += __builtin_shuffle(all, Ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    memcpy(out, &all, 4 * sizeof(float));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (N == 4) {
    __m256 low = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), high = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    __m256 halves = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    return;
  }
#endif
  for (int i = 0; i < N; i++) out[i] = sum(v[i]);
}

// e^x to 2 units in the last place for x <= 88; 0 below -87 (Cephes' polynomial).
static inline Floats exp(Floats x) {
  Floats low = splat(-87.0f);
  Ints tiny = x < low;
  x = tiny ? low : x;
  Floats n = x * 1.44269504f + (x < 0 ? splat(-0.5f) : splat(0.5f));
  Ints whole = __builtin_convertvector(n, Ints);
  n = __builtin_convertvector(whole, Floats);
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
  p = (Floats)(bits(p) + (whole << 23));
  return tiny ? Floats{} : p;
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
    Ints u = bits(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    narrow(p, v != v ? Ints{} + 0x7fc0 : rounded);
  }
  static inline void write1(T* p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    *p = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};
struct F8 {
  typedef uint8_t T;
  static inline Floats read(const T* p) {
    // The exponent moves from bias 7 to bias 127; subnormals come out right too. The sign's copies are cut away.
    return (Floats)(widen((const int8_t*)p) << 20 & (int)0x87ffffff) * 0x1p120f;
  }
  static inline float read1(const T* p) {
    uint32_t u = ((uint32_t)(*p & 0x7f) << 20) | ((uint32_t)(*p & 0x80) << 24);
    float f;
    memcpy(&f, &u, 4);
    return f * 0x1p120f;
  }
};

// to[i] = from[i], in another type.
template <class FROM, class TO> static void convert(void* to_, const void* from_, long count, int threads) {
  typedef typename FROM::T From;
  typedef typename TO::T To;
  const From* from = (const From*)from_;
  To* to = (To*)to_;
  const long whole = count / W * W;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 32768)
  for (long i = 0; i < whole; i += W) TO::write(to + i, FROM::read(from + i));
  for (long i = whole; i < count; i++) TO::write1(to + i, FROM::read1(from + i));
}
