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
  float* gates;  // [M, E]
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

using Run = void (*)(const Call&, Dtype);

// One build of the same code per instruction set.
void run_portable(const Call&, Dtype);
#if defined(__x86_64__)
void run_avx2(const Call&, Dtype);
void run_avx512(const Call&, Dtype);
void run_avx512bf16(const Call&, Dtype);
#endif

}  // namespace mogu
