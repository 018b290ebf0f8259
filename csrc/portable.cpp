// Any processor: 16-byte vectors, which SSE2 and NEON have.
#include "standard.h"

#define WIDTH 4
namespace mogu::portable {
#include "vectors.h"
#include "kernels.h"
#include "gemm.h"
#include "run.h"
}

#include "entry.h"
MOGU_ENTRY(portable)
