// Runs every kernel on odd shapes with buffers of exactly the promised size; built with the address and undefined-behaviour
// sanitizers by test_cpu_bounds.py, so that one byte read or written past an end ends the process.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace fxquant;

namespace {

struct Sizes {
    int64_t rows, out_features, in_features;
};

int64_t bytes_of(Float type) { return type == Float::f32 ? 4 : 2; }

// A heap block of its own, aligned like torch's.
template <class T>
struct Buffer {
    explicit Buffer(int64_t n) : data(static_cast<T*>(aligned_alloc(64, n * sizeof(T) == 0 ? 64 : n * sizeof(T)))) {}
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    T* data;
};

void run(const Kernels& kernels, const Sizes& s, Float type, bool with_bias) {
    const int64_t m = s.rows, n = s.out_features, k = s.in_features;
    std::vector<char> x(m * k * bytes_of(type), 0);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<char>(i * 37 % 60);  // small finite floats of any type
    std::vector<int8_t> packed(panels(n) * panel_bytes(k), 1);
    std::vector<float> scale(n, 0.5f), bias(n, 1.0f), x_scale(m);
    std::vector<int8_t> codes(m * k);
    const Rows rows{x.data(), k, k, type};
    kernels.quantize(rows, 0, m, codes.data(), x_scale.data());

    const Weight weight{packed.data(), scale.data(), with_bias ? bias.data() : nullptr, n, k};
    const int64_t stride = staged_stride(k, kernels.code_bytes), wide_stride = staged_stride(k, 4) / 4;
    Buffer<char> staged(m * stride);
    Buffer<float> wide(m * wide_stride);
    kernels.stage(codes.data(), k, 0, m, staged.data, stride);
    kernels.quantize_staged(rows, 0, m, staged.data, stride, x_scale.data());
    kernels.widen(rows, 0, m, wide.data, wide_stride);
    std::vector<char> out(m * n * bytes_of(type));
    for (int64_t row0 = 0; row0 < m; row0 += kRowBlock) {
        const int64_t row1 = row0 + kRowBlock < m ? row0 + kRowBlock : m;
        for (int64_t panel = 0; panel < panels(n); ++panel) {
            const int8_t* next = panel + 1 < panels(n) ? packed.data() + (panel + 1) * panel_bytes(k) : nullptr;
            kernels.int8_product({staged.data, stride, x_scale.data(), weight, out.data(), type}, {panel, next, row0, row1});
            kernels.float_product({wide.data, wide_stride, weight, out.data(), type}, {panel, next, row0, row1});
        }
    }
}

}  // namespace

int main() {
    const Sizes shapes[] = {{1, 1, 1},    {1, 33, 65},  {2, 64, 4},   {3, 65, 5},    {5, 63, 3},  {6, 64, 64},
                            {7, 129, 31}, {13, 70, 66}, {97, 65, 20}, {259, 70, 12}, {2, 1, 7000}};
    for (const Kernels* kernels : {portable_kernels(), avx2_kernels(), avx512vnni_kernels()}) {
        if (kernels == nullptr) continue;
        if (!strcmp(kernels->name, "avx2") && !__builtin_cpu_supports("avx2")) continue;
        if (!strcmp(kernels->name, "avx512vnni") && !__builtin_cpu_supports("avx512vnni")) continue;
        for (const Sizes& shape : shapes) {
            for (Float type : {Float::f32, Float::bf16, Float::f16}) {
                run(*kernels, shape, type, false);
                run(*kernels, shape, type, true);
            }
        }
        printf("%s done\n", kernels->name);
    }
}
