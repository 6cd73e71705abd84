// What is called without ONNX Runtime: the choice of an instruction set, and kernels on plain addresses, for PyTorch's tensors.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "kernels.h"

namespace bilevel {

const Kernels& best_kernels() {
  const Kernels* usable[3];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool is_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (is_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    usable[count++] = &avx512::kernels;
  if (is_avx2) usable[count++] = &avx2::kernels;
#endif
  usable[count++] = &baseline::kernels;
  const char* wanted = std::getenv("BILEVEL_CPU_ISA");
  for (int i = 0; wanted && i < count; ++i)
    if (!std::strcmp(wanted, usable[i]->name)) return *usable[i];
  return *usable[0];
}

}  // namespace bilevel

namespace {

// Threads of this call alone; the first failure ends it.
struct Threads {
  int count;
  std::atomic<bool> failed{false};

  static void run(void* self, void (*function)(void*, size_t), size_t total, void* data) {
    auto* threads = static_cast<Threads*>(self);
    std::atomic<size_t> next{0};
    const auto work = [&] {
      try {
        for (size_t i = next++; i < total && !threads->failed; i = next++) function(data, i);
      } catch (const std::exception&) {
        threads->failed = true;
      }
    };
    std::vector<std::thread> others;
    try {
      for (size_t n = 1; n < std::min<size_t>(threads->count, total); ++n) others.emplace_back(work);
    } catch (const std::exception&) {  // no more threads to be had: those that there are do the work
    }
    work();
    for (std::thread& other : others) other.join();
  }
};

template <typename Arguments>
int call(void (*kernel)(const Arguments&, const bilevel::Parallel&), const Arguments& arguments, int threads) {
  Threads pool{threads};
  try {
    kernel(arguments, {&Threads::run, &pool});
  } catch (const std::exception&) {
    return 1;
  }
  return pool.failed ? 1 : 0;
}

}  // namespace

extern "C" {

// The instruction set whose kernels this CPU gets: "avx512", "avx2" or "baseline".
__attribute__((visibility("default"))) const char* bilevel_instruction_set() { return bilevel::best_kernels().name; }

// RoutedAttention, or its gradients where tensors[8] is given. tensors: q, k, v, routes, past_len, new_len, out, lse, grad_out,
// grad_q, grad_k, grad_v. sizes: B, Hq, L, D, Hkv, M, Hs, K, E, block_size, causal, pieces. Returns 0, or 1: out of memory.
__attribute__((visibility("default"))) int bilevel_train_attention(void* const* tensors, const int64_t* sizes, float scale,
                                                                   int threads) {
  const auto numbers = [&](int n) { return static_cast<float*>(tensors[n]); };
  const auto indices = [&](int n) { return static_cast<const int32_t*>(tensors[n]); };
  bilevel::TrainingArguments t{};
  t.call.q = numbers(0), t.call.k = numbers(1), t.call.v = numbers(2);
  t.call.routes = indices(3), t.call.past_len = indices(4), t.call.new_len = indices(5);
  t.call.out = numbers(6), t.lse = numbers(7), t.grad_out = numbers(8);
  t.grad_q = numbers(9), t.grad_k = numbers(10), t.grad_v = numbers(11);
  t.call.batch = sizes[0], t.call.heads = sizes[1], t.call.length = sizes[2], t.call.width = sizes[3];
  t.call.kv_heads = sizes[4], t.call.capacity = sizes[5], t.call.selection_heads = sizes[6], t.call.kept = sizes[7];
  t.value_width = sizes[8], t.call.block_size = sizes[9], t.call.causal = sizes[10] != 0, t.pieces = sizes[11];
  t.call.scale = scale;
  return call(bilevel::best_kernels().train_attention, t, threads);
}
}
