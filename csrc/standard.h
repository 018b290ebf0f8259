// Every standard header, included before an instruction set is chosen, so that no inline function
// of theirs is compiled for a processor that may not be there.
#pragma once

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "mogu.h"
