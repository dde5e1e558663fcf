// Attention of rows that decode, straight from the pages: nothing is gathered, every key and value is read once.
//
// A context is cut every SPLIT tokens, wherever it belongs, so that a row's result does not depend on the batch; the
// parts are merged by their largest score and sum (Milakov and Gimelshein 2018, arXiv 1805.02867).
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "codes.h"

struct AttentionCall {
  void* out;               // [T, H, D]
  const void* query;       // [T, H, D], query_stride elements from token to token
  const void* pages;       // one layer's view [P, 2, N, K, head_size(D)] with these strides, in elements
  const int32_t* table;    // [B, table_stride]
  const int32_t* lengths;  // [B]
  const int32_t* starts;   // [B + 1]: each row's first token
  int64_t query_stride, page_stride, part_stride, token_stride, table_stride;
  int64_t num_rows, num_heads, num_kv_heads, head_dim, page_tokens, window;  // window 0: all
  float scale, soft_cap;  // scale: above 0; soft_cap 0: off
  int32_t type;           // what query and output are made of
};

constexpr long SPLIT = 128, CHUNK = 16;
// How many heads that share a key head meet a key at once: sums of four keys with each stay in registers. Where keys or
// values are bfloat16, and the processor multiplies these in pairs, weights are rounded to it as well.
constexpr int MOST_HEADS = W == 16 ? 4 : 3;
// Beside 12 sums AVX2 has room for what belongs to three heads and to one key or value. 32 rows of 208 tokens, 9 heads of 64
// over 3, one core of a Zen 5 EPYC held to AVX2: float32 273 to 254 us, bfloat16 258 to 242.
constexpr bool FEW_REGISTERS = W == 8;

// Positions first..last-1 of one row, for all its heads: a page's keys and values lie together and are read in order.
struct Part {
  long row, token, first, last;
};

// What is read next, fetched in the order of its addresses, some of it with each piece of work: asked for all at once, it
// would be waited for. 32 rows of 208 tokens, 9 heads of 64 over 3, float32, two cores of a Zen 3 EPYC: 750 us, 900 when
// fetched in the order in which it is read, head by head.
struct Ahead {
  const char *next, *end;
  inline void fetch(long bytes) {
    const char* stop = end - next < bytes ? end : next + bytes;
    for (; next < stop; next += 64) __builtin_prefetch(next);
  }
};

// What one part is computed with. Heads are padded, since lanes may be heads; so are `columns` of a head, and `units` of
// its query (see Operands).
template <class E> struct Work {
  long heads, columns, units;
  // A part's result: values mixed by weights [heads, columns], their largest scores and the weights' sums [heads].
  float *mixed, *peaks, *sums;
  // A thread's: query [heads, units]; scores, then weights [heads, CHUNK]; weights' sums lane by lane [heads, W]; what is
  // taken from scores before they become weights, and what this makes of older sums [heads]; if keys and values are codes,
  // the scales of a chunk's keys or values [key heads, CHUNK].
  float *query, *scores, *totals, *froms, *shrinks, *scales;
  explicit Work(const AttentionCall& c)
      : heads(padded(c.num_heads, W)),
        columns(padded(c.head_dim, Operands<E>::COUNT)),
        units(columns / Operands<E>::TOGETHER) {}
  long result_lines() const { return padded(heads * (columns + 2), LINE_FLOATS) / LINE_FLOATS; }
  long scratch_lines() const { return padded(heads * (units + 2 * CHUNK + W + 2), LINE_FLOATS) / LINE_FLOATS; }
  void place(Line* result, Line* scratch) {
    mixed = result->floats, peaks = mixed + heads * columns, sums = peaks + heads;
    query = scratch->floats, scores = query + heads * units, totals = scores + heads * CHUNK;
    froms = totals + heads * W, shrinks = froms + heads;
    scales = shrinks + heads;
  }
};

// A chunk's keys or values, of one key head; and what is fetched meanwhile.
template <class P> struct Chunk {
  const P* first;
  long stride, count, D;
  const float* scales;
  Ahead* shared;
};

