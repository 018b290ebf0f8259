// The CPU backend: what its files share. Strides are in elements; the last axis of x, weight,
// lora_A and gate_weight is contiguous, and so are y's and the gates' (the caller sees to it).
#pragma once

#include <cstdint>

namespace mogu {

enum class Dtype : int64_t { f32, f16, bf16 };
enum class Activation : int64_t { none, silu, gelu, gelu_tanh };

constexpr int64_t MAX_EXPERTS = 8;

// One routed projection of x [M, K].
struct Projection {
  const void* weight;  // [N, K]
  int64_t weight_n;
  const void* bias;  // [N] or null
  int64_t bias_n;
  const void* lora_A;  // [E, rank, K]
  int64_t lora_A_e, lora_A_r;
  const void* lora_B;  // [E, N, rank]
  int64_t lora_B_e, lora_B_n, lora_B_r;
  const float* gate_weight;  // [E, K]
  int64_t gate_weight_e;
  const float* gate_bias;  // [E]
  int64_t gate_bias_e;
  float* gates;  // [M, E] or null
  void* shrunk;  // [M, E * rank], for shrink alone
  float* total;  // [M], for shrink alone
};

// y = projection(x), or activation(projections[0](x)) * projections[1](x).
struct Call {
  const void* x;  // [M, K]
  int64_t x_m;
  const bool* routed;  // [M] or null
  int64_t routed_m;
  void* y;  // [M, N]
  int64_t y_m;
  int64_t M, N, K, E, rank, threads;
  int64_t most_tiled;  // more tokens than these take the blocked form
  bool softmax;
  Activation activation;  // none: one projection
  float scaling[MAX_EXPERTS];
  Projection projections[2];
};

// y = total[:, None] * (y + bias) + shrunk @ lora_B^T, in place.
struct Expansion {
  void* y;  // [M, N]
  int64_t y_m;
  const void* shrunk;  // [M, E * rank]
  int64_t shrunk_m;
  const float* total;  // [M]
  int64_t total_m;
  const void* lora_B;  // [E, N, rank]
  int64_t lora_B_e, lora_B_n, lora_B_r;
  const void* bias;  // [N] or null
  int64_t bias_n;
  int64_t M, N, E, rank, threads;
};

// False: out of memory, and the outputs hold anything.
struct Kernels {
  bool (*project)(const Call&, Dtype);
  bool (*shrink)(const Call&, Dtype);  // reads no weight, writes shrunk, total and gates
  bool (*expand)(const Expansion&, Dtype);
};

// One build of the same code per instruction set.
extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512bf16_kernels;
#endif

}  // namespace mogu
