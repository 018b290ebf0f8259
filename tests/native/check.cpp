// The CPU backend without Python: every form, dtype and instruction set against exact arithmetic.
//
//   check [isa ...]     prints the first thing that failed and exits with 1
//
// Operands are small integers and routers whose gates are exactly 0, 1/2 or 1, so that every sum is
// exact in fp32 and the one rounding is known to the bit. Thread sanitizers, emulators of other
// processors and mutants of csrc/ run this.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "mogu.h"

using namespace mogu;

namespace {

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

struct Sizes {
  int64_t M, N, K, E, rank;
  bool softmax, bias, routed;
};

const Sizes SIZES[] = {
    {1, 37, 70, 2, 8, false, true, false},   {2, 9, 40, 2, 8, true, true, true},
    {3, 70, 1, 2, 3, true, true, false},     {5, 64, 129, 1, 1, false, false, true},
    {13, 33, 600, 2, 8, false, false, false}, {17, 136, 72, 8, 7, false, true, true},
    {25, 40, 1100, 2, 16, true, true, true}, {33, 40, 129, 3, 5, false, true, true},
};

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A matrix of numbers that every dtype holds, with room around it.
struct Tensor {
  Dtype dtype;
  int64_t rows, columns, stride;
  std::vector<unsigned char> bytes;

  Tensor(Dtype dtype, int64_t rows, int64_t columns)
      : dtype(dtype), rows(rows), columns(columns), stride(columns + 3), bytes((rows * stride + 5) * 4) {}
  int64_t width() const { return dtype == Dtype::f32 ? 4 : 2; }
  void* data() { return bytes.data() + width(); }  // an odd address
  void set(int64_t row, int64_t column, double value) {
    void* at = bytes.data() + width() * (1 + row * stride + column);
    round(value, dtype, at);
  }
  static void round(double value, Dtype dtype, void* at) {
    float wide = float(value);
    uint16_t half = to_bf16(wide);
    if (dtype == Dtype::f16) {
      Half narrow = Half(wide);
      std::memcpy(&half, &narrow, 2);
    }
    if (dtype == Dtype::f32) std::memcpy(at, &wide, 4);
    else std::memcpy(at, &half, 2);
  }
  double get(int64_t row, int64_t column) const {
    const void* at = bytes.data() + width() * (1 + row * stride + column);
    if (dtype == Dtype::f32) {
      float wide;
      std::memcpy(&wide, at, 4);
      return wide;
    }
    uint16_t half;
    std::memcpy(&half, at, 2);
    if (dtype == Dtype::f16) {
      Half narrow;
      std::memcpy(&narrow, &half, 2);
      return double(narrow);
    }
    uint32_t bits = uint32_t(half) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
  bool holds(int64_t row, int64_t column, double value) const {
    Tensor one(dtype, 1, 1);
    one.set(0, 0, value);
    return get(row, column) == one.get(0, 0);
  }
};

struct Routed {
  Tensor weight, bias, lora_A, lora_B, gate_weight, gate_bias, gates;
  std::vector<double> exact;   // [M, E] gates
  std::vector<double> shrunk;  // [M, E * rank], s * gate * h
  std::vector<double> total;   // [M]
  std::vector<double> y;       // [M, N]
};

struct Problem {
  Sizes sizes;
  Tensor x, y;
  std::vector<unsigned char> mask;
  std::vector<Routed> projections;
  Call call{};

  Problem(const Sizes& s, Dtype dtype, int count, unsigned seed)
      : sizes(s), x(dtype, s.M, s.K), y(dtype, s.M, s.N), mask(2 * s.M) {
    std::mt19937 random(seed);
    auto integer = [&] { return random() % 3 ? 0.0 : double(int(random() % 5) - 2); };
    auto fill = [&](Tensor& t) {
      for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t j = 0; j < t.columns; ++j) t.set(i, j, integer());
    };
    fill(x);
    for (int64_t m = 0; m < s.M; ++m) {
      mask[2 * m] = random() % 3 != 0;
      x.set(m, 0, double(int(random() % 3) - 1));  // what the routers look at
    }
    call.x = x.data(), call.x_m = x.stride;
    call.y = y.data(), call.y_m = y.stride;
    if (s.routed) call.routed = reinterpret_cast<const bool*>(mask.data()), call.routed_m = 2;
    call.M = s.M, call.N = s.N, call.K = s.K, call.E = s.E, call.rank = s.rank;
    call.softmax = s.softmax, call.threads = 3;
    for (int64_t e = 0; e < s.E; ++e) call.scaling[e] = e % 2 ? 0.5f : 2.0f;
    for (int j = 0; j < count; ++j) {
      projections.push_back({Tensor(dtype, s.N, s.K), Tensor(dtype, s.N, 1),
                             Tensor(dtype, s.E * s.rank, s.K), Tensor(dtype, s.E * s.N, s.rank),
                             Tensor(Dtype::f32, s.E, s.K), Tensor(Dtype::f32, s.E, 1),
                             Tensor(Dtype::f32, s.M, s.E), {}, {}, {}, {}});
      Routed& p = projections.back();
      for (Tensor* t : {&p.weight, &p.lora_A, &p.lora_B}) fill(*t);
      for (int64_t n = 0; n < s.N; ++n) p.bias.set(n, 0, 512 * integer());  // for ties in fp16
      for (int64_t e = 0; e < s.E; ++e) {
        p.gate_weight.set(e, 0, s.softmax ? (e ? 0 : 256) : e % 2 ? -256 : 256);
        if (!s.softmax) p.gate_bias.set(e, 0, e % 3 == 2 ? 256 : 0);
      }
      truth(p);
    }
  }

