// Operands in the order in which a tile reads them, and their lines asked for before that.
//
// A panel is [pair][width] of 32 bits, width 12 on the left and 32 on the right. Matrices are
// row-major, and the reduction runs either along their rows (pack_along) or across (pack_across).
#pragma once

#include <algorithm>
#include <array>

#include "tile.h"

namespace phi {

// Rows of a matrix, or those that `place` names.
struct Rows {
  const bf16* base;
  int64_t stride;
  const int64_t* place = nullptr;

  const bf16* operator[](int64_t row) const { return base + stride * (place ? place[row] : row); }
  Rows from(int64_t row, int64_t column) const {
    if (place != nullptr) return {base + column, stride, place + row};
    return {base + row * stride + column, stride};
  }
};

// The reduction runs across rows: a pair is one column of rows 2p and 2p + 1; the last may lack its
// second. Packing on the left reads what nobody has asked for, so it looks some rows ahead.
template <int kWidth>
void pack_across(
    const Rows& rows, int64_t num_rows, int64_t columns, uint32_t* panels, int64_t panel_pairs) {
  static constexpr auto kOrder = [] {  // of 16-bit words: the first's, then the second's from 32
    std::array<std::array<int16_t, 32>, 2> order{};
    for (int16_t i = 0; i < 32; ++i) {
      order[i / 16][2 * (i % 16)] = i;
      order[i / 16][2 * (i % 16) + 1] = 32 + i;
    }
    return order;
  }();
  constexpr int64_t kRowsAhead = 16;
  const auto low = _mm512_loadu_si512(kOrder[0].data()), high = _mm512_loadu_si512(kOrder[1].data());
  for (int64_t row = 0; row < num_rows; row += 2) {
    const bool has_second = row + 1 < num_rows;
    const bf16 *one = rows[row], *two = has_second ? rows[row + 1] : one;
    if (kWidth == kTileRows) {
      const int64_t end = std::min(row + kRowsAhead + 2, num_rows);
      for (int64_t ahead = row + kRowsAhead; ahead < end; ++ahead) {
        const bf16* line = rows[ahead];
        for (int64_t i = 0; i < columns; i += 32) __builtin_prefetch(line + i);
      }
    }
    uint32_t* to = panels + row / 2 * kWidth;
    for (int64_t column = 0; column < columns; column += kWidth) {
      const auto mask = first(std::min<int64_t>(kWidth, columns - column));
      const auto a = _mm512_maskz_loadu_epi16(mask, one + column);
      const auto b = _mm512_maskz_loadu_epi16(has_second ? mask : 0, two + column);
      _mm512_storeu_si512(to + column * panel_pairs, _mm512_permutex2var_epi16(a, low, b));
      if (kWidth == kPanelColumns) {
        _mm512_storeu_si512(to + column * panel_pairs + 16, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
}

// Four pairs of each of rows 0, 4, 8 and 12.
inline __m512i four_of_four(const uint32_t* const* rows, int64_t pair) {
  const auto four = [&](int row) { return _mm_loadu_si128((const __m128i*)(rows[row] + pair)); };
  auto all = _mm512_inserti32x4(_mm512_castsi128_si512(four(0)), four(4), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(all, four(8), 2), four(12), 3);
}

// The reduction runs along rows, which become columns: 4 pairs of 16 rows at a time are transposed.
// What lies beyond the last row repeats it; its results are not written.
template <int kWidth>
void pack_along(
    const Rows& rows, int64_t num_rows, int64_t pairs, uint32_t* panels, int64_t panel_pairs) {
  for (int64_t begin = 0; begin < num_rows; begin += kWidth) {
    for (int64_t part = 0; part < kWidth; part += 16) {
      const uint32_t* from[16];
      for (int64_t i = 0; i < 16; ++i) {
        from[i] = (const uint32_t*)rows[std::min(begin + part + i, num_rows - 1)];
      }
      uint32_t* to = panels + begin * panel_pairs + part;
      int64_t pair = 0;
      for (; pair + 4 <= pairs; pair += 4) {
        const auto r0 = four_of_four(from, pair), r1 = four_of_four(from + 1, pair);
        const auto r2 = four_of_four(from + 2, pair), r3 = four_of_four(from + 3, pair);
        const auto t0 = _mm512_unpacklo_epi32(r0, r1), t1 = _mm512_unpackhi_epi32(r0, r1);
        const auto t2 = _mm512_unpacklo_epi32(r2, r3), t3 = _mm512_unpackhi_epi32(r2, r3);
        _mm512_storeu_si512(to + pair * kWidth, _mm512_unpacklo_epi64(t0, t2));
        _mm512_storeu_si512(to + (pair + 1) * kWidth, _mm512_unpackhi_epi64(t0, t2));
        _mm512_storeu_si512(to + (pair + 2) * kWidth, _mm512_unpacklo_epi64(t1, t3));
        _mm512_storeu_si512(to + (pair + 3) * kWidth, _mm512_unpackhi_epi64(t1, t3));
      }
      for (; pair < pairs; ++pair) {
        for (int i = 0; i < 16; ++i) to[pair * kWidth + i] = from[i][pair];
      }
    }
  }
}

// Lines that are read soon: asked for a few at a time while tiles are multiplied, so that packing
// finds them in the cache. Without it packing waits for memory: a tenth to a sixth of all time.
class LinesAhead {
 public:
  void add(const Rows& rows, int64_t num_rows, int64_t columns) {
    const int64_t lines = ceil_div(columns, 32);
    if (num_rows == 0 || total_ + num_rows * lines > kMost) return;
    parts_[size_++] = {rows, num_rows, lines};
    total_ += num_rows * lines;
    if (size_ == 1) next_ = rows[0];
  }
  int64_t total() const { return total_; }

  void ask(int64_t count) {
    while (count > 0 && part_ < size_) {
      const Part& part = parts_[part_];
      const int64_t now = std::min(count, part.lines - line_);
      for (int64_t i = 0; i < now; ++i) __builtin_prefetch(next_ + 32 * i, 0, 2);
      count -= now;
      next_ += 32 * now;
      line_ += now;
      if (line_ < part.lines) continue;
      line_ = 0;
      if (++row_ == part.num_rows) {
        row_ = 0;
        ++part_;
      }
      if (part_ < size_) next_ = parts_[part_].rows[row_];
    }
  }

 private:
  struct Part {
    Rows rows;
    int64_t num_rows, lines;
  };
  static constexpr int64_t kMost = 4096;  // 256 KiB: more would not stay in the cache
  std::array<Part, 4> parts_{};
  int size_ = 0, part_ = 0;
  int64_t row_ = 0, line_ = 0, total_ = 0;
  const bf16* next_ = nullptr;
};

}  // namespace phi
