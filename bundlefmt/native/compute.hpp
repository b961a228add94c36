// The kernels over threads: products, weighted sums, the FFN, digests, a transposition.
#pragma once

#include <cstdint>
#include <optional>

#include "kernels/kernels.hpp"

namespace bundlefmt {

enum class Activation { relu, relu2, fatrelu, silu, gelu, gelu_tanh };

void activate(Activation, float threshold, float* values, int64_t count);

// One part of every row, with a bias per row, or none.
struct Part {
  Rows rows;
  const float* bias;
};

struct Ffn {
  std::optional<Part> selector;  // what the activation is applied to; none where `active` is given
  std::optional<Part> up;        // multiplied with it, where the FFN is gated
  Part down;
  Activation activation;
  float threshold;
  Vectors active;  // the selector's activations, where they are known
};

// In all of these `count` is the number of rows, and x, h, y have `tokens` vectors without padding.
void products(const Rows&, int64_t count, Vectors x, Vectors out, int threads);
void weighted_sum(const Rows&, int64_t count, Vectors h, Vectors y, int threads);
void ffn(const Ffn&, int64_t count, Vectors x, Vectors y, int threads);
void digests(const uint8_t* rows, int64_t stride, int64_t length, int64_t count, uint64_t* out,
             int threads);

// out[i][j] = in[j][i]: `in` has `height` rows of `width` items, strides are in bytes.
template <class Item>
void transpose(const uint8_t* in, int64_t in_stride, int64_t height, int64_t width, uint8_t* out,
               int64_t out_stride, int threads);

}  // namespace bundlefmt