  void truth(Routed& p) {
    const Sizes& s = sizes;
    for (int64_t m = 0; m < s.M; ++m) {
      std::vector<double> logits(s.E), gates(s.E);
      double largest = -1e9, sum = 0, total = 0;
      for (int64_t e = 0; e < s.E; ++e) {
        for (int64_t k = 0; k < s.K; ++k) logits[e] += x.get(m, k) * p.gate_weight.get(e, k);
        logits[e] += p.gate_bias.get(e, 0);
        largest = std::fmax(largest, logits[e]);
      }
      for (double logit : logits) sum += std::exp(logit - largest);
      bool on = !s.routed || mask[2 * m];
      for (int64_t e = 0; e < s.E; ++e) {
        double gate = s.softmax ? std::exp(logits[e] - largest) / sum : 1 / (1 + std::exp(-logits[e]));
        gates[e] = gate < 1e-30 ? 0 : gate > 1 - 1e-9 ? 1 : gate;
        p.exact.push_back(gates[e]);
        total += on ? gates[e] : 0;
      }
      if (!on) total = 1;
      p.total.push_back(total);
      for (int64_t e = 0; e < s.E; ++e)
        for (int64_t r = 0; r < s.rank; ++r) {
          double h = 0;
          for (int64_t k = 0; k < s.K; ++k) h += x.get(m, k) * p.lora_A.get(e * s.rank + r, k);
          p.shrunk.push_back(on ? call.scaling[e] * gates[e] * h : 0);
        }
      for (int64_t n = 0; n < s.N; ++n) {
        double base = s.bias ? p.bias.get(n, 0) : 0, sum = 0;
        for (int64_t k = 0; k < s.K; ++k) base += x.get(m, k) * p.weight.get(n, k);
        sum = total * base;
        for (int64_t e = 0; e < s.E; ++e)
          for (int64_t r = 0; r < s.rank; ++r)
            sum += p.shrunk[m * s.E * s.rank + e * s.rank + r] * p.lora_B.get(e * s.N + n, r);
        p.y.push_back(sum);
      }
    }
  }

  void connect() {
    const Sizes& s = sizes;
    for (size_t j = 0; j < projections.size(); ++j) {
      Routed& p = projections[j];
      Projection& to = call.projections[j];
      to = {};
      to.weight = p.weight.data(), to.weight_n = p.weight.stride;
      if (s.bias) to.bias = p.bias.data(), to.bias_n = p.bias.stride;
      to.lora_A = p.lora_A.data();
      to.lora_A_e = s.rank * p.lora_A.stride, to.lora_A_r = p.lora_A.stride;
      to.lora_B = p.lora_B.data();
      to.lora_B_e = s.N * p.lora_B.stride, to.lora_B_n = p.lora_B.stride, to.lora_B_r = 1;
      to.gate_weight = static_cast<float*>(p.gate_weight.data());
      to.gate_weight_e = p.gate_weight.stride;
      to.gate_bias = static_cast<float*>(p.gate_bias.data()), to.gate_bias_e = p.gate_bias.stride;
    }
  }
};

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED %s\n", what.c_str());
  std::exit(1);
}

bool all_hold(const Tensor& t, const std::vector<double>& values) {
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = 0; j < t.columns; ++j)
      if (!t.holds(i, j, values[i * t.columns + j])) return false;
  return true;
}

void check_projection(const Kernels& kernels, const Sizes& s, Dtype dtype, int64_t most,
                      const std::string& what) {
  Problem problem(s, dtype, 1, 1);
  problem.connect();
  problem.call.most_tiled = most;
  std::vector<float> gates(s.M * s.E);
  problem.call.projections[0].gates = gates.data();
  expect(kernels.project(problem.call, dtype), what + " ran out of memory");
  expect(all_hold(problem.y, problem.projections[0].y), what + ": y");
  for (size_t i = 0; i < gates.size(); ++i)
    expect(std::fabs(gates[i] - problem.projections[0].exact[i]) < 1e-6, what + ": gates");
}

