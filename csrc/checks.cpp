#include "checks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sinkhorn {
namespace {

constexpr const char* kNames[kTensorCount] = {
    "query",        "key",          "value",             "mask",
    "row_score",    "col_score",    "corner_score",      "dustbin_value",
    "row_lo",       "row_hi",       "row_segment",       "col_segment",
    "log_row_mass", "log_col_mass", "log_row_capacity",  "log_col_capacity",
    "initial_row",  "initial_col",  "dropout_seed",
};

// Bounds within which no size in the kernels overflows; beyond them nothing could be allocated, nor ever end.
constexpr int64_t kMostIterations = int64_t(1) << 24, kMostElements = int64_t(1) << 40, kMostTokens = int64_t(1) << 31;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// What is said is only put together where it is needed.
#define SINKHORN_CHECK(fits, ...) \
  if (!(fits)) refuse(__VA_ARGS__)

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return toString(dtype);
  }
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

std::string described(ScalarType dtype, Shape shape) {
  std::string text = name_of(dtype) + std::string("[");
  for (size_t k = 0; k < shape.size(); ++k) text += (k ? ", " : "") + std::to_string(shape[k]);
  return text + "]";
}

std::string described(const Tensor& x) {
  if (!is_strided(x)) return name_of(x.scalar_type()) + std::string(" and not strided");
  return described(x.scalar_type(), x.sizes()) + (x.is_cpu() ? "" : " and not on the CPU");
}

// Numbers in this process's memory, as the strides say.
void check_plain(const char* name, const Tensor& x) {
  SINKHORN_CHECK(x.is_cpu() && is_strided(x), name, " is ", described(x), "; a strided tensor on the CPU is needed");
}

// A tensor of one dtype and shape; `contiguous` unless it is read through its strides.
void check_tensor(const char* name, const Tensor& x, ScalarType dtype, Shape shape, bool contiguous = true) {
  check_plain(name, x);
  SINKHORN_CHECK(x.scalar_type() == dtype && x.sizes().equals(shape), name, " is ", described(x), "; ",
                    described(dtype, shape), " is needed");
  SINKHORN_CHECK(!contiguous || x.is_contiguous(), name, " is not contiguous; pass ", name, ".contiguous()");
}

void check_present(const Given& g, size_t k) {
  SINKHORN_CHECK(g.has(k), kNames[k], " is missing");
}

void check_vector(const Given& g, size_t k, ScalarType dtype, Shape shape) {
  if (g.has(k)) check_tensor(kNames[k], g[k], dtype, shape);
}

void check_tokens(Given& g) {
  for (const size_t k : {kQuery, kKey, kValue}) {
    if (k != kValue) check_present(g, k);
    if (!g.has(k)) continue;
    check_plain(kNames[k], g[k]);
    SINKHORN_CHECK(g[k].dim() == 4, kNames[k], " is ", described(g[k]),
                      "; four dimensions are needed: batch, heads, tokens, features");
    SINKHORN_CHECK(is_float(g[k].scalar_type()), kNames[k], " is ", described(g[k]), "; float32, float64, float16 or bfloat16 is needed");
  }
  const Tensor &query = g[kQuery], &key = g[kKey];
  g.num = query.size(0), g.heads = query.size(1), g.length = query.size(2), g.features = query.size(3);
  g.key_heads = key.size(1), g.size = key.size(2);
  g.value_features = g.has(kValue) ? g[kValue].size(3) : 0;
  g.dtype = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  SINKHORN_CHECK(g.heads > 0 && g.features > 0, "query is ", described(query),
                    "; at least one head and one feature are needed");
  SINKHORN_CHECK(g.key_heads > 0 && g.heads % g.key_heads == 0, "key is ", described(key),
                    "; its heads must divide the ", g.heads, " of query");
  check_tensor("key", key, query.scalar_type(), {g.num, g.key_heads, g.size, g.features}, false);
  if (g.has(kValue))
    check_tensor("value", g[kValue], query.scalar_type(), {g.num, g.key_heads, g.size, g.value_features}, false);
  const int64_t tokens = std::max(g.length, g.size), widest = std::max(g.features, g.value_features);
  SINKHORN_CHECK(std::max(tokens, widest) < kMostTokens && std::max<int64_t>(tokens, 1) * widest < kMostElements,
                    "query is ", described(query), " and key ", described(key), ": too large for one call");
}

