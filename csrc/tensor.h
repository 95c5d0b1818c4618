// Helpers for the stable ABI's tensors, for the operators of every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

#include "check.h"

// What an operation that failed last in this thread said: in libtorch from 2.13 on.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace dcn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = std::vector<int64_t>;

inline Sizes sizes(const Tensor& t) { return {t.sizes().data(), static_cast<size_t>(t.dim())}; }

inline std::optional<Sizes> sizes(const std::optional<Tensor>& t) {
  return t ? std::optional<Sizes>(sizes(*t)) : std::nullopt;
}

inline Sizes sizes(const IntList& list) { return {list.data(), list.size()}; }

inline void check_same_device(const Tensor& t, const Tensor& input, const char* name,
                              const char* input_name = "input") {
  check(t.device() == input.device(), name, " must be on ", input_name, "'s device (shapes: ", input_name, " ",
        sizes(input), ", ", name, " ", sizes(t), ")");
}

// Throws unless `t` has input's dtype and device.
inline void check_like_input(const std::optional<Tensor>& t, const Tensor& input, const char* name) {
  if (!t) return;
  check_same_device(*t, input, name);
  check(t->scalar_type() == input.scalar_type(), name, " must have input's dtype ",
        torch::headeronly::toString(input.scalar_type()), ", got ", torch::headeronly::toString(t->scalar_type()),
        " (shapes: input ", sizes(input), ", ", name, " ", sizes(*t), ")");
}

inline void check_floating(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
            type == ScalarType::BFloat16,
        name, " must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(type));
}

// The type of coordinates and sums: float for everything but double.
inline ScalarType compute_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// Whether `t` is channels last and not at the same time contiguous: the layout in which an operator returns its result.
inline bool prefers_channels_last(const Tensor& t) {
  const auto stride = t.strides();
  const auto size = t.sizes();
  return stride[1] == 1 && size[1] > 1 && stride[3] >= size[1] && stride[2] >= stride[3] * size[3];
}

inline MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline MemoryFormat format_of(const Tensor& t) { return format_of(prefers_channels_last(t)); }

inline double bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 4;
  }
}

// The error of a tensor on like's device that could not be made: the ABI says no more than "API call failed". On CUDA
// libtorch's own text, where it can be had, tells a lack of memory from an earlier error of the GPU.
inline std::runtime_error allocation_error(const Tensor& like, Sizes size, ScalarType type) {
  std::ostringstream text;
  if (like.is_cuda() && torch_exception_get_what_without_backtrace) {
    text << torch_exception_get_what_without_backtrace() << " (a tensor of shape " << size << ')';
    return std::runtime_error(text.str());
  }
  double bytes = bytes_of(type);
  for (const int64_t n : size) bytes *= static_cast<double>(n);
  text << (like.is_cuda() ? "could not allocate, or convert to, " : "out of memory: cannot allocate ")
       << bytes / (1 << 30) << " GiB, a tensor of shape " << size;
  if (like.is_cuda()) text << ": the GPU's memory does not suffice, or an earlier kernel failed";
  return std::runtime_error(text.str());
}

inline Tensor converted(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return t;
  try {
    return torch::stable::to(t, type);
  } catch (const std::exception&) {
    throw allocation_error(t, sizes(t), type);
  }
}

inline Tensor as(const Tensor& t, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous) {
  const Tensor typed = converted(t, type);
  try {
    return torch::stable::contiguous(typed, format);
  } catch (const std::exception&) {
    throw allocation_error(t, sizes(t), type);
  }
}

inline std::optional<Tensor> as(const std::optional<Tensor>& t, ScalarType type) {
  return t ? std::optional<Tensor>(as(*t, type)) : std::nullopt;
}

inline Tensor empty(const Tensor& like, IntList size, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous) {
  try {
    return torch::stable::empty({size.data(), size.size()}, type, std::nullopt, like.device(), std::nullopt, format);
  } catch (const std::exception&) {
    throw allocation_error(like, sizes(size), type);
  }
}

inline Tensor zeros(const Tensor& like, IntList size, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous) {
  Tensor t = empty(like, std::move(size), type, format);
  return torch::stable::zero_(t);
}

// A gradient while it is computed, uninitialised: absent where it is not needed, or its argument is absent.
inline std::optional<Tensor> make_gradient(bool needed, const std::optional<Tensor>& argument, ScalarType type,
                                           MemoryFormat format = MemoryFormat::Contiguous) {
  if (!needed || !argument) return std::nullopt;
  return empty(*argument, IntList(sizes(*argument).begin(), sizes(*argument).end()), type, format);
}

inline std::optional<Tensor> zeroed(std::optional<Tensor> t) {
  if (t) torch::stable::zero_(*t);
  return t;
}

// The gradient as the operator returns it, in input's dtype; empty where it is absent.
inline Tensor finished(const std::optional<Tensor>& gradient, const Tensor& input,
                       MemoryFormat format = MemoryFormat::Contiguous) {
  return gradient ? as(*gradient, input.scalar_type(), format) : empty(input, {0}, input.scalar_type());
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

}  // namespace dcn
