// y = x @ weight.T for weights in floats of 32, 16 or 8 bits, which are widened in registers, or multiplied in pairs as they
// are where the processor has instructions for that.
//
// Weights lie in panels of PANEL outputs, a column's outputs side by side: one column of a few panels meets one input of
// each row of a tile. A row's sums grow in the order of the columns, whatever else is in the batch.
#pragma once
#include <memory>
#include <type_traits>

#include "codes.h"

constexpr long PANEL = 16;
// A tile's sums stay in registers: FLOAT_TILE rows of PANELS * VECTORS each. GFLOP/s of bfloat16 in pairs, [3072, 576] x 8,
// 16, 32, 512 rows and [896, 4864] x the same, two cores of a Zen 5 EPYC: 8 rows of 3 panels 397, 598, 744, 974 and 451, 638,
// 766, 923; 12 of 1 362, 406, 517, 807 and 317, 450, 627, 851; 12 of 2 403, 519, 621, 947 and 400, 677, 814, 995.
constexpr int VECTORS = PANEL / W, PANELS = W == 16 ? 3 : 1, FLOAT_TILE = W == 16 ? 8 : 6;
// Of x, rows of L2_BYTES stay in the second cache while the panels pass: at most ROW_BLOCK of them, and at most COLUMN_BLOCK
// columns of floats, of each panel as many in the first or second. 576 columns are one block.
constexpr long ROW_BLOCK = 256, COLUMN_BLOCK = 640, L2_BYTES = (W == 16 ? 512 : 240) * 1024;
// While rows meet a panel, the next one is fetched, a little for every AHEAD columns: else the first rows wait for memory.
// GFLOP/s of float32 [.., 576] x 32 rows, two cores of a Zen 3 EPYC: 139 to 144, 107 without; x 512 rows 142, 134 without.
constexpr long AHEAD = 8, LINE = 64;

struct ProductCall {
  const void* weight;   // floats: [panels, inputs / TOGETHER, PANEL, TOGETHER]; integers: see integers.h
  const float* scales;  // floats: [outputs] or null
  const void* bias;     // [outputs] or null
  const void* x;        // [rows, inputs]
  void* y;              // [rows, outputs]
  int64_t rows, outputs, inputs;
  int32_t type;  // what bias, x and y are made of
};

// How a panel holds COLUMNS columns of an output side by side, and FACTORS registers of a panel's outputs that are made of
// them: to[factor]. Columns are filled up to a multiple of COLUMNS. X and Y: what x and y are made of. Wide: how columns lie
// once they are widened for more rows than a tile has; as they are, unless that takes long.
struct Panel32 {
  typedef float T;
  typedef Panel32 Wide;
  typedef F32 X, Y;
  typedef Floats Factor;
  static constexpr int COLUMNS = 1, FACTORS = 1;
  static inline void read(const T* p, Factor* to) { to[0] = F32::read(p); }
};
struct Panel16 {  // of bfloat16; the first column in a word's low half
  typedef uint16_t T;
  typedef Panel16 Wide;
  typedef F32 X, Y;
  typedef Floats Factor;
  static constexpr int COLUMNS = 2, FACTORS = 2;
  static inline void read(const T* p, Factor* to) {
    Ints both = load<Ints>(p);
    to[0] = (Floats)(both << 16), to[1] = (Floats)(both & (int)0xffff0000);
  }
};
struct Panel8 {  // of fp8; the first column in a half's low byte
  typedef uint8_t T;
  typedef Panel32 Wide;
  typedef F32 X, Y;
  typedef Floats Factor;
  static constexpr int COLUMNS = 2, FACTORS = 2;
  static inline void read(const T* p, Factor* to) {
#if defined(__AVX512BW__)
    Ints both = widen_fp8(p);
    to[0] = (Floats)(both << 16), to[1] = (Floats)(both & (int)0xffff0000);
#else
    // The exponent moves from bias 7 to bias 127; subnormals come out right too. Copies of the sign are cut away.
    Ints both = widen((const uint16_t*)p);
    to[0] = (Floats)((both << 24 >> 4) & (int)0x87ffffff) * 0x1p120f;
    to[1] = (Floats)((both << 16 >> 4) & (int)0x87f00000) * 0x1p120f;
#endif
  }
};
static inline void add_products(Floats& to, const float* x, Floats factor) { to += splat(*x) * factor; }
struct Pairs16;
struct Pairs8;
#if defined(__AVX512BF16__)
// As above, for x and y of bfloat16: two columns of an output meet two inputs at once. Inputs are even.
struct Pairs16 {
  typedef uint16_t T;
  typedef Pairs16 Wide;
  typedef BF16 X, Y;
  typedef Ints Factor;
  static constexpr int COLUMNS = 2, FACTORS = 1;
  static inline void read(const T* p, Factor* to) { to[0] = load<Ints>(p); }
};
struct Pairs8 {
  typedef uint8_t T;
  typedef Pairs16 Wide;
  typedef BF16 X, Y;
  typedef Ints Factor;
  static constexpr int COLUMNS = 2, FACTORS = 1;
  static inline void read(const T* p, Factor* to) { to[0] = widen_fp8(p); }
};
static inline void add_products(Floats& to, const uint16_t* x, Ints factor) {
  Ints both = Ints{} + load<int32_t>(x);
  to = (Floats)_mm512_dpbf16_ps((__m512)to, (__m512bh)both, (__m512bh)factor);
}
#endif

