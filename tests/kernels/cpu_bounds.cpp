// Runs every kernel on odd shapes with buffers of exactly the promised size; built with the address and undefined-behaviour
// sanitizers by test_cpu_bounds.py, so that one byte read or written past an end ends the process.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "stored.h"

using namespace fxquant;

namespace {

struct Sizes {
    int64_t rows, out_features, in_features;
};

int64_t bytes_of(Float type) { return type == Float::f32 ? 4 : 2; }

// A heap block of its own, aligned like torch's.
template <class T>
struct Buffer {
    explicit Buffer(int64_t n) : data(nullptr) {
        if (posix_memalign(reinterpret_cast<void**>(&data), 64, n * sizeof(T)) != 0) abort();
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    T* data;
};

void run(const Kernels& kernels, const Sizes& s, Float type, bool with_bias) {
    const int64_t m = s.rows, n = s.out_features, k = s.in_features;
    std::vector<char> x(m * k * bytes_of(type), 0);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<char>(i * 37 % 60);  // small finite floats of any type
    const PanelLayout layout = int8_layout(n, k);
    const std::vector<int8_t> weights(n * k, 1);
    std::vector<int8_t> packed(layout.bytes());
    for (int64_t p = 0; p < panels(n); ++p) pack_quads(weights.data(), n, k, p, packed.data());
    std::vector<float> scale(n, 0.5f), bias(n, 1.0f), x_scale(m);
    std::vector<int8_t> codes(m * k);
    const Rows rows{x.data(), k, k, type};
    kernels.quantize(rows, 0, m, codes.data(), x_scale.data());

    const Weight weight{packed.data(), scale.data(), with_bias ? bias.data() : nullptr, n, k};
    const int64_t stride = staged_stride(k, kernels.code_bytes), wide_stride = staged_stride(k, 4) / 4;
    Buffer<char> staged(m * stride);
    Buffer<float> wide(m * wide_stride);
    kernels.stage(codes.data(), k, 0, m, staged.data, stride);
    kernels.quantize_static(rows, 0, m, {0.5f, 2.0f}, staged.data, stride, x_scale.data());
    kernels.quantize_staged(rows, 0, m, staged.data, stride, x_scale.data());
    kernels.widen(rows, 0, m, wide.data, wide_stride);
    std::vector<char> out(m * n * bytes_of(type));
    for (int64_t row0 = 0; row0 < m; row0 += kRowBlock) {
        const int64_t row1 = row0 + kRowBlock < m ? row0 + kRowBlock : m;
        for (int64_t panel = 0; panel < panels(n); ++panel) {
            const int8_t* next = layout.is_full(panel + 1) ? packed.data() + layout.offset(panel + 1) : nullptr;
            const Task task{panel, next, row0, row1};
            kernels.int8_product({staged.data, stride, 1, x_scale.data(), weight, out.data(), type}, task);
            if (kernels.float_product != nullptr) kernels.float_product({wide.data, wide_stride, weight, out.data(), type}, task);
        }
    }
    if (kernels.quantize_digits == nullptr) return;
    const int64_t count = digits_of(type);
    Buffer<char> digits(m * count * stride);
    kernels.quantize_digits(rows, 0, m, digits.data, stride, x_scale.data());
    for (int64_t row0 = 0; row0 < m; row0 += kRowBlock / kMostDigits) {
        const int64_t row1 = row0 + kRowBlock / kMostDigits < m ? row0 + kRowBlock / kMostDigits : m;
        for (int64_t panel = 0; panel < panels(n); ++panel) {
            kernels.int8_product({digits.data, stride, count, x_scale.data(), weight, out.data(), type}, {panel, nullptr, row0, row1});
        }
    }
}

// shared: how many features share their numbers, 0 if none do.
void run_coded(const Kernels& kernels, const Sizes& s, int64_t bits, Scheme scheme, Stored stored, int64_t granule, int64_t shared) {
    const int64_t m = s.rows, n = s.out_features, k = s.in_features;
    const int64_t granules = (k + granule - 1) / granule, each = stored == Stored::f32 ? 4 : stored == Stored::bf16 ? 2 : 1;
    std::vector<uint8_t> codes(n * k, 1), packed(plane_layout(n, k, bits).bytes());
    for (int64_t p = 0; p < panels(n); ++p) pack_planes(codes.data(), n, k, bits, 0, p, packed.data());
    const int64_t numbers = (shared == 0 ? n : (n + shared - 1) / shared) * granules;
    std::vector<uint16_t> values(256, 0x3f80);
    std::vector<uint8_t> scale(numbers * each, 0x38), zero(numbers, 1);
    std::vector<float> bias(n, 1.0f), x(m * k, 0.5f), x_scale(m);
    const CodedWeight weight{packed.data(), bits,   scheme,  stored == Stored::f32,     0, values.data(), {scale.data(), stored, shared},
                             {zero.data(), Stored::u8, shared}, granules, granule, bias.data(), bias.data(), n, k};
    const Rows rows{x.data(), k, k, Float::f32};
    const int64_t stride = staged_stride(k, kernels.code_bytes), wide_stride = staged_stride(k, 4) / 4;
    const int64_t digits = kernels.quantize_digits == nullptr ? 1 : kMostDigits;
    Buffer<char> staged(m * digits * stride);
    Buffer<float> wide(m * wide_stride);
    kernels.widen(rows, 0, m, wide.data, wide_stride);
    std::vector<float> out(m * n), decoded(n * k), x_sums(m * granules);
    std::vector<Piece> pieces;
    for (int64_t g = 0; g < granules; ++g) pieces.push_back({g * granule, (g + 1) * granule < k ? (g + 1) * granule : k, g});
    std::vector<int32_t> sums(m * digits * granules);
    const PieceRows piece_rows = {sums.data(), nullptr, granules};
    const auto dynamic = [&](int64_t d) {
        return CodedDynamicProblem{staged.data, stride, d, x_scale.data(), 0, piece_rows, pieces.data(), granules, weight, out.data(), Float::f32};
    };
    const bool whole_quads = granules == 1 || granule % kQuad == 0;
    for (int64_t panel = 0; panel < panels(n); ++panel) {
        kernels.coded.decode(weight, panel, decoded.data(), Float::f32);
        for (int64_t row0 = 0; row0 < m; row0 += kRowBlock) {
            const int64_t row1 = row0 + kRowBlock < m ? row0 + kRowBlock : m;
            for (int64_t r = row0; kernels.coded.sum != nullptr && r < row1; ++r) {
                kernels.coded.sum(weight, wide.data + r * wide_stride, x_sums.data() + r * granules);
            }
            kernels.coded.product({wide.data, wide_stride, x_sums.data(), weight, out.data(), Float::f32}, panel, row0, row1);
        }
        for (int64_t d = 1; whole_quads && d <= digits; d += kMostDigits - 1) {
            kernels.coded.quantize(rows, 0, m, dynamic(d), staged.data, x_scale.data(), sums.data());
            for (int64_t row0 = 0; row0 < m; row0 += kRowBlock / kMostDigits) {
                kernels.coded.dynamic_product(dynamic(d), panel, row0, row0 + kRowBlock / kMostDigits < m ? row0 + kRowBlock / kMostDigits : m);
            }
        }
    }
}

// int8 products of a weight in steps.
void run_stepped(const Kernels& kernels, const Sizes& s, int64_t bits, int64_t granule) {
    const int64_t m = s.rows, n = s.out_features, k = s.in_features, granules = (k + granule - 1) / granule;
    const PanelLayout layout = plane_layout(n, k, bits);
    std::vector<uint8_t> codes(n * k, 1), packed(layout.bytes());
    for (int64_t p = 0; p < panels(n); ++p) pack_planes(codes.data(), n, k, bits, 0, p, packed.data());
    std::vector<uint16_t> values(256, 0x3f80), scale(n * granules, 0x4000), steps(n, 0x3f80);
    std::vector<float> x(m * k, 0.5f), x_scale(m), out(m * n);
    CodedWeight weight{packed.data(), bits, Scheme::symmetric, true, static_cast<int32_t>(1 << (bits - 1)), values.data(), {scale.data(), Stored::bf16, 0},
                       {nullptr, Stored::u8, 0}, granules, granule, nullptr, nullptr, n, k};
    weight.steps = steps.data();
    const Weight as_int8{nullptr, nullptr, nullptr, n, k, {}, &weight};
    const Rows rows{x.data(), k, k, Float::f32};
    const int64_t stride = staged_stride(k, kernels.code_bytes);
    Buffer<char> staged(m * stride);
    std::vector<Piece> pieces;
    for (int64_t g = 0; g < granules; ++g) pieces.push_back({g * granule, (g + 1) * granule < k ? (g + 1) * granule : k, g});
    std::vector<int32_t> sums(m * granules);
    const bool few = m <= kernels.coded.stepped_rows && (granules == 1 || granule % kBlock == 0);
    const CodedDynamicProblem dynamic{staged.data, stride, 1, x_scale.data(), 0, {sums.data(), nullptr, granules}, pieces.data(), granules,
                                      weight, out.data(), Float::f32};
    for (int64_t panel = 0; panel < panels(n); ++panel) {
        kernels.quantize_staged(rows, 0, m, staged.data, stride, x_scale.data());
        for (int64_t row0 = 0; row0 < m; row0 += kRowBlock) {
            const int64_t row1 = row0 + kRowBlock < m ? row0 + kRowBlock : m;
            kernels.int8_product({staged.data, stride, 1, x_scale.data(), as_int8, out.data(), Float::f32}, {panel, nullptr, row0, row1});
        }
        if (!few || !layout.is_full(panel)) continue;
        kernels.coded.quantize(rows, 0, m, dynamic, staged.data, x_scale.data(), sums.data());
        kernels.coded.dynamic_product(dynamic, panel, 0, m);
    }
}

void run_all_coded(const Kernels& kernels, const Sizes& shape) {
    for (int64_t bits = 2; bits <= 8; ++bits) {
        for (const int64_t granule : {int64_t{5}, int64_t{16}, shape.in_features}) {
            run_coded(kernels, shape, bits, Scheme::symmetric, bits % 2 ? Stored::bf16 : Stored::e8m0, granule, 0);
            run_coded(kernels, shape, bits, Scheme::affine, bits % 2 ? Stored::f32 : Stored::e4m3, granule, 0);
            run_coded(kernels, shape, bits, Scheme::affine, bits % 2 ? Stored::f32 : Stored::bf16, granule, bits * 9);
        }
    }
    for (int64_t bits = 2; bits <= 4; ++bits) {
        for (const int64_t granule : {int64_t{4}, int64_t{16}, shape.in_features}) run_stepped(kernels, shape, bits, granule);
    }
}

void run_fake_quantize(const Kernels& kernels, int64_t m, int64_t k, Float type) {
    const std::vector<char> x(m * k * bytes_of(type), 0x11);
    std::vector<char> out(x.size());
    for (const auto scale : {Grid::Scale::float32, Grid::Scale::e8m0, Grid::Scale::e4m3}) {
        for (const int64_t group : {0, 1, 5, 16, 1000}) {
            const Grid grid{6.0f, 0x1p-123f, 2, 0, 1, true, scale, group};
            kernels.fake_quantize(grid, Rows{x.data(), k, k, type}, 0, m, out.data(), 0.5f);
        }
    }
    const Grid grid{6.0f, 0x1p-123f, 2, 0, 1, true, Grid::Scale::float32, 0};
    kernels.fake_quantize_static(grid, x.data(), type, m * k, {0.5f, 2.0f}, out.data());
    kernels.fake_quantize_piece(grid, x.data(), type, m * k, kernels.amax(x.data(), type, m * k), out.data());
    const std::vector<float> wide(k, 0.5f);
    std::vector<char> narrow(k * bytes_of(type));
    kernels.narrow(wide.data(), k, type, narrow.data());
}

// A convolution along one line: a kernel of three, outputs `step` apart, `pad` zeros at both ends.
void run_patches(const Kernels& kernels, int64_t channels, int64_t length, int64_t step, int64_t pad, bool last, Float type) {
    const int64_t reach = 3, out_length = (length + 2 * pad - reach) / step + 1, k = channels * reach, samples = 2, n = 70;
    Layout l = {};
    l.channels = channels;
    l.channels_last = last;
    for (int i = 0; i < 3; ++i) l.in[i] = l.size[i] = 1;
    l.stride[0] = l.stride[1] = 1;
    l.used[0] = l.used[1] = 1;
    l.in[2] = length, l.pad[2] = pad, l.step = step, l.size[2] = (out_length - 1) * step + reach;
    l.phases = step < reach ? step : reach;
    l.phase_length = (l.size[2] + step - 1) / step;
    l.line = l.channel = l.phases * l.phase_length;
    const std::vector<char> x(samples * channels * length * bytes_of(type), 0x11);
    const std::vector<float> factors(samples, 0.5f);
    const int64_t units = samples * (last ? 1 : channels), values = samples * channels * l.channel;
    std::vector<char> room(room_elements(l) * 4);
    std::vector<char> codes(values * kernels.code_bytes + 64);  // 15 bytes behind what is laid out are read
    std::vector<float> floats(values);
    kernels.patches.lay_codes(l, x.data(), type, factors.data(), codes.data(), 0, units, room.data());
    kernels.patches.lay_floats(l, x.data(), type, nullptr, floats.data(), 0, units, room.data());

    std::vector<int64_t> offsets;
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t w = 0; w < reach; ++w) offsets.push_back(c * l.channel + w % step * l.phase_length + w / step);
    }
    offsets.resize(round_up(k, 16), 0);
    Patches patches = {codes.data(), channels * l.channel, {0, 0, 1}, {1, 1, out_length}, offsets.data(), k};
    const int64_t rows = samples * out_length, stride = staged_stride(k, kernels.code_bytes);
    std::vector<char> staged(rows * stride);
    kernels.patches.stage(patches, 0, rows, staged.data(), stride);
    std::vector<char> row(length * kernels.code_bytes);
    kernels.patches.quantize_by(Rows{x.data(), length, length, type}, 0, 1, 0.5f, row.data(), 0);

