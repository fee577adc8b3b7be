// The host's side of a launch (kernels/device.h, csrc/cuda_call.h) on the stand-in for CUDA's runtime. One case per
// process: what was set is remembered. Prints the checks that fail.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cuda_call.h"
#include "../../kernels/device.h"

using namespace ddfast;

namespace {

int failed = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  failed = 1;
}
#define EXPECT(condition) expect(condition, #condition)

const char kernel = 0, other_kernel = 0;  // their addresses
stand_in::State& seen = stand_in::state;

cudaError_t launch(const void* of, int shared_bytes, int cluster = 1) {
  return simt::launch(of, 8, 128, (size_t)shared_bytes, cluster, nullptr, nullptr);
}

// A smaller launch beside a larger one must not take its memory away.
void two_threads() {
  std::vector<std::thread> threads;
  int refused[2] = {};
  for (int which = 0; which < 2; ++which)
    threads.emplace_back([which, &refused] {
      for (int i = 0; i < 2000; ++i) refused[which] += launch(&kernel, which ? 100 << 10 : 60 << 10) != cudaSuccess;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(refused[0] == 0 && refused[1] == 0);
  EXPECT(seen.launches == 4000);
}

void shared_memory_is_allowed_once_per_kernel_and_device() {
  EXPECT(launch(&kernel, 48 << 10) == cudaSuccess);
  EXPECT(seen.function_sets == 0);  // every kernel may have that much
  for (int i = 0; i < 3; ++i) EXPECT(launch(&kernel, (100 - 20 * i) << 10) == cudaSuccess);
  EXPECT(launch(&kernel, stand_in::kMostShared) == cudaSuccess);
  EXPECT(seen.function_sets == 2);  // the size and the carveout
  EXPECT((seen.carveout[{&kernel, 0}] == cudaSharedmemCarveoutMaxShared));
  EXPECT(launch(&other_kernel, 100 << 10) == cudaSuccess);
  EXPECT(seen.function_sets == 4);
  cudaSetDevice(1);
  EXPECT(launch(&kernel, 100 << 10) == cudaSuccess);
  EXPECT(seen.function_sets == 6);
  EXPECT(launch(&kernel, stand_in::kMostShared + 1) == cudaErrorInvalidValue);
  EXPECT(launch(&kernel, 100 << 10) == cudaSuccess);
}

void a_device_is_asked_once() {
  for (int id : {0, 1, 0, 1}) {
    cudaSetDevice(id);
    simt::Device device;
    EXPECT(simt::device(&device) == cudaSuccess);
    EXPECT(device.multiprocessors == 100 + id && device.clusters == (id == 0));
    EXPECT(device.shared_bytes == stand_in::kMostShared && device.shared_per_multiprocessor == stand_in::kMostShared);
  }
  EXPECT(seen.attribute_queries == 8);
}

void clusters() {
  EXPECT(launch(&kernel, 0, 4) == cudaSuccess && seen.last_cluster == 4);
  EXPECT(launch(&kernel, 0, 1) == cudaSuccess && seen.last_cluster == 1);
}

void an_earlier_error_is_not_this_launch_s() {
  stand_in::last_error = cudaErrorInvalidDevice;  // of a call whose status somebody else dealt with
  EXPECT(launch(&kernel, 0) == cudaSuccess);
}

void a_reported_error_is_forgotten() {
  bool raised = false;
  try {
    check(launch(&kernel, stand_in::kMostShared + 1), "noise");
  } catch (const std::runtime_error& error) {
    raised = std::strcmp(error.what(), "noise: cudaErrorName, its description") == 0;
  }
  EXPECT(raised);
  EXPECT(cudaGetLastError() == cudaSuccess);
  stand_in::last_error = cudaErrorInvalidDevice;  // not ours to forget
  try {
    check(cudaErrorInvalidValue, "our own check of the arguments");
  } catch (const std::runtime_error&) {
  }
  EXPECT(cudaGetLastError() == cudaErrorInvalidDevice);
}

void a_device_that_is_current_is_not_set() {
  cudaSetDevice(1);
  seen.device_sets = 0;
  { const DeviceGuard guard(1); }
  EXPECT(seen.device_sets == 0);
  {
    const DeviceGuard guard(0);
    EXPECT(stand_in::current == 0);
    const DeviceGuard inner(0);
    EXPECT(seen.device_sets == 1);
  }
  EXPECT(stand_in::current == 1 && seen.device_sets == 2);
  bool raised = false;
  try {
    const DeviceGuard guard(7);
  } catch (const std::runtime_error&) {
    raised = true;
  }
  EXPECT(raised && stand_in::current == 1 && seen.device_sets == 3);
}

#define CASE(name) {#name, name}
const std::pair<const char*, void (*)()> cases[] = {
    CASE(two_threads), CASE(shared_memory_is_allowed_once_per_kernel_and_device), CASE(a_device_is_asked_once),
    CASE(clusters), CASE(an_earlier_error_is_not_this_launch_s), CASE(a_reported_error_is_forgotten),
    CASE(a_device_that_is_current_is_not_set),
};

}  // namespace

int main(int count, char** arguments) {
  for (const auto& [name, run] : cases) {
    if (count == 2 && std::strcmp(arguments[1], name) == 0) return run(), failed;
  }
  return 2;
}
