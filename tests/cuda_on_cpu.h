// Runs a CUDA kernel on the CPU, thread by thread: what a .cu file uses of CUDA, and the primitives that it defines by
// PTX for a GPU. A block's threads are fibers; whatever needs a whole warp or block switches between them.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one after another; it begins with what the last one left
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float least(float x, float bound) { return x > bound ? bound : x; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}


typedef unsigned int u32;
static struct { unsigned x, y; } threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10;  // bytes per thread

struct Group {  // a warp, or the block
  unsigned size, arrived = 0, passed = 0;
  const char* what = "";
  float operands[2][WARP][12] = {};  // by parity: who has passed may write while others read
  const void* rows[2][WARP] = {};
};

struct Thread {
  ucontext_t context;
  Group* waits = nullptr;
  unsigned until = 0;
  bool ended = false;
};

static std::vector<Group> warps;
static Group block;
static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::string error;

inline std::string name(unsigned i) { return "thread " + std::to_string(i); }

inline void fail(const std::string& reason) {  // never returns: the launch ends
  error = name(threadIdx.x) + " " + reason;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

// Wait for the group's other threads to call the same.
inline void meet(Group& group, const char* what) {
  if (group.arrived && std::strcmp(group.what, what))
    fail(std::string("calls ") + what + " where others of its warp call " + group.what);
  group.what = what;
  Thread& self = threads[threadIdx.x];
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.passed;
  } else {
    self.waits = &group;
    self.until = group.passed + 1;
    swapcontext(&self.context, &scheduler);
    self.waits = nullptr;
  }
}

inline Group& warp() { return warps[threadIdx.x / WARP]; }
inline unsigned lane() { return threadIdx.x % WARP; }

// Who waits, and one of those who do not come.
inline std::string stuck() {
  const auto waiting = [](const Thread& t) { return t.waits != nullptr; };
  const unsigned i = std::find_if(threads.begin(), threads.end(), waiting) - threads.begin();
  Group& group = *threads[i].waits;
  unsigned j = &group == &block ? 0 : i / WARP * WARP;
  while (threads[j].waits == &group) ++j;
  return name(i) + " waits in " + group.what + " with " + std::to_string(group.arrived) + " of " +
         std::to_string(group.size) + "; " + name(j) +
         (threads[j].ended ? std::string(" has ended") : std::string(" waits in ") + threads[j].waits->what);
}

template <class Arguments>
struct Launch {
  static inline void (*kernel)(Arguments);
  static inline const Arguments* arguments;

  static void run() {
    kernel(*arguments);
    threads[threadIdx.x].ended = true;
    swapcontext(&threads[threadIdx.x].context, &scheduler);
  }

  static void run_block(char* stacks, std::mt19937* random) {
    const unsigned n = threads.size();
    warps.assign(n / WARP, Group{WARP});
    block = Group{n};
    for (unsigned i = 0; i < n; ++i) {
      threads[i] = Thread();
      getcontext(&threads[i].context);
      threads[i].context.uc_stack.ss_sp = stacks + i * STACK;
      threads[i].context.uc_stack.ss_size = STACK;
      makecontext(&threads[i].context, run, 0);
    }
    std::vector<unsigned> order(n / WARP), lanes(WARP);
    std::iota(order.begin(), order.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    for (bool progress = true; progress;) {
      progress = false;
      if (random) std::shuffle(order.begin(), order.end(), *random);
      for (unsigned w : order)  // each as far as it gets before the next: a missing barrier shows
        for (bool more = true; more;) {
          more = false;
          if (random) std::shuffle(lanes.begin(), lanes.end(), *random);
          for (unsigned l : lanes) {
            Thread& next = threads[threadIdx.x = w * WARP + l];
            if (next.ended || (next.waits && next.waits->passed < next.until)) continue;
            more = progress = true;
            swapcontext(&scheduler, &next.context);
            if (!error.empty()) return;
          }
        }
    }
    if (!std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.ended; })) error = stuck();
  }
};

