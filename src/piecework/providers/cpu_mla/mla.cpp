// Multi-head latent attention's cores on the CPU. What they mean is written in piecework/ops/mla/operators.py; what they are
// called with, in calls.h.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include <omp.h>

#include "../cpu_common/products.h"
#include "decode.h"
#include "prefill.h"
#include "write.h"

namespace piecework {

enum Result : int32_t { kDone = 0, kUnsupported = 1, kBadSlot = 2, kBadLength = 3, kBadBlock = 4, kNoMemory = 5 };

// Memory that a thread keeps from call to call, because fresh memory costs more than what is done with it.
class Kept {
 public:
  ~Kept() { std::free(at_); }
  float* of(int64_t count) {
    if (count > count_) {
      std::free(at_);
      at_ = (float*)std::aligned_alloc(64, (count * sizeof(float) + 4095) / 4096 * 4096);
      count_ = at_ == nullptr ? 0 : count;
    }
    return at_;
  }

 private:
  float* at_ = nullptr;
  int64_t count_ = 0;
};

Result check(const Paged& paged, int64_t seq, int64_t len) {
  if (len < 1 || len > paged.table_width * paged.block_size) return kBadLength;
  const int64_t* table = paged.tables + seq * paged.table_width;
  for (int64_t b = 0; b * paged.block_size < len; ++b)
    if (table[b] < 0 || table[b] >= paged.num_blocks) return kBadBlock;
  return kDone;
}

bool fits(int64_t rank, int64_t rope) { return rank > 0 && rope > 0 && rope % 2 == 0 && rank + rope <= kMaxWidth; }

Result check(const WriteCall& call) {
  for (int64_t t = 0; t < call.num_tokens; ++t)
    if (call.slots[t] < 0 || call.slots[t] >= call.paged.num_blocks * call.paged.block_size) return kBadSlot;
  return kDone;
}

template <class T, class E>
Result run(const WriteCall& call) {
  const Result checked = check(call);
  if (checked != kDone) return checked;
  const bool alone = call.num_tokens * (call.rank + call.rope) < 1 << 15;
#pragma omp parallel for schedule(static) num_threads(call.num_threads) if (!alone && call.num_threads > 1)
  for (int64_t t = 0; t < call.num_tokens; ++t) write<T, E>(call, t);
  return kDone;
}

struct Part {
  int64_t seq, begin, count;
  int64_t part;  // where the partial result goes; -1 where there is only one
};

struct Split {
  int64_t seq, part, num_parts;
};

// Long sequences in parts, so that there are a few parts for every thread; the longest first. Returns their number.
int64_t plan(const DecodeCall& call, std::vector<Part>& work, std::vector<Split>& splits) {
  constexpr int64_t kLeast = 64;
  int64_t num_keys = 0, num_parts = 0;
  for (int64_t s = 0; s < call.num_seqs; ++s) num_keys += call.lens[s];
  const int64_t share = num_keys / (4 * call.num_threads) / kLeast * kLeast + kLeast;
  const int64_t most = call.num_threads > 1 ? share : num_keys;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const int64_t num = call.lens[s], parts = (num + most - 1) / most;
    if (parts > 1) splits.push_back({s, num_parts, parts});
    for (int64_t p = 0; p < parts; ++p)
      work.push_back({s, p * most, std::min(most, num - p * most), parts > 1 ? num_parts++ : -1});
  }
  std::stable_sort(work.begin(), work.end(), [](const Part& a, const Part& b) { return a.count > b.count; });
  return num_parts;
}

// Writes `before`'s tokens first, where there are any.
template <class T, class E>
Result decode(const DecodeCall& call, const WriteCall* before) {
  if (kPaired<T> && call.rank % 2) return kUnsupported;
  if (before != nullptr) {
    const Result checked = check(*before);
    if (checked != kDone) return checked;
  }
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const Result checked = check(call.paged, s, call.lens[s]);
    if (checked != kDone) return checked;
  }
  std::vector<Part> work;
  std::vector<Split> splits;
  const int64_t num_parts = plan(call, work, splits), size = Partial::size(call);
  // All threads or one: OpenMP's runtimes end and start threads when their number changes.
  const bool alone = call.num_threads < 2 || work.size() < 2;
  static thread_local Kept kept;
  const int64_t own = size + (Decode<T>::room(call) + 15) / 16 * 16;  // of each thread
  float* parts = kept.of(num_parts * size + (alone ? 1 : call.num_threads) * own);
  if (parts == nullptr) return kNoMemory;
