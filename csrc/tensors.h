// Tensors as Python hands them over: addresses, sizes and strides through DLPack's C exchange API,
// which reads a tensor in tens of nanoseconds and asks for no torch at build time.
#pragma once

#include <cstring>
#include <initializer_list>

#include "mogu.h"

namespace mogu {

// DLPack 1.x as its specification lays it out (dmlc/dlpack); what is not read here has no name.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* managed[3];
  int (*read)(void* object, DLTensor* out);
};

enum : int32_t { ON_CPU = 1 };
enum : uint8_t { FLOAT = 2, BFLOAT = 4, BOOL = 6 };

// One tensor.
struct View {
  DLTensor t{};

  bool is(uint8_t code, uint8_t bits) const { return t.code == code && t.bits == bits; }
  bool is(Dtype dtype) const {
    return dtype == Dtype::f32 ? is(FLOAT, 32) : dtype == Dtype::f16 ? is(FLOAT, 16) : is(BFLOAT, 16);
  }
  bool has(std::initializer_list<int64_t> sizes) const {
    if (t.device_type != ON_CPU || t.ndim != int32_t(sizes.size())) return false;
    int axis = 0;
    for (int64_t size : sizes)
      if (t.shape[axis++] != size) return false;
    return true;
  }
  bool rows_are_contiguous() const {
    return t.strides[t.ndim - 1] == 1 || t.shape[t.ndim - 1] <= 1;
  }
  bool is_empty() const {
    for (int axis = 0; axis < t.ndim; ++axis)
      if (t.shape[axis] == 0) return true;
    return false;
  }
  int64_t size(int axis) const { return t.shape[axis]; }
  int64_t stride(int axis) const { return t.strides[axis]; }
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
  }
};

}  // namespace mogu
