// Vectors of WIDTH floats, in GCC's and clang's own notation: one source for every instruction set.
// Included inside an instruction set's namespace, after WIDTH is defined.

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct OutOfMemory {};

// Runs a part of a parallel region; what it throws becomes a flag, since it cannot cross OpenMP.
template <class Part>
static inline void attempt(bool& failed, Part part) {
  try {
    part();
  } catch (OutOfMemory) {
    __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  }
}

// An array, aligned for any vector; its contents are anything, or zeros. The standard library's
// containers and functions stay out of the code that is built several times: the linker keeps one
// copy of theirs, for whichever processor.
template <class T>
struct Buffer {
  T* data = nullptr;
  Buffer() = default;
  explicit Buffer(int64_t size) {
    data = static_cast<T*>(std::aligned_alloc(64, bytes(size)));
    if (!data) throw OutOfMemory();
  }
  static Buffer zeros(int64_t size) {
    Buffer buffer(size);
    std::memset(static_cast<void*>(buffer.data), 0, bytes(size));
    return buffer;
  }
  Buffer(Buffer&& other) noexcept : data(other.data) { other.data = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    T* mine = data;
    data = other.data, other.data = mine;
    return *this;
  }
  ~Buffer() { std::free(data); }
  T& operator[](int64_t i) const { return data[i]; }

 private:
  static size_t bytes(int64_t size) { return (size * sizeof(T) + 64) / 64 * 64; }
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

static inline Vector fill(float value) { return Vector{} + value; }

static inline float widen(float value) { return value; }

static inline float widen(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

static inline float widen(f16 value) {
  // shift exponent and mantissa into place, then mend the exponent's bias by a multiplication,
  // which is right for subnormals too; infinity and NaN keep a full exponent
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = uint32_t(value.bits & 0x7fff) << 13;
  float wide;
  std::memcpy(&wide, &rest, 4);
  wide *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  if ((value.bits & 0x7c00) == 0x7c00) bits = rest | 0x7f800000;
  bits |= sign;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// to nearest, ties to even
static inline void narrow(float value, float* out) { *out = value; }

static inline void narrow(float value, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void narrow(float value, f16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x47800000) {
    half = 0x7c00;  // infinity, or too large
  } else if (magnitude < 0x38800000) {  // subnormal: let an addition do the rounding
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, 4);
    half -= 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

static inline Vector load(const float* values) {
  Vector v;
  std::memcpy(&v, values, sizeof v);
  return v;
}

static inline Vector load(const bf16* values) {
  Halves halves;
  std::memcpy(&halves, values, sizeof halves);
  Integers bits = __builtin_convertvector(halves, Integers) << 16;
  return (Vector)bits;
}

static inline Vector load(const f16* values) {
#if defined(MOGU_F16C) && WIDTH == 16
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)values));
#elif defined(MOGU_F16C) && WIDTH == 8
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)values));
#else
  Vector v;
  for (int i = 0; i < WIDTH; ++i) v[i] = widen(values[i]);
  return v;
#endif
}

static inline void store(Vector v, float* out) { std::memcpy(out, &v, sizeof v); }

static inline void store(Vector v, bf16* out) {
#if defined(MOGU_BF16_DOT)
  Halves rounded;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
  std::memcpy(out, &rounded, sizeof rounded);
#else
  Integers bits = (Integers)v, magnitude = bits & 0x7fffffff;
  Integers rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
  Integers chosen = magnitude > 0x7f800000 ? quiet : rounded;
  Halves halves = __builtin_convertvector((chosen >> 16) & 0xffff, Halves);
  std::memcpy(out, &halves, sizeof halves);
#endif
}

static inline void store(Vector v, f16* out) {
  for (int i = 0; i < WIDTH; ++i) narrow(v[i], out + i);
}

#if defined(MOGU_BF16_DOT)
// acc + a * b by pairs of bf16, which travel as the 32 bits of a float. Spelt out: GCC 12 moves the
// intrinsic's own vector type through memory.
static inline Vector dot(Vector acc, Vector a, Vector b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
#endif

// lane of (a, b) that lane `lane` takes when groups of STEP lanes are brought together
template <int STEP, int HALF>
constexpr int picked(int lane) {
  int group = lane / (2 * STEP), within = lane % (2 * STEP);
  return group * 2 * STEP + within % STEP + HALF * STEP + (within < STEP ? 0 : WIDTH);
}

template <int STEP, int... LANES>
static inline Vector add_pair(Vector a, Vector b, std::integer_sequence<int, LANES...>) {
  return __builtin_shufflevector(a, b, picked<STEP, 0>(LANES)...) +
         __builtin_shufflevector(a, b, picked<STEP, 1>(LANES)...);
}

// Sums of WIDTH vectors: lane i of the result is the sum of the lanes of v[i]. Every step halves
// the number of vectors, at two shuffles and one addition a pair.
template <int COUNT = WIDTH>
static inline Vector sums(Vector* v) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    for (int i = 0; i < COUNT / 2; ++i)
      v[i] = add_pair<WIDTH / COUNT>(v[2 * i], v[2 * i + 1],
                                     std::make_integer_sequence<int, WIDTH>{});
    return sums<COUNT / 2>(v);
  }
}

// e^v, good to 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; clamped where floats end.
static inline Vector exponential(Vector v) {
  Vector top = fill(88.37f), bottom = fill(-87.3f);
  v = v < top ? v : top;
  v = v > bottom ? v : bottom;
  Vector shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to integers
  Vector n = shifted - 12582912.0f;
  Vector r = v - n * 0.693145752f - n * 1.42860677e-6f;
  Vector p = fill(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * (Vector)power;
}
