// tensor_api.h for torch 2.10 and later: of torch's libraries, only the C functions that are promised to stay.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <vector>

namespace sinkhorn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;
using MaybeTensors = std::vector<std::optional<Tensor>>;
using Doubles = torch::headeronly::HeaderOnlyArrayRef<double>;
using Integers = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

inline std::optional<Tensor> item(const MaybeTensors& list, size_t k) { return list[k]; }

inline bool is_strided(const Tensor& x) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// By the dispatcher, as torch::stable::empty and zero_ go, it would take three times as long.
inline Tensor zeros(Shape shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t numel = 1;
  for (size_t k = shape.size(); k-- > 0; numel *= shape[k]) strides[k] = numel;
  const bool whole = dtype == ScalarType::Long, wide = whole || dtype == ScalarType::Double;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      whole  ? aoti_torch_dtype_int64()
      : wide ? aoti_torch_dtype_float64()
             : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &made));
  Tensor x(made);
  const size_t bytes = static_cast<size_t>(numel) * (wide ? sizeof(double) : sizeof(float));
  if (bytes > size_t(1) << 20) return torch::stable::zero_(x);  // on all threads
  if (bytes) std::memset(x.mutable_data_ptr(), 0, bytes);
  return x;
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

template <typename Body>
void parallel_for(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

}  // namespace sinkhorn

#define SINKHORN_LIBRARY STABLE_TORCH_LIBRARY_FRAGMENT
#define SINKHORN_IMPL STABLE_TORCH_LIBRARY_IMPL
#define SINKHORN_KERNEL(function) TORCH_BOX(&function)
