// The one function that an instruction set shows to the others.
#define MOGU_ENTRY(isa)                                       \
  void mogu::run_##isa(const Call& call, Dtype dtype) {       \
    if (dtype == Dtype::f32) isa::run_typed<float>(call);     \
    if (dtype == Dtype::f16) isa::run_typed<isa::f16>(call);  \
    if (dtype == Dtype::bf16) isa::run_typed<isa::bf16>(call); \
  }
