// The routed projection for few tokens, written once and compiled for every instruction set.
//
//   y[m, n] = total[m] * (x[m, :] . weight[n, :] + bias[n])
//             + sum_e scaling_e * gates[m, e] * (x[m, :] . lora_A[e]^T) . lora_B[e, n, :]
//
// One parallel region. First the rows of lora_A and of the routers are shared out between the
// threads, each a dot with every token; after the one barrier every thread works out the gates for
// itself and goes through its own rows of weight, each of which it reads once. The expand rides in
// the accumulators before their lanes are summed: the ranks are a vector, and so is a row of
// lora_B. Everything is added up in fp32 and rounded once, at the store.

// A tile has ROWS rows of weight and WIDTH / ROWS tokens: WIDTH accumulators, one vector of sums.
template <int ROWS>
constexpr int TOKENS = WIDTH / ROWS;

// How a call of type T keeps its tokens: in fp32, or as they are where the processor has bf16 dots.
template <class T>
struct Keeping {
  using Kept = float;
};

// How rows meet the tokens that are kept: in fp32, or by pairs of bf16.
template <class Row, class Kept>
struct Meeting {
  static constexpr int STEP = WIDTH;
  static inline Vector row(const Row* w) { return load(w); }
  static inline Vector token(const Kept* x) { return load(x); }
  static inline Vector add(Vector acc, Vector w, Vector x) { return acc + w * x; }
};

#if defined(MOGU_BF16_DOT)
template <>
struct Keeping<bf16> {
  using Kept = bf16;
};

template <>
struct Meeting<bf16, bf16> {
  static constexpr int STEP = 2 * WIDTH;
  static inline Vector row(const bf16* w) { return load((const float*)w); }
  static inline Vector token(const bf16* x) { return row(x); }
  static inline Vector add(Vector acc, Vector w, Vector x) { return dot(acc, w, x); }
};
#endif

// The tokens of a call as a thread keeps them, rows padded with zeros to a multiple of any STEP.
template <class T>
struct Tokens {
  using Kept = typename Keeping<T>::Kept;
  int64_t padded = 0;
  Buffer<Kept> rows;  // [M, padded]

  Tokens() = default;
  explicit Tokens(const Call& call)
      : padded((call.K + 2 * WIDTH - 1) / (2 * WIDTH) * (2 * WIDTH)), rows(call.M * padded) {
    for (int64_t m = 0; m < call.M; ++m) {
      const T* from = static_cast<const T*>(call.x) + m * call.x_m;
      Kept* to = rows.data + m * padded;
      if constexpr (std::is_same_v<T, Kept>) {
        std::memcpy(to, from, call.K * sizeof(T));
      } else {
        int64_t k = 0;
        for (; k + WIDTH <= call.K; k += WIDTH) store(load(from + k), to + k);
        for (; k < call.K; ++k) to[k] = widen(from[k]);
      }
      std::memset(static_cast<void*>(to + call.K), 0, (padded - call.K) * sizeof(Kept));
    }
  }

  const Kept* row(int64_t m) const { return rows.data + m * padded; }
};

// Lane-wise dots of ROWS rows with TOKENS tokens from m on: acc[row * TOKENS + token].
template <int ROWS, class Row, class T>
static inline void dots(const Row* const* rows, const Tokens<T>& tokens, int64_t m, int64_t M,
                        int64_t K, Vector* acc) {
  using Kept = typename Tokens<T>::Kept;
  using Meet = Meeting<Row, Kept>;
  constexpr int COUNT = TOKENS<ROWS>;
  const Kept* xs[COUNT];
  for (int t = 0; t < COUNT; ++t) xs[t] = tokens.row(m + t < M ? m + t : M - 1);
  for (int i = 0; i < WIDTH; ++i) acc[i] = Vector{};
  int64_t k = 0;
  for (; k + Meet::STEP <= K; k += Meet::STEP)
    for (int r = 0; r < ROWS; ++r) {
      auto w = Meet::row(rows[r] + k);
      for (int t = 0; t < COUNT; ++t)
        acc[r * COUNT + t] = Meet::add(acc[r * COUNT + t], w, Meet::token(xs[t] + k));
    }
  if (k < K)
    for (int r = 0; r < ROWS; ++r) {
      Row tail[Meet::STEP] = {};
      std::memcpy(tail, rows[r] + k, (K - k) * sizeof(Row));
      auto w = Meet::row(tail);
      for (int t = 0; t < COUNT; ++t)
        acc[r * COUNT + t] = Meet::add(acc[r * COUNT + t], w, Meet::token(xs[t] + k));
    }
}

