// Any processor: 16-byte vectors, which SSE2 and NEON have.
#include "standard.h"

#define WIDTH 4
namespace mogu::portable {
#include "vectors.h"
#include "kernels.h"
#include "gemm.h"
#include "parts.h"
#include "run.h"
}

const mogu::Kernels mogu::portable_kernels = mogu::portable::kernels;
