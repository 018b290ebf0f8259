// The two steps around any other base: shrink and gate before it, gate and expand after it.

// shrunk[m, c] = scaling_e * gates[m, e] * (x[m, :] . lora_A[e, j, :]), c = e * rank + j, rounded;
// total[m] the sum of the gates. Of a call of tokens from m on.
template <class T>
static void store_shrunk(const Call& call, const Gated& gated, int64_t m, int64_t count) {
  const Projection& p = call.projections[0];
  int64_t columns = call.E * call.rank;
  for (int64_t i = 0; i < count; ++i) {
    p.total[m + i] = gated.total[i];
    for (int64_t c = 0; c < columns; ++c)
      narrow(gated.shrunk[i * gated.ranks + c],
             static_cast<T*>(p.shrunk) + (m + i) * columns + c);
  }
}

// Few tokens: the rows are shared out between the threads, and thread 0 works out the gates.
template <class T>
static bool shrink_few(const Call& call) {
  Narrow<T> narrow(call);
  Buffer<float> h((narrow.experts + call.E) * call.M);
  bool failed = false;
#pragma omp parallel num_threads(call.threads)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    attempt(failed, [&] {
      Tokens<T> tokens(call);
      own_shrink<4>(call, narrow, tokens, me, threads, h.data);
    });
#pragma omp barrier
    if (me == 0 && !__atomic_load_n(&failed, __ATOMIC_RELAXED))
      attempt(failed, [&] {
        Gated gated;
        gate(call, call.projections[0], h.data, call.projections[0].gates, gated);
        store_shrunk<T>(call, gated, 0, call.M);
      });
  }
  return !failed;
}

// Many: tiles of tokens are.
template <class T>
static bool shrink_many(const Call& call) {
  Narrow<T> narrow(call);
  int64_t tiles = (call.M + WIDE_TILE - 1) / WIDE_TILE;
  bool failed = false;
#pragma omp parallel num_threads(call.threads)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    attempt(failed, [&] {
      for (int64_t i = tiles * me / threads; i < tiles * (me + 1) / threads; ++i) {
        int64_t m = i * WIDE_TILE, count = smaller(WIDE_TILE, call.M - m);
        Call part = part_of<T>(call, m, count);
        Tokens<T> tokens(part);
        Gated gated;
        shrink_part(part, narrow, tokens, 0, gated);
        store_shrunk<T>(call, gated, m, count);
      }
    });
  }
  return !failed;
}

constexpr int64_t GROUP = 8;  // panels whose lora_B a thread keeps at once

// Columns n to last of y, at most GROUP panels.
template <class T>
static void expand_group(const Expansion& call, int64_t n, int64_t last, Vector* B) {
  int64_t columns = call.E * call.rank, panels = (last - n + PANEL - 1) / PANEL;
  float bias[GROUP * PANEL] = {};
  for (int64_t i = 0; i < panels; ++i)
    take_expansion<T>(call, call, n + i * PANEL, B + i * 2 * columns);
  if (call.bias)
    for (int64_t i = 0; n + i < last; ++i)
      bias[i] = widen(static_cast<const T*>(call.bias)[(n + i) * call.bias_n]);
  for (int64_t m = 0; m < call.M; ++m) {
    const T* shrunk = static_cast<const T*>(call.shrunk) + m * call.shrunk_m;
    float total = call.total[m * call.total_m];
    for (int64_t i = 0; i < panels; ++i) {
      T* y = static_cast<T*>(call.y) + m * call.y_m + n + i * PANEL;
      int64_t width = smaller(PANEL, last - n - i * PANEL);
      T tail[PANEL] = {};
      T* at = width == PANEL ? y : tail;
      if (at == tail) std::memcpy(tail, y, width * sizeof(T));
      const Vector* b = B + i * 2 * columns;
      Vector low = (load(at) + load(bias + i * PANEL)) * total;
      Vector high = (load(at + WIDTH) + load(bias + i * PANEL + WIDTH)) * total;
      for (int64_t c = 0; c < columns; ++c) {
        float s = widen(shrunk[c]);
        low += b[2 * c] * s;
        high += b[2 * c + 1] * s;
      }
      store(low, at);
      store(high, at + WIDTH);
      if (at == tail) std::memcpy(y, tail, width * sizeof(T));
    }
  }
}

template <class T>
static bool run_expansion(const Expansion& call) {
  int64_t panels = (call.N + PANEL - 1) / PANEL;
  bool failed = false;
#pragma omp parallel num_threads(call.threads)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t first = panels * me / threads * PANEL, last = panels * (me + 1) / threads * PANEL;
    attempt(failed, [&] {
      Buffer<Vector> B(GROUP * 2 * call.E * call.rank);
      for (int64_t n = first; n < last; n += GROUP * PANEL)
        expand_group<T>(call, n, smaller(smaller(n + GROUP * PANEL, last), call.N), B.data);
    });
  }
  return !failed;
}
