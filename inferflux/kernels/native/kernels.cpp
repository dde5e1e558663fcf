// The library's doors: plain C functions over raw memory, called through ctypes, one by one or many at once. See
// `calls.py`, whose order of functions is that of FUNCTIONS here.
// Element types are named by a number: 0 float32, 1 bfloat16; weights also 2 int8, 3 fp8 (e4m3), 4 int4.
#include <new>

#include "attention.h"
#include "integers.h"
#include "low_rank.h"
#include "matmul.h"
#include "prefill.h"

struct NormCall {
  void* out;           // [rows, size]
  const void* x;       // rows of one token lie together, token_stride elements from token to token
  void* residual;      // [rows, size], x is added to it first, in place; null: none
  const void* weight;  // [heads, size]: one for each row of a token
  int64_t rows, heads, size, token_stride;
  float eps;
};

template <class E>
static void norm_rows(const NormCall& c, Team& team) {
  typedef typename E::T T;
  const long F = c.size;
  team.share(c.rows, c.rows * F > 32768 ? team.slice(c.rows) : c.rows, [&](long begin, long end, long) {
    for (long r = begin; r < end; r++) {
      const T* from = (const T*)c.x + r / c.heads * c.token_stride + r % c.heads * F;
      const T* weight = (const T*)c.weight + r % c.heads * F;
      if (c.residual) {
        T* sums = (T*)c.residual + r * F;
        long i = 0;
        for (; i + W <= F; i += W) E::write(sums + i, E::read(sums + i) + E::read(from + i));
        for (; i < F; i++) E::write1(sums + i, E::read1(sums + i) + E::read1(from + i));
        from = sums;
      }
      Floats squares = {};
      float square = 0;
      long i = 0;
      for (; i + W <= F; i += W) {
        Floats v = E::read(from + i);
        squares += v * v;
      }
      for (; i < F; i++) square += E::read1(from + i) * E::read1(from + i);
      float factor = 1.0f / sqrtf((square + sum(squares)) / F + c.eps);
      T* to = (T*)c.out + r * F;
      for (i = 0; i + W <= F; i += W) E::write(to + i, E::read(from + i) * factor * E::read(weight + i));
      for (; i < F; i++) E::write1(to + i, E::read1(from + i) * factor * E::read1(weight + i));
    }
  });
}

struct RopeCall {
  void* qkv;          // [T, H + 2K, D], qkv_stride elements from token to token; rotated in place
  const void *cos, *sin;  // [T, R], angle_stride elements from token to token; null: no rotation
  void* pages;        // [P, 2, N, K, head_size(D)]
  const int64_t* slots;
  int64_t qkv_stride, angle_stride, page_stride, part_stride, token_stride;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, page_tokens;
  int32_t type;  // what qkv, cos and sin are made of
};

template <class E, class P>
static void rope_tokens(const RopeCall& c, Team& team) {
  typedef typename E::T T;
  const long D = c.head_dim, half = c.rotary_dim / 2, K = c.num_kv_heads, written = K * head_size<P>(D);
  // Two threads pay early: half of what they read is in the other's cache. 32 tokens of 15 heads of 64, two cores of a
  // Zen 3 EPYC: 240 us in one thread, 70 to 150 in two.
  const long each = c.num_tokens * c.num_heads * D > 4096 ? team.slice(c.num_tokens) : c.num_tokens;
  team.share(c.num_tokens, each, [&](long begin, long end, long) {
    for (long t = begin; t < end; t++) {
      T* heads = (T*)c.qkv + t * c.qkv_stride;
      P* to = (P*)c.pages + c.slots[t] / c.page_tokens * c.page_stride + c.slots[t] % c.page_tokens * c.token_stride;
      // Its place in the pages is fetched while the heads are rotated: it lies anywhere.
      for (long i = 0; i < written; i += 64 / sizeof(P)) {
        __builtin_prefetch(to + i, 1);
        __builtin_prefetch(to + c.part_stride + i, 1);
      }
      const T *cos = (const T*)c.cos + t * c.angle_stride, *sin = (const T*)c.sin + t * c.angle_stride;
      for (long h = 0; c.cos && h < c.num_heads + K; h++) {
        T *first = heads + h * D, *second = first + half;
        long i = 0;
        for (; i + W <= half; i += W) {
          Floats a = E::read(first + i), b = E::read(second + i), co = E::read(cos + i), si = E::read(sin + i);
          E::write(first + i, a * co - b * si);
          E::write(second + i, b * co + a * si);
        }
        for (; i < half; i++) {
          float a = E::read1(first + i), b = E::read1(second + i), co = E::read1(cos + i), si = E::read1(sin + i);
          E::write1(first + i, a * co - b * si);
          E::write1(second + i, b * co + a * si);
        }
      }
      for (const T* from = heads + c.num_heads * D; from < heads + (c.num_heads + 2 * K) * D; from += K * D) {
        if constexpr (IS_CODE<P>)
          for (long k = 0; k < K; k++) write_head<E>(to + k * head_size<P>(D), from + k * D, D);
        else
          memcpy(to, from, K * D * sizeof(T));
        to += c.part_stride;
      }
    }
  });
}

struct GateCall {
  void* out;       // [rows, size]
  const void* in;  // [rows, 2, size]: gate and up
  int64_t rows, size;
  int32_t kind;  // 0: SiLU, 1: GELU by tanh
};

