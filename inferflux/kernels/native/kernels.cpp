// The library's doors: plain C functions over raw memory, called through ctypes. See `loading.py`.
// Element types are named by a number: 0 float32, 1 bfloat16; weights also 2 int8, 3 fp8 (e4m3), 4 int4.
#include "attention.h"
#include "integers.h"
#include "matmul.h"
#include "prefill.h"

template <class E>
static void norm_rows(void* out_, const void* x_, void* residual_, const void* weight_, long rows, long F, float eps,
                      int threads) {
  typedef typename E::T T;
  T *out = (T*)out_, *residual = (T*)residual_;
  const T *x = (const T*)x_, *weight = (const T*)weight_;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * F > 32768)
  for (long r = 0; r < rows; r++) {
    const T* from = x + r * F;
    if (residual) {
      T* sums = residual + r * F;
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
    float factor = 1.0f / sqrtf((square + sum(squares)) / F + eps);
    T* to = out + r * F;
    for (i = 0; i + W <= F; i += W) E::write(to + i, E::read(from + i) * factor * E::read(weight + i));
    for (; i < F; i++) E::write1(to + i, E::read1(from + i) * factor * E::read1(weight + i));
  }
}

struct RopeCall {
  void* qkv;          // [T, H + 2K, D], qkv_stride elements from token to token; rotated in place
  const void *cos, *sin;  // [T, R], angle_stride elements from token to token; null: no rotation
  void* pages;        // [P, 2, N, K, D]
  const int64_t* slots;
  int64_t qkv_stride, angle_stride, page_stride, part_stride, token_stride;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, page_tokens;
  int32_t threads;
};

template <class E>
static void rope_tokens(const RopeCall& c) {
  typedef typename E::T T;
  const long D = c.head_dim, half = c.rotary_dim / 2, K = c.num_kv_heads;
  // Two threads pay early: half of what they read is in the other's cache. 32 tokens of 15 heads of 64, two cores of a
  // Zen 3 EPYC: 240 us in one thread, 70 to 150 in two.
#pragma omp parallel for num_threads(c.threads) schedule(static) if (c.num_tokens * c.num_heads * D > 4096)
  for (long t = 0; t < c.num_tokens; t++) {
    T* heads = (T*)c.qkv + t * c.qkv_stride;
    T* to = (T*)c.pages + c.slots[t] / c.page_tokens * c.page_stride + c.slots[t] % c.page_tokens * c.token_stride;
    // Its place in the pages is fetched while the heads are rotated: it lies anywhere.
    for (long i = 0; i < K * D; i += 64 / sizeof(T)) {
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
    memcpy(to, heads + c.num_heads * D, K * D * sizeof(T));
    memcpy(to + c.part_stride, heads + (c.num_heads + K) * D, K * D * sizeof(T));
  }
}

template <class E>
static void gate_rows(void* out_, const void* in_, long rows, long I, int kind, int threads) {
  typedef typename E::T T;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * I > 16384)
  for (long r = 0; r < rows; r++) {
    const T *gate = (const T*)in_ + r * 2 * I, *up = gate + I;
    T* out = (T*)out_ + r * I;
    for (long i = 0; i < I; i += W) {
      long count = I - i < W ? I - i : W;
      T last[2 * W] = {};
      if (count < W) {
        memcpy(last, gate + i, count * sizeof(T));
        memcpy(last + W, up + i, count * sizeof(T));
      }
      Floats g = E::read(count < W ? last : gate + i), u = E::read(count < W ? last + W : up + i);
      Floats inner = g * 0.7978845608f * (1.0f + 0.044715f * g * g);
      Floats half = kind ? 0.5f * g * (1.0f + tanh(inner)) : g / (1.0f + exp(g < -87.0f ? splat(87.0f) : -g));
      T result[W];
      E::write(count < W ? result : out + i, half * u);
      if (count < W) memcpy(out + i, result, count * sizeof(T));
    }
  }
}

extern "C" {

void inferflux_norm(int type, void* out, const void* x, void* residual, const void* weight, long rows, long F,
                    float eps, int threads) {
  (type ? norm_rows<BF16> : norm_rows<F32>)(out, x, residual, weight, rows, F, eps, threads);
}

void inferflux_rope(int type, const RopeCall* call) { (type ? rope_tokens<BF16> : rope_tokens<F32>)(*call); }

void inferflux_gate(int type, void* out, const void* in, long rows, long I, int kind, int threads) {
  (type ? gate_rows<BF16> : gate_rows<F32>)(out, in, rows, I, kind, threads);
}

void inferflux_attention(int type, const AttentionCall* call) {
  (type ? decode<BF16> : decode<F32>)(*call);
  (type ? prefill<BF16> : prefill<F32>)(*call);
}

// int8 and int4.
void inferflux_integers(int kind, const IntegersCall* call) {
  (kind == 4 ? multiply_integers<Packed4> : multiply_integers<Packed8>)(*call);
}

// float32, bfloat16 and fp8.
void inferflux_floats(int kind, const FloatsCall* call) {
  (kind == 0 ? multiply_floats<F32> : kind == 1 ? multiply_floats<BF16> : multiply_floats<F8>)(*call);
}
}
