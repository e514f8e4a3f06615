#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sinkhorn {

extern const KernelTable kernels_DEFAULT;
#ifdef SINKHORN_X86
extern const KernelTable kernels_AVX2, kernels_AVX512;
#endif

namespace {

struct Choice {
  const char* name;
  const KernelTable* table;
};

constexpr const char* kVariable = "TORCH_SINKHORN_ATTN_CPU_CAPABILITY";

std::vector<Choice> find_usable() {
  std::vector<Choice> found{{"default", &kernels_DEFAULT}};
#ifdef SINKHORN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))  // f16c comes with avx2
    found.push_back({"avx2", &kernels_AVX2});
  if (found.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back({"avx512", &kernels_AVX512});
#endif
  return found;
}

const std::vector<Choice>& usable() {
  static const std::vector<Choice> found = find_usable();
  return found;
}

const Choice* find(const std::string& requested, const std::string& origin) {
  std::string known;
  for (const auto& choice : usable()) {
    if (requested == choice.name) return &choice;
    known += (known.empty() ? "'" : ", '") + std::string(choice.name) + "'";
  }
  throw std::invalid_argument(origin + "='" + requested + "' is not usable on this processor; choose one of " + known +
                              ".");
}

const Choice* first_choice() {
  const char* requested = std::getenv(kVariable);
  return requested && *requested ? find(requested, kVariable) : &usable().back();
}

std::atomic<const Choice*>& current() {
  static std::atomic<const Choice*> choice{first_choice()};
  return choice;
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const auto& choice : usable()) names.emplace_back(choice.name);
  return names;
}

std::string capability() { return current().load()->name; }

void set_capability(const std::string& requested) { current().store(find(requested, "capability")); }

const KernelTable& kernels() { return *current().load()->table; }

}  // namespace sinkhorn
