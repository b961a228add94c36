#define BUNDLEFMT_KERNELS avx2_kernels
#define BUNDLEFMT_SIMD_NAME "avx2"
#include "kernels.inl"
