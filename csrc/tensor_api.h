// All that the ops take of torch, and all that differs between its two C++ interfaces: from torch 2.10 on the stable
// one, whose library loads in every later release; before, ATen, whose library is of one release. setup.py chooses.
//
//   Tensor, ScalarType, Shape                torch's; Shape is a view of sizes
//   MaybeTensors, Doubles, Integers          what the schemas call Tensor?[], float[] and int[]
//   item(list, k)                            of MaybeTensors
//   is_strided(x)                            neither sparse nor of another layout
//   zeros(shape, dtype)                      a new tensor on the CPU, float32 or float64
//   num_threads(), parallel_for(n, body)     torch's threads; body(first, end) for ranges of [0, n)
//   SINKHORN_LIBRARY, SINKHORN_IMPL, SINKHORN_KERNEL    registration
#pragma once

#ifdef TORCH_TARGET_VERSION
#include "tensor_api_stable.h"
#else
#include "tensor_api_aten.h"
#endif

namespace sinkhorn {
using MaybeTensor = std::optional<Tensor>;
}