void check_mask(const Given& g) {
  if (!g.has(kMask)) return;
  const Tensor& mask = g[kMask];
  check_plain("mask", mask);
  const auto dtype = mask.scalar_type();
  SINKHORN_CHECK(dtype == ScalarType::Bool || is_float(dtype), "mask is ", described(mask), "; bool, float32, float64, float16 or bfloat16 is needed");
  const int64_t wanted[4] = {g.num, g.heads, g.length, g.size};
  bool fits = mask.dim() == 4;
  for (int64_t k = 0; fits && k < 4; ++k) fits = mask.size(k) == 1 || mask.size(k) == wanted[k];
  SINKHORN_CHECK(fits, "mask is ", described(mask), "; four dimensions that broadcast to ",
                    described(dtype, wanted), " are needed");
}

void check_dustbin(Given& g) {
  const bool present = g.has(kLogRowCapacity);
  for (const size_t k : {kRowScore, kColScore, kCornerScore, kLogColCapacity})
    SINKHORN_CHECK(g.has(k) == present, kNames[k], present ? " is missing" : " is given", " beside ",
                      present ? "a" : "no", " log_row_capacity; a dustbin has all of them");
  SINKHORN_CHECK(present || !g.has(kDustbinValue), "dustbin_value is given without a dustbin");
  if (!present) return;
  const Tensor& capacity = g[kLogRowCapacity];
  SINKHORN_CHECK(capacity.dim() == 3 && capacity.size(2) > 0, "log_row_capacity is ", described(capacity), "; ",
                    described(g.dtype, {g.num, g.heads}), " by the number of dustbins is needed");
  g.bins = capacity.size(2);
  SINKHORN_CHECK(g.has(kRowSegment) || g.bins == 1, "log_row_capacity is ", described(capacity),
                    "; without segments there is one dustbin");
  check_vector(g, kRowScore, g.dtype, {g.num, g.heads, g.length});
  check_vector(g, kColScore, g.dtype, {g.num, g.heads, g.size});
  check_vector(g, kCornerScore, g.dtype, {g.num, g.heads});
  check_vector(g, kLogRowCapacity, g.dtype, {g.num, g.heads, g.bins});
  check_vector(g, kLogColCapacity, g.dtype, {g.num, g.heads, g.bins});
  if (!g.has(kDustbinValue)) return;
  const int64_t features = g.has(kValue) || g[kDustbinValue].dim() != 3 ? g.value_features : g[kDustbinValue].size(2);
  check_vector(g, kDustbinValue, g.dtype, {g.num, g.heads, features});
}

void check_intervals(const Given& g) {
  const int64_t *lo = g[kRowLo].const_data_ptr<int64_t>(), *hi = g[kRowHi].const_data_ptr<int64_t>();
  for (int64_t i = 0; i < g.num * g.length; ++i)
    SINKHORN_CHECK(0 <= lo[i] && lo[i] <= hi[i] && hi[i] <= g.size, "row_lo and row_hi hold [", lo[i], ", ", hi[i],
                      ") at batch ", i / g.length, ", row ", i % g.length, "; 0 <= row_lo <= row_hi <= ", g.size,
                      " is needed");
}

void check_segments(const Given& g) {
  SINKHORN_CHECK(g.has(kRowSegment) == g.has(kColSegment), "row_segment and col_segment belong together");
  if (!g.has(kRowSegment)) return;
  SINKHORN_CHECK(g.counts[kBanded] == 1, "row_segment is given, so banded must be true");
  const int64_t most = g.bins ? g.bins : std::max<int64_t>(1, std::min(g.length, g.size));
  for (const size_t k : {kRowSegment, kColSegment}) {
    const int64_t tokens = k == kRowSegment ? g.length : g.size;
    check_vector(g, k, ScalarType::Long, {g.num, tokens});
    const int64_t* index = g[k].const_data_ptr<int64_t>();
    for (int64_t i = 0; i < g.num * tokens; ++i) {
      const int64_t before = i % tokens ? index[i - 1] : 0;
      SINKHORN_CHECK(before <= index[i] && index[i] < most, kNames[k], " holds ", index[i], " after ", before,
                        " at batch ", i / tokens, ", token ", i % tokens, "; indices that do not fall, from 0 to ",
                        most - 1, ", are needed");
    }
  }
}

