// Storing new tokens in the rings.
#pragma once
#include "layer.h"

namespace moa {

// Token t of sample b gets position lens[b] + t; what the ring no longer holds after the last one isn't written.
INLINE void append_states(const Call& a, const Strided& fresh, char* ring, int64_t batch_stride, int64_t slot_stride,
                          int64_t dim) {
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t past = a.lens[b], count = a.counts ? least(a.counts[b], a.new_keys) : a.new_keys;
    const int32_t* columns = a.columns ? a.columns + b * a.new_keys : nullptr;
    for (int64_t kv = 0; kv < a.kv_heads; kv++) {
      const Ring& r = a.rings[kv];
      const int64_t kept = past + count - most(r.capacity - r.sink, 1);  // the oldest position of the ring
      for (int64_t t = 0; t < count; t++) {
        if (past + t >= r.sink && past + t < kept) t = kept - past;
        const int64_t slot = slot_of(r, past + t), column = columns ? columns[t] : t;
        if (slot >= r.offset + r.capacity) continue;  // where the sink is longer than the whole capacity
        const int64_t from = b * fresh.batch + kv * fresh.head + column * fresh.token;
        __builtin_memcpy(ring + (b * batch_stride + slot * slot_stride) * a.item_bytes,
                         fresh.data + from * a.item_bytes, dim * a.item_bytes);
      }
    }
  }
}
INLINE void append(const Call& a) {
  append_states(a, a.key, a.keys, a.keys_batch, a.keys_slot, a.dim);
  append_states(a, a.value, a.values, a.values_batch, a.values_slot, a.value_dim);
}

}  // namespace moa
