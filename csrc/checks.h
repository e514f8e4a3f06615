// The boundary of the kernels. The ops can be called by anyone, and by programs exported long ago; what they are given
// is checked here, once and in O(n), so that the kernels may trust every size, range and pointer.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor_api.h"

namespace sinkhorn {

// Places in the lists of the ops, as in engines/cpu.py, which takes them from the fields of a problem; a test compares.
enum Tensors : size_t {
  kQuery,
  kKey,
  kValue,
  kMask,
  kRowScore,
  kColScore,
  kCornerScore,
  kDustbinValue,
  kRowLo,
  kRowHi,
  kRowSegment,
  kColSegment,
  kLogRowMass,
  kLogColMass,
  kLogRowCapacity,
  kLogColCapacity,
  kInitialRow,
  kInitialCol,
  kDropoutSeed,
  kTensorCount,
};
enum Numbers : size_t {
  kScale,
  kEpsilon,
  kRhoRow,
  kRhoCol,
  kTolerance,
  kOverRelaxation,
  kDropoutP,
  kContraction,
  kNumberCount,
};
enum Counts : size_t { kStopped, kKept, kImplicit, kBanded, kBudget, kPoisoned, kAccelerated, kCountCount };

// What an op is given, alive as long as the pointers into it.
struct Given {
  std::vector<MaybeTensor> tensors;  // undefined ones are absent
  Doubles numbers;
  Integers counts;
  // Sizes, as in problem.h
  int64_t num = 0, heads = 0, key_heads = 0, length = 0, size = 0, features = 0, value_features = 0, bins = 0;
  ScalarType dtype = ScalarType::Float;  // the compute dtype

  const Tensor& operator[](size_t k) const { return *tensors[k]; }
  bool has(size_t k) const { return tensors[k].has_value(); }
};

// The problem of a call. Throws std::invalid_argument, in Python ValueError, naming the first thing that does not fit and
// what was expected.
Given check_problem(const MaybeTensors& tensors, Doubles numbers, Integers counts);

// The rest of a backward call: the cotangent of attention, with its output, or of the plan; and the duals.
void check_cotangents(const Given& given, const Tensor& grad, const MaybeTensor& grad_to_bin,
                      const MaybeTensor& grad_from_bin, const MaybeTensor& output, const Tensor& row_potentials,
                      const Tensor& col_potentials);

// What a verb of a rank reads beside the problem: places in the list, as VECTORS in engines/cpu_ranks.py.
enum Vectors : size_t { kU, kV, kX, kY, kGrad, kOutput, kRowTerms, kColTerms, kVectorCount };
inline constexpr const char* kVectorNames[kVectorCount] = {"u",    "v",      "x",         "y",
                                                           "grad", "output", "row_terms", "col_terms"};
struct RankNeeds {
  std::vector<size_t> vectors;
  bool value = false;
};

// The vectors that are needed; the others are absent. `first`: the places of the first row and column.
std::vector<MaybeTensor> check_rank_call(const Given& given, const MaybeTensors& vectors, const RankNeeds& needs,
                                         Integers first);

// The memory that a rank keeps.
void check_state(const Tensor& state, int64_t bytes);

// How many partners of each token an op finds.
void check_partners(int64_t partners, int64_t most);

// A number of bytes that a setting takes.
void check_bytes(const char* name, int64_t bytes);

}  // namespace sinkhorn