template <typename T>
void check_log_masses(const Given& g, size_t k) {
  if (!g.has(k)) return;
  const T* mass = g[k].const_data_ptr<T>();
  for (int64_t i = 0; i < g[k].numel(); ++i)
    SINKHORN_CHECK(mass[i] < std::numeric_limits<T>::infinity(), kNames[k], " holds ", mass[i], " at entry ", i,
                      "; the logarithm of a finite mass is needed, -inf where there is none");
}

// Without a band every active row reaches every active column, which is why nobody looks at the intervals then.
template <typename T>
void check_unbanded(const Given& g) {
  if (g.counts[kBanded]) return;
  const T *row = g[kLogRowMass].const_data_ptr<T>(), *col = g[kLogColMass].const_data_ptr<T>();
  const auto active = [](T mass) { return mass != -std::numeric_limits<T>::infinity(); };
  for (int64_t n = 0; n < g.num; ++n) {
    int64_t first = g.size, end = 0;
    for (int64_t h = 0; h < g.heads; ++h) {
      const T* line = col + (n * g.heads + h) * g.size;
      int64_t j = 0, last = g.size;
      while (j < first && !active(line[j])) ++j;
      while (last > end && !active(line[last - 1])) --last;
      first = std::min(first, j), end = std::max(end, last);
    }
    const int64_t *lo = g[kRowLo].const_data_ptr<int64_t>() + n * g.length,
                  *hi = g[kRowHi].const_data_ptr<int64_t>() + n * g.length;
    for (int64_t i = 0; first < end && i < g.length; ++i) {
      if (lo[i] <= first && end <= hi[i]) continue;
      for (int64_t h = 0; h < g.heads; ++h)
        SINKHORN_CHECK(!active(row[(n * g.heads + h) * g.length + i]), "row_lo and row_hi hold [", lo[i], ", ",
                          hi[i], ") at batch ", n, ", row ", i, "; without a band all of the active columns [", first,
                          ", ", end, ") are needed, or banded=true");
    }
  }
}

void check_number(const char* name, double x, bool fits, const char* wanted) {
  SINKHORN_CHECK(fits, name, " is ", x, "; ", wanted, " is needed");
}

void check_scalars(const Given& g) {
  const auto& x = g.numbers;
  const double most = std::numeric_limits<double>::max();
  const double limit = g.dtype == ScalarType::Double ? most : std::numeric_limits<float>::max();
  check_number("epsilon", x[kEpsilon], x[kEpsilon] > 0 && x[kEpsilon] <= most, "a positive finite number");
  check_number("scale", x[kScale], std::abs(x[kScale]) / x[kEpsilon] <= limit, "a number finite over epsilon");
  check_number("rho_row", x[kRhoRow], x[kRhoRow] > 0 && x[kRhoRow] <= 1, "a number above 0, at most 1");
  check_number("rho_col", x[kRhoCol], x[kRhoCol] > 0 && x[kRhoCol] <= 1, "a number above 0, at most 1");
  check_number("tolerance", x[kTolerance], x[kTolerance] >= 0 && x[kTolerance] <= most, "0 or a positive number");
  const double omega = x[kOverRelaxation], p = x[kDropoutP];
  check_number("over_relaxation", omega, omega > 0 && omega < 2, "a number between 0 and 2");
  check_number("dropout_p", p, p >= 0 && p < 1, "a number from 0 to below 1");
  check_number("contraction", x[kContraction], x[kContraction] >= 0 && x[kContraction] < 1, "a number from 0 to below 1");
  constexpr const char* names[] = {"base iterations", "tail iterations", "implicit",   "banded",
                                   "budget",          "poisoned",        "accelerated"};
  constexpr int64_t many = std::numeric_limits<int64_t>::max() / 2;
  constexpr int64_t largest[] = {kMostIterations, kMostIterations, 1, 1, many, 1, 1};
  for (size_t k = 0; k < kCountCount; ++k)
    SINKHORN_CHECK(0 <= g.counts[k] && g.counts[k] <= largest[k], names[k], " is ", g.counts[k], "; 0 to ",
                      largest[k], " is needed");
  SINKHORN_CHECK(omega == 1 || g.counts[kAccelerated] == 0, "over_relaxation is ", omega, "; 1 is needed beside ",
                    "acceleration");
  const int64_t lines = std::max<int64_t>(1, g.length + g.size + 2 * g.bins);
  SINKHORN_CHECK(g.num == 0 || (g.counts[kKept] + 1) <= kMostElements / lines / g.heads / g.num,
                    "tail iterations is ", g.counts[kKept], ": its potentials are too large for one call");
}