// Where a tile's rows are read, one pointer for every GROUP of them. Of AVX-512's 12 rows GCC 12 else holds one for each,
// most of them on the stack: 79 cycles for 8 columns of bfloat16, now 54, as LLVM's model of Skylake-X counts them.
template <class T, int ROWS> struct TileRows {
  static constexpr int GROUP = W == 16 ? 4 : ROWS;
  const T* first[(ROWS + GROUP - 1) / GROUP];
  long stride;
  inline TileRows(const T* x, long stride_) : stride(stride_) {
    for (int m = 0; m < ROWS; m += GROUP) first[m / GROUP] = x + m * stride;
  }
  // `column` is one of the few that come before the next move: each is an address more to hold.
  inline const T* at(int m, long column) const { return first[m / GROUP] + m % GROUP * stride + column; }
  inline void move(long columns) {
    for (const T*& p : first) p += columns, keep_apart(p);
  }
};

// What rows meet of a few panels before the next ones' turn.
template <class K> struct Columns {
  typedef typename K::X::T X;
  typedef typename K::Y::T Y;
  const typename K::T* weight;
  long panel;                   // from panel to panel
  long count, inputs, outputs;  // the last two: from row to row of x and y
  const float* scales;          // of the panels' outputs, where these are the last columns; or null
  const Y* bias;                // likewise
  bool fresh;                   // the first columns: y holds no sums yet
  const char* ahead;            // of the next panels: tiles fetch it as they go, `step` bytes for every AHEAD columns
  long step;
};

template <class K, int NUM, int ROWS>
static void add_tile(Columns<K>& c, const typename K::X::T* x, typename K::Y::T* y) {
  typedef typename K::Y Y;
  constexpr int NUM_V = NUM * VECTORS, EACH = K::COLUMNS / K::FACTORS;
  // One panel has no next: GCC 12 holds the distance all the same, and with AVX2 sums go to memory for it (252 to 219 GFLOP/s
  // of float32 x 512 rows).
  const long outputs = c.outputs, panel = NUM == 1 ? 0 : c.panel;
  Floats acc[ROWS][NUM_V];
  UNROLLED for (int m = 0; m < ROWS; m++)
    UNROLLED for (int v = 0; v < NUM_V; v++) acc[m][v] = Floats{};
  if (!c.fresh)
    UNROLLED for (int m = 0; m < ROWS; m++)
      UNROLLED for (int v = 0; v < NUM_V; v++) acc[m][v] = Y::read(y + m * outputs + v * W);
  auto add = [&](TileRows<typename K::X::T, ROWS> from, const typename K::T* w, long num) {
    typename K::Factor b[NUM_V][K::FACTORS];
    UNROLLED for (int v = 0; v < NUM_V; v++) K::read(w + v / VECTORS * panel + v % VECTORS * W * K::COLUMNS, b[v]);
    for (int k = 0; k < num; k++) {
      UNROLLED for (int v = 0; v < NUM_V; v++) keep(b[v][k]);
      UNROLLED for (int m = 0; m < ROWS; m++)
        UNROLLED for (int v = 0; v < NUM_V; v++) add_products(acc[m][v], from.at(m, k * EACH), b[v][k]);
    }
  };
  TileRows<typename K::X::T, ROWS> rows(x, c.inputs);
  const typename K::T *w = c.weight, *whole = w + c.count / AHEAD * AHEAD * PANEL;
  const char* ahead = c.ahead;
  for (; w < whole; w += AHEAD * PANEL) {
    __builtin_prefetch(ahead);
    if (c.step > LINE)
      for (long fetched = LINE; fetched < c.step; fetched += LINE) __builtin_prefetch(ahead + fetched);
    ahead += c.step;
#pragma GCC unroll 8
    for (int k = 0; k < AHEAD; k += K::COLUMNS, rows.move(K::COLUMNS)) add(rows, w + k * PANEL, K::FACTORS);
  }
  c.ahead = ahead;
  for (long left = c.count % AHEAD; left > 0; left -= K::COLUMNS, rows.move(K::COLUMNS), w += K::COLUMNS * PANEL)
    add(rows, w, left < K::FACTORS ? left : K::FACTORS);
  if (c.scales || c.bias)
    UNROLLED for (int v = 0; v < NUM_V; v++) {
      const Floats scale = c.scales ? load<Floats>(c.scales + v * W) : splat(1.0f);
      const Floats added = c.bias ? Y::read(c.bias + v * W) : splat(-0.0f);
      UNROLLED for (int m = 0; m < ROWS; m++) acc[m][v] = fused(acc[m][v], scale, added);
    }
  UNROLLED for (int m = 0; m < ROWS; m++)
    UNROLLED for (int v = 0; v < NUM_V; v++) Y::write(y + m * outputs + v * W, acc[m][v]);
}