#pragma omp parallel num_threads(call.num_threads) if (!alone)
  {
    float* mine = parts + num_parts * size + omp_get_thread_num() * own;
    if (before != nullptr) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < before->num_tokens; ++t) write<T, E>(*before, t);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < work.size(); ++i) {
      const Part& w = work[i];
      float* at = w.part >= 0 ? parts + w.part * size : mine;
      Decode<T>(call, w.seq, Partial(call, at), mine + size).template run<E>(w.begin, w.begin + w.count);
      if (w.part < 0)
        for (int64_t h = 0; h < call.num_heads; ++h) finish<T>(call, w.seq, h, at, 1);
    }
    for (const Split& split : splits) {
#pragma omp for schedule(static) nowait
      for (int64_t h = 0; h < call.num_heads; ++h)
        finish<T>(call, split.seq, h, parts + split.part * size, split.num_parts);
    }
  }
  return kDone;
}

template <class T, class E>
Result run(const DecodeCall& call) {
  return decode<T, E>(call, nullptr);
}

template <class T, class E>
Result run(const WriteDecodeCall& call) {
  return decode<T, E>(call.decode, &call.write);
}

// Entries from … of a sequence become rows of `latents` and `keys`. Threads of a parallel region share them.
template <class T, class E>
void gather(const Paged& paged, const Slice& s, int64_t rank, int64_t rope, T* latents, T* keys) {
#pragma omp for schedule(static) nowait
  for (int64_t t = 0; t < s.count; ++t) {
    int64_t slot;
    paged.locate(s.seq, s.begin + t, 1, &slot);
    E::read((const char*)paged.cache + slot * E::bytes(rank, rope), rank, rope, latents + t * rank, keys + t * rope);
  }
}

template <class T, class E>
Result run(const GatherCall& call) {
  int64_t count = 0;
  for (int64_t i = 0; i < call.num_slices; ++i) {
    const Slice& s = call.slices[i];
    if (s.seq < 0 || s.seq >= call.num_seqs || s.begin < 0 || s.count < 1) return kBadLength;
    const Result checked = check(call.paged, s.seq, s.begin + s.count);
    if (checked != kDone) return checked;
    count += s.count;
  }
  const bool alone = call.num_threads < 2 || count * E::bytes(call.rank, call.rope) < 1 << 18;
#pragma omp parallel num_threads(call.num_threads) if (!alone)
  {
    int64_t row = 0;
    for (int64_t i = 0; i < call.num_slices; row += call.slices[i++].count)
      gather<T, E>(call.paged, call.slices[i], call.rank, call.rope, (T*)call.latents + row * call.rank,
                   (T*)call.keys + row * call.rope);
  }
  return kDone;
}

Result check(const PrefillCall& call) {
  if (call.starts[0] != 0 || call.starts[call.num_seqs] != call.num_tokens) return kBadLength;
  for (int64_t s = 0; s < call.num_seqs; ++s)
    if (call.num_new(s) < 0) return kBadLength;
  for (int64_t i = 0; i < call.num_prompts; ++i) {
    const Prompt& p = call.prompts[i];
    if (p.seq < 0 || p.seq >= call.num_seqs || call.starts[p.seq] < call.num_decoded) return kBadLength;
    if (p.begin < 0 || p.count < 0 || p.begin + p.count > call.num_context) return kBadLength;
    if (call.kv_b == nullptr || p.count == 0) continue;
    const Result checked = p.from < 0 ? kBadLength : check(call.paged, p.seq, p.from + p.count);
    if (checked != kDone) return checked;
  }
  return kDone;
}

struct Work {
  int64_t prompt, head, first, count, cost;
};

// As many as leave a few pieces of work for every thread, in whole tiles.
int64_t rows_at_once(const PrefillCall& call) {
  const int64_t all = (call.num_tokens - call.num_decoded) * call.num_heads, share = all / (4 * call.num_threads);
  return std::clamp<int64_t>(share / kTileRows, 1, kGroup) * kTileRows;
}

// Makes the context's keys and values, in memory that is kept; each head's lie together where that can be.
template <class T, class E>
Result expand(PrefillCall& call) {
  static thread_local Kept kept;
  const int64_t count = call.num_context, width = call.nope + call.value, all = call.num_heads * width;
  const int64_t size = count * (all + call.rank + call.rope);
  T* expanded = (T*)kept.of((size * sizeof(T) + sizeof(float) - 1) / sizeof(float));
  if (expanded == nullptr) return kNoMemory;
  T *latents = expanded + count * all, *keys = latents + count * call.rank;
#pragma omp parallel num_threads(call.num_threads)
  for (int64_t i = 0; i < call.num_prompts; ++i) {
    const Prompt& p = call.prompts[i];
    gather<T, E>(call.paged, {p.seq, p.from, p.count}, call.rank, call.rope, latents + p.begin * call.rank,
                 keys + p.begin * call.rope);
  }
  const bool apart = width % kColumns == 0;
  call.old_kv = expanded;
  call.old_keys = keys;
  call.old_token = apart ? width : all;
  call.old_head = apart ? count * width : width;
  Product product;
  product.x = latents;
  product.matrices = call.kv_b;
  product.bias = nullptr;
  product.out = expanded;
  product.x_token = product.depth = call.rank;
  product.x_head = 0;
  product.out_token = call.old_token;
  product.out_head = call.old_head;
  product.num_tokens = count;
  product.num_heads = apart ? call.num_heads : 1;
  product.width = apart ? width : all;
  product.num_threads = call.num_threads;
  return multiply<T>(product) ? kDone : kNoMemory;
}