void check_dropout(const Given& g) {
  const double p = g.numbers[kDropoutP];
  SINKHORN_CHECK(g.has(kDropoutSeed) == (p > 0), "dropout_seed is ", g.has(kDropoutSeed) ? "given" : "missing",
                    " beside dropout_p=", p);
  if (!g.has(kDropoutSeed)) return;
  check_vector(g, kDropoutSeed, ScalarType::Long, {2});
  const int64_t* seed = g[kDropoutSeed].const_data_ptr<int64_t>();
  for (int64_t k = 0; k < 2; ++k)
    SINKHORN_CHECK(0 <= seed[k] && seed[k] < int64_t(1) << 32, "dropout_seed holds ", seed[k],
                      "; two 32-bit words are needed");
}

template <typename T>
void check_contents(const Given& g) {
  for (const size_t k : {kLogRowMass, kLogColMass, kLogRowCapacity, kLogColCapacity}) check_log_masses<T>(g, k);
  check_unbanded<T>(g);
}

}  // namespace

Given check_problem(const MaybeTensors& tensors, Doubles numbers, Integers counts) {
  SINKHORN_CHECK(
      tensors.size() == kTensorCount && numbers.size() == kNumberCount && counts.size() == kCountCount,
      "got ", tensors.size(), " tensors, ", numbers.size(), " numbers and ", counts.size(), " counts; ", kTensorCount,
      ", ", kNumberCount, " and ", kCountCount, " are needed: engines/cpu.py and the compiled library must belong together");
  Given g;
  g.numbers = numbers, g.counts = counts;
  g.tensors.reserve(kTensorCount);
  for (size_t k = 0; k < kTensorCount; ++k) {
    MaybeTensor x = item(tensors, k);
    if (x.has_value() && !x->defined()) x.reset();
    g.tensors.push_back(std::move(x));
  }
  check_tokens(g);
  check_mask(g);
  for (const size_t k : {kRowLo, kRowHi, kLogRowMass, kLogColMass}) check_present(g, k);
  check_vector(g, kRowLo, ScalarType::Long, {g.num, g.length});
  check_vector(g, kRowHi, ScalarType::Long, {g.num, g.length});
  check_vector(g, kLogRowMass, g.dtype, {g.num, g.heads, g.length});
  check_vector(g, kLogColMass, g.dtype, {g.num, g.heads, g.size});
  check_dustbin(g);
  check_vector(g, kInitialRow, g.dtype, {g.num, g.heads, g.length + g.bins});
  check_vector(g, kInitialCol, g.dtype, {g.num, g.heads, g.size + g.bins});
  check_scalars(g);
  check_dropout(g);
  check_intervals(g);
  check_segments(g);
  g.dtype == ScalarType::Double ? check_contents<double>(g) : check_contents<float>(g);
  return g;
}