// h[row, m] = rows[row] . x[m] for `count` rows
template <int ROWS, class Row, class T>
static void narrow_dots(const Row* const* rows, int64_t count, const Tokens<T>& tokens, int64_t M,
                        int64_t K, float* h) {
  for (int64_t r = 0; r < count; r += ROWS) {
    const Row* tile[ROWS];
    for (int i = 0; i < ROWS; ++i) tile[i] = rows[r + i < count ? r + i : count - 1];
    for (int64_t m = 0; m < M; m += TOKENS<ROWS>) {
      Vector acc[WIDTH];
      dots<ROWS>(tile, tokens, m, M, K, acc);
      Vector sum = sums(acc);
      for (int i = 0; i < ROWS && r + i < count; ++i)
        for (int t = 0; t < TOKENS<ROWS> && m + t < M; ++t)
          h[(r + i) * M + m + t] = sum[i * TOKENS<ROWS> + t];
    }
  }
}

// Gates of one token from its logits.
static inline void gates_of(const Call& call, const float* logits, float* gates) {
  float largest = logits[0], sum = 0;
  for (int64_t e = 1; e < call.E; ++e) largest = logits[e] > largest ? logits[e] : largest;
  for (int64_t e = 0; e < call.E; ++e) {
    gates[e] = call.softmax ? std::exp(logits[e] - largest) : 1 / (1 + std::exp(-logits[e]));
    sum += gates[e];
  }
  if (call.softmax)
    for (int64_t e = 0; e < call.E; ++e) gates[e] /= sum;
}

// What a thread makes of the shrink: the total of every token and its gated ranks, padded.
struct Gated {
  Buffer<float> total;   // [M]
  Buffer<float> shrunk;  // [M, ranks]
  int64_t ranks;         // E * rank, rounded up to a multiple of WIDTH
};

static void gate(const Call& call, const Projection& p, const float* h, bool store, Gated& gated) {
  gated.ranks = (call.E * call.rank + WIDTH - 1) / WIDTH * WIDTH;
  gated.total = Buffer<float>::zeros(call.M);
  gated.shrunk = Buffer<float>::zeros(call.M * gated.ranks);
  const float* of_routers = h + call.E * call.rank * call.M;
  for (int64_t m = 0; m < call.M; ++m) {
    float logits[MAX_EXPERTS], gates[MAX_EXPERTS];
    for (int64_t e = 0; e < call.E; ++e)
      logits[e] = of_routers[e * call.M + m] + p.gate_bias[e * p.gate_bias_e];
    gates_of(call, logits, gates);
    if (store)
      for (int64_t e = 0; e < call.E; ++e) p.gates[m * call.E + e] = gates[e];
    if (call.routed && !call.routed[m * call.routed_m]) {
      gated.total[m] = 1;
      continue;
    }
    for (int64_t e = 0; e < call.E; ++e) {
      gated.total[m] += gates[e];
      for (int64_t j = 0; j < call.rank; ++j) {
        int64_t c = e * call.rank + j;
        gated.shrunk[m * gated.ranks + c] = call.scaling[e] * gates[e] * h[c * call.M + m];
      }
    }
  }
}

// Row n of lora_B, all experts side by side, in fp32.
template <class T>
static inline void expand_row(const Call& call, const Projection& p, int64_t n, float* row) {
  const T* B = static_cast<const T*>(p.lora_B) + n * p.lora_B_n;
  int64_t ranks = call.E * call.rank, c = 0;
  if (p.lora_B_r == 1 && (p.lora_B_e == call.rank || call.E == 1)) {
    for (; c + WIDTH <= ranks; c += WIDTH) {
      Vector v = load(B + c);
      std::memcpy(row + c, &v, sizeof v);
    }
    for (; c < ranks; ++c) row[c] = widen(B[c]);
    return;
  }
  for (int64_t e = 0; e < call.E; ++e)
    for (int64_t j = 0; j < call.rank; ++j)
      row[e * call.rank + j] = widen(B[e * p.lora_B_e + j * p.lora_B_r]);
}

// ROWS rows of weight from n on, tokens from m on: the projection, lane row * TOKENS + token.
template <int ROWS, class T>
static inline Vector project(const Call& call, const Projection& p, const Tokens<T>& tokens,
                             const Gated& gated, const float* B, int64_t n, int64_t m) {
  constexpr int COUNT = TOKENS<ROWS>;
  const T* rows[ROWS];
  int64_t row[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    row[r] = smaller(n + r, call.N - 1);
    rows[r] = static_cast<const T*>(p.weight) + row[r] * p.weight_n;
  }
  Vector acc[WIDTH];
  dots<ROWS>(rows, tokens, m, call.M, call.K, acc);
  float constants[WIDTH];
  for (int t = 0; t < COUNT; ++t) {
    int64_t token = smaller(m + t, call.M - 1);
    const float* shrunk = gated.shrunk.data + token * gated.ranks;
    Vector total = fill(gated.total[token]);
    for (int r = 0; r < ROWS; ++r) {
      Vector& a = acc[r * COUNT + t];
      a *= total;
      for (int64_t c = 0; c < gated.ranks; c += WIDTH)
        a += load(shrunk + c) * load(B + r * gated.ranks + c);
      constants[r * COUNT + t] =
          p.bias ? gated.total[token] * widen(static_cast<const T*>(p.bias)[row[r] * p.bias_n]) : 0;
    }
  }
  return sums(acc) + load(constants);
}

