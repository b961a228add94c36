#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace bundlefmt {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs_here;
};

const Kernels& choose() {
  const Choice choices[] = {
#if defined(__x86_64__)
      {&avx512_kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      // Every CPU with AVX2 has F16C.
      {&avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&portable_kernels, true},
  };
  const char* forced = std::getenv("BUNDLEFMT_SIMD");
  for (const Choice& choice : choices)
    if (choice.runs_here && (!forced || std::string(forced) == choice.kernels->name))
      return *choice.kernels;
  std::string expected;
  for (const Choice& choice : choices)
    if (choice.runs_here) expected += (expected.empty() ? "" : ", ") + std::string(choice.kernels->name);
  throw std::invalid_argument(expected);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace bundlefmt
