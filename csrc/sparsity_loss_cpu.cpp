// SPDX-License-Identifier: Apache-2.0
//
// `pemt_fast::task_sparsity_loss_rows` on CPU tensors: allocates results and hands raw pointers to
// cpu/sparsity_loss.h. What it computes and who calls it: pemt_fast/ops/sparsity_rows.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <numeric>
#include <tuple>

#include "cpu/sparsity_loss.h"
#include "cpu_call.h"

namespace pemt_fast {
namespace {

using at::Tensor;

// The order of the results that can be left out.
enum Result { kFactors, kScaled, kByNorm, kDHidden, kDZ, kResults };

using Rows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Rows task_sparsity_loss_rows(const Tensor& z_, const Tensor& hidden_, const Tensor& products_,
                             const Tensor& folded_, const OptionalTensor& projected_,
                             const OptionalTensor& offset_dot_,
                             const OptionalTensor& offset_squared_, const OptionalTensor& mask_,
                             const Tensor& share_, at::IntArrayRef ranks, double scale,
                             std::array<bool, kResults> wanted) {
  const int64_t tokens = z_.size(0), h = z_.size(1), n = hidden_.size(1);
  const int64_t adapters = (int64_t)ranks.size();
  TORCH_CHECK(c10::sum_integers(ranks.begin(), ranks.end()) == n && hidden_.size(0) == tokens &&
                  products_.sizes().equals(hidden_.sizes()) &&
                  folded_.sizes().equals(hidden_.sizes()) && share_.numel() == adapters &&
                  (!mask_ || mask_->numel() == tokens),
              "task_sparsity_loss_rows: sizes that do not belong together");
  const auto type = z_.scalar_type();
  const auto dense = [&](const Tensor& t, at::ScalarType as) { return t.to(as).contiguous(); };
  const Tensor z = as_rows(z_, tokens, h), hidden = as_rows(hidden_.to(type), tokens, n);
  const Tensor products = dense(products_, type), folded = dense(folded_, type);
  const Tensor share = dense(share_, at::kFloat);
  Tensor projected, offset_dot, offset_squared, mask;
  if (projected_) projected = dense(*projected_, type);
  if (offset_dot_) offset_dot = dense(offset_dot_->expand({tokens, adapters}), at::kFloat);
  if (offset_squared_) {
    offset_squared = dense(offset_squared_->expand({tokens, adapters}), at::kFloat);
  }
  if (mask_) mask = dense(*mask_, at::kBool);

  const auto result = [&](Result which, int64_t width, at::ScalarType as) {
    return at::empty(wanted[which] ? at::DimVector{tokens, width} : at::DimVector{0},
                     z.options().dtype(as));
  };
  Tensor disagreement = at::empty({adapters}, share.options());
  Tensor for_dot = result(kFactors, adapters, at::kFloat);
  Tensor for_norm = result(kFactors, adapters, at::kFloat);
  Tensor scaled = result(kScaled, n, type), by_norm = result(kByNorm, n, type);
  Tensor d_hidden = result(kDHidden, n, type), d_z = result(kDZ, h, type);

  at::DimVector ends(ranks.begin(), ranks.end());
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  const auto row = [&](const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; };
  const auto out = [&](Result which, Tensor& t) {
    return wanted[which] ? t.mutable_data_ptr() : nullptr;
  };
  const auto floats = [](const Tensor& t) {
    return t.defined() ? t.const_data_ptr<float>() : nullptr;
  };
  cpu::SparsityLoss loss;
  loss.tokens = tokens;
  loss.storage = cpu_dtype(type);
  loss.share = floats(share);
  loss.scale = (float)scale;
  loss.disagreement = disagreement.mutable_data_ptr<float>();
  cpu::LossRows& rows = loss.rows;
  rows.h = h;
  rows.n = n;
  rows.adapters = adapters;
  rows.ends = ends.data();
  rows.z = z.const_data_ptr();
  rows.z_row = row(z);
  rows.hidden = hidden.const_data_ptr();
  rows.hidden_row = row(hidden);
  rows.products = products.const_data_ptr();
  rows.folded = folded.const_data_ptr();
  if (projected.defined()) {
    rows.projected = projected.const_data_ptr();
    rows.projected_row = row(projected);
  }
  rows.offset_dot = floats(offset_dot);
  rows.offset_squared = floats(offset_squared);
  rows.mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  rows.for_dot = (float*)out(kFactors, for_dot);
  rows.for_norm = (float*)out(kFactors, for_norm);
  rows.scaled = out(kScaled, scaled);
  rows.by_norm = out(kByNorm, by_norm);
  rows.d_hidden = out(kDHidden, d_hidden);
  rows.d_z = out(kDZ, d_z);
  cpu::run(cpu::kernels(), loss, threads());
  return {disagreement, for_dot, for_norm, scaled, by_norm, d_hidden, d_z};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pemt_fast, m) {
  m.def(
      "task_sparsity_loss_rows(Tensor z, Tensor hidden, Tensor products, Tensor folded, "
      "Tensor? projected, Tensor? offset_dot, Tensor? offset_squared, Tensor? mask, Tensor share, "
      "int[] ranks, float scale, bool[5] wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pemt_fast, CPU, m) {
  m.impl("task_sparsity_loss_rows", &task_sparsity_loss_rows);
}

}  // namespace pemt_fast
