// A cheap look at many tensors at every call, to notice weights that changed: those that torch counts (_version), those that
// got other memory (param.data = ...), and those edited behind torch's back (param.data += ..., numpy, LoRA merges).
//
// Between two steps of a large model all of this has left the caches, so a look is a few thousand misses: they must overlap.
// The one place that reads torch's own structs, inline and header-only; the library is built anew for every torch.
#include <c10/core/TensorImpl.h>

#include <cstdint>
#include <cstring>

namespace {

// 8-byte words read of each buffer: first, middle, last. Each costs a miss of the cache and of the TLB at every step.
constexpr int64_t kSamples = 3;
constexpr int64_t kWord = 8;

uint64_t mix(uint64_t hash, uint64_t word) {  // one step of splitmix64's finalizer
    hash = (hash ^ word) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

int64_t offset_of(int64_t sample, int64_t nbytes) { return (nbytes - kWord) / (kSamples - 1) * sample; }

void prefetch(const void* pointer, int64_t nbytes) {
    if (nbytes < kWord) return;
    for (int64_t s = 0; s + 1 < kSamples; ++s) __builtin_prefetch(static_cast<const char*>(pointer) + offset_of(s, nbytes));
    __builtin_prefetch(static_cast<const char*>(pointer) + nbytes - kWord);
}

uint64_t word_at(const void* pointer, int64_t offset, int64_t n) {
    uint64_t word = 0;
    std::memcpy(&word, static_cast<const char*>(pointer) + offset, static_cast<size_t>(n));  // any alignment
    return word;
}

uint64_t hash_buffer(const void* pointer, int64_t nbytes) {
    uint64_t hash = mix(0, static_cast<uint64_t>(nbytes));
    if (nbytes <= 0) return hash;
    if (nbytes < kWord) return mix(hash, word_at(pointer, 0, nbytes));
    for (int64_t s = 0; s + 1 < kSamples; ++s) hash = mix(hash, word_at(pointer, offset_of(s, nbytes), kWord));
    return mix(hash, word_at(pointer, nbytes - kWord, kWord));
}

}  // namespace

// pointers: n buffers of nbytes[i] bytes. each: n hashes, written if not null. Returns one hash over all of them, in order.
extern "C" __attribute__((visibility("default"))) uint64_t fxquant_fingerprint(const void* const* pointers,
                                                                               const int64_t* nbytes, int64_t n,
                                                                               uint64_t* each) {
    constexpr int64_t kAhead = 12;  // buffers whose samples are on their way: one miss to memory is 100 ns
    for (int64_t i = 0; i < n && i < kAhead; ++i) prefetch(pointers[i], nbytes[i]);
    uint64_t all = static_cast<uint64_t>(n);
    for (int64_t i = 0; i < n; ++i) {
        if (i + kAhead < n) prefetch(pointers[i + kAhead], nbytes[i + kAhead]);
        const uint64_t hash = hash_buffer(pointers[i], nbytes[i]);
        if (each != nullptr) each[i] = hash;
        all = mix(all, hash);
    }
    return all;
}

// One hash over the state of n tensors, in order: storage address, offset, and the count of edits (none under inference mode).
extern "C" __attribute__((visibility("default"))) uint64_t fxquant_tensor_state(c10::TensorImpl* const* tensors, int64_t n) {
    constexpr int64_t kLines = (sizeof(c10::TensorImpl) + 63) / 64;
    for (int64_t i = 0; i < n; ++i) {
        const char* bytes = reinterpret_cast<const char*>(tensors[i]);
        for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(bytes + 64 * line);
    }
    for (int64_t i = 0; i < n; ++i) {
        if (tensors[i]->has_storage()) __builtin_prefetch(tensors[i]->unsafe_storage().unsafeGetStorageImpl());
    }
    uint64_t all = static_cast<uint64_t>(n);
    for (int64_t i = 0; i < n; ++i) {
        c10::TensorImpl& tensor = *tensors[i];
        const void* address = nullptr;
        if (tensor.has_storage()) address = tensor.unsafe_storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get();
        all = mix(all, reinterpret_cast<uint64_t>(address));
        all = mix(all, static_cast<uint64_t>(tensor.storage_offset()));
        if (!tensor.is_inference()) all = mix(all, tensor.version_counter().current_version());
    }
    return all;
}
