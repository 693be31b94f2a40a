// What the linears do around their product, as their ops are given it: checked, and held for as long as they run.
#pragma once

#include <string>
#include <vector>

#include "tensors.h"

namespace fxquant {

inline bool parse_activation(const std::string& name, Activation& activation) {
    static const char* const kNames[] = {"", "relu", "gelu", "gelu_tanh", "silu"};
    for (int i = 0; i < 5; ++i) {
        if (name != kNames[i]) continue;
        activation = static_cast<Activation>(i);
        return true;
    }
    return false;
}

// The activation and the residual that follow a product [rows, out_features].
class HeldAfter {
public:
    HeldAfter(const char* op, const Tensor& out, const std::optional<Tensor>& residual, const std::string& activation) {
        STD_TORCH_CHECK(parse_activation(activation, view.activation), "fxquant::", op, ": activation is '", activation,
                        "'; '', relu, gelu, gelu_tanh and silu are known");
        if (!residual.has_value()) return;
        const auto sizes = residual->sizes(), wanted = out.sizes();
        STD_TORCH_CHECK(residual->scalar_type() == out.scalar_type() && sizes.size() == wanted.size() &&
                            std::equal(sizes.begin(), sizes.end(), wanted.begin()),
                        "fxquant::", op, ": residual is not of the result's shape and dtype");
        residual_ = dense(*residual);
        view.residual = residual_->data_ptr();
    }

    // For rows from `first` on of a result [rows, width].
    After from(int64_t first, int64_t width, Float type) const {
        After after = view;
        if (after.residual != nullptr) {
            after.residual = static_cast<const char*>(after.residual) + first * width * (type == Float::f32 ? 4 : 2);
        }
        return after;
    }

    After view{};

private:
    std::optional<Tensor> residual_;
};

// The norm or the gate that x goes through before a product.
class HeldBefore {
public:
    HeldBefore(const char* op, const Kernels& kernels, const Tensor& x, const RowView& rows, Float type, const std::string& name,
               const std::optional<Tensor>& by, const std::optional<Tensor>& shift, double eps) {
        if (name.empty()) return;
        view.eps = static_cast<float>(eps);
        if (name == "rmsnorm" || name == "layernorm") {
            view.kind = name == "rmsnorm" ? Before::Kind::rmsnorm : Before::Kind::layernorm;
            view.weight = numbers(op, "by", kernels, by, rows.width, weight_);
            view.bias = numbers(op, "shift", kernels, shift, rows.width, bias_);
            return;
        }
        const size_t n = name.size();
        const bool known = n > 4 && name.compare(n - 4, 4, "_mul") == 0 && parse_activation(name.substr(0, n - 4), view.activation);
        STD_TORCH_CHECK(known, "fxquant::", op, ": prologue is '", name,
                        "'; rmsnorm, layernorm, and relu, gelu, gelu_tanh and silu before _mul are known");
        view.kind = Before::Kind::gate;
        const auto sizes = x.sizes();
        STD_TORCH_CHECK(by.has_value() && by->scalar_type() == x.scalar_type() && by->sizes().size() == sizes.size() &&
                            std::equal(sizes.begin(), sizes.end(), by->sizes().begin()),
                        "fxquant::", op, ": by, what x is multiplied with, is not of its shape and dtype");
        other_.emplace(row_view(op, "by", *by));
        view.other = rows_from(*other_, type, 0);
    }

    // For rows of x from `first` on.
    Before from(int64_t first) const {
        Before before = view;
        if (other_.has_value()) before.other = rows_from(*other_, view.other.type, first);
        return before;
    }

private:
    const float* numbers(const char* op, const char* what, const Kernels& kernels, const std::optional<Tensor>& given, int64_t width,
                         std::vector<float>& wide) {
        if (!given.has_value()) return nullptr;
        const Float type = float_type(op, what, given->scalar_type());
        STD_TORCH_CHECK(given->sizes().size() == 1 && given->numel() == width, "fxquant::", op, ": ", what, " has ", given->numel(),
                        " values for ", width, " features");
        const Tensor& held = held_.emplace_back(dense(*given));
        if (type == Float::f32 && width % 16 == 0) return static_cast<const float*>(held.data_ptr());
        wide.resize(static_cast<size_t>(round_up(width, 16)));  // whole vectors are read
        kernels.widen(Rows{held.data_ptr(), width, width, type}, 0, 1, wide.data(), width);
        return wide.data();
    }

    Before view{};
    std::vector<Tensor> held_;
    std::vector<float> weight_, bias_;
    std::optional<RowView> other_;
};

// body(rows, row0, row1, at): rows row0 <= r < row1 of what a product reads, which are the rows from `at` on of `begin` to `end`
// of x.
template <class Body>
void for_prepared(const Kernels& kernels, const Before& before, const Rows& x, int64_t begin, int64_t end, Body body) {
    if (before.kind == Before::Kind::none) return body(x, begin, end, int64_t{0});
    thread_local Scratch held;
    char* made = held.at_least(round_up(x.width, 16) * static_cast<int64_t>(sizeof(float)));
    for (int64_t r = begin; r < end; ++r) {
        kernels.prepare(before, x, r, made);
        body(Rows{made, x.width, x.width, x.type}, int64_t{0}, int64_t{1}, r);
    }
}

}  // namespace fxquant
