// SPDX-License-Identifier: Apache-2.0
#include "skill_call.h"

#include "cpu/plan.h"

namespace pemt_fast {
namespace {

using at::Tensor;

// From here on the products read packed factors; fewer tokens would not pay for the packing.
constexpr int64_t kPackFactors = 48;

}  // namespace

Tensor readable_skills(const Tensor& skills) {
  return (skills.scalar_type() == at::kDouble ? skills.to(at::kFloat) : skills).contiguous();
}

SkillCall::SkillCall(const Tensor& x, const OptionalTensor& mixing, const Tensor& a,
                     const Tensor& b, const OptionalTensor& task_ids, double scale)
    : splits(a.dim() == 4 ? a.size(0) : 1),
      skills(a.size(-3)),
      rank(a.size(-2)),
      type(x.scalar_type()),
      bf16(type == at::kBFloat16 && cpu::kernels().bf16) {
  d = splits * a.size(-1);
  h = splits * b.size(-1);
  const int64_t all = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  // One row for everybody makes all tokens one sequence.
  tasks = mixing ? mixing->size(0) : skills;
  sequences = tasks == 1 ? 1 : x.size(0);
  tokens = sequences > 0 ? all / sequences : 0;
  rows = sequences;
  if (task_ids && tasks != 1) find_rows(*task_ids);
  if (!mixing) return;
  weights = used(*mixing).to(at::kFloat).contiguous();
  scaled_weights = scale == 1 ? weights : weights * scale;
}

// Only tasks that occur have a row, and each only one.
void SkillCall::find_rows(const Tensor& task_ids) {
  const Tensor ids = task_ids.to(at::kLong).contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> row_of_task((size_t)tasks, -1);
  row_of.resize((size_t)sequences);
  for (int64_t s = 0; s < sequences; s++) {
    TORCH_CHECK_INDEX(0 <= id[s] && id[s] < tasks, "task_ids must be from 0 to ", tasks - 1,
                      ", got ", id[s]);
    int64_t& row = row_of_task[(size_t)id[s]];
    if (row < 0) {
      row = (int64_t)task_of.size();
      task_of.push_back(id[s]);
    }
    row_of[(size_t)s] = row;
  }
  rows = (int64_t)task_of.size();
  if (rows == sequences) row_of.clear();
}

Tensor SkillCall::used(const Tensor& of_tasks) const {
  return task_of.empty() ? of_tasks : of_tasks.index_select(0, at::tensor(task_of, at::kLong));
}

Tensor SkillCall::of_tasks(const Tensor& used) const {
  if (task_of.empty()) return used;
  at::DimVector sizes(used.sizes().begin(), used.sizes().end());
  sizes[0] = tasks;
  return at::zeros(sizes, used.options()).index_copy_(0, at::tensor(task_of, at::kLong), used);
}

void* Factors::allocate() {
  rows_ = at::empty({call_.rows, call_.rank, width_}, at::TensorOptions().dtype(call_.compute()));
  return rows_.mutable_data_ptr();
}

void Factors::take(const Tensor& of_tasks, double scale) {
  Tensor rows = call_.used(of_tasks);
  if (scale != 1) rows = rows.to(at::kFloat) * scale;
  rows_ = rows.to(call_.type).to(call_.compute()).contiguous();
}

void Factors::pack(bool sums_over_width) {
  const cpu::Kernels& k = cpu::kernels();
  if (call_.tokens < kPackFactors && !(call_.bf16 && k.rows_bf16 == nullptr)) return;
  bytes_ = cpu::packed_bytes(k, call_.rank, width_, sums_over_width, call_.bf16);
  panels_ = at::empty({call_.rows * bytes_}, at::kByte);
  const int64_t row_bytes = call_.rank * width_ * rows_.element_size();
  for (int64_t row = 0; row < call_.rows; row++) {
    cpu::pack(k, (const char*)rows_.const_data_ptr() + row * row_bytes, width_, call_.rank, width_,
              sums_over_width, call_.bf16, (char*)panels_.mutable_data_ptr() + row * bytes_,
              threads());
  }
}

cpu::Operand Factors::operand(int64_t row) const {
  cpu::Operand result;
  result.dtype = call_.bf16 ? cpu::Dtype::bf16 : cpu::Dtype::f32;
  if (panels_.defined()) {
    result.panels = true;
    result.data = (const char*)panels_.const_data_ptr() + row * bytes_;
    return result;
  }
  const int64_t at = row * call_.rank * width_ * rows_.element_size();
  result.data = (const char*)rows_.const_data_ptr() + at;
  result.row = width_;
  return result;
}

cpu::SkillFactor skill_factor(const Tensor& skills, const Tensor& weights) {
  cpu::SkillFactor f{};
  f.skills = skills.const_data_ptr();
  f.dtype = cpu_dtype(skills.scalar_type());
  f.width = skills.size(-1);
  f.weights = weights.const_data_ptr<float>();
  return f;
}

void fill(const SkillCall& call, const Tensor& a, const Tensor& b, double scale, Factors* down,
          Factors* up) {
  if (!call.weights.defined()) {
    if (down) down->take(a, 1);
    if (up) up->take(b, scale);
    return;
  }
  cpu::SkillFactor factors[2];
  int count = 0;
  const auto add = [&](Factors* to, const Tensor& skills, const Tensor& weights) {
    if (to == nullptr) return;
    factors[count] = skill_factor(skills, weights);
    factors[count++].mixed = to->allocate();
  };
  add(down, a, call.weights);
  add(up, b, call.scaled_weights);
  cpu::mix(cpu::kernels(), call.sizes(), factors, count, cpu_dtype(call.type), call.bf16,
           threads());
}

Walks::Walks(const SkillCall& call) : call_(call) {
  adapter_of_unit_.assign((size_t)cpu::round_up(call.rank, cpu::kBlockColumns), 1);
  std::fill_n(adapter_of_unit_.begin(), call.rank, 0);
}

cpu::Walk Walks::walk(int64_t s, const Tensor& rows) const {
  cpu::Walk w;
  w.tokens = call_.tokens;
  w.units = call_.rank;
  w.adapters = 1;
  w.storage = cpu_dtype(call_.type);
  w.bf16 = call_.bf16;
  w.block.gate = gate_;
  w.block.gate_row = 2;
  w.block.tokens_per_row = std::max<int64_t>(call_.tokens, 1);
  w.block.adapter_of_unit = adapter_of_unit_.data();
  w.width_in = rows.size(1);
  w.x_row = rows.size(0) > 1 ? rows.stride(0) : w.width_in;
  w.x = at_row(rows, s);
  return w;
}

char* Walks::at_row(const Tensor& rows, int64_t s) const {
  const int64_t row = rows.size(0) > 1 ? rows.stride(0) : rows.size(1);
  return (char*)rows.data_ptr() + s * call_.tokens * row * rows.element_size();
}

}  // namespace pemt_fast