static inline Vector activate(Vector z, Activation activation) {
  if (activation == Activation::silu) return z / (1.0f + exponential(-z));
  if (activation == Activation::gelu_tanh)  // z * sigmoid(2 a), a = sqrt(2 / pi) (z + 0.044715 z^3)
    return z / (1.0f + exponential(-1.5957691216f * (z + 0.044715f * z * z * z)));
  for (int i = 0; i < WIDTH; ++i) z[i] = 0.5f * z[i] * (1.0f + std::erf(z[i] * 0.70710678f));
  return z;
}

// Rows first to last of weight, by tiles of ROWS: read once each, whatever M is.
template <int ROWS, class T>
static void own_rows(const Call& call, const Tokens<T>& tokens, const Gated* gated, int64_t first,
                     int64_t last) {
  constexpr int COUNT = TOKENS<ROWS>;
  int projections = call.activation == Activation::none ? 1 : 2;
  Buffer<float> B[2];
  for (int j = 0; j < projections; ++j) B[j] = Buffer<float>::zeros(ROWS * gated[j].ranks);
  for (int64_t n = first; n < last; n += ROWS) {
    for (int j = 0; j < projections; ++j)
      for (int r = 0; r < ROWS; ++r)
        expand_row<T>(call, call.projections[j], smaller(n + r, call.N - 1),
                      B[j].data + r * gated[j].ranks);
    for (int64_t m = 0; m < call.M; m += COUNT) {
      Vector y = project<ROWS, T>(call, call.projections[0], tokens, gated[0], B[0].data, n, m);
      if (projections == 2)
        y = activate(y, call.activation) *
            project<ROWS, T>(call, call.projections[1], tokens, gated[1], B[1].data, n, m);
      for (int t = 0; t < COUNT && m + t < call.M; ++t)
        for (int r = 0; r < ROWS && n + r < last; ++r)
          narrow(y[r * COUNT + t], static_cast<T*>(call.y) + (m + t) * call.y_m + n + r);
    }
  }
}

// The rows of lora_A and of the routers, of every projection.
template <class T>
struct Narrow {
  int projections;
  int64_t experts, E;  // rows of lora_A, and routers, of one projection
  Buffer<const T*> shrink;
  Buffer<const float*> routers;

  explicit Narrow(const Call& call)
      : projections(call.activation == Activation::none ? 1 : 2),
        experts(call.E * call.rank),
        E(call.E),
        shrink(projections * experts),
        routers(projections * E) {
    for (int j = 0; j < projections; ++j) {
      const Projection& p = call.projections[j];
      for (int64_t e = 0; e < E; ++e) {
        for (int64_t r = 0; r < call.rank; ++r)
          shrink[j * experts + e * call.rank + r] =
              static_cast<const T*>(p.lora_A) + e * p.lora_A_e + r * p.lora_A_r;
        routers[j * E + e] = p.gate_weight + e * p.gate_weight_e;
      }
    }
  }

  const T* const* shrink_of(int j) const { return shrink.data + j * experts; }
  const float* const* routers_of(int j) const { return routers.data + j * E; }
};

// This thread's share of the rows of lora_A and of the routers, with every token:
// h[projection][row, m].
template <int ROWS, class T>
static void own_shrink(const Call& call, const Narrow<T>& narrow, const Tokens<T>& tokens,
                       int64_t me, int64_t threads, float* h) {
  int64_t experts = narrow.experts;
  for (int j = 0; j < narrow.projections; ++j, h += (experts + call.E) * call.M) {
    int64_t first = experts * me / threads, last = experts * (me + 1) / threads;
    narrow_dots<ROWS>(narrow.shrink_of(j) + first, last - first, tokens, call.M, call.K,
                      h + first * call.M);
    if (me == threads - 1)
      narrow_dots<ROWS>(narrow.routers_of(j), call.E, tokens, call.M, call.K, h + experts * call.M);
  }
}

template <int ROWS, class T>
static bool run_tiled(const Call& call) {
  Narrow<T> narrow(call);
  int64_t per_projection = (narrow.experts + call.E) * call.M;
  Buffer<float> h(narrow.projections * per_projection);
  bool failed = false;
#pragma omp parallel num_threads(call.threads)
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    Tokens<T> tokens;
    attempt(failed, [&] {
      tokens = Tokens<T>(call);
      own_shrink<ROWS>(call, narrow, tokens, me, threads, h.data);
    });
#pragma omp barrier
    if (!__atomic_load_n(&failed, __ATOMIC_RELAXED))
      attempt(failed, [&] {
        Gated gated[2];
        for (int j = 0; j < narrow.projections; ++j)
          gate(call, call.projections[j], h.data + j * per_projection,
               me == 0 && call.projections[j].gates, gated[j]);
        int64_t tiles = (call.N + ROWS - 1) / ROWS;
        own_rows<ROWS, T>(call, tokens, gated, tiles * me / threads * ROWS,
                          smaller(tiles * (me + 1) / threads * ROWS, call.N));
      });
  }
  return !failed;
}
