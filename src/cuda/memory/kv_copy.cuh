// Tiles of keys and values that the copy engine brings from where they lie (kv_rows.cuh).
//
// A tensor map of pages has them where others have batch entries, so a box lies within a page. A tile of 128 tokens
// then takes several boxes: of 16 to 128 tokens, as many as lie in one page wherever such a run begins, and of one
// panel of columns, because a box is contiguous in shared memory and a tile's panels are not. A warp's lanes bring one
// each.
//
// In the last page anything may stand where there is no token. A second map ends where the tokens do, so that the
// engine fills in zeros there, as it does behind contiguous keys: kernels see the same tiles either way.
#pragma once

#include "cuda/memory/kv_rows.cuh"
#include "cuda/sm90/tensor_map.h"
#ifdef __CUDACC__
#include "cuda/sm90/ptx.cuh"
#endif

namespace pbsattn::cuda {

struct KvMap {
  CUtensorMap map;
  CUtensorMap last;  // of the last page, as far as it holds tokens; read where there are pages
};

// Describes keys or values of `width` elements, read in boxes of that, of pages in as many parts as they take.
inline bool make_kv_map(KvMap& to, const ConstView& view, const PageTable& pages, const Shape& shape,
                        std::int64_t width, Box box) {
  if (pages.entries == nullptr)
    return make_tensor_map(to.map, view, shape.batch, shape.kv_heads, shape.kv_len, width, box);
  if (box.panel == 0) box.panel = panel_of(width);
  box.tokens = pages.run(box.tokens * box.token_step) / box.token_step;
  box.columns = box.panel;
  return make_tensor_map(to.map, view, pages.count, shape.kv_heads, pages.size, width, box) &&
         make_tensor_map(to.last, view, pages.count, shape.kv_heads, pages.tokens_of_last(), width, box);
}

#ifdef __CUDACC__
// A warp's copies of a block of 128 keys or values from pages, `tokens` of them at a time.
template <int tokens>
class PagedCopy {
 public:
  __device__ PagedCopy(const PageTable& table, int lane)
      : table_(table), row_(lane * table.run(tokens) % block_tokens), panel_(lane * table.run(tokens) / block_tokens) {}

  // Returns the page of this lane's rows of a block; that number `count` where there are no tokens. To be asked for
  // early, since it comes from memory.
  __device__ int page(int batch, int block) const {
    const int token = block * block_tokens + row_;
    return token < table_.tokens ? table_.page(batch, table_.slot(token)) : table_.count;
  }
  // Starts the copy of a block's part to a tile of [panels][tokens][panel], whose bytes `done` expects.
  template <int panels, int panel>
  __device__ void start(void* tile, const KvMap& map, sm90::Barrier& done, int block, int part, int head,
                        int page) const {
    const int row = row_ - part * tokens;
    if (panel_ >= panels || row < 0 || row >= tokens) return;
    const int token = block * block_tokens + row_;
    const int slot = table_.slot(token);
    sm90::tma_load(static_cast<unsigned char*>(tile) + (panel_ * tokens + row) * panel * 2,
                   slot == table_.last_slot ? map.last : map.map, done, 0, table_.place(token, slot), panel_, head,
                   page);
  }

 private:
  const PageTable& table_;  // a kernel's parameter
  int row_;                 // of a block, this lane's first
  int panel_;
};

// Starts a warp's copy of a block of 128 keys to a swizzled tile (swizzled_tile.cuh), whose bytes `done` expects.
template <int head_dim>
__device__ void copy_block(unsigned char* tile, const KvMap& map, const PageTable& pages, sm90::Barrier& done,
                           int block, int head, int batch, int lane) {
  if (pages.entries == nullptr) {
    if (lane == 0) sm90::tma_load(tile, map.map, done, 0, block * block_tokens, 0, head, batch);
    return;
  }
  constexpr int panel = SwizzledTile<head_dim>::panel;
  const PagedCopy<block_tokens> copy(pages, lane);
  copy.template start<head_dim / panel, panel>(tile, map, done, block, 0, head, copy.page(batch, block));
}
#endif

}  // namespace pbsattn::cuda
