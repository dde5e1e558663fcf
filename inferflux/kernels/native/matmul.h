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

struct ProductCall {
  const void* weight;   // floats: [panels, inputs, PANEL]; integers: see integers.h
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

// Columns first..last-1.
template <class K, int ROWS>
static void add_tile(const ProductCall& c, long p, long row, long first, long last) {
  const long o = p * PANEL, count = c.outputs - o < PANEL ? c.outputs - o : PANEL;
  const typename K::T* w = (const typename K::T*)c.weight + (p * c.inputs + first) * PANEL;
  const float* x = c.x + row * c.inputs + first;
  float rest[ROWS][PANEL] = {};
  Floats acc[ROWS][VECTORS] = {};
  float* y = c.y + row * c.outputs + o;
  if (first)
    for (int m = 0; m < ROWS; m++) {
      memcpy(rest[m], y + m * c.outputs, count * sizeof(float));
      for (int v = 0; v < VECTORS; v++) acc[m][v] = load<Floats>(rest[m] + v * W);
    }
  for (long i = 0; i < last - first; i++) {
    Floats b[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      b[v] = K::read(w + i * PANEL + v * W);
      keep(b[v]);
    }
    for (int m = 0; m < ROWS; m++) {
      Floats a = splat(x[m * c.inputs + i]);
      for (int v = 0; v < VECTORS; v++) acc[m][v] += a * b[v];
    }
  }
  for (int m = 0; m < ROWS; m++) {
    for (int v = 0; v < VECTORS; v++) store(rest[m] + v * W, acc[m][v]);
    if (last == c.inputs)
      for (long k = 0; k < count; k++)
        rest[m][k] = rest[m][k] * (c.scales ? c.scales[o + k] : 1.0f) + (c.bias ? c.bias[o + k] : 0.0f);
    memcpy(y + m * c.outputs, rest[m], count * sizeof(float));
  }
}

// The last rows, fewer than a tile's.
template <class K, int ROWS>
static void add_rest(const ProductCall& c, long p, long row, long count, long first, long last) {
  if (count == ROWS)
    add_tile<K, ROWS>(c, p, row, first, last);
  else if constexpr (ROWS > 1)
    add_rest<K, ROWS - 1>(c, p, row, count, first, last);
}

template <class K>
static void multiply_floats(const ProductCall& c) {
  const long panels = (c.outputs + PANEL - 1) / PANEL, blocks = (c.inputs + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
  const long columns = (c.inputs + blocks - 1) / blocks;
#pragma omp parallel num_threads(c.threads) if (c.rows * c.outputs * c.inputs > 20000)
  for (long row = 0; row < c.rows; row += ROW_BLOCK)
    for (long first = 0; first < c.inputs; first += columns) {
      const long row_end = row + ROW_BLOCK < c.rows ? row + ROW_BLOCK : c.rows;
      const long last = first + columns < c.inputs ? first + columns : c.inputs;
      // A panel is always the same thread's.
#pragma omp for schedule(static) nowait
      for (long p = 0; p < panels; p++) {
        long m = row;
        for (; m + FLOAT_TILE <= row_end; m += FLOAT_TILE) add_tile<K, FLOAT_TILE>(c, p, m, first, last);
        if (m < row_end) add_rest<K, FLOAT_TILE - 1>(c, p, m, row_end - m, first, last);
      }
    }
}