void check_mlp(const Kernels& kernels, const Sizes& s, Dtype dtype, int64_t most, Activation kind,
               const std::string& what) {
  Problem problem(s, dtype, 2, 2);
  problem.connect();
  problem.call.most_tiled = most, problem.call.activation = kind;
  expect(kernels.project(problem.call, dtype), what + " ran out of memory");
  double unit = dtype == Dtype::f32 ? 1e-6 : dtype == Dtype::f16 ? 1e-3 : 8e-3;
  for (int64_t m = 0; m < s.M; ++m)
    for (int64_t n = 0; n < s.N; ++n) {
      double z = problem.projections[0].y[m * s.N + n], up = problem.projections[1].y[m * s.N + n];
      double tanh = std::tanh(0.7978845608 * (z + 0.044715 * z * z * z));
      double act = kind == Activation::silu   ? z / (1 + std::exp(-z))
                   : kind == Activation::gelu ? 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)))
                                              : 0.5 * z * (1 + tanh);
      double ref = act * up;
      if (dtype == Dtype::f16 && std::fabs(ref) > 6e4) continue;
      expect(std::fabs(problem.y.get(m, n) - ref) <= unit * std::fabs(ref) + 1e-5 * std::fabs(up) + 1e-6,
             what + ": y");
    }
}

void check_parts(const Kernels& kernels, const Sizes& s, Dtype dtype, int64_t most,
                 const std::string& what) {
  Problem problem(s, dtype, 1, 3);
  problem.connect();
  problem.call.most_tiled = most;
  Routed& p = problem.projections[0];
  Projection& to = problem.call.projections[0];
  Tensor shrunk(dtype, s.M, s.E * s.rank);
  shrunk.stride = shrunk.columns;
  std::vector<float> total(s.M), gates(s.M * s.E);
  to.shrunk = shrunk.data(), to.total = total.data(), to.gates = gates.data();
  expect(kernels.shrink(problem.call, dtype), what + " ran out of memory");
  expect(all_hold(shrunk, p.shrunk), what + ": shrunk");
  for (int64_t m = 0; m < s.M; ++m) expect(total[m] == p.total[m], what + ": total");
  // a base of integers, and what the shrink has rounded
  std::vector<double> expected;
  std::mt19937 random(4);
  for (int64_t m = 0; m < s.M; ++m)
    for (int64_t n = 0; n < s.N; ++n) {
      double base = double(int(random() % 9) - 4);
      problem.y.set(m, n, base);
      double sum = total[m] * (base + (s.bias ? p.bias.get(n, 0) : 0));
      for (int64_t c = 0; c < s.E * s.rank; ++c)
        sum += shrunk.get(m, c) * p.lora_B.get(c / s.rank * s.N + n, c % s.rank);
      expected.push_back(sum);
    }
  Expansion call{};
  call.y = problem.y.data(), call.y_m = problem.y.stride;
  call.shrunk = shrunk.data(), call.shrunk_m = shrunk.stride;
  call.total = total.data(), call.total_m = 1;
  call.lora_B = to.lora_B, call.lora_B_e = to.lora_B_e, call.lora_B_n = to.lora_B_n;
  call.lora_B_r = to.lora_B_r, call.bias = to.bias, call.bias_n = to.bias_n;
  call.M = s.M, call.N = s.N, call.E = s.E, call.rank = s.rank, call.threads = 3;
  expect(kernels.expand(call, dtype), what + " ran out of memory");
  expect(all_hold(problem.y, expected), what + ": expanded y");
}

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    std::string isa = names[i];
    const Kernels* kernels = isa == "portable" ? &portable_kernels : nullptr;
#if defined(MOGU_CHECK_X86)
    if (isa == "avx2") kernels = &avx2_kernels;
    if (isa == "avx512") kernels = &avx512_kernels;
    if (isa == "avx512bf16") kernels = &avx512bf16_kernels;
#endif
    if (!kernels) {
      std::printf("%s was not built\n", isa.c_str());
      return 2;
    }
    for (const Sizes& s : SIZES)
      for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
        for (int64_t most : {int64_t(0), int64_t(1000)}) {
          std::string what = isa + (most ? " tiled" : " blocked") + " M=" + std::to_string(s.M) +
                             " dtype=" + std::to_string(int(dtype));
          check_projection(*kernels, s, dtype, most, what);
          check_parts(*kernels, s, dtype, most, what);
          for (Activation kind : {Activation::silu, Activation::gelu, Activation::gelu_tanh})
            check_mlp(*kernels, s, dtype, most, kind, what + " mlp");
        }
  }
  std::printf("all exact\n");
  return 0;
}
