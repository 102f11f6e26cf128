// Attention under per-head spans over a ragged ring cache, on CPUs: a plain C interface, nothing of torch or Python.
#include "append.h"
#include "coded.h"
#include "decode.h"
#include "influence.h"
#include "prefill.h"

namespace moa {
namespace {

int32_t type_of(const Call& a) { return a.dtype; }
int32_t type_of(const Influence& a) { return a.dtype; }
int32_t type_of(const Coded& a) { return a.call.dtype; }

template <template <class> class Run, class C>
void by_type(const C& a) {
  switch (type_of(a)) {
    case 0: return Run<float>::run(a);
    case 1: return Run<bf16>::run(a);
    default: return Run<fp16>::run(a);
  }
}
template <class T>
struct Prefill {
  static void run(const Call& a) { prefill<T>(a); }
};
template <class T>
struct Decode {
  static void run(const Call& a) { decode<T>(a); }
};

template <class T>
struct Statistics {
  static void run(const Influence& a) { influence<T>(a); }
};

template <class T>
struct AppendCoded {
  static void run(const Coded& a) { append_coded<T>(a); }
};
template <class T>
struct DecodeCoded {
  static void run(const Coded& a) { decode_by(CodedDecoding<T>(a)); }
};
template <class T>
struct SeeCoded {
  static void run(const Coded& a) { see_coded<T>(a); }
};
template <class T>
struct CodedStates {
  static void run(const Coded& a) { coded_states<T>(a); }
};

void advance(const Call& a) {
  for (int64_t b = 0; b < a.batch; b++) a.lens[b] += a.counts ? a.counts[b] : a.new_keys;
}

}  // namespace
}  // namespace moa

extern "C" {
#define EXPORT __attribute__((visibility("default")))

EXPORT int moa_call_bytes() { return sizeof(moa::Call); }
EXPORT int moa_influence_bytes() { return sizeof(moa::Influence); }
EXPORT int moa_coded_bytes() { return sizeof(moa::Coded); }
EXPORT int moa_lanes() { return moa::L; }
EXPORT int moa_multiplies_bf16() { return moa::Pairs::PER == 2; }

// Asks the system for AMX tiles, once per process, before the first use: 1 if it may use them, -1 if not, 0 if the
// library doesn't want any.
EXPORT int moa_tiles() {
#if defined(MOA_TILES)
  return moa::tiles_allowed() ? 1 : -1;
#else
  return 0;
#endif
}

// Attention of the new tokens to the rings and to each other.
EXPORT void moa_prefill(const moa::Call* a) { moa::by_type<moa::Prefill>(*a); }

// Stores the new tokens.
EXPORT void moa_append(const moa::Call* a) { moa::append(*a); }

// Attention of the newest tokens, which are stored and counted in `lens` already.
EXPORT void moa_decode(const moa::Call* a) { moa::by_type<moa::Decode>(*a); }

// A decoding step: stores the new tokens, counts them in `lens`, and lets them attend.
EXPORT void moa_step(const moa::Call* a) {
  moa::append(*a);
  moa::advance(*a);
  moa::by_type<moa::Decode>(*a);
}

// As moa_append and moa_decode, of rings of codes.
EXPORT void moa_append_codes(const moa::Coded* a) { moa::by_type<moa::AppendCoded>(*a); }
EXPORT void moa_decode_codes(const moa::Coded* a) { moa::by_type<moa::DecodeCoded>(*a); }

// New tokens, and all that rings of codes hold, as they come back from codes.
EXPORT void moa_see_tokens(const moa::Coded* a) { moa::by_type<moa::SeeCoded>(*a); }
EXPORT void moa_stored_states(const moa::Coded* a) { moa::by_type<moa::CodedStates>(*a); }

// What shorter windows would cost.
EXPORT void moa_influence(const moa::Influence* a) { moa::by_type<moa::Statistics>(*a); }
}
