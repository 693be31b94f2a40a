// fxquant::attention: checks, strides, and how the work is shared out. The kernel: attention.h.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "tensors.h"
#include "shims.h"

namespace fxquant {
namespace {

constexpr const char* kOp = "attention";

// Rows of one task, queries times heads of a group. Each task lays out the keys and values that it reads: as many rows as fit into
// the L2 cache with their sums, but rather kLeastRows than fewer tasks than kManyTasks.
constexpr int64_t kLeastRows = 128, kMostRows = 512, kTaskFloats = int64_t{1} << 16, kManyTasks = 32;

// Queries of a task.
int64_t queries_of_task(const AttentionProblem& p, int64_t batch) {
    const int64_t rows = p.queries * (p.heads / p.key_heads), key_heads = batch * p.key_heads;
    const int64_t fitting = kTaskFloats / std::max<int64_t>(p.width + p.value_width, 1);
    const int64_t most = std::min(kMostRows, std::max(kLeastRows, fitting));
    const auto pieces = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    const int64_t wanted = std::min(pieces(kManyTasks, key_heads), pieces(rows, kLeastRows));
    return pieces(p.queries, std::max(wanted, pieces(rows, most)));
}

Tensor last_contiguous(const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    const size_t last = sizes.size() - 1;
    return sizes[last] <= 1 || strides[last] == 1 ? t : torch::stable::contiguous(t);
}

// A tensor [batch, head, row, contiguous], or with leading dimensions missing, which it then shares, as it does those of size 1.
AttentionOperand operand(const char* what, const Tensor& t, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t dims = static_cast<int64_t>(sizes.size()), wanted[4] = {batch, heads, rows, width};
    int64_t step[4] = {};
    for (int64_t d = 0; d < dims; ++d) {
        const int64_t at = 4 - dims + d;
        STD_TORCH_CHECK(sizes[d] == wanted[at] || (sizes[d] == 1 && at < 3), "fxquant::", kOp, ": ", what, " has size ", sizes[d],
                        " where [", batch, ", ", heads, ", ", rows, ", ", width, "] is needed");
        step[at] = sizes[d] == 1 ? 0 : strides[d];
    }
    return {t.data_ptr(), step[0], step[1], step[2]};
}

MaskType mask_type_of(const Tensor& mask) {
    switch (mask.scalar_type()) {
        case ScalarType::Bool: return MaskType::boolean;
        case ScalarType::Float: return MaskType::f32;
        case ScalarType::BFloat16: return MaskType::bf16;
        case ScalarType::Half: return MaskType::f16;
        default: break;
    }
    STD_TORCH_CHECK(false, "fxquant::", kOp, ": mask is ", torch::headeronly::toString(mask.scalar_type()),
                    "; bool, float32, bfloat16 and float16 are taken");
    return MaskType::none;
}

// [batch, heads, queries, width] as a view of [batch, queries, heads, width]: what follows joins the heads of a query.
Tensor output(int64_t batch, int64_t heads, int64_t queries, int64_t width, ScalarType type) {
    const int64_t sizes[4] = {batch, heads, queries, width};
    const int64_t head = std::max<int64_t>(width, 1), query = std::max<int64_t>(heads, 1) * head;
    const int64_t strides[4] = {std::max<int64_t>(queries, 1) * query, head, query, 1};
    AtenTensorHandle fresh = nullptr;
    const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &fresh));
    return in_large_pages(Tensor(fresh));
}

void run(const Kernels& kernels, const AttentionProblem& p, int64_t batch) {
    const int64_t group = p.heads / p.key_heads;
    const int64_t step = queries_of_task(p, batch), pieces = (p.queries + step - 1) / step;
    const auto keys = static_cast<double>(p.keys * (p.width + p.value_width));
    const double bytes = static_cast<double>(batch * p.key_heads) * keys * (p.type == Float::f32 ? 4 : 2);
    const double products = static_cast<double>(batch * p.heads * p.queries) * keys;
    const double time = std::max(bytes / kReadSpeed, products / kernels.float_products);
    split(batch * p.key_heads * pieces, time < kSerialTime, [&](int64_t begin, int64_t end) {
        void* room = scratch(attention_room(step * group, p.width, p.value_width) * static_cast<int64_t>(sizeof(float)));
        for (int64_t task = begin; task < end; ++task) {
            const int64_t query0 = task % pieces * step, head = task / pieces;
            kernels.attention(p, head / p.key_heads, head % p.key_heads, query0, std::min(p.queries, query0 + step), room);
        }
    });
}

Tensor attention(const Tensor query, const Tensor key, const Tensor value, std::optional<Tensor> mask, std::optional<double> scale,
                 bool causal, int64_t isa) {
    const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
    STD_TORCH_CHECK(q.size() == 4 && k.size() == 4 && v.size() == 4, "fxquant::", kOp, ": query, key and value have ", q.size(), ", ",
                    k.size(), " and ", v.size(), " dimensions; [batch, heads, length, features] is needed");
    const Float type = float_type(kOp, "query", query.scalar_type());
    STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(), "fxquant::", kOp,
                    ": query, key and value are of different dtypes");
    const int64_t batch = q[0], heads = q[1], key_heads = k[1];
    STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, "fxquant::", kOp, ": ", heads, " heads of the query are no multiple of ",
                    key_heads, " of the key");
    const Kernels& kernels = kernels_for(isa);
    Tensor out = output(batch, heads, q[2], v[3], query.scalar_type());
    const Tensor held_query = last_contiguous(query), held_key = last_contiguous(key), held_value = last_contiguous(value);
    std::optional<Tensor> held_mask;
    AttentionProblem p = {};
    p.query = operand("query", held_query, batch, heads, q[2], q[3]);
    p.key = operand("key", held_key, batch, key_heads, k[2], q[3]);
    p.value = operand("value", held_value, batch, key_heads, k[2], v[3]);
    if (mask.has_value()) {
        STD_TORCH_CHECK(mask->sizes().size() >= 1 && mask->sizes().size() <= 4, "fxquant::", kOp, ": mask has ", mask->sizes().size(),
                        " dimensions; 1 to 4 are taken");
        p.mask_type = mask_type_of(*mask);
        held_mask = last_contiguous(*mask);
        p.mask = operand("mask", *held_mask, batch, heads, q[2], k[2]);
    }
    p.type = type;
    p.causal = causal;
    p.scale = static_cast<float>(scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(q[3])));
    p.heads = heads;
    p.key_heads = key_heads;
    p.queries = q[2];
    p.keys = k[2];
    p.width = q[3];
    p.value_width = v[3];
    p.out = out.data_ptr();
    if (out.numel() > 0) run(kernels, p, batch);
    return out;
}

}  // namespace
}  // namespace fxquant

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) { m.impl("attention", TORCH_BOX(&fxquant::attention)); }

FXQUANT_SHIM(attention)
