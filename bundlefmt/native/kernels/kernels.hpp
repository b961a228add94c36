// The arithmetic over rows of stored numbers, once per instruction set.
#pragma once

#include <cstdint>

namespace bundlefmt {

enum class Encoding { f32, f16, bf16, q8_0, q4_0 };

constexpr int64_t BLOCK = 32;  // numbers decoded at a time; x and y are padded to a multiple of it

constexpr int64_t block_bytes(Encoding encoding) {
  switch (encoding) {
    case Encoding::f32: return 4 * BLOCK;
    case Encoding::f16:
    case Encoding::bf16: return 2 * BLOCK;
    case Encoding::q8_0: return 2 + BLOCK;
    case Encoding::q4_0: return 2 + BLOCK / 2;
  }
  return 0;
}

// Rows of n numbers each: row k lies at base + slots[k] * stride.
struct Rows {
  Encoding encoding;
  const uint8_t* base;
  int64_t stride;
  const int64_t* slots;
  int64_t n;

  const uint8_t* row(int64_t k) const { return base + slots[k] * stride; }
};

// `tokens` vectors, each `stride` floats after the one before.
struct Vectors {
  float* data;
  int64_t stride;
  int64_t tokens;

  float* token(int64_t t) const { return data + t * stride; }
};

struct Kernels {
  const char* name;
  // out[t][k] = row k . x[t], for first <= k < last. x is zero up to a multiple of BLOCK.
  void (*products)(const Rows&, int64_t first, int64_t last, Vectors x, Vectors out);
  // y[t] += sum of h[t][k] * row k, for first <= k < last. y has room up to a multiple of BLOCK.
  void (*weighted_sum)(const Rows&, int64_t first, int64_t last, Vectors h, Vectors y);
  uint64_t (*xxh3_64)(const void* data, uint64_t length);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The best that this CPU has, or what BUNDLEFMT_SIMD names; chosen once. Throws
// std::invalid_argument, with the names that this CPU can take, for any other name.
const Kernels& kernels();

}  // namespace bundlefmt