template <class T, class E>
Result run(const PrefillCall& given) {
  if (kPaired<T> && (given.nope % 2 || given.rope % 2)) return kUnsupported;
  const Result checked = check(given);
  if (checked != kDone) return checked;
  PrefillCall call = given;
  if (call.kv_b != nullptr && call.num_context > 0) {
    const bool packable = call.rank % 2 == 0 && call.num_heads * (call.nope + call.value) % kColumns == 0;
    Result expanded = kUnsupported;
    if constexpr (kPacked<T>) expanded = packable ? expand<T, E>(call) : kUnsupported;
    if (expanded != kDone) return expanded;
  }
  std::vector<Work> work;
  const int64_t rows = rows_at_once(call);
  for (int64_t i = 0; i < call.num_prompts; ++i) {
    const Prompt& p = call.prompts[i];
    const int64_t num_new = call.num_new(p.seq);
    // What is left over may be few rows, which are handled faster apart.
    for (int64_t first = 0, count; first < num_new; first += count) {
      const int64_t whole = (num_new - first) / kTileRows * kTileRows;
      count = std::min(rows, whole ? whole : num_new - first);
      const int64_t cost = count * (p.count + (p.paused ? 0 : first + count));
      for (int64_t h = 0; h < call.num_heads; ++h) work.push_back({i, h, first, count, cost});
    }
  }
  std::stable_sort(work.begin(), work.end(), [](const Work& a, const Work& b) { return a.cost > b.cost; });
  const int64_t row = call.num_heads * call.value;
#pragma omp parallel num_threads(call.num_threads) if (call.num_threads > 1 && work.size() > 1)
  {
    if (call.decoded != nullptr) {
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < call.num_decoded; ++t)
        std::memcpy((T*)call.out + t * row, (const T*)call.decoded + t * call.decoded_token, row * sizeof(T));
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < work.size(); ++i) {
      const Work& w = work[i];
      prefill<T>(call, call.prompts[w.prompt], w.head, w.first, w.count);
    }
  }
  return kDone;
}

// What each call says of its tensors' type, and of its cache's entries.
template <class Call>
int64_t dtype_of(const Call& call) {
  return call.dtype;
}
int64_t dtype_of(const WriteDecodeCall& call) { return call.decode.dtype; }

template <class Call>
bool fp8_of(const Call& call) {
  return call.paged.fp8;
}
bool fp8_of(const WriteDecodeCall& call) { return call.decode.paged.fp8; }

template <class T, class Call>
Result of_entries(const Call& call) {
  return fp8_of(call) ? run<T, Fp8Entries<T>>(call) : run<T, PlainEntries<T>>(call);
}

// Types that this library was not built for are not supported.
template <class Call>
Result of_type(const Call& call) {
  switch (dtype_of(call)) {
#if defined(PIECEWORK_FLOAT32)
    case 0: return of_entries<float>(call);
#endif
#if defined(PIECEWORK_BFLOAT16)
    case 1: return of_entries<BFloat16>(call);
#endif
#if defined(PIECEWORK_FLOAT16) && defined(__FLT16_MAX__)
    case 2: return of_entries<Half>(call);
#endif
    default: return kUnsupported;
  }
}

}  // namespace piecework

// Names tell the layout of what is given.
#define PIECEWORK_ENTRY extern "C" __attribute__((visibility("default"))) int32_t

PIECEWORK_ENTRY piecework_mla_write_3(const piecework::WriteCall* call) {
  return piecework::fits(call->rank, call->rope) ? piecework::of_type(*call) : piecework::kUnsupported;
}

PIECEWORK_ENTRY piecework_mla_decode_3(const piecework::DecodeCall* call) {
  return piecework::fits(call->rank, call->rope) ? piecework::of_type(*call) : piecework::kUnsupported;
}

PIECEWORK_ENTRY piecework_mla_write_decode_3(const piecework::WriteDecodeCall* call) {
  const auto& [rank, rope] = std::pair(call->decode.rank, call->decode.rope);
  return piecework::fits(rank, rope) ? piecework::of_type(*call) : piecework::kUnsupported;
}

PIECEWORK_ENTRY piecework_mla_gather_2(const piecework::GatherCall* call) { return piecework::of_type(*call); }

PIECEWORK_ENTRY piecework_mla_prefill_3(const piecework::PrefillCall* call) {
  using namespace piecework;
  if (call->nope + call->rope > kMaxHeadDim || call->value > kMaxHeadDim) return kUnsupported;
  return of_type(*call);
}
