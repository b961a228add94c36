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

// Whether the memory and the work come to more than 64 bits count, or anyone waits for.
bool too_much(int64_t tokens, int64_t count, int64_t n) {
  constexpr double MOST = 1e17;
  return static_cast<double>(tokens) * static_cast<double>(count + FFN_ROWS) *
             static_cast<double>(n + BLOCK) > MOST;
}

const char* part_fault(const Part& part) {
  const Encoding encoding = part.rows.encoding;
  const int64_t n = part.rows.n;
  if (n < 0) return "a width below zero";
  if ((encoding == Encoding::q8_0 || encoding == Encoding::q4_0) && n % BLOCK != 0)
    return "block encodings take multiples of 32 numbers";
  int64_t bytes;
  if (__builtin_mul_overflow(n, block_bytes(encoding), &bytes) || part.bytes != bytes / BLOCK)
    return "a part's bytes do not hold that many numbers";
  return nullptr;
}

template <class Item>
void transpose_items(const uint8_t* in, int64_t in_stride, int64_t height, int64_t width,
                     uint8_t* out, int64_t out_stride, int threads) {
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

}  // namespace

const char* threads_fault(int threads) {
  return threads >= 1 && threads <= MAX_THREADS ? nullptr : "threads: 1 to 1024";
}

const char* slots_fault(const int64_t* slots, int64_t count, int64_t stored) {
  const auto inside = [=](int64_t slot) { return slot >= 0 && slot < stored; };
  return std::all_of(slots, slots + count, inside) ? nullptr : "no such slot";
}

const char* products_fault(const Part& part, int64_t count, Vectors x, int threads) {
  if (const char* fault = threads_fault(threads)) return fault;
  if (x.stride != part.rows.n) return "vectors and rows of different lengths";
  if (const char* fault = part_fault(part)) return fault;
  return too_much(x.tokens, count, part.rows.n) ? "too much to compute" : nullptr;
}

const char* weighted_sum_fault(const Part& part, int64_t count, Vectors h, int threads) {
  if (const char* fault = threads_fault(threads)) return fault;
  if (h.stride != count) return "as many weights as rows";
  if (const char* fault = part_fault(part)) return fault;
  return too_much(h.tokens, count, part.rows.n) ? "too much to compute" : nullptr;
}

const char* ffn_fault(const Ffn& layer, int64_t count, Vectors x, int threads) {
  if (layer.selector.has_value() == layer.active.has_value())
    return "a selector, or activations: one of them";
  for (const auto* part : {&layer.selector, &layer.up}) {
    if (!*part) continue;
    if ((*part)->stored != layer.down.stored) return "parts of different numbers of rows";
    if ((*part)->rows.n != x.stride) return "vectors and rows of different lengths";
    if (const char* fault = part_fault(**part)) return fault;
  }
  if (layer.active && (layer.active->tokens != x.tokens || layer.active->stride != count))
    return "activations: one per token and slot";
  return products_fault(layer.down, count, x, threads);
}

const char* transpose_fault(int64_t in_rows, int64_t in_bytes, int64_t out_rows, int64_t out_bytes,
                            int item, int threads) {
  if (const char* fault = threads_fault(threads)) return fault;
  if (item != 1 && item != 2 && item != 4) return "items of 1, 2 or 4 bytes";
  if (in_bytes % item || out_bytes % item || in_bytes / item != out_rows ||
      out_bytes / item != in_rows)
    return "not the shape of the transposed matrix";
  return nullptr;
}

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
          std::copy_n(layer.active->token(t) + k, some, h.token(t));
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

void transpose(const uint8_t* in, int64_t in_stride, int64_t height, int64_t width, uint8_t* out,
               int64_t out_stride, int item, int threads) {
  if (!height || !width) return;
  const auto run = item == 1   ? transpose_items<uint8_t>
                   : item == 2 ? transpose_items<uint16_t>
                               : transpose_items<uint32_t>;
  run(in, in_stride, height, width, out, out_stride, threads);
}

}  // namespace bundlefmt