template <class K, int NUM, int ROWS = FLOAT_TILE>
static void add_rows(Columns<K>& c, const typename K::X::T* x, typename K::Y::T* y, long count) {
  if (count == ROWS)
    add_tile<K, NUM, ROWS>(c, x, y);
  else if constexpr (ROWS > 1)
    add_rows<K, NUM, ROWS - 1>(c, x, y, count);
}

static inline long tiles_of(long rows, long most) { return (rows + most - 1) / most; }

// Tiles as even as can be: where 6 rows are one, 32 are 5, 5, 6, 5, 5, 6.
template <class K, int NUM>
static void add_all(Columns<K> c, const typename K::X::T* x, typename K::Y::T* y, long rows) {
  const long tiles = tiles_of(rows, FLOAT_TILE);
  c.step = c.step * NUM / tiles;
  for (long t = 0, m = 0, next; t < tiles; t++, m = next) {
    next = (t + 1) * rows / tiles;
    add_rows<K, NUM>(c, x + m * c.inputs, y + m * c.outputs, next - m);
  }
}

// For the last panel, where it has fewer than PANEL outputs.
template <class K>
static void add_narrow(Columns<K> c, const typename K::X::T* x, typename K::Y::T* y, long rows, long count) {
  typedef typename K::Y::T Y;
  Y part[ROW_BLOCK][PANEL] = {}, bias[PANEL] = {};
  float scales[PANEL] = {};
  const long outputs = c.outputs;
  if (c.scales) c.scales = (const float*)memcpy(scales, c.scales, count * sizeof(float));
  if (c.bias) c.bias = (const Y*)memcpy(bias, c.bias, count * sizeof(Y));
  c.outputs = PANEL;
  for (long m = 0; !c.fresh && m < rows; m++) memcpy(part[m], y + m * outputs, count * sizeof(Y));
  add_all<K, 1>(c, x, part[0], rows);
  for (long m = 0; m < rows; m++) memcpy(y + m * outputs, part[m], count * sizeof(Y));
}

// `num` panels meet rows; the last may be narrow.
template <class K>
static void add_panels(const Columns<K>& c, long num, const typename K::X::T* x, typename K::Y::T* y, long rows, long outputs) {
  if (outputs < PANEL)
    add_narrow(c, x, y, rows, outputs);
  else if (num == PANELS)
    add_all<K, PANELS>(c, x, y, rows);
  else
    add_all<K, 1>(c, x, y, rows);
}

// c's columns of `num` panels as K::Wide has them, at `to`, `panel` from panel to panel.
template <class K>
static Columns<typename K::Wide> widen_panels(const Columns<K>& c, long num, typename K::Wide::T* to, long panel) {
  constexpr int EACH = K::COLUMNS / K::FACTORS, WIDE = K::Wide::COLUMNS * W;
  for (long p = 0; p < num; p++)
    for (long k = 0; k < c.count; k += K::COLUMNS)
      for (int v = 0; v < VECTORS; v++) {
        typename K::Factor factors[K::FACTORS];
        K::read(c.weight + p * c.panel + k * PANEL + v * W * K::COLUMNS, factors);
        typename K::Wide::T* columns = to + p * panel + k * PANEL + v * WIDE;
        for (int f = 0; f < K::FACTORS; f++) memcpy(columns + f * EACH * PANEL, factors + f, sizeof *factors);
      }
  return {to, panel, c.count, c.inputs, c.outputs, c.scales, c.bias, c.fresh, c.ahead, c.step};
}

