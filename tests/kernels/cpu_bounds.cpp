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

void run_coded(const Kernels& kernels, const Sizes& s, int64_t bits, Scheme scheme, Stored stored, int64_t granule) {
    const int64_t m = s.rows, n = s.out_features, k = s.in_features;
    const int64_t granules = (k + granule - 1) / granule, each = stored == Stored::f32 ? 4 : stored == Stored::bf16 ? 2 : 1;
    std::vector<uint8_t> codes(n * k, 1), packed(panels(n) * plane_blocks(k) * bits * kPanel);
    for (int64_t p = 0; p < panels(n); ++p) {
        pack_planes(codes.data(), n, k, bits, 0, p, packed.data() + p * plane_blocks(k) * bits * kPanel);
    }
    std::vector<uint16_t> values(256, 0x3f80);
    std::vector<uint8_t> scale(panels(n) * granules * kPanel * each, 0x38), zero(panels(n) * granules * kPanel, 1);
    std::vector<float> bias(n, 1.0f), x(m * k, 0.5f), x_scale(m);
    const CodedWeight weight{packed.data(), bits,   scheme,  stored == Stored::f32,     0, values.data(), {scale.data(), stored},
                             {zero.data(), Stored::u8}, granules, granule, bias.data(), bias.data(), n, k};
    const Rows rows{x.data(), k, k, Float::f32};
    const int64_t stride = staged_stride(k, kernels.code_bytes), wide_stride = staged_stride(k, 4) / 4;
    Buffer<char> staged(m * stride);
    Buffer<float> wide(m * wide_stride);
    kernels.widen(rows, 0, m, wide.data, wide_stride);
    std::vector<float> out(m * n), decoded(n * k);
    std::vector<Piece> pieces;
    for (int64_t g = 0; g < granules; ++g) pieces.push_back({g * granule, (g + 1) * granule < k ? (g + 1) * granule : k, g});
    std::vector<int32_t> sums(m * granules);
    const CodedDynamicProblem dynamic{staged.data, stride,   x_scale.data(), sums.data(), pieces.data(), granules,
                                      weight,      out.data(), Float::f32};
    const bool whole_quads = granules == 1 || granule % kQuad == 0;
    if (whole_quads) kernels.coded.quantize(rows, 0, m, dynamic, staged.data, x_scale.data(), sums.data());
    for (int64_t panel = 0; panel < panels(n); ++panel) {
        kernels.coded.decode(weight, panel, decoded.data(), Float::f32);
        for (int64_t row0 = 0; row0 < m; row0 += kRowBlock) {
            const int64_t row1 = row0 + kRowBlock < m ? row0 + kRowBlock : m;
            kernels.coded.product({wide.data, wide_stride, weight, out.data(), Float::f32}, panel, row0, row1);
            if (whole_quads) kernels.coded.dynamic_product(dynamic, panel, row0, row1);
        }
    }
}

void run_all_coded(const Kernels& kernels, const Sizes& shape) {
    for (int64_t bits = 2; bits <= 8; ++bits) {
        for (const int64_t granule : {int64_t{5}, int64_t{16}, shape.in_features}) {
            run_coded(kernels, shape, bits, Scheme::symmetric, bits % 2 ? Stored::bf16 : Stored::e8m0, granule);
            run_coded(kernels, shape, bits, Scheme::affine, bits % 2 ? Stored::f32 : Stored::e4m3, granule);
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
        for (const Sizes& shape : {Sizes{1, 1, 1}, Sizes{7, 65, 31}, Sizes{259, 70, 12}, Sizes{2, 3, 700}}) run_all_coded(*kernels, shape);
        printf("%s done\n", kernels->name);
    }
}
