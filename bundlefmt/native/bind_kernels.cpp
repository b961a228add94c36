#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "compute.hpp"

namespace nb = nanobind;

namespace bundlefmt {
namespace {

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Biases = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>;
using Writable = nb::ndarray<uint8_t, nb::ndim<2>, nb::device::cpu>;
using Slots = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

constexpr std::pair<const char*, Encoding> ENCODINGS[] = {{"f32", Encoding::f32},
                                                          {"f16", Encoding::f16},
                                                          {"bf16", Encoding::bf16},
                                                          {"q8_0", Encoding::q8_0},
                                                          {"q4_0", Encoding::q4_0}};

constexpr std::pair<const char*, Activation> ACTIVATIONS[] = {
    {"relu", Activation::relu},          {"relu2", Activation::relu2},
    {"fatrelu", Activation::fatrelu},    {"silu", Activation::silu},
    {"gelu", Activation::gelu},          {"gelu_new", Activation::gelu_tanh},
    {"gelu_tanh", Activation::gelu_tanh}};

template <class Table>
auto named(const Table& table, const std::string& name) {
  for (const auto& [known, value] : table)
    if (name == known) return value;
  throw nb::value_error(("unknown name: " + name).c_str());
}

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

void refuse(const char* fault) {
  if (fault) throw nb::value_error(fault);
}

// One part of every row: uint8 [rows, bytes] of an encoding, and a bias per row.
struct StoredPart {
  Bytes bytes;
  Encoding encoding;
  std::optional<Biases> bias;

  StoredPart(Bytes stored, const std::string& name, std::optional<Biases> biases)
      : bytes(std::move(stored)), encoding(named(ENCODINGS, name)), bias(std::move(biases)) {
    require(bytes.size() == 0 || bytes.stride(1) == 1, "a part's bytes must be contiguous");
    require(!bias || bias->shape(0) == bytes.shape(0), "as many biases as rows");
  }

  // Its rows as vectors of n numbers, which are still to be checked.
  Part rows_of(int64_t n, const int64_t* slots) const {
    return {{encoding, bytes.data(), bytes.stride(0), slots, n},
            bias ? bias->data() : nullptr,
            static_cast<int64_t>(bytes.shape(0)),
            static_cast<int64_t>(bytes.shape(1))};
  }
};

// The slots that were given, checked, or all rows in order.
class RowList {
 public:
  RowList(const std::optional<Slots>& slots, size_t rows) {
    if (!slots) {
      all_.resize(rows);
      std::iota(all_.begin(), all_.end(), 0);
      data_ = all_.data();
      count_ = static_cast<int64_t>(rows);
      return;
    }
    data_ = slots->data();
    count_ = static_cast<int64_t>(slots->shape(0));
    if (const char* fault = slots_fault(data_, count_, static_cast<int64_t>(rows)))
      throw nb::index_error(fault);
  }

  const int64_t* data() const { return data_; }
  int64_t count() const { return count_; }

