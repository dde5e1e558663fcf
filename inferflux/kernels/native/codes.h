// Numbers of 8 bits, int8 and fp8 (e4m3): as operands, and as a page's heads of keys and values hold them.
//
// P stands for what a page holds: int8_t for int8, uint8_t for fp8, else elements of E, as queries have them. A head's D
// codes are followed by their scale, a float (see quantized_kv.py). Scores are multiplied by keys' scales, and weights by
// values', so that codes are operands as they are: float32 and bfloat16 hold every one of them.
#pragma once
#include <type_traits>

#include "vector.h"

template <class P> constexpr bool IS_CODE = sizeof(P) == 1;
// What a head takes in a page, in elements of P.
template <class P> constexpr long head_size(long D) { return D + (IS_CODE<P> ? sizeof(float) : 0); }

#if defined(__AVX512BW__)
// The numbers that codes stand for, without their signs, in bfloat16.
constexpr int bfloat_of(int number) {
  int exponent = 7;
  for (int n = number; n && n < 128; exponent--) n *= 2;
  return number ? (127 + exponent) << 7 | (number << (7 - exponent) & 127) : 0;
}
template <class P> constexpr int size_of(int code) {
  const int exponent = code >> 3, digits = code & 7, steps = exponent ? digits + 8 : digits;
  if (std::is_same_v<P, int8_t>) return bfloat_of(code);
  if (code == 127) return 0x7fc0;
  return steps ? bfloat_of(steps) + ((exponent ? exponent - 1 : 0) - 9) * 128 : 0;
}
// As words, and as their low and high bytes.
template <class P> struct alignas(64) Sizes {
  uint16_t words[128];
  uint8_t low[128], high[128];
  constexpr Sizes() : words(), low(), high() {
    for (int code = 0; code < 128; code++)
      words[code] = size_of<P>(code), low[code] = words[code] & 255, high[code] = words[code] >> 8;
  }
};
template <class P> static const Sizes<P> SIZES;
// Pairs of fp8 as pairs of bfloat16.
static inline Ints widen_fp8(const uint8_t* p) {
  const __m512i codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
  const __m512i* sizes = (const __m512i*)SIZES<uint8_t>.words;
  const __m512i low = _mm512_permutex2var_epi16(sizes[0], codes, sizes[1]);
  const __m512i high = _mm512_permutex2var_epi16(sizes[2], codes, sizes[3]);
  const __m512i size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(64)), low, high);
  return (Ints)size | ((Ints)codes & (int)0x80008000);
}
#endif