template <class E>
static void gate_rows(const GateCall& c, Team& team) {
  typedef typename E::T T;
  const long I = c.size;
  team.share(c.rows, c.rows * I > 16384 ? team.slice(c.rows) : c.rows, [&](long begin, long end, long) {
    for (long r = begin; r < end; r++) {
      const T *gate = (const T*)c.in + r * 2 * I, *up = gate + I;
      T* out = (T*)c.out + r * I;
      const auto gated = [&](const T* g_at, const T* u_at, T* to) {
        const Floats g = E::read(g_at), u = E::read(u_at);
        const Floats inner = g * 0.7978845608f * (1.0f + 0.044715f * g * g);
        const Floats half = c.kind ? 0.5f * g * (1.0f + tanh(inner)) : g / (1.0f + exp(g < -87.0f ? splat(87.0f) : -g));
        E::write(to, half * u);
      };
      long i = 0;
      for (; i + W <= I; i += W) gated(gate + i, up + i, out + i);
      if (i < I) {
        T last[2 * W] = {}, result[W];
        memcpy(last, gate + i, (I - i) * sizeof(T));
        memcpy(last + W, up + i, (I - i) * sizeof(T));
        gated(last, last + W, result);
        memcpy(out + i, result, (I - i) * sizeof(T));
      }
    }
  });
}

struct CopyCall {
  void* to;          // rows of to_stride bytes
  const void* from;  // of from_stride bytes
  int64_t rows, bytes, to_stride, from_stride;
};

template <class Call, void (*FLOAT)(const Call&, Team&), void (*BFLOAT)(const Call&, Team&)>
static void by_type(int type, const void* call, Team& team) {
  (type ? BFLOAT : FLOAT)(*(const Call*)call, team);
}

template <class E, class P>
static void attend_rows(const AttentionCall& c, Team& team) {
  decode<E, P>(c, team);
  prefill<E, P>(c, team);
}

// By the pages' type, then by that of what they are used with: the same, unless pages are of 8 bits.
static void attend_all(int type, const void* call, Team& team) {
  static void (*const by_types[][2])(const AttentionCall&, Team&) = {
      {attend_rows<F32, float>},
      {nullptr, attend_rows<BF16, uint16_t>},
      {attend_rows<F32, int8_t>, attend_rows<BF16, int8_t>},
      {attend_rows<F32, uint8_t>, attend_rows<BF16, uint8_t>}};
  const AttentionCall& c = *(const AttentionCall*)call;
  by_types[type][c.type](c, team);
}

static void rope_all(int type, const void* call, Team& team) {
  static void (*const by_types[][2])(const RopeCall&, Team&) = {
      {rope_tokens<F32, float>},
      {nullptr, rope_tokens<BF16, uint16_t>},
      {rope_tokens<F32, int8_t>, rope_tokens<BF16, int8_t>},
      {rope_tokens<F32, uint8_t>, rope_tokens<BF16, uint8_t>}};
  const RopeCall& c = *(const RopeCall*)call;
  by_types[type][c.type](c, team);
}

// By the weights' type, then by that of bias, x and y.
static void multiply(int type, const void* call, Team& team) {
  static void (*const by_types[][2])(const ProductCall&, Team&) = {
      {multiply_floats<Panel32>, multiply_widened<Panel32>},
      {multiply_floats<Panel16>, multiply_pairs<Pairs16, Panel16>},
      {multiply_integers<Packed8, F32>, multiply_integers<Packed8, BF16>},
      {multiply_floats<Panel8>, multiply_pairs<Pairs8, Panel8>},
      {multiply_integers<Packed4, F32>, multiply_integers<Packed4, BF16>}};
  const ProductCall& c = *(const ProductCall*)call;
  by_types[type][c.type](c, team);
}

static void copy_rows(int, const void* call, Team&) {
  const CopyCall& c = *(const CopyCall*)call;
  for (long r = 0; r < c.rows; r++) memcpy((char*)c.to + r * c.to_stride, (const char*)c.from + r * c.from_stride, c.bytes);
}

typedef void (*Function)(int type, const void* call, Team& team);
static const Function FUNCTIONS[] = {by_type<NormCall, norm_rows<F32>, norm_rows<BF16>>,
                                     rope_all,
                                     by_type<GateCall, gate_rows<F32>, gate_rows<BF16>>,
                                     attend_all,
                                     multiply,
                                     copy_rows,
                                     by_type<LowRankCall, add_low_ranks<F32>, add_low_ranks<BF16>>};

// A call on a tape: the words of its struct; those whose bits are set in `relative` count from the arena's start.
struct Entry {
  int32_t function, type;
  uint64_t relative;
  int64_t words[20];
};
template <class... Calls> constexpr bool all_fit() { return ((sizeof(Calls) <= sizeof(Entry::words)) && ...); }
static_assert(all_fit<NormCall, RopeCall, GateCall, AttentionCall, ProductCall, CopyCall, LowRankCall>(),
              "an entry holds any call");

// seconds: null, or where the time before each call and after the last one is put.
static bool replay(const Entry* entries, long count, char* arena, Team& team, double* seconds) noexcept {
  try {
    for (const Entry* e = entries; e < entries + count; e++) {
      if (seconds) *seconds++ = omp_get_wtime();
      int64_t words[20];
      memcpy(words, e->words, sizeof words);
      for (uint64_t bits = e->relative; bits; bits &= bits - 1) words[__builtin_ctzll(bits)] += (int64_t)arena;
      FUNCTIONS[e->function](e->type, words, team);
    }
    if (seconds) *seconds = omp_get_wtime();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

extern "C" {

// Both return whether there was memory for what is computed. threads: how many compute it.
int inferflux_call(int function, int type, const void* call, int threads) {
  try {
    Team team(threads);
    FUNCTIONS[function](type, call, team);
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

int inferflux_replay(const Entry* entries, long count, char* arena, int threads, double* seconds) {
  try {
    Team team(threads);
    bool enough = true;
    team.gather([&] { enough = replay(entries, count, arena, team, seconds); });
    return enough;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
}
