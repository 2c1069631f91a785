// A product in tasks: a block of rows times some columns, its float32 sums kept in the L2 cache.
//
// The reduction is cut into chunks. For each one the columns are packed, then all tiles multiplied,
// panel after panel so that a panel stays in L1; meanwhile the lines of the next chunk, or of the
// next task's first, are fetched. Rows are packed once and kept while the next task has the same.
// Threads take the next task when they are done: ranges of their own, so that no two pack the same
// rows, were no faster. Every element is summed by one task in one order: the number of threads
// changes no bit.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "pack.h"

namespace phi {

// Chosen by measurement on a core with 48 KiB of L1 and 1 MiB of L2.
constexpr int64_t kMostRows = 360;  // of a task: packed columns are used that often
constexpr int64_t kColumns = 128;   // of a task with that many rows: 180 KiB of sums
constexpr int64_t kMostColumns = 512;
constexpr int64_t kMostPairs = 192;  // of a chunk: a panel is 24 KiB
constexpr int64_t kMostPacked = 49152;  // pairs of a chunk's columns: 192 KiB
constexpr int64_t kMostPackedOnce = 131072;  // of all columns, kept from task to task: 512 KiB

// Columns of a task and pairs of a chunk.
struct Cut {
  int64_t columns, pairs;
};

// Where the reduction runs along the weights' rows: long pieces of few rows.
inline Cut long_cut() { return {kColumns, kMostPairs}; }

// Where it runs across them: the fewer rows share the sums' place, the wider a piece of each.
inline Cut wide_cut(int64_t most_rows, int64_t columns) {
  const int64_t fitting = kMostRows * kColumns / std::max<int64_t>(most_rows, 1);
  const int64_t width = std::clamp(fitting / kColumns * kColumns, kColumns, kMostColumns);
  const int64_t wide = std::min(width, round_up(columns, kPanelColumns));
  return {wide, std::min(kMostPairs, kMostPacked / wide)};
}

// Memory of one thread, on a line's boundary.
template <class T>
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  T* at_least(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = round_up(size, 64);
      data_ = static_cast<T*>(std::aligned_alloc(64, size_ * sizeof(T)));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Where the finished columns of a task go; without `base` they stay in the sums for finish().
struct Output {
  bf16* base = nullptr;
  int64_t stride = 0, columns = 0;
};

// One chunk of the reduction of one task: packed operands, and where its tiles go.
struct Chunk {
  const uint32_t* left;  // panels of left_pairs, from this chunk's first pair on
  int64_t left_pairs, rows;
  const uint32_t* right;  // panels of right_pairs
  int64_t right_pairs, panels;
  int64_t pairs;
  bool adds;  // to what the sums hold
  float* sums;
  int64_t sums_stride;
  Output output;
};

// All tiles, and between them the lines that are wanted next.
inline void multiply(const Chunk& chunk, LinesAhead& lines) {
  const Output& output = chunk.output;
  const int64_t tiles = ceil_div(chunk.rows, kTileRows) * chunk.panels;
  const int64_t lines_each = ceil_div(lines.total(), tiles);
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    const int64_t column = panel * kPanelColumns;
    const uint32_t* right = chunk.right + column * chunk.right_pairs;
    const __mmask32 columns = first(output.columns - column);
    for (int64_t row = 0; row < chunk.rows; row += kTileRows) {
      lines.ask(lines_each);
      float* sums = chunk.sums + row * chunk.sums_stride + column;
      bf16* out = output.base ? output.base + row * output.stride + column : nullptr;
      kMultiplyTile[std::min(kTileRows, chunk.rows - row)](
          chunk.left + row * chunk.left_pairs, right, chunk.pairs, chunk.adds,
          {sums, chunk.sums_stride, out, output.stride, columns});
    }
  }
}

// A Product says, of each task: rows, columns, reduction; pack_left, pack_right; left_of, which is
// the same for tasks with the same rows, and right_of with the same columns or -1; ahead, the lines
// that pack_right reads; finish_ahead and finish, for what is made of the sums; output. And cut and
// most_rows, of all.
template <class Product>
void run(const Product& product, int64_t num_tasks) {
  const Cut cut = product.cut;
  const int64_t stride = round_up(cut.columns, kPanelColumns), longest = 2 * cut.pairs;
  std::atomic<int64_t> next_task{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Scratch<uint32_t> left_scratch, right_scratch;
    Scratch<float> sums_scratch;
    uint32_t* right = right_scratch.at_least(stride * cut.pairs);
    float* sums = sums_scratch.at_least(product.most_rows * stride);
    int64_t packed_left = -1, packed_right = -1, following;
    for (int64_t task = next_task++; task < num_tasks; task = following) {
      following = next_task++;
      const int64_t rows = product.rows(task), reduction = product.reduction(task);
      // a pair more: packing writes 16 where 12 are meant, in the order of pairs
      const int64_t left_pairs = ceil_div(reduction, 2) + 1;
      uint32_t* left = left_scratch.at_least(round_up(rows, kTileRows) * left_pairs);
      if (product.left_of(task) != packed_left) {
        product.pack_left(task, left, left_pairs);
        packed_left = product.left_of(task);
      }
      for (int64_t start = 0; start < reduction; start += longest) {
        const int64_t length = std::min(longest, reduction - start), end = start + length;
        if (product.right_of(task) < 0 || product.right_of(task) != packed_right) {
          product.pack_right(task, start, length, right);
          packed_right = product.right_of(task);
        }
        LinesAhead lines;
        if (end < reduction) {
          product.ahead(task, end, std::min(longest, reduction - end), lines);
        } else {
          product.finish_ahead(task, lines);
          const bool has_next = following < num_tasks;
          if (has_next && (packed_right < 0 || product.right_of(following) != packed_right)) {
            product.ahead(following, 0, std::min(longest, product.reduction(following)), lines);
          }
        }
        const Chunk chunk{
            left + start / 2 * kTileRows, left_pairs, rows,
            right, cut.pairs, ceil_div(product.columns(task), kPanelColumns),
            ceil_div(length, 2), start > 0, sums, stride,
            end < reduction ? Output{} : product.output(task)};
        multiply(chunk, lines);
      }
      product.finish(task, sums, stride);
    }
  });
}

}  // namespace phi
