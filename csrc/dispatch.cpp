#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenselect {

#define TS_DECLARE(isa)                            \
  namespace isa {                                  \
  void score_tokens(const ScoreArgs&);             \
  void topk_tokens(const TopkArgs&);               \
  void sparse_attention(const AttentionArgs&);     \
  void linear(const LinearArgs&);                  \
  void rms_norm(const NormArgs&);                  \
  void quantize_rows(const QuantizeArgs&);         \
  void pool_queries(const PoolArgs&);              \
  }                                                \
  static const Kernels isa##_kernels{#isa, isa::score_tokens, isa::topk_tokens, isa::sparse_attention, \
                                      isa::linear, isa::rms_norm, isa::quantize_rows, \
                                      isa::pool_queries};

TS_DECLARE(portable)
#if defined(__x86_64__)
TS_DECLARE(avx2)
TS_DECLARE(avx512)
TS_DECLARE(avx512_bf16)
#if !defined(TS_NO_AMX)
TS_DECLARE(amx)
#endif
#endif

#if defined(__x86_64__) && !defined(TS_NO_AMX)
// Whether there are tiles of bf16 and int8, and the system lets this process have them.
static bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  constexpr int kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll && !syscall(SYS_arch_prctl, kAskFor, kTileData);
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

// Best first.
static const Candidate* candidates(size_t* count) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512vnni");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  static const Candidate all[] = {
#if !defined(TS_NO_AMX)
      {&amx_kernels, has_bf16 && may_use_amx()},
#endif
      {&avx512_bf16_kernels, has_bf16},
      {&avx512_kernels, has_avx512},
      {&avx2_kernels, has_avx2},
      {&portable_kernels, true},
  };
#else
  static const Candidate all[] = {{&portable_kernels, true}};
#endif
  *count = sizeof all / sizeof *all;
  return all;
}

static const Kernels* find(const char* name) {
  size_t count;
  const Candidate* all = candidates(&count);
  for (size_t i = 0; i < count; i++)
    if (all[i].runs && (!std::strcmp(name, "auto") || !std::strcmp(name, all[i].kernels->name))) return all[i].kernels;
  return nullptr;
}

static std::atomic<const Kernels*> in_use{nullptr};

const Kernels& kernels(int64_t row_size) {
  const Kernels* found = in_use.load(std::memory_order_relaxed);
  if (!found) in_use = found = find("auto");
#if defined(__x86_64__)
  if (row_size % 32 && found != &portable_kernels) return avx2_kernels;
#endif
  return *found;
}

bool use_kernels(const char* name) {
  const Kernels* found = find(name);
  if (found) in_use = found;
  return found != nullptr;
}

const char* runnable_kernels() {
  static const std::string names = [] {
    std::string text;
    size_t count;
    const Candidate* all = candidates(&count);
    for (size_t i = 0; i < count; i++)
      if (all[i].runs) text += std::string(text.empty() ? "" : " ") + all[i].kernels->name;
    return text;
  }();
  return names.c_str();
}

namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* scratch(int slot, size_t bytes) {
  static thread_local Buffer buffers[kScratchSlots];
  Buffer& own = buffers[slot];
#if defined(__SANITIZE_ADDRESS__)
  // What was asked for to the byte, and anew each time: a step too far and the use of an older buffer show.
  std::free(own.data);
  own.data = nullptr;
  if (posix_memalign(&own.data, 64, bytes ? bytes : 1)) throw std::bad_alloc();
#else
  if (own.size < bytes) {
    std::free(own.data);
    own.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    own.data = std::aligned_alloc(4096, own.size);
    if (!own.data) {
      own.size = 0;
      throw std::bad_alloc();
    }
  }
#endif
  return own.data;
}

}  // namespace tokenselect
