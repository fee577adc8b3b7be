// Compiled with -ffp-contract=off: see kernels/philox.h.
#include "../kernels/philox.h"

#include "kernels.h"
#include "runtime.h"

namespace ddfast {
namespace {

struct Args {
  uint64_t seed;
  const int64_t* index;
  int64_t per_sample, quads;
  float* out;
};

// Pieces are counted in quads of one sample, over all samples.
void body(void* context, int64_t begin, int64_t end) {
  const Args& a = *static_cast<const Args*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / a.quads, quad = i % a.quads, element = 4 * quad;
    float values[4];
    noise_quad(a.seed, a.index[sample], static_cast<uint32_t>(quad), values);
    float* out = a.out + sample * a.per_sample + element;
    const int64_t left = a.per_sample - element;
    for (int64_t j = 0; j < 4 && j < left; ++j) out[j] = values[j];
  }
}

}  // namespace

void noise(uint64_t seed, const int64_t* index, int64_t count, int64_t per_sample, float* out, int threads) {
  Args args{seed, index, per_sample, (per_sample + 3) / 4, out};
  parallel_for(count * args.quads, 1024, threads, body, &args);
}

}  // namespace ddfast
