#define BUNDLEFMT_KERNELS avx512_kernels
#define BUNDLEFMT_SIMD_NAME "avx512"
#include "kernels.inl"
