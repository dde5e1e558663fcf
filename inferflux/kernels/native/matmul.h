// y = x @ weight.T for weights in floats of 32, 16 or 8 bits, which are widened in registers.
//
// Weights lie in panels of PANEL outputs, a column's outputs side by side: one column of a panel meets one input of each row
// of a tile. A row's sums grow in the order of the columns, whatever else is in the batch.
#pragma once
#include <memory>

#include "vector.h"

constexpr long PANEL = 16;
// A tile's sums stay in registers: rows of VECTORS each.
constexpr int VECTORS = PANEL / W, FLOAT_TILE = 12 / VECTORS;
// Of x, ROW_BLOCK rows of at most COLUMN_BLOCK columns stay in the second cache while the panels pass, of each panel as many
// columns in the first or second. 576 columns are one block.
constexpr long ROW_BLOCK = 96, COLUMN_BLOCK = 640;
// While rows meet a panel, the next one is fetched, a little for every AHEAD columns: else the first rows wait for memory.
// GFLOP/s of float32 [.., 576] x 32 rows, two cores of a Zen 3 EPYC: 139 to 144, 107 without; x 512 rows 142, 134 without.
constexpr long AHEAD = 8, LINE = 64;

struct ProductCall {
  const void* weight;   // floats: [panels, inputs / TOGETHER, PANEL, TOGETHER]; integers: see integers.h
  const float* scales;  // floats: [outputs] or null
  const float* bias;    // [outputs] or null
  const float* x;       // [rows, inputs]
  float* y;             // [rows, outputs]
  int64_t rows, outputs, inputs;
  int32_t type, threads;  // type: what bias, x and y are made of; what multiplies wants floats
};

// For bias, x and y of bfloat16.
static void multiply_widened(const ProductCall& given, void (*multiply)(const ProductCall&)) {
  const long num_x = given.rows * given.inputs, num_y = given.rows * given.outputs;
  std::unique_ptr<float[]> floats(new float[num_x + num_y + given.outputs]);
  ProductCall c = given;
  c.x = floats.get(), c.y = floats.get() + num_x, c.type = 0;
  convert<BF16, F32>(floats.get(), given.x, num_x, c.threads);
  if (given.bias) {
    c.bias = floats.get() + num_x + num_y;
    convert<BF16, F32>(floats.get() + num_x + num_y, given.bias, c.outputs, 1);
  }
  multiply(c);
  convert<F32, BF16>(given.y, c.y, num_y, c.threads);
}

// How a panel holds TOGETHER columns of an output side by side, and how they become floats, to[column][register]. Columns
// are filled up to a multiple of TOGETHER.
struct Panel32 {
  typedef float T;
  static constexpr int TOGETHER = 1;
  static inline void read(const T* p, Floats to[][VECTORS]) {
    for (int v = 0; v < VECTORS; v++) to[0][v] = F32::read(p + v * W);
  }
};
struct Panel16 {  // of bfloat16; the first column in a word's low half
  typedef uint16_t T;
  static constexpr int TOGETHER = 2;
  static inline void read(const T* p, Floats to[][VECTORS]) {
    for (int v = 0; v < VECTORS; v++) {
      Ints both = load<Ints>(p + v * 2 * W);
      to[0][v] = (Floats)(both << 16), to[1][v] = (Floats)(both & (int)0xffff0000);
    }
  }
};
struct Panel8 {
  typedef uint8_t T;
  static constexpr int TOGETHER = 1;
  static inline void read(const T* p, Floats to[][VECTORS]) {
    for (int v = 0; v < VECTORS; v++) to[0][v] = F8::read(p + v * W);
  }
};

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

// What rows meet of a panel before the next panel's turn.
template <class K> struct Columns {
  const typename K::T* weight;
  long count, inputs, outputs;  // the last two: from row to row of x and y
  const float *scales, *bias;   // of the panel's outputs, where these are the last columns; or null
  bool fresh;                   // the first columns: y holds no sums yet
  const char* ahead;            // of the next panel: tiles fetch it as they go, `step` bytes for every AHEAD columns
  long step;
};