// scores[g][n] of GT heads that share a key head: a key is read once for all of them, and enough sums grow side by side
// that none waits for the one before. WHOLE: no register is filled up with zeros.
template <class E, class P, int GT, bool WHOLE>
static inline void score(const Chunk<P> keys, const float* query, long units, float* scores) {
  typedef Operands<E> O;
  const long D = keys.D, count = keys.count;
  Ahead ahead = *keys.shared;
  Floats folded[GT][CHUNK / W][W / 4];
  for (long n = 0; n < CHUNK; n += 4) {
    Floats acc[GT][4];
    UNROLLED for (int g = 0; g < GT; g++)
      UNROLLED for (int i = 0; i < 4; i++) acc[g][i] = Floats{};
    if (n < count) {
      ahead.fetch(4 * head_size<P>(D) * sizeof(P));
      // In place of keys behind the last it is read again: what comes of that does not count.
      const P* key[4] = {keys.first + n * keys.stride};
      UNROLLED for (int i = 1; i < 4; i++) key[i] = key[i - 1] + (n + i < count ? keys.stride : 0);
      const float* q = query;
      for (long d = 0; d < D; d += O::COUNT, q += W) {
        if constexpr (FEW_REGISTERS) {
          Floats x[GT];
          UNROLLED for (int g = 0; g < GT; g++) x[g] = load<Floats>(q + g * units), hold(x[g]);
          UNROLLED for (int i = 0; i < 4; i++) {
            Floats k = WHOLE ? read_page<E>(key[i] + d) : read_up_to<E>(key[i] + d, D - d);
            hold(k);
            UNROLLED for (int g = 0; g < GT; g++) acc[g][i] = O::add(acc[g][i], k, x[g]);
          }
          continue;
        }
        Floats k[4];
        UNROLLED for (int i = 0; i < 4; i += AT_ONCE<E, P>) read_rows<E, WHOLE>(key + i, d, D - d, k + i);
        UNROLLED for (int i = 0; i < 4; i++) hold(k[i]);
        UNROLLED for (int g = 0; g < GT; g++) {
          const Floats x = load<Floats>(q + g * units);
          UNROLLED for (int i = 0; i < 4; i++) acc[g][i] = O::add(acc[g][i], k[i], x);
        }
      }
    }
    UNROLLED for (int g = 0; g < GT; g++) folded[g][n / W][n % W / 4] = fold<added>(acc[g]);
  }
  for (int g = 0; g < GT; g++)
    for (int n = 0; n < CHUNK / W; n++) {
      const Floats all = join<added>(folded[g][n]);
      store(scores + g * CHUNK + n * W, IS_CODE<P> ? all * load<Floats>(keys.scales + n * W) : all);
    }
  *keys.shared = ahead;
}

// mixed = mixed * shrinks + weights @ values, of DT registers of columns from d on.
template <class E, class P, int GT, int DT, bool WHOLE>
static inline void mix_columns(const Chunk<P> values, const float* weights, const float* shrinks, long d, float* mixed,
                               long columns) {
  typedef Operands<E> O;
  Floats acc[GT][DT];
  UNROLLED for (int g = 0; g < GT; g++)
    UNROLLED for (int i = 0; i < DT; i++) acc[g][i] = load<Floats>(mixed + g * columns + d + i * W) * shrinks[g];
  const P* value = values.first + d;
  Ahead ahead = *values.shared;
  for (long n = 0; n < values.count; n += O::TOGETHER, value += O::TOGETHER * values.stride, weights++) {
    ahead.fetch(O::TOGETHER * DT * W * sizeof(P));
    if constexpr (FEW_REGISTERS) {
      Floats weight[GT];
      UNROLLED for (int g = 0; g < GT; g++) weight[g] = splat_unit(weights + g * CHUNK), hold(weight[g]);
      UNROLLED for (int i = 0; i < DT; i++) {
        Floats v = WHOLE ? read_page<E>(value + i * W) : read_page<E>(value + i * W, values.D - d);
        hold(v);
        UNROLLED for (int g = 0; g < GT; g++) acc[g][i] = O::add(acc[g][i], weight[g], v);
      }
      continue;
    }
    Floats v[DT];
    UNROLLED for (int i = 0; i < DT; i += O::TOGETHER) {
      const P* rows[O::TOGETHER];
      Floats pairs[O::TOGETHER];
      UNROLLED for (int t = 0; t < O::TOGETHER; t++) rows[t] = value + (n + t < values.count ? t * values.stride : 0);
      read_columns<E, WHOLE>(rows, i * W, values.D - d, pairs);
      UNROLLED for (int t = 0; t < O::TOGETHER; t++) v[i + t] = pairs[t], hold(v[i + t]);
    }
    UNROLLED for (int g = 0; g < GT; g++) {
      const Floats weight = splat_unit(weights + g * CHUNK);
      UNROLLED for (int i = 0; i < DT; i++) acc[g][i] = O::add(acc[g][i], weight, v[i]);
    }
  }
  UNROLLED for (int g = 0; g < GT; g++)
    UNROLLED for (int i = 0; i < DT; i++) store(mixed + g * columns + d + i * W, acc[g][i]);
  *values.shared = ahead;
}

