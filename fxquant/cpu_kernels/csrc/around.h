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

// 'silu_first': the half that goes through silu. none where the name is that of an activation of all columns.
inline Gate gate_of(const std::string& activation) {
    const auto ends = [&](const std::string& with) {
        return activation.size() > with.size() && activation.compare(activation.size() - with.size(), with.size(), with) == 0;
    };
    return ends("_first") ? Gate::first : ends("_second") ? Gate::second : Gate::none;
}

// Columns of the result of a product [rows, out_features] with that activation.
inline int64_t result_columns(const char* op, int64_t out_features, const std::string& activation) {
    const Gate gate = gate_of(activation);
    STD_TORCH_CHECK(gate == Gate::none || out_features % (2 * kPanel) == 0, "fxquant::", op, ": activation '", activation,
                    "' wants two halves of a multiple of ", kPanel, " columns; met ", out_features, " in all");
    return gate == Gate::none ? out_features : out_features / 2;
}

// The activation and the residual that follow a product, whose result `out` is.
class HeldAfter {
public:
    HeldAfter(const char* op, const Tensor& out, const std::optional<Tensor>& residual, const std::string& activation) {
        view.gate = gate_of(activation);
        columns = out.sizes()[out.sizes().size() - 1];
        const std::string name = view.gate == Gate::none ? activation : activation.substr(0, activation.rfind('_'));
        STD_TORCH_CHECK(parse_activation(name, view.activation), "fxquant::", op, ": activation is '", activation,
                        "'; '', relu, gelu, gelu_tanh and silu are known, and before _first or _second, where halves are multiplied");
        if (!residual.has_value()) return;
        const auto sizes = residual->sizes(), wanted = out.sizes();
        STD_TORCH_CHECK(residual->scalar_type() == out.scalar_type() && sizes.size() == wanted.size() &&
                            std::equal(sizes.begin(), sizes.end(), wanted.begin()),
                        "fxquant::", op, ": residual is not of the result's shape and dtype");
        residual_ = dense(*residual);
        view.residual = residual_->data_ptr();
    }

    // For rows from `first` on.
    After from(int64_t first, Float type) const {
        After after = view;
        if (after.residual != nullptr) {
            after.residual = static_cast<const char*>(after.residual) + first * columns * (type == Float::f32 ? 4 : 2);
        }
        return after;
    }

    After view{};
    int64_t columns;  // of the result

private:
    std::optional<Tensor> residual_;
};

// run(problem, panel, row0, row1, next) of every panel that a product of `rows` rows takes; next: the one that the thread will
// run after it, or -1. Halves that are multiplied are run by groups of panels, first that with the activation, whose result
// stays in the cache: a panel that does not stand behind the last one is slower to come from memory. time: see for_panels.
template <class Problem, class Run>
void for_products(const Problem& p, int64_t rows, double time, const Blocking& by, Run run) {
    const After& after = p.weight.after;
    if (after.gate == Gate::none) {
        for_panels(p.weight.out_features, rows, time, by, [&](int64_t panel, int64_t row0, int64_t row1, bool last) {
            run(p, panel, row0, row1, last ? panel + 1 : -1);
        });
        return;
    }
    const int64_t columns = p.weight.out_features / 2, half = panels(columns), threads = torch::stable::get_num_threads();
    const int64_t lead = after.gate == Gate::first ? 0 : half, trail = half - lead;
    const int64_t fitting = kRowBlock / std::max<int64_t>(1, std::min(rows, by.rows));
    const int64_t group = std::max<int64_t>(1, std::min(fitting, threads == 1 ? half : half / (2 * threads)));
    for_panels((half + group - 1) / group * kPanel, rows, time, by, [&](int64_t number, int64_t row0, int64_t row1, bool last) {
        const int64_t begin = number * group, end = std::min(half, begin + group);
        alignas(64) float activated[kPatternRows * kPanel];  // a task has no more rows, of a group kRowBlock
        const auto rows_of = [&](int64_t panel) { return activated + (panel - begin) * (row1 - row0) * kPanel; };
        const bool first = by.by_rows || row0 == 0;  // the rows before these left the panels in the cache
        Problem one = p, two = p;
        one.out_type = Float::f32;
        for (int64_t panel = begin; panel < end; ++panel) {
            one.out = rows_of(panel);
            one.weight.after = {after.activation, Gate::none, nullptr, nullptr, 0, {row0, (lead + panel) * kPanel, kPanel}};
            run(one, lead + panel, row0, row1, panel + 1 < end ? lead + panel + 1 : first ? trail + begin : -1);
        }
        for (int64_t panel = begin; panel < end; ++panel) {
            two.weight.after = {Activation::none, Gate::none, after.residual, rows_of(panel), row0, {0, trail * kPanel, columns}};
            run(two, trail + panel, row0, row1, panel + 1 < end ? trail + panel + 1 : last ? lead + end : -1);
        }
    });
}

// The same for a weight packed by int8_pack: run(problem, task). products: a nanosecond.
template <class Problem, class Run>
void for_int8_products(const Problem& p, int64_t rows, double products, const Blocking& by, Run run) {
    const Weight& w = p.weight;
    const PanelLayout layout = int8_layout(w.out_features, w.in_features);
    const double time = product_time(rows, w.out_features, w.in_features, 8, products);
    for_products(p, rows, time, by, [&](const Problem& of_task, int64_t panel, int64_t row0, int64_t row1, int64_t next) {
        run(of_task, Task{panel, next >= 0 && w.packed != nullptr && layout.is_full(next) ? w.packed + layout.offset(next) : nullptr, row0, row1});
    });
}

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