#if defined(__AVX512F__)
static inline Ints widen(const int8_t* p) { return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#elif defined(__AVX2__)
static inline Ints widen(const int8_t* p) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
typedef int8_t Bytes __attribute__((vector_size(W)));
static inline Ints widen(const int8_t* p) { return __builtin_convertvector(load<Bytes>(p), Ints); }
#endif

// A register of operands (see Operands) of what lies in a page; with a count of so many, and zeros behind them.
template <class E, class P> static inline Floats read_page(const P* p) {
  if constexpr (!IS_CODE<P>) {
    return Operands<E>::read(p);
#if defined(__AVX512BF16__)
  } else if constexpr (Operands<E>::TOGETHER == 2) {
    if constexpr (std::is_same_v<P, uint8_t>) return (Floats)widen_fp8(p);
    const Floats low = __builtin_convertvector(widen((const int8_t*)p), Floats);
    const Floats high = __builtin_convertvector(widen((const int8_t*)p + W), Floats);
    return (Floats)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
  } else {
    const Ints codes = widen((const int8_t*)p);
    if constexpr (std::is_same_v<P, int8_t>) return __builtin_convertvector(codes, Floats);
    // The exponent moves from bias 7 to bias 127; subnormals come out right too. Copies of the sign are cut away.
    return (Floats)((codes << 20) & (int)0x87f00000) * 0x1p120f;
  }
}
template <class E, class P> static inline Floats read_page(const P* p, long count) {
  if constexpr (IS_CODE<P>) {
    P some[Operands<E>::COUNT] = {};
    memcpy(some, p, count);
    return read_page<E>(some);
  } else {
    return Operands<E>::read(p, count);
  }
}

// As many of `left` elements as a register holds, and zeros behind them.
template <class E, class P> static inline Floats read_up_to(const P* p, long left) {
  return left < Operands<E>::COUNT ? read_page<E>(p, left) : read_page<E>(p);
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// Two registers of 32 codes each, as they are or with zeros behind `left`, side by side.
template <bool WHOLE, class P> static inline __m512i read_codes(const P* first, const P* second, long left) {
  const __mmask32 some = WHOLE || left >= 32 ? ~0u : (1u << left) - 1;
  const __m512i low = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8(some, first));
  return _mm512_inserti64x4(low, _mm256_maskz_loadu_epi8(some, second), 1);
}
// Two registers of bfloat16 of 64 codes, whose groups of eight go to the one and to the other in turn. By bytes, since what
// there is least of are permutations. Decode of 512 tokens of int8, of fp8, 32 heads over 4 of 128, one core of a Zen 5
// EPYC: 52 to 46, 53 to 44 us; 14 over 2 of 64: 16.6 to 15.7, to 15.4 us (of bfloat16 41 and 12.0).
template <class P> static inline void widen_codes(__m512i codes, Floats* to) {
  const __m512i *low = (const __m512i*)SIZES<P>.low, *high = (const __m512i*)SIZES<P>.high;
  const __m512i sizes = std::is_same_v<P, int8_t> ? _mm512_abs_epi8(codes) : codes;
  const __m512i lows = _mm512_permutex2var_epi8(low[0], sizes, low[1]);
  const __m512i unsigned_highs = _mm512_permutex2var_epi8(high[0], sizes, high[1]);
  const __m512i highs = (__m512i)((Ints)unsigned_highs | ((Ints)codes & (int)0x80808080));
  to[0] = (Floats)_mm512_unpacklo_epi8(lows, highs), to[1] = (Floats)_mm512_unpackhi_epi8(lows, highs);
}
#endif
// How many rows are read at once, and that: a register of each one's operands from number d on, with zeros behind `left`
// unless all are WHOLE.
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <class E, class P> constexpr int AT_ONCE = IS_CODE<P> ? Operands<E>::TOGETHER : 1;
#else
template <class E, class P> constexpr int AT_ONCE = 1;
#endif
template <class E, bool WHOLE, class P> static inline void read_rows(const P* const* rows, long d, long left, Floats* to) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  if constexpr (AT_ONCE<E, P> == 2) {
    const __m512i in_turn = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    widen_codes<P>(_mm512_permutexvar_epi64(in_turn, read_codes<WHOLE>(rows[0] + d, rows[1] + d, left)), to);
    return;
  }
#endif
  to[0] = WHOLE ? read_page<E>(rows[0] + d) : read_up_to<E>(rows[0] + d, left);
}
// The same of TOGETHER rows, column by column.
template <class E, bool WHOLE, class P, int N>
static inline void read_columns(const P* const (&rows)[N], long d, long left, Floats (&to)[N]) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  if constexpr (AT_ONCE<E, P> == 2) {
    alignas(64) static constexpr struct Order {
      uint8_t of[64];
      constexpr Order() : of() {
        for (int i = 0; i < 64; i++) of[i] = i % 2 * 32 + i / 8 % 2 * 16 + i / 16 * 4 + i % 8 / 2;
      }
    } ORDER;
    const __m512i order = _mm512_load_si512(ORDER.of);
    widen_codes<P>(_mm512_permutexvar_epi8(order, read_codes<WHOLE>(rows[0] + d, rows[1] + d, left)), to);
    return;
  }
#endif
  Floats own[N];
  UNROLLED for (int t = 0; t < N; t++) own[t] = WHOLE ? read_page<E>(rows[t] + d) : read_page<E>(rows[t] + d, left);
  Operands<E>::pair(own, to);
}

// The codes of numbers that are at most the largest one's, to memory: to the nearest, ties to even. What is no number need
// have no code in int8, as its head's scale is none either.
static inline void write_codes(int8_t* to, Floats v) { narrow(to, bits(v + 0x1.8p23f)); }
static inline void write_codes(uint8_t* to, Floats v) {
  const Ints all = bits(v), size = all & 0x7fffffff;
  const Ints normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
  // Below 2^-6 steps are 2^-9, as those of floats from 2^14 on.
  const Ints small = bits((Floats)size + 0x1p14f) - bits(splat(0x1p14f));
  const Ints code = size < bits(splat(0x1p-6f)) ? small : size > bits(splat(464.0f)) ? Ints{} + 0x7f : normal;
  narrow((int8_t*)to, code | (all >> 24 & 0x80));
}
template <class P> constexpr float LARGEST_CODE = std::is_same_v<P, int8_t> ? 127.0f : 448.0f;

// A head of D elements as codes and their scale: what quantized_kv.quantize makes of it, bit by bit.
template <class E, class P> static inline void write_head(P* to, const typename E::T* from, long D) {
  const auto at = [&](long d) {
    typename E::T some[W] = {};
    if (D - d >= W) return E::read(from + d);
    memcpy(some, from + d, (D - d) * sizeof *from);
    return E::read(some);
  };
  // As integers, of which what is no number is the largest.
  Ints most = {};
  for (long d = 0; d < D; d += W) most = larger(bits(at(d)) & 0x7fffffff, most);
  const int32_t size = largest(most);
  float scale;
  memcpy(&scale, &size, sizeof scale);
  scale = (scale < 1e-30f ? 1e-30f : scale) / LARGEST_CODE<P>;
  for (long d = 0; d < D; d += W) {
    P codes[W];
    write_codes(codes, at(d) / scale);
    memcpy(to + d, codes, D - d < W ? D - d : W);
  }
  memcpy(to + D, &scale, sizeof scale);
}