template <class K, int ROWS>
static void add_tile(Columns<K>& c, const float* x, float* y) {
  const long inputs = c.inputs, outputs = c.outputs;
  Floats acc[ROWS][VECTORS];
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) acc[m][v] = Floats{};
  if (!c.fresh)
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) acc[m][v] = load<Floats>(y + m * outputs + v * W);
  auto add = [&](TileRows<float, ROWS> from, const typename K::T* w, long num) {
    Floats b[K::TOGETHER][VECTORS];
    K::read(w, b);
    for (int k = 0; k < num; k++) {
      for (int v = 0; v < VECTORS; v++) keep(b[k][v]);
      for (int m = 0; m < ROWS; m++) {
        Floats a = splat(*from.at(m, k));
        for (int v = 0; v < VECTORS; v++) acc[m][v] += a * b[k][v];
      }
    }
  };
  TileRows<float, ROWS> rows(x, inputs);
  const typename K::T *w = c.weight, *whole = w + c.count / AHEAD * AHEAD * PANEL;
  const char* ahead = c.ahead;
  for (; w < whole; w += AHEAD * PANEL) {
    __builtin_prefetch(ahead);
    if (c.step > LINE)
      for (long fetched = LINE; fetched < c.step; fetched += LINE) __builtin_prefetch(ahead + fetched);
    ahead += c.step;
#pragma GCC unroll 8
    for (int k = 0; k < AHEAD; k += K::TOGETHER, rows.move(K::TOGETHER)) add(rows, w + k * PANEL, K::TOGETHER);
  }
  c.ahead = ahead;
  for (long left = c.count % AHEAD; left > 0; left -= K::TOGETHER, rows.move(K::TOGETHER), w += K::TOGETHER * PANEL)
    add(rows, w, left < K::TOGETHER ? left : K::TOGETHER);
  if (c.scales)
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) acc[m][v] *= load<Floats>(c.scales + v * W);
  if (c.bias)
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) acc[m][v] += load<Floats>(c.bias + v * W);
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) store(y + m * outputs + v * W, acc[m][v]);
}

template <class K, int ROWS = FLOAT_TILE>
static void add_rows(Columns<K>& c, const float* x, float* y, long count) {
  if (count == ROWS)
    add_tile<K, ROWS>(c, x, y);
  else if constexpr (ROWS > 1)
    add_rows<K, ROWS - 1>(c, x, y, count);
}

// Tiles as even as can be: where 6 rows are one, 32 are 5, 5, 6, 5, 5, 6.
template <class K>
static void add_all(Columns<K>& c, const float* x, float* y, long rows) {
  const long tiles = (rows + FLOAT_TILE - 1) / FLOAT_TILE;
  for (long t = 0, m = 0, next; t < tiles; t++, m = next) {
    next = (t + 1) * rows / tiles;
    add_rows<K>(c, x + m * c.inputs, y + m * c.outputs, next - m);
  }
}

// For the last panel, where it has fewer than PANEL outputs.
template <class K>
static void add_narrow(Columns<K> c, const float* x, float* y, long rows, long count) {
  float part[ROW_BLOCK][PANEL] = {}, scales[PANEL] = {}, bias[PANEL] = {};
  const long outputs = c.outputs, bytes = count * sizeof(float);
  if (c.scales) c.scales = (const float*)memcpy(scales, c.scales, bytes);
  if (c.bias) c.bias = (const float*)memcpy(bias, c.bias, bytes);
  c.outputs = PANEL;
  for (long m = 0; !c.fresh && m < rows; m++) memcpy(part[m], y + m * outputs, bytes);
  add_all(c, x, part[0], rows);
  for (long m = 0; m < rows; m++) memcpy(y + m * outputs, part[m], bytes);
}

template <class K>
static void multiply_floats(const ProductCall& c) {
  typedef typename K::T T;
  const long panels = (c.outputs + PANEL - 1) / PANEL, blocks = (c.inputs + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
  const long most = ((c.inputs + blocks - 1) / blocks + AHEAD - 1) / AHEAD * AHEAD;
  const long panel = (c.inputs + K::TOGETHER - 1) / K::TOGETHER * K::TOGETHER * PANEL;
#pragma omp parallel num_threads(c.threads) if (c.rows * c.outputs * c.inputs > 20000)
  for (long row = 0; row < c.rows; row += ROW_BLOCK)
    for (long first = 0; first < c.inputs; first += most) {
      const long rows = row + ROW_BLOCK < c.rows ? ROW_BLOCK : c.rows - row;
      const long step = AHEAD * PANEL * (long)sizeof(T) / ((rows + FLOAT_TILE - 1) / FLOAT_TILE);
      const long count = first + most < c.inputs ? most : c.inputs - first;
      const bool last = first + count == c.inputs;
      const float* x = c.x + row * c.inputs + first;
      // A panel is always the same thread's. Where each has few, what it fetched would be another's too often.
      const bool fetches = panels > 4 * c.threads;
#pragma omp for schedule(static) nowait
      for (long p = 0; p < panels; p++) {
        const T* weight = (const T*)c.weight + p * panel + first * PANEL;
        const long o = p * PANEL;
        const float *scales = last && c.scales ? c.scales + o : nullptr, *bias = last && c.bias ? c.bias + o : nullptr;
        const char* next = (const char*)(fetches ? weight + panel : weight);
        Columns<K> columns{weight, count, c.inputs, c.outputs, scales, bias, first == 0, next, fetches ? step : 0};
        float* y = c.y + row * c.outputs + o;
        if (c.outputs - o < PANEL)
          add_narrow(columns, x, y, rows, c.outputs - o);
        else
          add_all(columns, x, y, rows);
      }
    }
}