template <class E, class P, int GT>
static inline void mix(const Chunk<P> values, const float* weights, const float* shrinks, float* mixed, long columns) {
  constexpr int DT = 4, LEAST = Operands<E>::TOGETHER;
  long d = 0;
  for (; d + DT * W <= values.D; d += DT * W) mix_columns<E, P, GT, DT, true>(values, weights, shrinks, d, mixed, columns);
  for (; d + LEAST * W <= values.D; d += LEAST * W)
    mix_columns<E, P, GT, LEAST, true>(values, weights, shrinks, d, mixed, columns);
  if (d < values.D) mix_columns<E, P, GT, LEAST, false>(values, weights, shrinks, d, mixed, columns);
}

// Scores in units in which 2^score is a weight.
constexpr float LOG2_E = 1.44269504f;
static inline Floats capped(const AttentionCall& c, Floats score) {
  return tanh(score * (c.scale / c.soft_cap)) * (c.soft_cap * LOG2_E);
}

// A chunk's scores join the running peaks and totals, and become weights in place.
template <class E, class P>
static void weigh(const AttentionCall& c, int count, const Work<E> w) {
  const long G = c.num_heads / c.num_kv_heads;
  for (long first = 0; first < w.heads; first += W) {
    Floats tops[W / 4];
    for (long h = 0; h < W; h += 4) {
      Floats most[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
      for (int i = 0; i < 4; i++)
        for (int n = 0; n < CHUNK; n += W) {
          float* at = w.scores + (first + h + i) * CHUNK + n;
          Floats s = load<Floats>(at);
          s = c.soft_cap > 0 ? capped(c, s) : s * (c.scale * LOG2_E);
          s = LANES + n < count ? s : splat(-INFINITY);
          store(at, s);
          most[i] = larger(s, most[i]);
        }
      tops[h / 4] = fold<larger<Floats>>(most);
    }
    const Floats peak = load<Floats>(w.peaks + first), most = larger(join<larger<Floats>>(tops), peak);
    // Nothing was seen yet: all weights are 0, not 0 / 0.
    const Floats from = most == -INFINITY ? Floats{} : most;
    store(w.shrinks + first, exp2(peak - from));
    store(w.froms + first, from);
    store(w.peaks + first, most);
  }
  for (long h = 0; h < c.num_heads; h++) {
    Floats total = load<Floats>(w.totals + h * W) * w.shrinks[h];
    for (int n = 0; n < CHUNK; n += W) {
      Floats weights = exp2(load<Floats>(w.scores + h * CHUNK + n) - w.froms[h]);
      if (IS_CODE<P>) {
        total += weights;
        weights = Operands<E>::round_row(weights * load<Floats>(w.scales + h / G * CHUNK + n));
      } else {
        // Rounded before they are added up, too: then each value counts for what it is divided by.
        weights = Operands<E>::round_row(weights);
        total = Operands<E>::add_up(total, weights);
      }
      store(w.scores + h * CHUNK + n, weights);
    }
    store(w.totals + h * W, total);
  }
}

// f(how many, the first of them) for all heads, as many at once as share a key head, but at most MOST_HEADS; one alone,
// for which keys are read again, only where there is but one.
template <class F>
static inline void by_heads(long num_heads, long group, F f) {
  for (long h = 0, left, num; h < num_heads; h += num) {
    left = group - h % group;
    num = left <= MOST_HEADS ? left : left % MOST_HEADS == 1 ? 2 : MOST_HEADS;
    switch (num) {
      case 1: f(std::integral_constant<int, 1>(), h); break;
      case 2: f(std::integral_constant<int, 2>(), h); break;
      case 3: f(std::integral_constant<int, 3>(), h); break;
      default: f(std::integral_constant<int, MOST_HEADS>(), h);
    }
  }
}

// Where a token's keys lie.
template <class P>
static inline const P* place_of(const AttentionCall& c, long row, long position) {
  const long N = c.page_tokens, page = c.table[row * c.table_stride + position / N];
  return (const P*)c.pages + page * c.page_stride + position % N * c.token_stride;
}

// A chunk lies in one page.
static inline long chunk_end(const AttentionCall& c, const Part& part, long start) {
  const long page_end = (start / c.page_tokens + 1) * c.page_tokens;
  const long stop = page_end < start + CHUNK ? page_end : start + CHUNK;
  return stop < part.last ? stop : part.last;
}

// scales[k][n]: of key head k of the n-th token of a chunk, whose first token's keys or values are `first`. Behind the last
// token its own again: what is multiplied by these does not count.
template <class P>
static inline void read_scales(const AttentionCall& c, const P* first, long count, float* scales) {
  for (long k = 0; k < c.num_kv_heads; k++, scales += CHUNK) {
    const P* scale = first + (k + 1) * head_size<P>(c.head_dim) - sizeof(float);
    UNROLLED for (long n = 0; n < CHUNK; n++) {
      memcpy(scales + n, scale, sizeof *scales);
      scale += n + 1 < count ? c.token_stride : 0;
    }
  }
}

// following: what this thread computes next, or null.
template <class E, class P>
static void attend(const AttentionCall& c, const Part& part, const Part* following, const Work<E> w) {
  typedef typename E::T T;
  typedef Operands<E> O;
  const long D = c.head_dim, H = c.num_heads, G = H / c.num_kv_heads;
  const T* query = (const T*)c.query + part.token * c.query_stride;
  for (long h = 0; h < H; h++)
    for (long d = 0; d < D; d += O::COUNT)
      store(w.query + h * w.units + d / O::TOGETHER, read_up_to<E>(query + h * D + d, D - d));
  std::fill(w.mixed, w.mixed + H * w.columns, 0.0f);
  std::fill(w.peaks, w.peaks + w.heads, -INFINITY);
  std::fill(w.totals, w.totals + H * W, 0.0f);
  std::fill(w.scores + H * CHUNK, w.scores + w.heads * CHUNK, 0.0f);
  for (long start = part.first, stop; start < part.last; start = stop) {
    stop = chunk_end(c, part, start);
    const P* keys = place_of<P>(c, part.row, start);
    const P* values = keys + c.part_stride;
    const long count = stop - start, size = c.token_stride * sizeof(P);
    Ahead ahead{(const char*)values, (const char*)values + count * size};
    const auto chunk_of = [&](const P* heads, long h) {
      return Chunk<P>{heads + h / G * head_size<P>(D), c.token_stride, count, D, w.scales + h / G * CHUNK, &ahead};
    };
    if (IS_CODE<P>) read_scales(c, keys, count, w.scales);
    by_heads(H, G, [&](auto num, long h) {
      const auto score_heads = D % O::COUNT ? score<E, P, num, false> : score<E, P, num, true>;
      score_heads(chunk_of(keys, h), w.query + h * w.units, w.units, w.scores + h * CHUNK);
    });
    if (IS_CODE<P>) read_scales(c, values, count, w.scales);
    weigh<E, P>(c, count, w);
    // Pages lie anywhere, so the processor cannot guess the next one.
    const Part* next = stop < part.last ? &part : following;
    if (next) {
      const long after = next == &part ? stop : next->first;
      ahead.next = (const char*)place_of<P>(c, next->row, after);
      ahead.end = ahead.next + (chunk_end(c, *next, after) - after) * size;
    }
    by_heads(H, G, [&](auto num, long h) {
      mix<E, P, num>(chunk_of(values, h), w.scores + h * CHUNK, w.shrinks + h, w.mixed + h * w.columns, w.columns);
    });
  }
  for (long h = 0; h < H; h++) w.sums[h] = sum(load<Floats>(w.totals + h * W));
}

// first: of a row's `count` parts, whose peaks become what each counts for.
template <class E>
static void merge(const AttentionCall& c, const Part& part, long count, const Work<E> first) {
  const long D = c.head_dim, H = c.num_heads, size = first.result_lines() * LINE_FLOATS;
  typename E::T* out = (typename E::T*)c.out + part.token * H * D;
  for (long h = 0; h < H; h += W) {
    Floats peak = splat(-INFINITY), total = {};
    for (long p = 0; p < count; p++) peak = larger(load<Floats>(first.peaks + p * size + h), peak);
    for (long p = 0; p < count; p++) {
      const Floats weight = exp2(load<Floats>(first.peaks + p * size + h) - peak);
      store(first.peaks + p * size + h, weight);
      total += weight * load<Floats>(first.sums + p * size + h);
    }
    store(first.sums + h, 1.0f / total);
  }
  for (long h = 0; h < H; h++) {
    float* mixed = first.mixed + h * first.columns;
    for (long d = 0; d < D; d += W) {
      Floats all = load<Floats>(mixed + d) * first.peaks[h];
      for (long p = 1; p < count; p++) all += load<Floats>(mixed + p * size + d) * first.peaks[p * size + h];
      store(mixed + d, all);
    }
    write_scaled<E>(out + h * D, mixed, first.sums[h], D);
  }
}

template <class E, class P>
static void decode(const AttentionCall& c, Team& team) {
  std::vector<Part> parts;
  std::vector<long> firsts;
  for (long r = 0; r < c.num_rows; r++) {
    const long length = c.lengths[r];
    if (c.starts[r + 1] - c.starts[r] != 1) continue;
    firsts.push_back(parts.size());
    for (long first = c.window && length > c.window ? length - c.window : 0; first < length;) {
      long last = (first / SPLIT + 1) * SPLIT;
      if (last > length) last = length;
      parts.push_back({r, c.starts[r], first, last});
      first = last;
    }
  }
  firsts.push_back(parts.size());
  const long num_parts = parts.size(), num_rows = firsts.size() - 1;
  if (!num_rows) return;
  Work<E> work(c);
  const long num_threads = num_parts > 1 ? team.size() : 1, result = work.result_lines(), scratch = work.scratch_lines();
  // Made here, because a thread that finds no memory can only end the process.
  const std::unique_ptr<Line[]> memory(new Line[num_parts * result + num_threads * scratch]);
  Line *results = memory.get(), *scratches = results + num_parts * result;
  std::atomic<long> taken(0);
  team.share(num_threads, 1, [&](long thread, long, long) {
    Work<E> own = work;
    // A part is taken before the one before it is computed, so that its first keys are fetched in time.
    for (long p = taken++, next; p < num_parts; p = next) {
      next = taken++;
      own.place(&results[p * result], &scratches[thread * scratch]);
      attend<E, P>(c, parts[p], next < num_parts ? &parts[next] : nullptr, own);
    }
  });
  team.share(num_rows, num_parts > 1 ? team.slice(num_rows) : num_rows, [&](long begin, long end, long) {
    Work<E> own = work;
    for (long r = begin; r < end; r++) {
      own.place(&results[firsts[r] * result], scratches);
      merge<E>(c, parts[firsts[r]], firsts[r + 1] - firsts[r], own);
    }
  });
}
