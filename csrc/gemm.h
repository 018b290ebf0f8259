// The routed projection for many tokens: the same mathematics as kernels.h around a blocked GEMM.
//
// Two parallel phases with a barrier between them. First tiles of COUNT tokens are shared out: each
// thread shrinks its own, works out their gates and lays them side by side, in fp32 or as pairs of
// bf16. Then the rows of weight are: a panel of 2 * WIDTH rows is transposed once into this thread's
// cache and meets every tile, with 2 * COUNT accumulators in registers; gate, expand and bias are
// applied to those before the one rounding.

constexpr int WIDE_TILE = WIDTH == 16 ? 12 : 6;  // tokens whose accumulators fit the registers
constexpr int PANEL = 2 * WIDTH;                 // rows of weight

// What stands for a step of K in a panel: one fp32 column, or a pair of bf16 columns.
template <class T>
struct Column {
  using Token = float;
  static constexpr int STEP = 1;
  static inline Vector block(const T* w) { return load(w); }
  static inline Vector add(Vector acc, Vector w, float x) { return acc + w * x; }
};

#if defined(MOGU_BF16_DOT)
template <>
struct Column<bf16> {
  using Token = int32_t;  // the bits of two of them
  static constexpr int STEP = 2;
  static inline Vector block(const bf16* w) { return load((const float*)w); }
  static inline Vector add(Vector acc, Vector w, int32_t x) {
    return dot(acc, w, (Vector)(Integers{} + x));
  }
};
#endif

template <int STEP, int HALF, int... LANES>
static inline Vector exchange(Vector a, Vector b, std::integer_sequence<int, LANES...>) {
  // HALF 0: lanes with STEP unset from a, the others from b one block lower; HALF 1: mirrored
  return __builtin_shufflevector(
      a, b,
      (HALF == 0 ? (LANES & STEP ? WIDTH + LANES - STEP : LANES)
                 : (LANES & STEP ? WIDTH + LANES : LANES + STEP))...);
}

// v[row][column] becomes v[column][row]
template <int STEP = 1>
static inline void transpose(Vector* v) {
  if constexpr (STEP < WIDTH) {
    for (int i = 0; i < WIDTH; ++i)
      if (!(i & STEP)) {
        Vector a = v[i], b = v[i + STEP];
        v[i] = exchange<STEP, 0>(a, b, std::make_integer_sequence<int, WIDTH>{});
        v[i + STEP] = exchange<STEP, 1>(a, b, std::make_integer_sequence<int, WIDTH>{});
      }
    transpose<STEP * 2>(v);
  }
}

// Rows n to n + PANEL of weight as columns: panel[step of K][row]; what is missing is zero.
template <class T>
static void take_panel(const Call& call, const Projection& p, int64_t n, Vector* panel) {
  constexpr int64_t BLOCK = WIDTH * Column<T>::STEP;  // elements of a row in one vector
  for (int half = 0; half < 2; ++half) {
    const T* rows[WIDTH];
    for (int i = 0; i < WIDTH; ++i) {
      int64_t row = smaller(n + half * WIDTH + i, call.N - 1);
      rows[i] = static_cast<const T*>(p.weight) + row * p.weight_n;
    }
    for (int64_t k = 0; k < call.K; k += BLOCK) {
      Vector v[WIDTH];
      for (int i = 0; i < WIDTH; ++i) {
        if (k + BLOCK <= call.K) {
          v[i] = Column<T>::block(rows[i] + k);
        } else {
          T tail[BLOCK] = {};
          std::memcpy(tail, rows[i] + k, (call.K - k) * sizeof(T));
          v[i] = Column<T>::block(tail);
        }
      }
      transpose(v);
      Vector* to = panel + 2 * (k / Column<T>::STEP) + half;
      for (int i = 0; i < WIDTH; ++i) to[2 * i] = v[i];
    }
  }
}

// acc[token][half] for a tile xs[step of K][token] and a panel. K is taken RUN steps at a time, whose
// sums are added up: one long sum would round more than the library GEMMs do.
constexpr int64_t RUN = 512;

template <class T, int COUNT>
static inline void meet(const typename Column<T>::Token* xs, const Vector* panel, int64_t steps,
                        Vector (*acc)[2]) {
  if (steps == 0)
    for (int t = 0; t < COUNT; ++t) acc[t][0] = acc[t][1] = Vector{};
  for (int64_t first = 0; first < steps; first += RUN) {
    Vector run[COUNT][2] = {};
    for (int64_t k = first, last = smaller(first + RUN, steps); k < last; ++k) {
      Vector low = panel[2 * k], high = panel[2 * k + 1];
      for (int t = 0; t < COUNT; ++t) {
        run[t][0] = Column<T>::add(run[t][0], low, xs[k * COUNT + t]);
        run[t][1] = Column<T>::add(run[t][1], high, xs[k * COUNT + t]);
      }
    }
    for (int t = 0; t < COUNT; ++t)
      for (int half = 0; half < 2; ++half)
        acc[t][half] = first ? acc[t][half] + run[t][half] : run[t][half];
  }
}

