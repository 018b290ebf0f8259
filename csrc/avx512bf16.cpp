// 512-bit vectors, and dots of bf16 pairs.
#include "standard.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define WIDTH 16
#define MOGU_F16C
#define MOGU_BF16_DOT
namespace mogu::avx512bf16 {
#include "vectors.h"
#include "kernels.h"
#include "gemm.h"
#include "parts.h"
#include "run.h"
}

const mogu::Kernels mogu::avx512bf16_kernels = mogu::avx512bf16::kernels;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
