// The CPU kernels of one instruction set, called through pipes: a program without Python, so that tests can run the code
// of another processor in an emulator (tests/aarch64.py has the other end).
//
// kernel_calls ISA; then on stdin, call after call, in the machine's own byte order:
//   int64 length of the op's name, the name, int64 count of arguments, and for each of them
//   'i' int64 | 'd' float64 | 'a' int64 bytes (-1: null), the array
// and on stdout, for each: int64 status, then every array that is not null, as the kernel left it.
// Names and arguments are those of bindings.cpp. An array ends where a page without access begins.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace {

using namespace ddfast;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "kernel_calls: %s\n", what.c_str());
  std::exit(1);
}

bool read_bytes(void* to, int64_t count) {
  return std::fread(to, 1, static_cast<size_t>(count), stdin) == static_cast<size_t>(count);
}

template <class T>
T read_value() {
  T value;
  if (!read_bytes(&value, sizeof value)) fail("the input ended within a call");
  return value;
}

// Memory whose last byte is a page's last, before one that must not be touched.
class Array {
 public:
  explicit Array(int64_t bytes) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    mapped_ = static_cast<size_t>(room + page);
    void* start = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) fail("out of memory");
    start_ = static_cast<char*>(start);
    if (mprotect(start_ + room, static_cast<size_t>(page), PROT_NONE) != 0) fail("mprotect");
    data_ = start_ + room - bytes;
    if (!read_bytes(data_, bytes)) fail("the input ended within an array");
  }
  Array(Array&& other) noexcept : bytes_(other.bytes_), mapped_(other.mapped_), start_(other.start_), data_(other.data_) {
    other.start_ = nullptr;
  }
  Array& operator=(Array&&) = delete;
  ~Array() {
    if (start_) munmap(start_, mapped_);
  }
  char* data() const { return data_; }
  void write() const { std::fwrite(data_, 1, static_cast<size_t>(bytes_), stdout); }

 private:
  int64_t bytes_;
  size_t mapped_;
  char *start_, *data_;
};

struct Argument {
  char kind;
  int64_t integer;
  double real;
  void* pointer;
};

// A call's arguments in their order: initialising a member of a struct takes the next one, in the member's type.
class Arguments {
 public:
  Arguments(std::vector<Argument> list) : list_(std::move(list)) {}

  template <class T>
  operator T() {
    static_assert(std::is_pointer_v<T> || std::is_arithmetic_v<T>);
    if (next_ == list_.size()) fail("too few arguments");
    const Argument& argument = list_[next_++];
    if (argument.kind != (std::is_pointer_v<T> ? 'a' : std::is_floating_point_v<T> ? 'd' : 'i'))
      fail("argument " + std::to_string(next_) + " is of another kind");
    if constexpr (std::is_pointer_v<T>)
      return static_cast<T>(argument.pointer);
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(argument.real);
    else
      return static_cast<T>(argument.integer);
  }
  template <class T>
  T take() {
    return *this;
  }
  Rows rows() { return {*this, *this, *this}; }
  FilterArgs filter() {  // but its sizes
    FilterArgs f{};
    f.logits = rows();
    f.uncond = {*this, f.logits.dtype, *this};
    f.cfg_scale = *this;
    f.temperature = *this;
    f.top_k = *this;
    f.top_p = *this;
    return f;
  }
  FlowArgs flow(const Rows& log_probs) {
    return {log_probs, *this, *this, *this, *this, *this, *this, *this, *this, *this, *this, *this, *this};
  }
  void end() const {
    if (next_ != list_.size()) fail("too many arguments");
  }

 private:
  std::vector<Argument> list_;
  size_t next_ = 0;
};

int64_t call(const Kernels& kernels, const std::string& name, Arguments a) {
  int64_t status = kOk;
  int threads = 1;
  const auto last = [&] {
    threads = a;
    a.end();
  };
  if (name == "noise") {
    const uint64_t seed = a;
    const int64_t *index = a, count = a, per_sample = a;
    float* out = a;
    last();
    noise(seed, index, count, per_sample, out, threads);
  } else if (name == "nearest_code") {
    const NearestCodeArgs args{a, a, a, a, a, a, a};
    last();
    kernels.nearest_code(args, threads);
  } else if (name == "filter_logits") {
    FilterArgs args = a.filter();
    float* out = a;
    args.rows = a;
    args.V = a;
    last();
    status = kernels.filter_logits(args, out, threads);
  } else if (name == "codebook_posterior_forward") {
    PosteriorArgs args{a, a, a.rows(), a, 0, 0, 0};
    float *x0 = a, *lse = a;
    args.rows = a;
    args.V = a;
    args.d = a;
    last();
    status = kernels.posterior_forward(args, x0, lse, threads);
  } else if (name == "codebook_posterior_backward") {
    const float* grad = a;
    PosteriorArgs args{a, a, a.rows(), a, 0, 0, 0};
    const float *x0 = a, *lse = a;
    float* dx = a;
    args.rows = a;
    args.V = a;
    args.d = a;
    last();
    kernels.posterior_backward(args, grad, x0, lse, dx, threads);
  } else if (name == "flow_sample") {
    const FlowArgs args = a.flow(a.rows());
    last();
    status = kernels.flow_sample(args, threads);
  } else if (name == "sample_codes") {
    FilterArgs filter = a.filter();
    const FlowArgs args = a.flow({});
    filter.rows = args.rows;
    filter.V = args.V;
    last();
    status = kernels.sample_codes(filter, args, threads);
  } else if (name == "draw_codes") {
    FilterArgs args = a.filter();
    const float* uniform = a;
    int64_t* codes = a;
    args.rows = a;
    args.V = a;
    last();
    status = kernels.draw_codes(args, uniform, codes, threads);
  } else if (name == "decode_attention") {
    const AttentionArgs args{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a};
    last();
    kernels.decode_attention(args, threads);
  } else if (name == "activate") {
    ActivateArgs args{};
    args.x = a;
    args.x_stride = a;
    args.times = a;
    args.times_stride = a;
    args.out = a;
    args.dtype = a;
    args.rows = a;
    args.width = a;
    args.gelu = a;
    last();
    kernels.activate(args, threads);
  } else {
    fail("no op is called " + name);
  }
  return status;
}

const Kernels& variant(const std::string& isa) {
#if defined(DDFAST_ARM64)
  if (isa == neon::kernels.name) return neon::kernels;
#endif
  if (isa != baseline::kernels.name) fail("no instruction set is called " + isa);
  return baseline::kernels;
}

}  // namespace

int main(int argc, char** argv) {
  const Kernels& kernels = variant(argc > 1 ? argv[1] : "");
  for (int64_t length; read_bytes(&length, sizeof length);) {
    std::string name(static_cast<size_t>(length), ' ');
    if (!read_bytes(name.data(), length)) fail("the input ended within a name");
    std::vector<Argument> list(static_cast<size_t>(read_value<int64_t>()));
    std::vector<Array> arrays;
    for (Argument& argument : list) {
      argument = {read_value<char>(), 0, 0, nullptr};
      if (argument.kind == 'd') {
        argument.real = read_value<double>();
        continue;
      }
      argument.integer = read_value<int64_t>();
      if (argument.kind == 'a' && argument.integer >= 0) argument.pointer = arrays.emplace_back(argument.integer).data();
    }
    const int64_t status = call(kernels, name, Arguments(std::move(list)));
    std::fwrite(&status, sizeof status, 1, stdout);
    for (const Array& array : arrays) array.write();
    std::fflush(stdout);
  }
}
