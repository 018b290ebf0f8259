// Which form serves a call. Included last, inside an instruction set's namespace.

template <class T>
static bool run_projection(const Call& call) {
  if (call.M > call.most_tiled) return run_blocked<T>(call);
  if (call.M == 1) return run_tiled<WIDTH, T>(call);
  if (call.M == 2) return run_tiled<WIDTH / 2, T>(call);
  return run_tiled<4, T>(call);
}

template <class T>
static bool run_shrink(const Call& call) {
  return call.M > call.most_tiled ? shrink_many<T>(call) : shrink_few<T>(call);
}

// What is set up before a parallel region may run out of memory too.
#define MOGU_BY_DTYPE(kernel, Arguments)                 \
  static bool kernel(const Arguments& call, Dtype dtype) { \
    try {                                                \
      if (dtype == Dtype::f32) return kernel<float>(call); \
      if (dtype == Dtype::f16) return kernel<f16>(call);   \
      return kernel<bf16>(call);                         \
    } catch (OutOfMemory) {                              \
      return false;                                      \
    }                                                    \
  }
MOGU_BY_DTYPE(run_projection, Call)
MOGU_BY_DTYPE(run_shrink, Call)
MOGU_BY_DTYPE(run_expansion, Expansion)
#undef MOGU_BY_DTYPE

static constexpr Kernels kernels = {run_projection, run_shrink, run_expansion};
