#include "kernels/cpu/select_isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace godwit {
namespace {

// The bits of cpuid leaf 7 that are asked for (Intel SDM, volume 2, CPUID).
constexpr uint32_t kAvx2 = 1u << 5, kAvx512f = 1u << 16, kAvx512dq = 1u << 17, kAvx512cd = 1u << 28,
                   kAvx512bw = 1u << 30, kAvx512vl = 1u << 31;  // ebx
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;    // edx
constexpr uint32_t kAvx512Bf16 = 1u << 5;                       // subleaf 1, eax
constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28,
                   kF16c = 1u << 29;  // leaf 1, ecx
// State components that the system saves (xgetbv).
constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
// arch_prctl: the kernel gives tile data only to a process that asks
// (Documentation/arch/x86/xstate.rst).
constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers CpuId(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

uint64_t SavedState() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

bool Has(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

bool HasAvx2() {
  const uint32_t leaf1 = CpuId(1, 0).ecx;
  return Has(leaf1, kFma | kOsxsave | kAvx | kF16c) && Has(SavedState(), kYmmState) &&
         Has(CpuId(7, 0).ebx, kAvx2);
}

bool HasAvx512Bf16() {
  return HasAvx2() && Has(SavedState(), kZmmState) &&
         Has(CpuId(7, 0).ebx, kAvx512f | kAvx512dq | kAvx512cd | kAvx512bw | kAvx512vl) &&
         Has(CpuId(7, 1).eax, kAvx512Bf16);
}

bool HasAmx() {
  return HasAvx512Bf16() && Has(CpuId(7, 0).edx, kAmxTile | kAmxBf16) &&
         Has(SavedState(), kTileState) &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

struct Candidate {
  const IsaTable& (*table)();
  bool (*available)();
};
// Best first.
constexpr Candidate kCandidates[] = {{AmxIsa, HasAmx},
                                     {Avx512Bf16Isa, HasAvx512Bf16},
                                     {Avx2Isa, HasAvx2},
                                     {PortableIsa, [] { return true; }}};

}  // namespace

absl::StatusOr<const IsaTable*> SelectIsa(absl::string_view name) {
  for (const Candidate& candidate : kCandidates) {
    const IsaTable& table = candidate.table();
    if (name.empty() ? candidate.available() : name == table.name) {
      if (candidate.available()) return &table;
      return absl::FailedPreconditionError(
          absl::StrCat("this machine lacks the instruction set '", name, "'"));
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("instruction set '", name, "' is none of portable, avx2, avx512bf16, amx"));
}

}  // namespace godwit
