// The four products of a layer of experts in bfloat16, with what precedes and follows each fused in.
//
// The same operators as reference.py and the Triton kernels, on a CPU with AVX-512 BF16: N rows
// sorted by expert, D model width, F expert width, H = 2F, E experts; row n copies token token_N[n];
// expert e owns rows offset_E[e - 1] to offset_E[e]. Sums are float32, rounded once where written.
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "product.h"

namespace phi {
namespace {

using at::Tensor;
using Float = at::vec::Vectorized<float>;

// Rows of one expert.
struct Block {
  int64_t expert, begin, end;
};

struct Blocks {
  std::vector<Block> all;
  int64_t most_rows = 0;
};

Blocks blocks_of(const Tensor& offset_E) {
  Blocks blocks;
  const auto* offset = offset_E.const_data_ptr<int32_t>();
  int64_t begin = 0;
  for (int64_t expert = 0; expert < offset_E.numel(); begin = offset[expert++]) {
    const int64_t end = offset[expert], rows = end - begin;
    if (rows == 0) continue;
    const int64_t each = round_up(ceil_div(rows, ceil_div(rows, kMostRows)), kTileRows);
    for (int64_t row = begin; row < end; row += each) {
      blocks.all.push_back({expert, row, std::min(row + each, end)});
    }
    blocks.most_rows = std::max(blocks.most_rows, std::min(each, rows));
  }
  return blocks;
}

// What products of rows with a matrix of their expert share. A task is a block of rows and a group
// of columns; K is the reduction.
struct RowProduct {
  Rows left;
  const bf16* weights;  // (E, K, width) or (E, width, K)
  int64_t k, width;
  int64_t group_columns;
  Cut cut;
  int64_t most_rows;
  const std::vector<Block>& blocks;

  int64_t groups() const { return ceil_div(width, group_columns); }
  int64_t num_tasks() const { return static_cast<int64_t>(blocks.size()) * groups(); }
  const Block& block(int64_t task) const { return blocks[task / groups()]; }
  int64_t column(int64_t task) const { return task % groups() * group_columns; }
  int64_t group_width(int64_t task) const { return std::min(group_columns, width - column(task)); }

  int64_t rows(int64_t task) const { return block(task).end - block(task).begin; }
  int64_t columns(int64_t task) const { return group_width(task); }
  int64_t reduction(int64_t) const { return k; }
  int64_t left_of(int64_t task) const { return task / groups(); }
  int64_t right_of(int64_t) const { return -1; }
  void pack_left(int64_t task, uint32_t* to, int64_t pairs) const {
    pack_along<kTileRows>(left.from(block(task).begin, 0), rows(task), k / 2, to, pairs);
  }
  void finish_ahead(int64_t, LinesAhead&) const {}
  Output output(int64_t) const { return {}; }
  void finish(int64_t, const float*, int64_t) const {}
};

// ---- rows times a matrix

struct GroupedGemm : RowProduct {
  bool is_transposed;  // weights are (E, width, K)
  bf16* out_NQ;

