// All kernels for one instruction set: compiled once for each, with DDFAST_ISA naming the namespace (see CMakeLists.txt).
#include <cstddef>
#include <cstdint>
#if defined(DDFAST_X86)
#include <immintrin.h>
#elif defined(DDFAST_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "runtime.h"

extern "C" double exp(double);
extern "C" double expm1(double);
extern "C" double log(double);
extern "C" double sqrt(double);

#define DDFAST_STRING_(x) #x
#define DDFAST_STRING(x) DDFAST_STRING_(x)

namespace ddfast {
namespace DDFAST_ISA {
namespace {

#include "simd.h"

#include "nearest_code.h"

#include "filter_logits.h"

#include "codebook_posterior.h"

#include "flow_sample.h"

#include "draw_codes.h"

#include "decode_attention.h"

#include "activate.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {DDFAST_STRING(DDFAST_ISA), nearest_code, filter_logits, posterior_forward, posterior_backward,
                         flow_sample, sample_codes, draw_codes, decode_attention, activate};

}  // namespace DDFAST_ISA
}  // namespace ddfast
