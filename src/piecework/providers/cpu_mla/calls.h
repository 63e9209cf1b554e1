// What calls are given. Their layout is known to calls.py: whoever changes one changes its entry's name there as well.
#pragma once

#include <cstdint>

namespace piecework {

constexpr int kMaxWidth = 1024;  // of a latent with its rotated key
constexpr int kMaxHeadDim = 256;

// T tokens, D decode tokens, S sequences, H heads, N dimensions of a head without rotation, R with, V of a value,
// L of a latent; blocks of B tokens, W of them in a table's row.
struct Paged {
  void* cache;            // [blocks, B], entries
  const int64_t* tables;  // [S, W]
  int64_t num_blocks, block_size, table_width;
  int64_t fp8;            // whether entries are `Fp8Entries`; else `PlainEntries`

  // Where entries first … first + count - 1 of a sequence lie in the cache, counted in entries.
  void locate(int64_t seq, int64_t first, int64_t count, int64_t* slots) const {
    const int64_t* table = tables + seq * table_width;
    int64_t block = first / block_size, inside = first % block_size;
    for (int64_t i = 0; i < count; ++block, inside = 0) {
      int64_t at = table[block] * block_size + inside;
      for (; inside < block_size && i < count; ++inside, ++i, ++at) slots[i] = at;
    }
  }
};

// By which tokens' pairs are rotated; where cos is null, they are rotated already.
struct Angles {
  const void *cos, *sin;         // [T, R / 2]
  int64_t cos_token, sin_token;  // strides in elements
  int64_t plain;                 // cos and sin are float32; else they have the type of the pairs
};

struct WriteCall {
  Paged paged;  // without tables
  Angles angles;
  const void *compressed, *norm_weight;  // [T, L + R], [L]
  const int64_t* slots;                  // [T]
  void* entry;                           // [T, L + R], or null
  int64_t compressed_token, num_tokens, rank, rope;
  int64_t dtype, num_threads;
  double eps;
};

struct DecodeCall {
  Paged paged;
  Angles angles;                // of the queries
  const void *q_latent, *q_pe;  // [D, H, L], [D, H, R]
  const int64_t* lens;          // [D]
  void* out;                    // [D, H, L]
  int64_t latent_token, latent_head, pe_token, pe_head;
  int64_t num_seqs, num_heads, rank, rope;
  int64_t dtype, num_threads;
  double scale;
};

// The tokens are written, and then each of them is decoded.
struct WriteDecodeCall {
  WriteCall write;
  DecodeCall decode;
};

// Entries `begin` … of a sequence become rows of `latents` and `keys`, one slice after the other.
struct Slice {
  int64_t seq, begin, count;
};

struct GatherCall {
  Paged paged;
  const Slice* slices;
  void *latents, *keys;  // [C, L], [C, R]
  int64_t num_slices, num_seqs, rank, rope;
  int64_t dtype, num_threads;
};

// A sequence's new tokens, which see rows `begin` … of the context, and then each other.
struct Prompt {
  int64_t seq, begin, count;
  int64_t from;             // what is cached of the sequence before the first of these rows
  int64_t state;            // where its state is kept, in rows of tiles; -1 where it has none
  int64_t resumed, paused;  // whether there is earlier context, and whether more follows: then no result yet
};

// The context's keys and values are given, or else they are made of the cache by `kv_b`.
struct PrefillCall {
  Paged paged;
  Angles angles;                  // of the queries
  const void *q_nope, *q_pe;      // [T, H, N], [T, H, R]
  const void *kv, *keys;          // [P, H * (N + V)], [T, R]: of the new tokens
  const void *old_kv, *old_keys;  // [C, H, N + V], [C, R], rows of keys dense: of the context; or null
  const void* kv_b;               // [H * (N + V), L], packed (ops/packed.py); or null
  const void* decoded;            // [D, H * V] or null
  const int64_t* starts;          // [S + 1]
  const Prompt* prompts;
  float* state;
  void* out;  // [T, H * V]
  int64_t nope_token, nope_head, pe_token, pe_head, kv_token, keys_token, old_token, old_head, decoded_token;
  int64_t num_tokens, num_decoded, num_seqs, num_prompts, num_context, num_heads, nope, rope, value, rank;
  int64_t dtype, num_threads;
  double scale;

  int64_t num_new(int64_t seq) const { return starts[seq + 1] - starts[seq]; }
};

}  // namespace piecework