  Rows piece(int64_t task, int64_t start) const {
    const Rows all{weights + block(task).expert * k * width, is_transposed ? k : width};
    return is_transposed ? all.from(column(task), start) : all.from(start, column(task));
  }
  void pack_right(int64_t task, int64_t start, int64_t length, uint32_t* to) const {
    if (is_transposed) {
      pack_along<kPanelColumns>(piece(task, start), columns(task), length / 2, to, cut.pairs);
    } else {
      pack_across<kPanelColumns>(piece(task, start), length, columns(task), to, cut.pairs);
    }
  }
  void ahead(int64_t task, int64_t start, int64_t length, LinesAhead& lines) const {
    const int64_t n = columns(task);
    lines.add(piece(task, start), is_transposed ? n : length, is_transposed ? length : n);
  }
  Output output(int64_t task) const {
    return {out_NQ + block(task).begin * width + column(task), width, columns(task)};
  }
};

// out (N, Q): each expert's rows (N, P) times its (P, Q), or its (Q, P) where is_transposed.
void grouped_gemm(
    const Tensor& rows_NP, const Tensor& weight, const Tensor& offset_E, bool is_transposed,
    Tensor& out_NQ) {
  const int64_t k = rows_NP.size(1), width = out_NQ.size(1);
  const Blocks blocks = blocks_of(offset_E);
  const Cut cut = is_transposed ? long_cut() : wide_cut(blocks.most_rows, width);
  const GroupedGemm product{
      {{rows_NP.const_data_ptr<bf16>(), k}, weight.const_data_ptr<bf16>(), k, width, cut.columns,
       cut, blocks.most_rows, blocks.all},
      is_transposed, out_NQ.data_ptr<bf16>()};
  run(product, product.num_tasks());
}

// ---- SwiGLU

inline Float sigmoid(Float x) { return Float(1.0f) / (Float(1.0f) + x.neg().exp_u20()); }

inline Float widened(__m512i values, int half) {
  const auto words = half ? _mm512_extracti64x4_epi64(values, 1) : _mm512_castsi512_si256(values);
  return Float(_mm512_cvtpbh_ps((__m256bh)words));
}

inline __m512i rounded(Float low, Float high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline __m512i rounded(const float* sums) {
  return rounded(Float(_mm512_load_ps(sums)), Float(_mm512_load_ps(sums + 16)));
}

// Lines that the same columns of a later row are written to.
inline void ask_to_write(const bf16* row, int64_t columns) {
  for (int64_t i = 0; i < columns; i += 32) __builtin_prefetch(row + i, 1);
}
constexpr int64_t kRowsToWriteAhead = 3;

// Tokens times W1 and W3; a task has as many columns of one as of the other, gate before up.
struct GateUp : RowProduct {
  bf16 *hidden_NH, *act_NF;  // hidden_NH may be null

  Rows piece(int64_t task, int64_t start, int64_t side) const {
    return Rows{weights + block(task).expert * 2 * width * k, k}.from(
        side * width + column(task), start);
  }
  int64_t columns(int64_t) const { return 2 * group_columns; }
  void pack_right(int64_t task, int64_t start, int64_t length, uint32_t* to) const {
    for (int64_t side = 0; side < 2; ++side) {
      pack_along<kPanelColumns>(
          piece(task, start, side), group_width(task), length / 2,
          to + side * group_columns * cut.pairs, cut.pairs);
    }
  }
  void ahead(int64_t task, int64_t start, int64_t length, LinesAhead& lines) const {
    for (int64_t side = 0; side < 2; ++side) {
      lines.add(piece(task, start, side), group_width(task), length);
    }
  }
  void finish(int64_t task, const float* sums, int64_t stride) const {
    const int64_t n = group_width(task);
    for (int64_t row = block(task).begin; row < block(task).end; ++row, sums += stride) {
      bf16* hidden = hidden_NH ? hidden_NH + row * 2 * width + column(task) : nullptr;
      bf16* act = act_NF + row * width + column(task);
      ask_to_write(act + kRowsToWriteAhead * width, n);
      for (int64_t i = 0; i < n; i += 32) {
        const auto mask = first(n - i);
        const auto gate = rounded(sums + i), up = rounded(sums + group_columns + i);
        if (hidden != nullptr) {
          store(hidden + i, mask, gate);
          store(hidden + width + i, mask, up);
        }
        const Float gate_0 = widened(gate, 0), gate_1 = widened(gate, 1);
        const Float act_0 = gate_0 * sigmoid(gate_0) * widened(up, 0);
        const Float act_1 = gate_1 * sigmoid(gate_1) * widened(up, 1);
        store(act + i, mask, rounded(act_0, act_1));
      }
    }
  }
};

// hidden (N, H) = [gate, up] of the tokens' rows, where given, and act (N, F) = silu(gate) * up.
void gate_up(
    const Tensor& x_TD, const Tensor& gate_up_EHD, const Tensor& token_N, const Tensor& offset_E,
    const std::optional<Tensor>& hidden_NH, Tensor& act_NF) {
  const int64_t d = x_TD.size(1), f = act_NF.size(1);
  const Blocks blocks = blocks_of(offset_E);
  const GateUp product{
      {{x_TD.const_data_ptr<bf16>(), d, token_N.const_data_ptr<int64_t>()},
       gate_up_EHD.const_data_ptr<bf16>(), d, f, kColumns / 2, long_cut(), blocks.most_rows,
       blocks.all},
      hidden_NH ? hidden_NH->data_ptr<bf16>() : nullptr, act_NF.data_ptr<bf16>()};
  run(product, product.num_tasks());
}

// dL/dy times W2, and with the pre-activation everything elementwise that follows.
struct SwigluBackward : RowProduct {
  const bf16* hidden_NH;
  const float* weight_N;
  bf16 *grad_hidden_NH, *act_NF;
  float* dot_NG;  // one part for each kColumns

  Rows piece(int64_t task, int64_t start) const {
    return Rows{weights + block(task).expert * k * width, width}.from(start, column(task));
  }
  void pack_right(int64_t task, int64_t start, int64_t length, uint32_t* to) const {
    pack_across<kPanelColumns>(piece(task, start), length, columns(task), to, cut.pairs);
  }
  void ahead(int64_t task, int64_t start, int64_t length, LinesAhead& lines) const {
    lines.add(piece(task, start), length, columns(task));
  }
  void finish_ahead(int64_t task, LinesAhead& lines) const {
    const Rows hidden{hidden_NH, 2 * width};
    for (int64_t side = 0; side < 2; ++side) {
      lines.add(
          hidden.from(block(task).begin, side * width + column(task)), rows(task), columns(task));
    }
  }
  void finish(int64_t task, const float* sums, int64_t stride) const {
    const int64_t n = columns(task);
    for (int64_t row = block(task).begin; row < block(task).end; ++row, sums += stride) {
      const bf16* hidden = hidden_NH + row * 2 * width + column(task);
      bf16* grad = grad_hidden_NH + row * 2 * width + column(task);
      bf16* act = act_NF + row * width + column(task);
      ask_to_write(grad + kRowsToWriteAhead * 2 * width, n);
      ask_to_write(grad + kRowsToWriteAhead * 2 * width + width, n);
      ask_to_write(act + kRowsToWriteAhead * width, n);
      const Float weight(weight_N[row]);
      Float dot(0.0f);  // of kColumns at a time: how wide a task is changes no bit
      for (int64_t i = 0; i < n; i += 32) {
        if (i % kColumns == 0) dot = Float(0.0f);
        const auto mask = first(n - i);
        const auto gates = _mm512_maskz_loadu_epi16(mask, hidden + i);
        const auto ups = _mm512_maskz_loadu_epi16(mask, hidden + width + i);
        Float of_act[2], of_gate[2], of_up[2];
        for (int half = 0; half < 2; ++half) {
          const auto own = static_cast<__mmask16>(mask >> (16 * half));  // beyond: gradient 0
          const Float grad_act(_mm512_maskz_load_ps(own, sums + i + 16 * half));
          const Float gate = widened(gates, half), up = widened(ups, half), s = sigmoid(gate);
          const Float gated = gate * s, plain_act = gated * up, weighted = weight * grad_act;
          dot = dot + grad_act * plain_act;
          of_act[half] = weight * plain_act;
          of_gate[half] = weighted * up * s * (Float(1.0f) + gate * (Float(1.0f) - s));
          of_up[half] = weighted * gated;
        }
        store(act + i, mask, rounded(of_act[0], of_act[1]));
        store(grad + i, mask, rounded(of_gate[0], of_gate[1]));
        store(grad + width + i, mask, rounded(of_up[0], of_up[1]));
        if ((i + 32) % kColumns != 0 && i + 32 < n) continue;
        const int64_t part = (column(task) + i) / kColumns;
        dot_NG[row * ceil_div(width, kColumns) + part] = _mm512_reduce_add_ps(dot);
      }
    }
  }
};

// grad_hidden (N, H) and weight * act (N, F); returns parts (N, G) whose sum is weight_N's gradient.
Tensor swiglu_backward(
    const Tensor& grad_TD, const Tensor& weight_N, const Tensor& down_EDF, const Tensor& hidden_NH,
    const Tensor& token_N, const Tensor& offset_E, Tensor& grad_hidden_NH, Tensor& act_NF) {
  const int64_t d = grad_TD.size(1), f = act_NF.size(1), n = token_N.size(0);
  const Blocks blocks = blocks_of(offset_E);
  const Cut cut = wide_cut(blocks.most_rows, f);
  Tensor dot_NG = at::empty({n, ceil_div(f, kColumns)}, weight_N.options());
  const SwigluBackward product{
      {{grad_TD.const_data_ptr<bf16>(), d, token_N.const_data_ptr<int64_t>()},
       down_EDF.const_data_ptr<bf16>(), d, f, cut.columns, cut, blocks.most_rows, blocks.all},
      hidden_NH.const_data_ptr<bf16>(), weight_N.const_data_ptr<float>(),
      grad_hidden_NH.data_ptr<bf16>(), act_NF.data_ptr<bf16>(), dot_NG.data_ptr<float>()};
  run(product, product.num_tasks());
  return dot_NG;
}

// ---- gradients of weights

constexpr int64_t kRowsPackedOnce = 96;  // of a task that writes whole lines of the matrix

// A task is some rows and columns of one expert's matrix; the reduction is over the expert's rows.
struct WeightGradient {
  Rows left, right;
  int64_t height, width;
  const int32_t* offset;
  int64_t block_height;
  Cut cut;
  int64_t most_rows;
  bf16* out;

  int64_t down() const { return ceil_div(height, block_height); }
  int64_t across() const { return ceil_div(width, cut.columns); }
  int64_t expert(int64_t task) const { return task / across() / down(); }
  int64_t begin(int64_t task) const { return expert(task) == 0 ? 0 : offset[expert(task) - 1]; }
  int64_t top(int64_t task) const { return task / across() % down() * block_height; }
  int64_t column(int64_t task) const { return task % across() * cut.columns; }

  int64_t rows(int64_t task) const { return std::min(block_height, height - top(task)); }
  int64_t columns(int64_t task) const { return std::min(cut.columns, width - column(task)); }
  int64_t reduction(int64_t task) const { return offset[expert(task)] - begin(task); }
  int64_t left_of(int64_t task) const { return task / across(); }
  int64_t right_of(int64_t task) const {
    return across() == 1 && reduction(task) <= 2 * cut.pairs ? expert(task) : -1;
  }
  void pack_left(int64_t task, uint32_t* to, int64_t pairs) const {
    const Rows own = left.from(begin(task), top(task));
    pack_across<kTileRows>(own, reduction(task), rows(task), to, pairs);
  }
  Rows piece(int64_t task, int64_t start) const {
    return right.from(begin(task) + start, column(task));
  }
  void pack_right(int64_t task, int64_t start, int64_t length, uint32_t* to) const {
    pack_across<kPanelColumns>(piece(task, start), length, columns(task), to, cut.pairs);
  }
  void ahead(int64_t task, int64_t start, int64_t length, LinesAhead& lines) const {
    lines.add(piece(task, start), length, columns(task));
  }
  void finish_ahead(int64_t, LinesAhead&) const {}
  Output output(int64_t task) const {
    bf16* to = out + (expert(task) * height + top(task)) * width + column(task);
    return {to, width, columns(task)};
  }
  void finish(int64_t task, const float*, int64_t) const {
    if (reduction(task) > 0) return;
    const Output zero = output(task);
    for (int64_t row = 0; row < rows(task); ++row) {
      std::fill_n(zero.base + row * width, zero.columns, bf16(0));
    }
  }
};

// out (E, P, Q): sum over each expert's rows of left (P) times right (Q), zero without rows. Of the
// two, `token_N` picks the rows of the one that is tokens.
void weight_gradient(
    const Tensor& left, const Tensor& right, const Tensor& token_N, const Tensor& offset_E,
    bool left_is_tokens, Tensor& out) {
  const int64_t experts = out.size(0), height = out.size(1), width = out.size(2);
  const auto* token = token_N.const_data_ptr<int64_t>();
  const auto* offset = offset_E.const_data_ptr<int32_t>();
  int64_t most = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    most = std::max<int64_t>(most, offset[expert] - (expert == 0 ? 0 : offset[expert - 1]));
  }
  // few rows: whole lines of the matrix, from columns that are packed once for each expert
  const bool is_packed_once = round_up(most, 2) / 2 * width <= kMostPackedOnce;
  const Cut cut = is_packed_once ? Cut{width, std::max<int64_t>(ceil_div(most, 2), 1)}
                                 : Cut{2 * kColumns, kMostPairs};
  const int64_t most_height = is_packed_once ? kRowsPackedOnce : kMostRows;
  const int64_t block_height = round_up(ceil_div(height, ceil_div(height, most_height)), kTileRows);
  const WeightGradient product{
      {left.const_data_ptr<bf16>(), height, left_is_tokens ? token : nullptr},
      {right.const_data_ptr<bf16>(), width, left_is_tokens ? nullptr : token},
      height, width, offset, block_height, cut, is_packed_once ? 0 : block_height,
      out.data_ptr<bf16>()};
  run(product, experts * product.down() * product.across());
}

TORCH_LIBRARY(phi_avx512, library) {
  library.def(
      "grouped_gemm(Tensor rows, Tensor weight, Tensor offset, bool is_transposed, Tensor(a!) out)"
      " -> ()");
  library.def(
      "gate_up(Tensor x, Tensor gate_up, Tensor token, Tensor offset, Tensor(a!)? hidden,"
      " Tensor(b!) act) -> ()");
  library.def(
      "swiglu_backward(Tensor grad, Tensor weight, Tensor down, Tensor hidden, Tensor token,"
      " Tensor offset, Tensor(a!) grad_hidden, Tensor(b!) act) -> Tensor");
  library.def(
      "weight_gradient(Tensor left, Tensor right, Tensor token, Tensor offset,"
      " bool left_is_tokens, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(phi_avx512, CPU, library) {
  library.impl("grouped_gemm", grouped_gemm);
  library.impl("gate_up", gate_up);
  library.impl("swiglu_backward", swiglu_backward);
  library.impl("weight_gradient", weight_gradient);
}

}  // namespace
}  // namespace phi
