#define BUNDLEFMT_KERNELS portable_kernels
#define BUNDLEFMT_SIMD_NAME "portable"
#include "kernels.inl"
