// The few host declarations that the kernels' headers need: CUDA's own, or the emulator's (tests/cuda/emulator.h).
#pragma once

#ifdef DDFAST_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif
