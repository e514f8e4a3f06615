// tensor_api.h for torch 2.9.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

namespace sinkhorn {

using at::ScalarType;
using at::Tensor;
using Shape = at::IntArrayRef;
using MaybeTensors = c10::List<std::optional<Tensor>>;
using Doubles = c10::ArrayRef<double>;
using Integers = c10::ArrayRef<int64_t>;

inline std::optional<Tensor> item(const MaybeTensors& list, size_t k) { return list.get(k); }

inline bool is_strided(const Tensor& x) { return x.layout() == at::kStrided; }

inline Tensor zeros(Shape shape, ScalarType dtype) { return at::zeros(shape, dtype); }

inline int64_t num_threads() { return at::get_num_threads(); }

template <typename Body>
void parallel_for(int64_t count, const Body& body) {
  at::parallel_for(0, count, 1, body);
}

}  // namespace sinkhorn

#define SINKHORN_LIBRARY TORCH_LIBRARY_FRAGMENT
#define SINKHORN_IMPL TORCH_LIBRARY_IMPL
#define SINKHORN_KERNEL(function) function