    const std::vector<uint8_t> packed(plane_layout(n, k, 4).bytes(), 1);
    const std::vector<float> scale(n, 0.5f), bias(n, 1.0f);
    const std::vector<uint16_t> code_values(256, 0x3f80);
    const CodedWeight weight{packed.data(), 4, Scheme::symmetric, true, 8, code_values.data(), {scale.data(), Stored::f32, 0},
                             {nullptr, Stored::u8, 0}, 1, k, nullptr, bias.data(), n, k};
    patches.data = floats.data();
    std::vector<char> out(rows * n * bytes_of(type)), turned(rows * n * bytes_of(type));
    for (int64_t panel = 0; panel < panels(n); ++panel) {
        kernels.patches.product(patches, weight, panel, 0, rows, out.data(), type, n, panel * kPanel);
    }
    out.resize(out.size() + 16);  // as is promised to `turn`
    kernels.patches.turn(out.data(), n, rows, n, type, turned.data(), rows);
}

// Rows of a checkpoint, at an odd address, into panels and back; every instruction set makes the same panels.
void run_stored(const Kernels& kernels, int64_t n, int64_t k, int64_t bits, bool is_int8) {
    const StoredWeight w = stored_weight(n, k, bits, static_cast<uint8_t>(is_int8 ? 0 : 1 << (bits - 1)), is_int8);
    for (int64_t panel = 0; panel < panels(n); ++panel) {
        const int64_t bytes = w.layout.features(panel) * w.row_bytes(), packed_bytes = w.layout.offset(panel + 1) - w.layout.offset(panel);
        std::vector<uint8_t> rows(bytes + 1), wanted(packed_bytes), back(bytes);
        for (int64_t i = 0; i <= bytes; ++i) rows[i] = static_cast<uint8_t>(i * 37 ^ i >> 7);
        panel_of_rows(w, *portable_kernels(), rows.data() + 1, panel, false, wanted.data());
        for (const bool past : {false, true}) {
            Buffer<uint8_t> packed(packed_bytes);
            panel_of_rows(w, kernels, rows.data() + 1, panel, past, packed.data);
            if (std::memcmp(packed.data, wanted.data(), wanted.size()) != 0) {
                fprintf(stderr, "%s: panel %d of [%d, %d] in %d bits differs\n", kernels.name, int(panel), int(n), int(k), int(bits));
                exit(1);
            }
        }
        rows_of_panel(w, wanted.data(), panel, back.data());
    }
}

}  // namespace

