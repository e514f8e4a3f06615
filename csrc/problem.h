// What the CPU engine is given: plain pointers and numbers, nothing of torch, so that every capability's translation unit
// can include it. Shapes as in torch_sinkhorn_attn/problem/problem.py: N batch, H heads, Hk key heads, L queries, S keys,
// E features, Ev value features, G dustbins.
#pragma once

#include <cstdint>

namespace sinkhorn {

inline constexpr int64_t kMostPartners = 16;  // as MOST_PARTNERS in engines/cpu.py

enum class Kind : int32_t { float64, float32, float16, bfloat16, boolean };

// A tensor [N, H, rows, columns] of any dtype and strides; strides count elements and are 0 where it is broadcast.
struct Operand {
  const void* data = nullptr;
  Kind kind = Kind::float32;
  int64_t batch = 0, head = 0, row = 0, col = 0;

  explicit operator bool() const { return data != nullptr; }
};

// One problem: a batch element, a query head and a segment. Rows and columns outside the ranges are inactive.
struct Job {
  int64_t batch, head;
  int64_t row0, row1, col0, col1;
  int64_t bin;  // index of its dustbin
};

// Inputs and Problem, T the compute dtype. Pointers to T and int64 are to contiguous tensors; null where absent.
template <typename T>
struct Problem {
  Operand query, key, value;  // key and value have Hk heads
  Operand mask;
  double mask_floor = 0;                                                        // a float mask keeps what lies above
  const T *row_score = nullptr, *col_score = nullptr, *corner_score = nullptr;  // [N, H, L], [N, H, S], [N, H]
  const T* dustbin_value = nullptr;                                             // [N, H, Ev]
  const int64_t *row_lo = nullptr, *row_hi = nullptr;                           // [N, L]
  const T *log_row_mass = nullptr, *log_col_mass = nullptr;                     // [N, H, L], [N, H, S]
  const T *log_row_capacity = nullptr, *log_col_capacity = nullptr;             // [N, H, G]
  const T *initial_row = nullptr, *initial_col = nullptr;                       // [N, H, L+G], [N, H, S+G]
  bool dropout = false;
  uint32_t seed[2] = {0, 0};
  double dropout_p = 0;
  int64_t first_row = 0, first_col = 0;  // places by which dropout draws: of the first row and column
  int64_t num = 0, heads = 0, key_heads = 1, length = 0, size = 0, features = 0, value_features = 0, bins = 0;
  double score_factor = 1, epsilon = 1, rho_row = 1, rho_col = 1;
  int64_t stopped = 0, kept = 0;  // base and tail iterations
  double tolerance = 0, over_relaxation = 1;
  bool accelerated = false;
  double contraction = 0;  // 0: measured
  bool balanced = true, banded = false, implicit = false;
  int64_t partners = 0;   // how many of each token are wanted, at most kMostPartners
  int64_t budget = 0;     // bytes of plan tiles that one problem may keep
  bool poisoned = false;  // the workspace is filled with NaN first, as torch fills what nobody has written when asked to
};

// Zero-filled contiguous tensors; a job writes its own tokens only.
template <typename T>
struct ForwardResult {
  T* output = nullptr;                                     // [N, H, L, Ev]; null when only the duals are wanted
  T *row_potentials = nullptr, *col_potentials = nullptr;  // [R+1, N, H, L+G], [R+1, N, H, S+G]
  T *to_bin = nullptr, *from_bin = nullptr;                // [N, H, L], [N, H, S]; null without a dustbin
  T *row_residual = nullptr, *col_residual = nullptr;      // [jobs]; null where not wanted
  T* plan = nullptr;    // [N, H, L, S], or [N, H, L+1, S+1] with a dustbin; null unless wanted
  T* corner = nullptr;  // [N, H, G] the plan's corners, with `plan`
  int64_t *row_index = nullptr, *col_index = nullptr;  // [N, H, L, k], [N, H, S, k], filled with -1; null unless wanted
  T *row_mass = nullptr, *col_mass = nullptr;          // likewise, with them
};

template <typename T>
struct BackwardGiven {
  Operand grad_output;  // [N, H, L, Ev]
  Operand grad_plan;    // or this alone: [N, H, L, S], or [N, H, L+1, S+1] with a dustbin
  const T* output = nullptr;
  const T *row_potentials = nullptr, *col_potentials = nullptr;
  const T *grad_to_bin = nullptr, *grad_from_bin = nullptr;  // null: zero
};

// Zero-filled contiguous tensors, per query head where the inputs are per key head; null where not wanted.
template <typename T>
struct BackwardResult {
  T *query = nullptr, *key = nullptr, *value = nullptr;  // [N, H, L, E], [N, H, S, E], [N, H, S, Ev]
  T* mask = nullptr;                                     // of the mask's own shape, and its strides:
  int64_t mask_batch = 0, mask_head = 0, mask_row = 0, mask_col = 0;
  T *row_score = nullptr, *col_score = nullptr, *corner_score = nullptr;  // corner [N, H, G]
  T* dustbin_value = nullptr;                                             // [N, H, G, Ev]
  T* dropped = nullptr;  // z^0 [N, H, L+G], or w^0 [N, H, S+G] for R = 0
};

// What a rank of a sharded sequence is asked for, of its real pairs alone: see rank.h.
enum class RankVerb {
  pack,
  row_lse,
  col_lse,
  absorb,
  row_sums,
  col_sums,
  sweep,
  values,
  value_gradient,
  score_gradients
};

// Vectors [N, H, L] and [N, H, S], as the verb wants them; null elsewhere.
template <typename T>
struct RankGiven {
  const T *u = nullptr, *v = nullptr;  // potentials, -inf on inactive lines
  const T *x = nullptr, *y = nullptr;  // what the plan is multiplied with; for a sweep x is the rows' masses
  bool scored = false;                 // the tiles kept hold scores
  BackwardGiven<T> backward;           // its potentials are u and v
  const T *row_terms = nullptr, *col_terms = nullptr;  // the field: [N, H, L, K], [N, H, S, K]
  int64_t terms = 1;                                   // K
};

template <typename T>
struct RankResult {
  T *rows = nullptr, *cols = nullptr;  // [N, H, L], [N, H, S]
  T* output = nullptr;                 // [N, H, L, Ev]
  BackwardResult<T> backward;
};

// Where the parts of one problem run: body(context, part, slot), slot < threads being private to the caller's thread.
struct Team {
  int64_t threads;
  void (*run)(const Team&, int64_t parts, void (*body)(void*, int64_t, int64_t), void* context);
  void (*check)(const Team&);  // throws once the call is to stop; asked before work of more than some milliseconds