 private:
  std::vector<int64_t> all_;
  const int64_t* data_;
  int64_t count_;
};

Vectors vectors(const Floats& floats) {
  const auto width = static_cast<int64_t>(floats.shape(1));
  return {const_cast<float*>(floats.data()), width, static_cast<int64_t>(floats.shape(0))};
}

// A new float32 array [tokens, width] of zeros, and its memory as vectors.
std::pair<Result, Vectors> zeros(int64_t tokens, int64_t width) {
  auto* numbers = new float[static_cast<size_t>(tokens * width)]();
  nb::capsule owner(numbers, [](void* data) noexcept { delete[] static_cast<float*>(data); });
  const size_t shape[] = {static_cast<size_t>(tokens), static_cast<size_t>(width)};
  return {Result(numbers, 2, shape, owner), {numbers, width, tokens}};
}

Result products_of(const Floats& x, const StoredPart& part, const std::optional<Slots>& slots,
                   int threads) {
  const RowList rows(slots, part.bytes.shape(0));
  const Part stored = part.rows_of(static_cast<int64_t>(x.shape(1)), rows.data());
  refuse(products_fault(stored, rows.count(), vectors(x), threads));
  auto [result, out] = zeros(static_cast<int64_t>(x.shape(0)), rows.count());
  const Unlocked unlocked;
  products(stored.rows, rows.count(), vectors(x), out, threads);
  return result;
}

Result weighted_sum_of(const Floats& h, const StoredPart& part, int64_t width,
                       const std::optional<Slots>& slots, int threads) {
  const RowList rows(slots, part.bytes.shape(0));
  const Part stored = part.rows_of(width, rows.data());
  refuse(weighted_sum_fault(stored, rows.count(), vectors(h), threads));
  auto [result, y] = zeros(static_cast<int64_t>(h.shape(0)), width);
  const Unlocked unlocked;
  weighted_sum(stored.rows, rows.count(), vectors(h), y, threads);
  return result;
}

Result ffn_of(const Floats& x, const std::optional<Slots>& slots, const StoredPart* selector,
              const StoredPart* up, const StoredPart& down, const std::string& activation,
              float threshold, const std::optional<Floats>& active, int threads) {
  const RowList rows(slots, down.bytes.shape(0));
  const auto n = static_cast<int64_t>(x.shape(1));
  Ffn layer{{}, {}, down.rows_of(n, rows.data()), named(ACTIVATIONS, activation), threshold, {}};
  if (selector) layer.selector = selector->rows_of(n, rows.data());
  if (up) layer.up = up->rows_of(n, rows.data());
  if (active) layer.active = vectors(*active);
  refuse(ffn_fault(layer, rows.count(), vectors(x), threads));
  auto [result, y] = zeros(static_cast<int64_t>(x.shape(0)), n);
  const Unlocked unlocked;
  ffn(layer, rows.count(), vectors(x), y, threads);
  return result;
}

auto digests_of(const Bytes& rows, int threads) {
  refuse(threads_fault(threads));
  require(rows.size() == 0 || rows.stride(1) == 1, "a row's bytes must be contiguous");
  const size_t count = rows.shape(0);
  auto* found = new uint64_t[count];
  nb::capsule owner(found, [](void* data) noexcept { delete[] static_cast<uint64_t*>(data); });
  {
    const Unlocked unlocked;
    digests(rows.data(), rows.stride(0), static_cast<int64_t>(rows.shape(1)),
            static_cast<int64_t>(count), found, threads);
  }
  return nb::ndarray<nb::numpy, uint64_t, nb::ndim<1>>(found, {count}, owner);
}

void transpose_into(const Bytes& in, const Writable& out, int item, int threads) {
  const auto height = static_cast<int64_t>(in.shape(0)), width = static_cast<int64_t>(out.shape(0));
  refuse(transpose_fault(height, static_cast<int64_t>(in.shape(1)), width,
                         static_cast<int64_t>(out.shape(1)), item, threads));
  require((in.size() == 0 || in.stride(1) == 1) && (out.size() == 0 || out.stride(1) == 1),
          "a row's bytes must be contiguous");
  const Unlocked unlocked;
  transpose(in.data(), in.stride(0), height, width, out.data(), out.stride(0), item, threads);
}

}  // namespace

void bind_kernels(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<StoredPart>(module, "Part")
      .def(nb::init<Bytes, const std::string&, std::optional<Biases>>(), "stored"_a, "encoding"_a,
           "bias"_a = nb::none());
  module.def("simd", [] { return kernels().name; });
  module.def("products", &products_of, "x"_a, "part"_a, "slots"_a = nb::none(), "threads"_a = 1);
  module.def("weighted_sum", &weighted_sum_of, "h"_a, "part"_a, "width"_a, "slots"_a = nb::none(),
             "threads"_a = 1);
  module.def("ffn", &ffn_of, "x"_a, "slots"_a.none(), "selector"_a.none(), "up"_a.none(), "down"_a,
             "activation"_a, "threshold"_a = 0.0F, "active"_a = nb::none(), "threads"_a = 1);
  module.def("digests", &digests_of, "rows"_a, "threads"_a = 1);
  module.def("transpose", &transpose_into, "rows"_a, "out"_a, "item"_a, "threads"_a = 1);
}

}  // namespace bundlefmt
