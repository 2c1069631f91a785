// The innermost product: up to 12 rows times a panel of 32 columns, all sums in registers.
//
// Both operands come as pairs: 32 bits hold two neighbours along the reduction, which is what
// vdpbf16ps multiplies and adds in float32. Per pair of the reduction a tile reads 12 pairs of rows
// and 32 of columns: left[pair][12], right[pair][32] (pack.h). 24 of the 32 registers are sums.
#pragma once

#include <ATen/core/Tensor.h>
#include <immintrin.h>

namespace phi {

using bf16 = at::BFloat16;

constexpr int64_t kTileRows = 12;
constexpr int64_t kPanelColumns = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One bit for each of the first n of 32; none for n below 1.
inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n < 1 ? 0u : (1u << n) - 1; }

// The columns that are there: an ordinary store where that is all of them.
inline void store(bf16* to, __mmask32 columns, __m512i values) {
  if (columns == ~0u) {
    _mm512_storeu_si512(to, values);
  } else {
    _mm512_mask_storeu_epi16(to, columns, values);
  }
}

// Where a tile's result goes: to `sums` (float32, whole panels), or rounded to `out` if that is set.
struct TileResult {
  float* sums;
  int64_t sums_stride;
  bf16* out;
  int64_t out_stride;
  __mmask32 columns;  // of the panel, that `out` has
};

// sums (+)= left right over `pairs`; adds: whether sums already hold a part of the reduction.
template <int kRows>
void multiply_tile(
    const uint32_t* left, const uint32_t* right, int64_t pairs, bool adds, const TileResult& to) {
  __m512 low[kRows], high[kRows];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const float* sum = to.sums + row * to.sums_stride;
    low[row] = adds ? _mm512_load_ps(sum) : _mm512_setzero_ps();
    high[row] = adds ? _mm512_load_ps(sum + 16) : _mm512_setzero_ps();
  }
  for (; pairs > 0; --pairs, left += kTileRows, right += kPanelColumns) {
    const auto right_low = (__m512bh)_mm512_load_si512(right);
    const auto right_high = (__m512bh)_mm512_load_si512(right + 16);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const auto pair = (__m512bh)_mm512_set1_epi32(left[row]);
      low[row] = _mm512_dpbf16_ps(low[row], pair, right_low);
      high[row] = _mm512_dpbf16_ps(high[row], pair, right_high);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    if (to.out == nullptr) {
      _mm512_store_ps(to.sums + row * to.sums_stride, low[row]);
      _mm512_store_ps(to.sums + row * to.sums_stride + 16, high[row]);
    } else {
      const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(high[row], low[row]);
      store(to.out + row * to.out_stride, to.columns, rounded);
    }
  }
}

using MultiplyTile = decltype(&multiply_tile<1>);
constexpr MultiplyTile kMultiplyTile[kTileRows + 1] = {
    nullptr,           multiply_tile<1>, multiply_tile<2>,  multiply_tile<3>,  multiply_tile<4>,
    multiply_tile<5>,  multiply_tile<6>, multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>,
    multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

}  // namespace phi
