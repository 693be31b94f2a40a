// The instruction sets that there are kernels for, and which of them this CPU runs.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace fxquant {

enum Isa : int64_t { kChoose = 0, kPortable = 1, kAvx2 = 2, kAvx512Vnni = 3, kAmx = 4, kAvxVnni = 5 };

// Whether the CPU has AMX for int8 and bfloat16, and Linux gives it to this process: it does so once asked.
inline bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
    static const bool has = [] {
        constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
        unsigned a = 0, b = 0, c = 0, d = 0;
        const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0 &&
                           (d >> 24 & 1) != 0 && (d >> 25 & 1) != 0;
        return there && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return has;
#else
    return false;
#endif
}

// Whether the CPU multiplies bytes in vectors of AVX2.
inline bool has_avx_vnni() {
#if defined(__x86_64__) && defined(__linux__)
    static const bool has = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
    }();
    return has;
#else
    return false;
#endif
}

inline bool cpu_has(int64_t isa) {
#if defined(__x86_64__)
    if (isa == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == kAvx512Vnni) {
        return cpu_has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    }
#endif
    if (isa == kAmx) return cpu_has(kAvx512Vnni) && has_amx();
    if (isa == kAvxVnni) return cpu_has(kAvx2) && has_avx_vnni();
    return isa == kPortable;
}

inline const Kernels* kernels_of_isa(int64_t isa) {
    switch (isa) {
        case kPortable: return portable_kernels();
        case kAvx2: return avx2_kernels();
        case kAvx512Vnni: return avx512vnni_kernels();
        case kAmx: return amx_kernels();
        case kAvxVnni: return avxvnni_kernels();
        default: return nullptr;
    }
}

}  // namespace fxquant
