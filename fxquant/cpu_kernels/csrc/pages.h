// Large outputs in large pages. Memory that malloc gets from the system for each call costs a page fault for every 4 KiB that
// are written, which is more than the product takes; a fault of 2 MiB is one in 512.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fxquant {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kWorthHugePages = 2 * kHugePage;  // at least one whole page lies inside, however the memory begins

// Ask for huge pages where [data, data + bytes) is large and is not there yet. What the system does with it changes no result.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes < kWorthHugePages) return;
    const auto start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t mask = ~static_cast<uintptr_t>(kHugePage - 1);
    const uintptr_t first = (start + static_cast<uintptr_t>(kHugePage) - 1) & mask;
    const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) & mask;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Whether the page in the middle of [data, data + bytes) has been written before. The system zeroes one that has not, and by
// that brings it into the caches.
inline bool was_written([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    unsigned char there = 1;
    const uintptr_t middle = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) / 2;
    return mincore(reinterpret_cast<void*>(middle & ~(page - 1)), page, &there) != 0 || (there & 1) != 0;
#else
    return true;
#endif
}

// Ask for all pages of [data, data + bytes) at once, which takes less than a page fault for each.
inline void bring_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
    static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(data) & ~(page - 1);
    madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) - first, MADV_POPULATE_WRITE);
#endif
}

}  // namespace fxquant
