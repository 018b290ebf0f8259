// 512-bit vectors.
#include "standard.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define WIDTH 16
#define MOGU_F16C

namespace mogu::avx512 {
#include "vectors.h"
#include "kernels.h"
#include "gemm.h"
#include "parts.h"
#include "run.h"
}

const mogu::Kernels mogu::avx512_kernels = mogu::avx512::kernels;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