// What the threads share: the tokens by tiles, and what the shrink made of them.
template <class T>
struct Shared {
  using Token = typename Column<T>::Token;
  int64_t steps;        // of K
  Buffer<Token> tokens;  // [tiles, steps, COUNT]
  Gated gated[2];
};

// Tile `tile` and one panel from row n of weight on: finished values, acc[token][half].
template <class T, int COUNT>
static inline void finish(const Call& call, const Projection& p, const Shared<T>& shared,
                          const Gated& gated, const Vector* panel, const Vector* B, int64_t n,
                          int64_t tile, Vector (*acc)[2]) {
  meet<T, COUNT>(shared.tokens.data + tile * shared.steps * COUNT, panel, shared.steps, acc);
  float bias[PANEL] = {};
  if (p.bias)
    for (int i = 0; i < PANEL && n + i < call.N; ++i)
      bias[i] = widen(static_cast<const T*>(p.bias)[(n + i) * p.bias_n]);
  const float* shrunk = gated.shrunk.data + tile * COUNT * gated.ranks;
  Vector expanded[COUNT][2] = {};  // apart from acc: fewer additions to a large sum round less
  for (int64_t c = 0; c < call.E * call.rank; ++c) {
    Vector low = B[2 * c], high = B[2 * c + 1];
    for (int t = 0; t < COUNT; ++t) {
      expanded[t][0] += low * shrunk[t * gated.ranks + c];
      expanded[t][1] += high * shrunk[t * gated.ranks + c];
    }
  }
  Vector low = load(bias), high = load(bias + WIDTH);
  for (int t = 0; t < COUNT; ++t) {
    float total = gated.total[tile * COUNT + t];
    acc[t][0] = (acc[t][0] + low) * total + expanded[t][0];
    acc[t][1] = (acc[t][1] + high) * total + expanded[t][1];
  }
}

// Row c of B holds rank column c of PANEL rows of lora_B; `sizes` has N, E, rank, `from` lora_B.
template <class T, class Sizes, class From>
static void take_expansion(const Sizes& sizes, const From& from, int64_t n, Vector* B) {
  float* to = reinterpret_cast<float*>(B);
  for (int64_t e = 0; e < sizes.E; ++e)
    for (int64_t j = 0; j < sizes.rank; ++j)
      for (int i = 0; i < PANEL; ++i) {
        int64_t row = smaller(n + i, sizes.N - 1);
        to[(e * sizes.rank + j) * PANEL + i] = widen(static_cast<const T*>(
            from.lora_B)[e * from.lora_B_e + row * from.lora_B_n + j * from.lora_B_r]);
      }
}

template <class T, int COUNT>
static void own_panels(const Call& call, const Shared<T>& shared, int64_t first, int64_t last) {
  int projections = call.activation == Activation::none ? 1 : 2;
  Buffer<Vector> panels[2], B[2];
  for (int j = 0; j < projections; ++j) {
    panels[j] = Buffer<Vector>(2 * ((shared.steps + WIDTH - 1) / WIDTH * WIDTH));
    B[j] = Buffer<Vector>(2 * call.E * call.rank);
  }
  for (int64_t n = first; n < last; n += PANEL) {
    for (int j = 0; j < projections; ++j) {
      take_panel<T>(call, call.projections[j], n, panels[j].data);
      take_expansion<T>(call, call.projections[j], n, B[j].data);
    }
    for (int64_t m = 0, tile = 0; m < call.M; m += COUNT, ++tile) {
      Vector acc[COUNT][2], up[COUNT][2];
      finish<T, COUNT>(call, call.projections[0], shared, shared.gated[0], panels[0].data,
                       B[0].data, n, tile, acc);
      if (projections == 2) {
        finish<T, COUNT>(call, call.projections[1], shared, shared.gated[1], panels[1].data,
                         B[1].data, n, tile, up);
        for (int t = 0; t < COUNT; ++t)
          for (int half = 0; half < 2; ++half)
            acc[t][half] = activate(acc[t][half], call.activation) * up[t][half];
      }
      for (int t = 0; t < COUNT && m + t < call.M; ++t) {
        T* y = static_cast<T*>(call.y) + (m + t) * call.y_m + n;
        if (n + PANEL <= call.N) {
          store(acc[t][0], y);
          store(acc[t][1], y + WIDTH);
        } else {
          const float* values = reinterpret_cast<const float*>(acc[t]);
          for (int i = 0; n + i < call.N; ++i) narrow(values[i], y + i);
        }
      }
    }
  }
}

