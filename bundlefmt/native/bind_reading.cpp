#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <unistd.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.hpp"
#include "reading/engine.hpp"

namespace nb = nanobind;

namespace bundlefmt {
namespace {

constexpr int MAX_IN_FLIGHT = 4096;

using Memory = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Digests = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<int64_t> copy(const Integers& from) {
  return {from.data(), from.data() + from.shape(0)};
}

// A child process has none of the threads that its parent started: it must not wait for what they
// do, and cannot destroy what they may have locked.
class Process {
 public:
  bool ours() const { return getpid() == id_; }
  void require() const {
    if (!ours()) throw std::runtime_error("the reader was opened by another process");
  }

 private:
  const pid_t id_ = getpid();
};

// A batch that is under way, and the memory that it fills.
class Submitted {
 public:
  Submitted(std::shared_ptr<Batch> batch, Memory memory, std::optional<Memory> spare)
      : batch_(std::move(batch)), memory_(std::move(memory)), spare_(std::move(spare)) {}
  Submitted(const Submitted&) = delete;
  Submitted& operator=(const Submitted&) = delete;

  ~Submitted() {  // its memory must not go while it is being filled
    if (!process_.ours()) {
      new auto(std::move(batch_));
      return;
    }
    const Unlocked unlocked;
    batch_->wait();
  }

  // None, or what failed first: (kind, request, errno, bytes that came, bundle, its digest).
  nb::object wait() {
    process_.require();
    std::optional<Failure> failure;
    {
      const Unlocked unlocked;
      failure = batch_->wait();
    }
    if (!failure) return nb::none();
    constexpr const char* KINDS[] = {"failed", "ended", "damaged"};
    return nb::make_tuple(KINDS[static_cast<int>(failure->kind)], failure->request, failure->error,
                          failure->came, failure->bundle, failure->found);
  }

  int64_t bytes_read() const { return batch_->bytes_read; }
  int64_t finished() const { return batch_->finished; }

  nb::list latencies() {
    nb::list found;
    for (const int64_t latency : batch_->latencies) found.append(latency);
    return found;
  }

 private:
  const Process process_;
  std::shared_ptr<Batch> batch_;
  Memory memory_;
  std::optional<Memory> spare_;
};

class BoundEngine {
 public:
  BoundEngine(const std::string& kind, int fd, int count, int64_t offset_alignment,
              int64_t memory_alignment, std::optional<Memory> memory)
      : memory_(std::move(memory)) {
    const auto power = [](int64_t n) { return n > 0 && n <= 1 << 20 && !(n & (n - 1)); };
    if (!power(offset_alignment) || !power(memory_alignment))
      throw nb::value_error("alignments are powers of two");
    if (count < 1 || count > MAX_IN_FLIGHT) throw nb::value_error("too few or too many in flight");
    const Source source{fd, offset_alignment, memory_alignment};
    if (kind == "threads")
      engine_ = thread_engine(source, count);
    else if (kind == "uring")
      engine_ = uring_engine(
          source, count,
          memory_ ? std::span(memory_->data(), memory_->shape(0)) : std::span<uint8_t>());
    else
      throw nb::value_error("an engine is threads or uring");
  }

  ~BoundEngine() {
    close();
    if (!process_.ours()) engine_.release();
  }

  std::unique_ptr<Submitted> submit(const Memory& memory, const Integers& offsets,
                                    const Integers& bounds, const Integers& starts,
                                    const Integers& lengths,
                                    const std::optional<Integers>& bundle_bounds,
                                    const std::optional<Integers>& bundle_starts, int64_t stride,
                                    const std::optional<Digests>& expected,
                                    const std::optional<Memory>& spare) {
    process_.require();
    Reads reads;
    reads.memory = memory.data();
    reads.memory_bytes = static_cast<int64_t>(memory.shape(0));
    if (spare) {
      reads.spare = spare->data();
      reads.spare_bytes = static_cast<int64_t>(spare->shape(0));
    }
    reads.offsets = copy(offsets);
    reads.bounds = copy(bounds);
    reads.starts = copy(starts);
    reads.lengths = copy(lengths);
    if (bundle_bounds.has_value() != bundle_starts.has_value() ||
        bundle_bounds.has_value() != expected.has_value())
      throw nb::value_error("bundle_bounds, bundle_starts, expected: all of them, or none");
    if (bundle_bounds) {
      reads.bundle_bounds = copy(*bundle_bounds);
      reads.bundle_starts = copy(*bundle_starts);
      reads.expected.assign(expected->data(), expected->data() + expected->shape(0));
    }
    reads.stride = stride;
    if (const char* fault = reads.fault()) throw nb::value_error(fault);
    auto batch = std::make_shared<Batch>(std::move(reads));
    engine_->submit(batch);
    return std::make_unique<Submitted>(std::move(batch), memory, spare);
  }

  void close() {
    if (!process_.ours()) return;
    const Unlocked unlocked;
    const std::lock_guard<std::mutex> one(closing_);
    engine_->close();
  }

 private:
  const Process process_;
  const std::optional<Memory> memory_;  // outlives the engine, which reads into it
  std::unique_ptr<Engine> engine_;
  std::mutex closing_;
};

}  // namespace

void bind_reading(nb::module_& module) {
  using namespace nb::literals;
  module.attr("MAX_IN_FLIGHT") = MAX_IN_FLIGHT;
  nb::class_<Submitted>(module, "Batch")
      .def("wait", &Submitted::wait)
      .def_prop_ro("latencies", &Submitted::latencies)
      .def_prop_ro("bytes_read", &Submitted::bytes_read)
      .def_prop_ro("finished", &Submitted::finished);
  nb::class_<BoundEngine>(module, "Engine")
      .def(nb::init<const std::string&, int, int, int64_t, int64_t, std::optional<Memory>>(),
           "kind"_a, "fd"_a, "count"_a, "offset_alignment"_a = 1, "memory_alignment"_a = 1,
           "memory"_a = nb::none())
      .def("submit", &BoundEngine::submit, "memory"_a, "offsets"_a, "bounds"_a, "starts"_a,
           "lengths"_a, "bundle_bounds"_a = nb::none(), "bundle_starts"_a = nb::none(),
           "stride"_a = 0, "expected"_a = nb::none(), "spare"_a = nb::none())
      .def("close", &BoundEngine::close);
}

}  // namespace bundlefmt