  template <typename Body>
  void each(int64_t parts, const Body& body) const {
    run(
        *this, parts, [](void* b, int64_t part, int64_t slot) { (*static_cast<const Body*>(b))(part, slot); },
        const_cast<Body*>(&body));
  }
};

// The entry points of one capability. `bytes` functions say how much workspace a job takes with `threads` threads.
template <typename T>
struct Kernels {
  int64_t (*forward_bytes)(const Problem<T>&, const Job&, int64_t threads);
  void (*forward)(const Problem<T>&, const Job&, int64_t index, const ForwardResult<T>&, const Team&, void* workspace);
  int64_t (*backward_bytes)(const Problem<T>&, const Job&, int64_t threads);
  void (*backward)(const Problem<T>&, const Job&, const BackwardGiven<T>&, const BackwardResult<T>&, const Team&,
                   void* workspace);
  int64_t (*rank_state_bytes)(const Problem<T>&, const Job&);
  int64_t (*rank_bytes)(RankVerb, const Problem<T>&, const Job&, int64_t terms, int64_t threads);
  void (*rank)(RankVerb, const Problem<T>&, const Job&, const RankGiven<T>&, const RankResult<T>&, const Team&,
               void* state, void* workspace);
};

struct KernelTable {
  Kernels<float> f32;
  Kernels<double> f64;
};

}  // namespace sinkhorn
