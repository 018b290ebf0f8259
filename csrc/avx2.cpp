// 256-bit vectors.
#include "standard.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define WIDTH 8
#define MOGU_F16C

namespace mogu::avx2 {
#include "vectors.h"
#include "kernels.h"
#include "gemm.h"
#include "parts.h"
#include "run.h"
}

const mogu::Kernels mogu::avx2_kernels = mogu::avx2::kernels;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