int main() {
    const Sizes shapes[] = {{1, 1, 1},    {1, 33, 65},  {2, 64, 4},   {3, 65, 5},    {5, 63, 3},   {6, 64, 64},  {3, 65, 260},
                            {7, 129, 31}, {13, 70, 66}, {97, 65, 20}, {259, 70, 12}, {2, 1, 7000}, {2, 70, 447}, {70, 70, 1100}};
    for (const int64_t isa : {kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAmx}) {
        const Kernels* kernels = kernels_of_isa(isa);
        if (kernels == nullptr || !cpu_has(isa)) continue;
        for (const int64_t k : {1, 3, 40, 64, 72, 127, 128, 401, 403, 447, 512, 4096, 8191, 8192}) {
            for (const int64_t n : {1, 63, 64, 130}) {
                run_stored(*kernels, n, k, 8, true);
                for (int64_t bits = 2; bits <= 8; ++bits) run_stored(*kernels, n, k, bits, false);
            }
        }
        for (const Sizes& shape : shapes) {
            for (Float type : {Float::f32, Float::bf16, Float::f16}) {
                run(*kernels, shape, type, false);
                run(*kernels, shape, type, true);
                run_fake_quantize(*kernels, shape.rows, shape.in_features, type);
            }
        }
        for (const Sizes& shape : {Sizes{1, 1, 1}, Sizes{7, 65, 31}, Sizes{259, 70, 12}, Sizes{2, 3, 700}, Sizes{2, 70, 447}}) run_all_coded(*kernels, shape);
        for (Float type : {Float::f32, Float::bf16, Float::f16}) {
            for (const bool last : {false, true}) {
                run_patches(*kernels, 1, 3, 1, 0, last, type);
                run_patches(*kernels, 3, 17, 1, 1, last, type);
                run_patches(*kernels, 5, 9, 2, 4, last, type);
                run_patches(*kernels, 17, 33, 5, 2, last, type);
                run_patches(*kernels, 70, 100, 1, 1, last, type);
            }
        }
        printf("%s done\n", kernels->name);
    }
}