template <class K>
static void multiply_floats(const ProductCall& c, Team& team) {
  typedef typename K::T T;
  typedef typename K::X::T X;
  typedef typename K::Y::T Y;
  const long panels = (c.outputs + PANEL - 1) / PANEL, whole = c.outputs / PANEL;
  // Sums of floats wait in y for the next columns; in bfloat16 they would lose digits.
  const long blocks = sizeof(Y) == sizeof(float) ? (c.inputs + COLUMN_BLOCK - 1) / COLUMN_BLOCK : 1;
  const long most = ((c.inputs + blocks - 1) / blocks + AHEAD - 1) / AHEAD * AHEAD;
  const long near = L2_BYTES / (most * (long)sizeof(X)) / FLOAT_TILE * FLOAT_TILE;
  const long row_block = near < FLOAT_TILE ? FLOAT_TILE : near > ROW_BLOCK ? ROW_BLOCK : near;
  const long panel = (c.inputs + K::COLUMNS - 1) / K::COLUMNS * K::COLUMNS * PANEL;
  constexpr bool WIDENS = !std::is_same<K, typename K::Wide>::value;
  // Each thread's widened panels. GFLOP/s of fp8 [3072, 576] x 32, 512 rows of bfloat16, two cores of a Zen 5 EPYC: 845, 979;
  // without 768, 822; of float32 451, 503; without 262, 259; as AVX2 208, 232; before 123, 121.
  const long wide_panel = (most + 1) / 2 * 2 * PANEL;
  std::unique_ptr<typename K::Wide::T[]> wide;
  if (WIDENS && c.rows > FLOAT_TILE) wide.reset(new typename K::Wide::T[team.size() * PANELS * wide_panel]);
  const bool together = c.rows * c.outputs * c.inputs > 20000;
  // Where each thread has few panels, what it fetched would be another's too often.
  const long step = panels > 4 * team.size() ? AHEAD * PANEL * (long)sizeof(T) : 0;
  for (long row = 0; row < c.rows; row += row_block)
    for (long column = 0; column < c.inputs; column += most) {
      const long rows = row + row_block < c.rows ? row_block : c.rows - row;
      const long count = column + most < c.inputs ? most : c.inputs - column;
      const bool done = column + count == c.inputs;
      const X* x = (const X*)c.x + row * c.inputs + column;
      team.share(panels, together ? PANELS : panels, [&](long begin, long end, long thread) {
        for (long p = begin, next; p < end; p = next) {
          const long o = p * PANEL, at_once = p + PANELS <= end && p + PANELS <= whole ? PANELS : 1;
          next = p + at_once;
          const T* weight = (const T*)c.weight + p * panel + column * PANEL;
          const char* ahead = (const char*)(step ? weight + at_once * panel : weight);
          const float* scales = done && c.scales ? c.scales + o : nullptr;
          const Y* bias = done && c.bias ? (const Y*)c.bias + o : nullptr;
          Columns<K> columns{weight, panel, count, c.inputs, c.outputs, scales, bias, column == 0, ahead, step};
          Y* y = (Y*)c.y + row * c.outputs + o;
          if constexpr (WIDENS)
            if (wide) {
              auto* to = wide.get() + thread * PANELS * wide_panel;
              add_panels(widen_panels(columns, at_once, to, wide_panel), at_once, x, y, rows, c.outputs - o);
              continue;
            }
          add_panels(columns, at_once, x, y, rows, c.outputs - o);
        }
      });
    }
}

// For bias, x and y of bfloat16.
template <class K>
static void multiply_widened(const ProductCall& given, Team& team) {
  const long num_x = given.rows * given.inputs, num_y = given.rows * given.outputs;
  std::unique_ptr<float[]> floats(new float[num_x + num_y + given.outputs]);
  ProductCall c = given;
  c.x = floats.get(), c.y = floats.get() + num_x, c.type = 0;
  convert<BF16, F32>(floats.get(), given.x, num_x, team);
  if (given.bias) {
    c.bias = floats.get() + num_x + num_y;
    convert<BF16, F32>(floats.get() + num_x + num_y, given.bias, c.outputs, team);
  }
  multiply_floats<K>(c, team);
  convert<F32, BF16>(given.y, c.y, num_y, team);
}

// The same, in pairs if the processor can.
template <class PAIRS, class K>
static void multiply_pairs(const ProductCall& c, Team& team) {
#if defined(__AVX512BF16__)
  if (c.inputs % 2 == 0) return multiply_floats<PAIRS>(c, team);
#endif
  multiply_widened<K>(c, team);
}
