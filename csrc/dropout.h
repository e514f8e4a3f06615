// Dropout numbers as a pure function of (seed, head, row, column); the same as torch_sinkhorn_attn/method/dropout.py, to the
// bit. Murmur3's 32-bit finaliser, A. Appleby, public domain.
#pragma once

#include "head.h"

namespace sinkhorn {
inline namespace CPU_CAPABILITY {

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// to = from with entries zeroed with probability p and the others divided by 1 - p; from may be to.
template <typename T>
void drop_out(const Head<T>& h, const Block<T>& b, const T* from, T* to) {
  const auto& p = h.p;
  const auto floor = static_cast<uint32_t>(static_cast<uint64_t>(p.dropout_p * 4294967296.0));
  const T kept = static_cast<T>(1 / (1 - p.dropout_p));
  const uint32_t stream = mix(mix(p.seed[0] ^ static_cast<uint32_t>(h.head_index())) + p.seed[1]);
  for (int64_t i = 0; i < b.rows; ++i) {
    const auto row = static_cast<uint32_t>(p.first_row + h.job.row0 + b.row + i);
    const auto first = static_cast<uint32_t>(p.first_col + h.job.col0 + b.col);
    const uint32_t line = mix(stream + row * 0x9E3779B1u);
    const T* source = from + i * b.stride;
    T* target = to + i * b.stride;
    for (int64_t j = 0; j < b.cols; ++j) {
      const uint32_t bits = mix(line + (first + static_cast<uint32_t>(j)) * 0x85EBCA77u);
      target[j] = bits >= floor ? source[j] * kept : T(0);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace sinkhorn
