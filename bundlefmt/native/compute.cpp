#include "compute.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.hpp"

namespace bundlefmt {
namespace {

constexpr int64_t FFN_ROWS = 64;  // computed at a time: so many that few begin without a prefetch
constexpr int64_t LEAST_BYTES = 1 << 17;  // per thread: less is done before a thread has woken

int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// Vectors with room up to a multiple of BLOCK, zero at first.
class Padded {
 public:
  Padded(int64_t n, int64_t tokens)
      : numbers_(static_cast<size_t>(padded(n) * tokens)), n_(n), tokens_(tokens) {}

  Padded(int64_t n, Vectors from) : Padded(n, from.tokens) {
    for (int64_t t = 0; t < from.tokens; ++t)
      std::copy_n(from.token(t), n, vectors().token(t));
  }

  Vectors vectors() { return {numbers_.data(), padded(n_), tokens_}; }

  void add_to(Vectors y) {
    for (int64_t t = 0; t < tokens_; ++t)
      for (int64_t i = 0; i < n_; ++i) y.token(t)[i] += vectors().token(t)[i];
  }

 private:
  std::vector<float> numbers_;
  int64_t n_, tokens_;
};

// Calls work(part, first, last) for even shares of `count` rows.
template <class Work>
void share(int64_t count, int64_t row_bytes, int threads, Work work) {
  const int64_t useful = count * row_bytes / LEAST_BYTES + 1;
  const int parts = static_cast<int>(std::min<int64_t>({threads, useful, std::max<int64_t>(count, 1)}));
  run_parts(parts, [&](int part) { work(part, count * part / parts, count * (part + 1) / parts); });
}

// Shares whose sums are private, then added in the order of the shares: the same threads give the
// same result.
template <class Work>
void share_sums(int64_t count, int64_t row_bytes, int threads, int64_t n, Vectors y, Work work) {
  std::vector<std::optional<Padded>> sums(static_cast<size_t>(threads));
  share(count, row_bytes, threads, [&](int part, int64_t first, int64_t last) {
    auto& own = sums[static_cast<size_t>(part)].emplace(n, y.tokens);
    work(first, last, own.vectors());
  });
  for (auto& own : sums)
    if (own) own->add_to(y);
}

int64_t row_bytes(const Rows& rows) { return rows.n * block_bytes(rows.encoding) / BLOCK; }

Rows from_row(Rows rows, int64_t first) {
  rows.slots += first;
  return rows;
}

// out[t][k] = row k . x[t] + bias of row k.
void biased_products(const Part& part, int64_t first, int64_t count, Vectors x, Vectors out) {
  kernels().products(from_row(part.rows, first), 0, count, x, out);
  if (!part.bias) return;
  for (int64_t t = 0; t < x.tokens; ++t)
    for (int64_t k = 0; k < count; ++k) out.token(t)[k] += part.bias[part.rows.slots[first + k]];
}

template <class Function>
void each(float* values, int64_t count, Function function) {
  for (int64_t i = 0; i < count; ++i) values[i] = function(values[i]);
}

}  // namespace

void activate(Activation activation, float threshold, float* values, int64_t count) {
  switch (activation) {
    case Activation::relu: return each(values, count, [](float v) { return v > 0 ? v : 0 * v; });
    case Activation::relu2:
      return each(values, count, [](float v) { return v > 0 ? v * v : 0 * v; });
    case Activation::fatrelu:
      return each(values, count, [=](float v) { return v > threshold ? v : 0; });
    case Activation::silu:
      return each(values, count, [](float v) { return v / (1 + std::exp(-v)); });
    case Activation::gelu:
      return each(values, count, [](float v) {
        return 0.5F * v * (1 + std::erf(v * 0.7071067811865476F));
      });
    case Activation::gelu_tanh:
      return each(values, count, [](float v) {
        const float inner = 0.7978845608028654F * (v + 0.044715F * v * v * v);
        return 0.5F * v * (1 + std::tanh(inner));
      });
  }
}

void products(const Rows& rows, int64_t count, Vectors x, Vectors out, int threads) {
  Padded input(rows.n, x);
  share(count, row_bytes(rows) * x.tokens, threads, [&](int, int64_t first, int64_t last) {
    kernels().products(rows, first, last, input.vectors(), out);
  });
}

void weighted_sum(const Rows& rows, int64_t count, Vectors h, Vectors y, int threads) {
  share_sums(count, row_bytes(rows) * h.tokens, threads, rows.n, y,
             [&](int64_t first, int64_t last, Vectors own) {
               kernels().weighted_sum(rows, first, last, h, own);
             });
}

void ffn(const Ffn& layer, int64_t count, Vectors x, Vectors y, int threads) {
  const int64_t n = layer.down.rows.n;
  Padded input(n, x);
  const int64_t bytes = 3 * row_bytes(layer.down.rows) * x.tokens;
  share_sums(count, bytes, threads, n, y, [&](int64_t first, int64_t last, Vectors own) {
    std::vector<float> hidden(static_cast<size_t>(FFN_ROWS * x.tokens));
    std::vector<float> factor(static_cast<size_t>(FFN_ROWS * x.tokens));
    const Vectors h{hidden.data(), FFN_ROWS, x.tokens};
    const Vectors up{factor.data(), FFN_ROWS, x.tokens};
    for (int64_t k = first; k < last; k += FFN_ROWS) {
      const int64_t some = std::min(FFN_ROWS, last - k);
      if (layer.selector) {
        biased_products(*layer.selector, k, some, input.vectors(), h);
        for (int64_t t = 0; t < x.tokens; ++t)
          activate(layer.activation, layer.threshold, h.token(t), some);
      } else {
        for (int64_t t = 0; t < x.tokens; ++t)
          std::copy_n(layer.active.token(t) + k, some, h.token(t));
      }
      if (layer.up) {
        biased_products(*layer.up, k, some, input.vectors(), up);
        for (int64_t t = 0; t < x.tokens; ++t)
          for (int64_t i = 0; i < some; ++i) h.token(t)[i] *= up.token(t)[i];
      }
      kernels().weighted_sum(from_row(layer.down.rows, k), 0, some, h, own);
    }
  });
}

void digests(const uint8_t* rows, int64_t stride, int64_t length, int64_t count, uint64_t* out,
             int threads) {
  share(count, length, threads, [&](int, int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k)
      out[k] = kernels().xxh3_64(rows + k * stride, static_cast<uint64_t>(length));
  });
}