// to[k][token] = from[token][k], WIDTH of each at a time; tokens that are missing are zero.
template <int COUNT>
static void lay_side_by_side(const float* from, int64_t stride, int64_t count, int64_t steps,
                             float* to) {
  for (int64_t k = 0; k < steps; k += WIDTH)
    for (int first = 0; first < COUNT; first += WIDTH) {
      Vector v[WIDTH];
      for (int i = 0; i < WIDTH; ++i)
        v[i] = first + i < count ? load(from + (first + i) * stride + k) : Vector{};
      transpose(v);
      constexpr int LANES = COUNT < WIDTH ? COUNT : WIDTH;
      int lanes = COUNT - first < LANES ? COUNT - first : LANES;
      for (int i = 0; i < WIDTH && k + i < steps; ++i)
        std::memcpy(to + (k + i) * COUNT + first, &v[i], lanes * sizeof(float));
    }
}

// Tokens m to m + count of a call as a call of their own.
template <class T>
static Call part_of(const Call& call, int64_t m, int64_t count) {
  Call part = call;
  part.x = static_cast<const T*>(call.x) + m * call.x_m;
  part.M = count;
  if (call.routed) part.routed += m * call.routed_m;
  for (Projection& p : part.projections)
    if (p.gates) p.gates += m * call.E;
  return part;
}

// The shrink and the gates of all tokens of a part, projection j.
template <class T>
static void shrink_part(const Call& part, const Narrow<T>& narrow, const Tokens<T>& tokens, int j,
                        Gated& gated) {
  Buffer<float> h((narrow.experts + part.E) * part.M);
  narrow_dots<4>(narrow.shrink_of(j), narrow.experts, tokens, part.M, part.K, h.data);
  narrow_dots<4>(narrow.routers_of(j), part.E, tokens, part.M, part.K,
                 h.data + narrow.experts * part.M);
  gate(part, part.projections[j], h.data, part.projections[j].gates, gated);
}

// Tokens m to m + COUNT: shrunk, gated and laid side by side.
template <class T, int COUNT>
static void own_tile(const Call& call, const Narrow<T>& narrow, int64_t m, Shared<T>& shared) {
  int64_t count = smaller(COUNT, call.M - m);
  Call part = part_of<T>(call, m, count);
  Tokens<T> tokens(part);
  // pairs of bf16 travel as the 32 bits of a float
  lay_side_by_side<COUNT>(reinterpret_cast<const float*>(tokens.rows.data),
                          tokens.padded / Column<T>::STEP, count, shared.steps,
                          reinterpret_cast<float*>(shared.tokens.data) + m * shared.steps);
  for (int j = 0; j < narrow.projections; ++j) {
    Gated gated;
    shrink_part(part, narrow, tokens, j, gated);
    Gated& all = shared.gated[j];
    std::memcpy(all.total.data + m, gated.total.data, count * sizeof(float));
    std::memcpy(all.shrunk.data + m * all.ranks, gated.shrunk.data,
                count * all.ranks * sizeof(float));
  }
}

template <class T, int COUNT>
static bool run_by_tiles_of(const Call& call) {
  Narrow<T> narrow(call);
  Shared<T> shared;
  int64_t tiles = (call.M + COUNT - 1) / COUNT, panels = (call.N + PANEL - 1) / PANEL;
  shared.steps = (call.K + Column<T>::STEP - 1) / Column<T>::STEP;
  shared.tokens = Buffer<typename Column<T>::Token>(tiles * shared.steps * COUNT);
  for (int j = 0; j < narrow.projections; ++j) {
    Gated& gated = shared.gated[j];
    gated.ranks = (narrow.experts + WIDTH - 1) / WIDTH * WIDTH;
    gated.total = Buffer<float>::zeros(tiles * COUNT);
    gated.shrunk = Buffer<float>::zeros(tiles * COUNT * gated.ranks);
  }
  bool failed = false;
#pragma omp parallel num_threads(call.threads)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    attempt(failed, [&] {
      for (int64_t i = tiles * me / threads; i < tiles * (me + 1) / threads; ++i)
        own_tile<T, COUNT>(call, narrow, i * COUNT, shared);
    });
#pragma omp barrier
    if (!__atomic_load_n(&failed, __ATOMIC_RELAXED))
      attempt(failed, [&] {
        own_panels<T, COUNT>(call, shared, panels * me / threads * PANEL,
                             smaller(panels * (me + 1) / threads * PANEL, call.N));
      });
  }
  return !failed;
}

template <class T>
static bool run_blocked(const Call& call) {
  constexpr int NARROW_TILE = WIDE_TILE * 2 / 3;
  int64_t wide = (call.M + WIDE_TILE - 1) / WIDE_TILE * WIDE_TILE;
  int64_t narrow = (call.M + NARROW_TILE - 1) / NARROW_TILE * NARROW_TILE;
  // a narrow tile is slower per token, so it must save a sixth of them
  if (narrow * 7 <= wide * 6) return run_by_tiles_of<T, NARROW_TILE>(call);
  return run_by_tiles_of<T, WIDE_TILE>(call);
}
