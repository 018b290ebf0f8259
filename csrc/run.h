// Which form serves a call. Included last, inside an instruction set's namespace.

template <class T>
static void run_typed(const Call& call) {
  if (call.M > call.most_tiled) return run_blocked<T>(call);
  if (call.M == 1) return run_tiled<WIDTH, T>(call);
  if (call.M == 2) return run_tiled<WIDTH / 2, T>(call);
  return run_tiled<4, T>(call);
}