template <class Item>
void transpose(const uint8_t* in, int64_t in_stride, int64_t height, int64_t width, uint8_t* out,
               int64_t out_stride, int threads) {
  // Squares whose lines, 64 bytes wide on either side, stay in the L1 cache.
  constexpr int64_t SIDE = 64 / sizeof(Item);
  const int64_t bands = (width + SIDE - 1) / SIDE;
  share(bands, height * SIDE * static_cast<int64_t>(sizeof(Item)), threads,
        [&](int, int64_t first, int64_t last) {
          for (int64_t j = 0; j < height; j += SIDE)
            for (int64_t band = first; band < last; ++band) {
              const int64_t j_end = std::min(j + SIDE, height);
              const int64_t i_end = std::min((band + 1) * SIDE, width);
              for (int64_t i = band * SIDE; i < i_end; ++i)
                for (int64_t at = j; at < j_end; ++at)
                  std::memcpy(out + i * out_stride + at * static_cast<int64_t>(sizeof(Item)),
                              in + at * in_stride + i * static_cast<int64_t>(sizeof(Item)),
                              sizeof(Item));
            }
        });
}

template void transpose<uint8_t>(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t, int);
template void transpose<uint16_t>(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t,
                                  int);
template void transpose<uint32_t>(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t,
                                  int);

}  // namespace bundlefmt
