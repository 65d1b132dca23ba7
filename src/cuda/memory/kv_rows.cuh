// Where the keys and values of a pass lie: contiguous, or in pages of a server's cache (Pages). Kernels that read rows
// by pointer ask Rows for each; what the copy engine brings is in kv_copy.cuh. Both go by PageTable.
//
// An entry that names no page is read as the nearest one that there is: the results are of no use then, but no load
// leaves the cache. The host doesn't see the table, so it can't refuse such an entry.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/geometry.cuh"
#ifdef __CUDACC__
#include "cuda/sm90/swizzled_tile.cuh"
#endif

namespace pbsattn::cuda {

// The table of a pass's batch entries, as kernels read it.
struct PageTable {
  PageTable() = default;
  PageTable(const Pages& pages, std::int64_t kv_len)
      : entries(pages.table),
        batch_stride(pages.batch_stride),
        tokens(static_cast<int>(kv_len)),
        size(static_cast<int>(pages.size)),
        count(static_cast<int>(pages.count)) {
    if (entries == nullptr) return;
    const int log_size = std::bit_width(static_cast<unsigned>(size - 1));
    shift = 31 + log_size;
    factor = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + pages.size - 1) / pages.size);
    last_slot = slot(tokens - 1);
  }

  // Returns which of its batch entry's pages a token is in: token / size, without a division.
  PBSATTN_DEVICE int slot(int token) const {
    return static_cast<int>(static_cast<std::uint64_t>(static_cast<std::uint32_t>(token)) * factor >> shift);
  }
  // Returns a token's place in the page of a slot.
  PBSATTN_DEVICE int place(int token, int slot) const { return token - slot * size; }
  // Returns the tokens of the last page that there are.
  PBSATTN_DEVICE int tokens_of_last() const { return tokens - last_slot * size; }
  // Returns how many tokens, up to `most`, a power of two, lie in one page wherever that many begin at a multiple.
  PBSATTN_DEVICE int run(int most) const {
    const int aligned = size & -size;
    return aligned < most ? aligned : most;
  }
#ifdef __CUDACC__
  __device__ int page(int batch, int slot) const {
    return min(max(__ldg(entries + batch * batch_stride + slot), 0), count - 1);
  }
#endif

  const std::int32_t* entries = nullptr;  // [batch][pages of an entry]; null: contiguous
  std::int64_t batch_stride = 0;
  int tokens = 0;            // kv_len
  int size = 0, count = 0;   // tokens of a page, pages of the cache
  int last_slot = 0;         // that of the last token
  std::uint32_t factor = 0;  // token / size is token * factor >> shift
  int shift = 0;
};

#ifdef __CUDACC__
// The keys or values of one head of a batch entry.
template <class T>
struct Rows {
  __device__ Rows(const ConstView& view, const PageTable& table, int batch, int head)
      : view(view), table(table), batch(batch), data(head_of<T>(view, table.entries == nullptr ? batch : 0, head)) {}

  __device__ bool paged() const { return table.entries != nullptr; }
  // Returns the row of a token below kv_len.
  __device__ const T* at(int token) const { return paged() ? in_pages(token) : contiguous(token); }
  // Do the same where it is known which.
  __device__ const T* contiguous(int token) const { return data + token * view.token_stride; }
  __device__ const T* in_pages(int token) const {
    const int slot = table.slot(token);
    return data + table.page(batch, slot) * view.batch_stride + table.place(token, slot) * view.token_stride;
  }

  const ConstView& view;  // parameters of a kernel, where they cost no registers
  const PageTable& table;
  int batch;
  const T* data;
};

// Starts the copy of 128 rows from token `first` on; all of them are there.
template <class T, int head_dim, int threads>
__device__ void load_tile(unsigned char* tile, const Rows<T>& rows, int first, int thread) {
  if (!rows.paged()) {
    load_tile<T, head_dim, threads>(tile, rows.at(first), rows.view.token_stride, tile_tokens, thread);
    return;
  }
  using Swizzled = SwizzledTile<head_dim>;
  constexpr int rows_at_once = threads / Swizzled::threads;
  const int chunk = thread % Swizzled::threads;
  if (chunk >= Swizzled::chunks) return;
  constexpr int at_once = head_dim > 128 ? 2 : 4;  // as registers allow
#pragma unroll at_once
  for (int row = thread / Swizzled::threads; row < tile_tokens; row += rows_at_once)
    copy_async(sm90::shared_address(tile) + Swizzled::offset(row, chunk), rows.at(first + row) + chunk * 8, true);
}
#endif

}  // namespace pbsattn::cuda
