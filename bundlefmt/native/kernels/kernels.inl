// The kernels, compiled once per instruction set: the including file names it in BUNDLEFMT_KERNELS.
//
// Strategy: four rows at a time, so that x is loaded once for four of them and four streams of
// memory are open; up to four tokens at a time, so that a block is decoded once for all of them.

#define XXH_INLINE_ALL
#include "xxhash.h"

#include "kernels.hpp"
#include "vec.hpp"

namespace bundlefmt {
namespace {

constexpr int VECS = BLOCK / WIDTH;  // vectors of a block
constexpr int ROWS = 4;
constexpr int TOKENS = 4;

template <Encoding E>
inline void decode(const uint8_t* block, Vec* to) {
  if constexpr (E == Encoding::q4_0) {
    from_nibbles(block + 2, scale_of(block), to);
  } else {
    for (int j = 0; j < VECS; ++j) {
      const int i = j * WIDTH;
      if constexpr (E == Encoding::f32) std::memcpy(to + j, block + 4 * i, sizeof(Vec));
      if constexpr (E == Encoding::f16) to[j] = from_f16(block + 2 * i);
      if constexpr (E == Encoding::bf16) to[j] = from_bf16(block + 2 * i);
      if constexpr (E == Encoding::q8_0) to[j] = from_i8(block + 2 + i) * scale_of(block);
    }
  }
}

// Calls use(index, blocks) for each block of R rows; what is left of rows that end within a block
// is continued with zeros.
template <Encoding E, int R, class Use>
inline void for_each_block(const uint8_t* const* rows, const uint8_t* const* next, int64_t n,
                           Use use) {
  constexpr int64_t bytes = block_bytes(E);
  const int64_t whole = n / BLOCK;
  const uint8_t* at[R];
  for (int64_t b = 0; b < whole; ++b) {
    for (int r = 0; r < R; ++r) {
      at[r] = rows[r] + b * bytes;
      // Into the L2 cache: four rows ahead are as much as the L1 cache holds.
      for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(next[r] + b * bytes + line, 0, 2);
    }
    use(b, at);
  }
  if (const int64_t rest = n % BLOCK) {
    uint8_t tails[R][bytes] = {};
    for (int r = 0; r < R; ++r) {
      std::memcpy(tails[r], rows[r] + whole * bytes,
                  static_cast<size_t>(rest * bytes / BLOCK));
      at[r] = tails[r];
    }
    use(whole, at);
  }
}

// A tile is R rows by T tokens of one of the two kernels.
struct Dot {
  template <Encoding E, int R, int T>
  static void tile(const uint8_t* const* rows, const uint8_t* const* next, int64_t n, Vectors x,
                   int64_t first_token, Vectors out, int64_t k) {
    Vec total[R][T] = {};
    for_each_block<E, R>(rows, next, n, [&](int64_t b, const uint8_t* const* blocks) {
      for (int r = 0; r < R; ++r) {
        Vec numbers[VECS];
        decode<E>(blocks[r], numbers);
        for (int t = 0; t < T; ++t) {
          const float* from = x.token(first_token + t) + b * BLOCK;
          for (int j = 0; j < VECS; ++j) total[r][t] += numbers[j] * load(from + j * WIDTH);
        }
      }
    });
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) out.token(first_token + t)[k + r] = sum(total[r][t]);
  }
};

struct Sum {
  template <Encoding E, int R, int T>
  static void tile(const uint8_t* const* rows, const uint8_t* const* next, int64_t n, Vectors h,
                   int64_t first_token, Vectors y, int64_t k) {
    Vec weights[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) weights[r][t] = broadcast(h.token(first_token + t)[k + r]);
    for_each_block<E, R>(rows, next, n, [&](int64_t b, const uint8_t* const* blocks) {
      Vec totals[T][VECS];
      for (int t = 0; t < T; ++t)
        for (int j = 0; j < VECS; ++j)
          totals[t][j] = load(y.token(first_token + t) + b * BLOCK + j * WIDTH);
      for (int r = 0; r < R; ++r) {
        Vec numbers[VECS];
        decode<E>(blocks[r], numbers);
        for (int t = 0; t < T; ++t)
          for (int j = 0; j < VECS; ++j) totals[t][j] += numbers[j] * weights[r][t];
      }
      for (int t = 0; t < T; ++t)
        for (int j = 0; j < VECS; ++j)
          store(y.token(first_token + t) + b * BLOCK + j * WIDTH, totals[t][j]);
    });
  }
};

template <class Kernel, Encoding E, int R>
void some_rows(const Rows& rows, int64_t k, int64_t last, Vectors in, Vectors out) {
  const uint8_t* at[R];
  const uint8_t* next[R];
  for (int r = 0; r < R; ++r) {
    at[r] = rows.row(k + r);
    next[r] = rows.row(k + R + r < last ? k + R + r : k + r);
  }
  int64_t t = 0;
  for (; t + TOKENS <= in.tokens; t += TOKENS)
    Kernel::template tile<E, R, TOKENS>(at, next, rows.n, in, t, out, k);
  for (; t < in.tokens; ++t) Kernel::template tile<E, R, 1>(at, next, rows.n, in, t, out, k);
}

template <class Kernel, Encoding E>
void all_rows(const Rows& rows, int64_t first, int64_t last, Vectors in, Vectors out) {
  int64_t k = first;
  for (; k + ROWS <= last; k += ROWS) some_rows<Kernel, E, ROWS>(rows, k, last, in, out);
  for (; k < last; ++k) some_rows<Kernel, E, 1>(rows, k, last, in, out);
}

template <class Kernel>
void run(const Rows& rows, int64_t first, int64_t last, Vectors in, Vectors out) {
  switch (rows.encoding) {
    case Encoding::f32: return all_rows<Kernel, Encoding::f32>(rows, first, last, in, out);
    case Encoding::f16: return all_rows<Kernel, Encoding::f16>(rows, first, last, in, out);
    case Encoding::bf16: return all_rows<Kernel, Encoding::bf16>(rows, first, last, in, out);
    case Encoding::q8_0: return all_rows<Kernel, Encoding::q8_0>(rows, first, last, in, out);
    case Encoding::q4_0: return all_rows<Kernel, Encoding::q4_0>(rows, first, last, in, out);
  }
}

uint64_t digest(const void* data, uint64_t length) { return XXH3_64bits(data, length); }

}  // namespace

const Kernels BUNDLEFMT_KERNELS = {BUNDLEFMT_SIMD_NAME, run<Dot>, run<Sum>, digest};

}  // namespace bundlefmt