// null, or what went wrong
template <class Arguments>
const char* launch(void (*kernel)(Arguments), unsigned x, unsigned y, unsigned n, const void* arguments, size_t size,
                   unsigned seed) {
  error.clear();
  std::mt19937 random(seed);
  if (size != sizeof(Arguments)) error = "the kernel's arguments are " + std::to_string(sizeof(Arguments)) + " bytes";
  if (n == 0 || n % WARP) error = "threads come in whole warps";
  if (!error.empty()) return error.c_str();
  Launch<Arguments>::kernel = kernel;
  Launch<Arguments>::arguments = static_cast<const Arguments*>(arguments);
  threads.resize(n);
  const std::unique_ptr<char[]> stacks(new char[n * STACK]);
  gridDim = {x, y};
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
      Launch<Arguments>::run_block(stacks.get(), seed ? &random : nullptr);
      if (!error.empty()) {
        error = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "): " + error;
        return error.c_str();
      }
    }
  return nullptr;
}

template <class To, class From>
To bits(From value) {
  To result;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline u32 half(float value) { return bits<uint16_t>(static_cast<_Float16>(value)); }
inline float of_half(u32 value) { return bits<_Float16>(static_cast<uint16_t>(value)); }

inline u32 bfloat(float value) {
  const u32 b = bits<u32>(value);
  return std::isnan(value) ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

}  // namespace cuda_on_cpu

inline u32 pack_half(float lo, float hi) { return cuda_on_cpu::half(lo) | cuda_on_cpu::half(hi) << 16; }
inline float half_lo(u32 pair) { return cuda_on_cpu::of_half(pair & 0xffff); }
inline float half_hi(u32 pair) { return cuda_on_cpu::of_half(pair >> 16); }
inline u32 pack_bfloat(float lo, float hi) { return cuda_on_cpu::bfloat(lo) | cuda_on_cpu::bfloat(hi) << 16; }
inline float ex2(float x) { return std::exp2(x); }
inline float rcp(float x) { return 1 / x; }

inline void barrier() { cuda_on_cpu::meet(cuda_on_cpu::block, "barrier"); }

inline float shuffle_xor(float value, int mask) {
  auto& warp = cuda_on_cpu::warp();
  auto& operands = warp.operands[warp.passed & 1];
  operands[cuda_on_cpu::lane()][0] = value;
  cuda_on_cpu::meet(warp, "shuffle_xor");
  return operands[cuda_on_cpu::lane() ^ mask][0];
}

inline void ldsm(u32 (&a)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_on_cpu::fail("calls ldsm with a row that is not aligned to 16 bytes");
  auto& warp = cuda_on_cpu::warp();
  auto& rows = warp.rows[warp.passed & 1];
  rows[cuda_on_cpu::lane()] = row;
  cuda_on_cpu::meet(warp, "ldsm");
  const unsigned l = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) std::memcpy(&a[i], static_cast<const char*>(rows[8 * i + l / 4]) + 4 * (l % 4), 4);
}

inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  auto& warp = cuda_on_cpu::warp();
  auto& operands = warp.operands[warp.passed & 1];
  const u32 pairs[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 6; ++i) {
    operands[cuda_on_cpu::lane()][2 * i] = half_lo(pairs[i]);
    operands[cuda_on_cpu::lane()][2 * i + 1] = half_hi(pairs[i]);
  }
  cuda_on_cpu::meet(warp, "mma");
  const unsigned g = cuda_on_cpu::lane() >> 2, t = cuda_on_cpu::lane() & 3;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned upper = i >> 1, column = 2 * t + (i & 1);  // of row g + 8 * upper
    double sum = d[i];  // rounded once: tensor cores round otherwise, and not better
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned owner = k % 8 / 2, part = k / 8;
      sum += static_cast<double>(operands[4 * g + owner][2 * (2 * part + upper) + k % 2]) *
             operands[4 * column + owner][8 + 2 * part + k % 2];
    }
    d[i] = static_cast<float>(sum);
  }
}