void check_cotangents(const Given& g, const Tensor& grad, const MaybeTensor& grad_to_bin,
                      const MaybeTensor& grad_from_bin, const MaybeTensor& output, const Tensor& row_potentials,
                      const Tensor& col_potentials) {
  const bool of_plan = !output.has_value();
  const int64_t extra = g.bins > 0, duals = g.counts[kKept] + 1;
  SINKHORN_CHECK(of_plan || g.has(kValue), "value is missing; the output's cotangent cannot do without it");
  if (of_plan) {
    check_tensor("grad_plan", grad, g.dtype, {g.num, g.heads, g.length + extra, g.size + extra}, false);
  } else {
    check_tensor("grad_output", grad, g.dtype, {g.num, g.heads, g.length, g.value_features}, false);
    check_tensor("output", *output, g.dtype, {g.num, g.heads, g.length, g.value_features});
  }
  const auto of_dustbin = [&](const char* name, const MaybeTensor& x, int64_t tokens) {
    if (!x.has_value()) return;
    SINKHORN_CHECK(g.bins > 0 && !of_plan, name, " is given, but there is no mass of a dustbin to differentiate");
    check_tensor(name, *x, g.dtype, {g.num, g.heads, tokens});
  };
  of_dustbin("grad_to_bin", grad_to_bin, g.length);
  of_dustbin("grad_from_bin", grad_from_bin, g.size);
  check_tensor("row_potentials", row_potentials, g.dtype, {duals, g.num, g.heads, g.length + g.bins});
  check_tensor("col_potentials", col_potentials, g.dtype, {duals, g.num, g.heads, g.size + g.bins});
}

std::vector<MaybeTensor> check_rank_call(const Given& g, const MaybeTensors& vectors, const RankNeeds& needs,
                                         Integers first) {
  SINKHORN_CHECK(vectors.size() == kVectorCount && first.size() == 2, "got ", vectors.size(), " vectors and ",
                 first.size(), " places; ", static_cast<size_t>(kVectorCount), " and 2 are needed");
  SINKHORN_CHECK(g.bins == 0 && !g.has(kRowSegment),
                 "log_row_capacity or row_segment is given; a rank's half-steps are of real pairs and of intervals alone");
  SINKHORN_CHECK(!needs.value || g.has(kValue), "value is missing");
  for (const int64_t place : first)
    SINKHORN_CHECK(0 <= place && place < kMostElements, "first holds ", place, "; places from 0 are needed");
  std::vector<MaybeTensor> found(kVectorCount);
  for (const size_t k : needs.vectors) {
    found[k] = item(vectors, k);
    const char* name = kVectorNames[k];
    SINKHORN_CHECK(found[k].has_value() && found[k]->defined(), name, " is missing");
    const Tensor& x = *found[k];
    const int64_t lines = k == kV || k == kY || k == kColTerms ? g.size : g.length;
    if (k == kGrad || k == kOutput) {
      check_tensor(name, x, g.dtype, {g.num, g.heads, lines, g.value_features}, k == kOutput);
    } else if (k == kRowTerms || k == kColTerms) {
      SINKHORN_CHECK(x.dim() == 4 && x.size(3) > 0, name, " is ", described(x), "; four dimensions and a term are needed");
      const int64_t terms = k == kColTerms ? found[kRowTerms]->size(3) : x.size(3);
      check_tensor(name, x, g.dtype, {g.num, g.heads, lines, terms});
    } else {
      check_tensor(name, x, g.dtype, {g.num, g.heads, lines});
    }
  }
  return found;
}

void check_state(const Tensor& state, int64_t bytes) {
  check_plain("state", state);
  SINKHORN_CHECK(state.scalar_type() == ScalarType::Byte && state.is_contiguous() && state.numel() >= bytes, "state is ",
                 described(state), "; ", bytes, " bytes of uint8 are needed");
}

void check_partners(int64_t partners, int64_t most) {
  SINKHORN_CHECK(partners >= 1 && partners <= most, "partners is ", partners, "; 1 to ", most, " are found at a time");
}

void check_bytes(const char* name, int64_t bytes) {
  SINKHORN_CHECK(bytes >= 0, name, " is ", bytes, "; 0 or more is needed");
}

}  // namespace sinkhorn
