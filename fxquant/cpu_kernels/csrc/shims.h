// The ops as C functions, for Inductor's C++ to call without the dispatcher: `aoti_torch_cpu_<op>`, with the arguments that
// Inductor generates for an op in its setting "custom_ops_to_c_shims". They are told to it by lowering/shims.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "tensors.h"

namespace fxquant {

// How an argument of type T comes from C, and what it is made of.
template <class T>
struct FromC {
    using Type = T;
    static T made(T value) { return value; }
};

template <>
struct FromC<bool> {
    using Type = int32_t;
    static bool made(int32_t value) { return value != 0; }
};

template <>
struct FromC<std::string> {
    using Type = const char*;
    static std::string made(const char* text) { return text; }
};

template <>
struct FromC<ScalarType> {
    using Type = int32_t;
    static ScalarType made(int32_t code) { return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code)); }
};

template <>
struct FromC<Tensor> {
    using Type = AtenTensorHandle;
    static Tensor made(AtenTensorHandle borrowed) {
        AtenTensorHandle owned = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(borrowed, &owned));
        return Tensor(owned);
    }
};

template <class T>
struct FromC<std::optional<T>> {
    using Type = typename FromC<T>::Type*;
    static std::optional<T> made(Type value) { return value == nullptr ? std::nullopt : std::optional<T>(FromC<T>::made(*value)); }
};

template <auto Op>
struct Shim;

template <class... Arguments, Tensor (*Op)(Arguments...)>
struct Shim<Op> {
    // What the op throws passes through: the caller's own code turns it into Python's error, with its words.
    static AOTITorchError call(typename FromC<Arguments>::Type... arguments, AtenTensorHandle* out) {
        const Tensor made = Op(FromC<Arguments>::made(arguments)...);
        return aoti_torch_new_tensor_handle(made.get(), out);
    }
};

}  // namespace fxquant

// A pointer rather than a function, so that the types need not be written out again; a call of it reads the same.
#define FXQUANT_SHIM(op)                                                     \
    extern "C" __attribute__((visibility("default"))) const auto aoti_torch_cpu_##op = &fxquant::Shim<&fxquant::op>::call;
