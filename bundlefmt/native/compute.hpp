// The kernels over threads: products, weighted sums, the FFN, digests, a transposition. Each has a
// function that says why its arguments cannot be, or nullptr when they can: nothing else keeps the
// kernels within their memory.
#pragma once

#include <cstdint>
#include <optional>

#include "kernels/kernels.hpp"

namespace bundlefmt {

enum class Activation { relu, relu2, fatrelu, silu, gelu, gelu_tanh };

void activate(Activation, float threshold, float* values, int64_t count);

constexpr int MAX_THREADS = 1024;

// One part of every row, with a bias per row, or none.
struct Part {
  Rows rows;
  const float* bias;
  int64_t stored;  // rows that there are,
  int64_t bytes;   // and bytes of each
};

struct Ffn {
  std::optional<Part> selector;  // what the activation is applied to; none where `active` is given
  std::optional<Part> up;        // multiplied with it, where the FFN is gated
  Part down;
  Activation activation;
  float threshold;
  std::optional<Vectors> active;  // the selector's activations, where they are known
};

const char* threads_fault(int threads);
const char* slots_fault(const int64_t* slots, int64_t count, int64_t stored);
// These take the slots for checked.
const char* products_fault(const Part&, int64_t count, Vectors x, int threads);
const char* weighted_sum_fault(const Part&, int64_t count, Vectors h, int threads);
const char* ffn_fault(const Ffn&, int64_t count, Vectors x, int threads);
const char* transpose_fault(int64_t in_rows, int64_t in_bytes, int64_t out_rows, int64_t out_bytes,
                            int item, int threads);

// In all of these `count` is the number of rows, and x, h, y have `tokens` vectors without padding.
void products(const Rows&, int64_t count, Vectors x, Vectors out, int threads);
void weighted_sum(const Rows&, int64_t count, Vectors h, Vectors y, int threads);
void ffn(const Ffn&, int64_t count, Vectors x, Vectors y, int threads);
void digests(const uint8_t* rows, int64_t stride, int64_t length, int64_t count, uint64_t* out,
             int threads);

// out[i][j] = in[j][i]: `in` has `height` rows of `width` items of 1, 2 or 4 bytes, strides are in
// bytes.
void transpose(const uint8_t* in, int64_t in_stride, int64_t height, int64_t width, uint8_t* out,
               int64_t out_stride, int item, int threads);

}  // namespace bundlefmt
