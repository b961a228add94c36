#include "batch.hpp"

#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>

#include "../kernels/kernels.hpp"

namespace bundlefmt {
namespace {

constexpr size_t MAX_VIEWS = 1024;  // IOV_MAX on Linux

bool ascends_to(const std::vector<int64_t>& bounds, size_t end) {
  return bounds.front() == 0 && bounds.back() == static_cast<int64_t>(end) &&
         std::is_sorted(bounds.begin(), bounds.end());
}

bool inside(int64_t start, int64_t length, int64_t whole) {
  return start >= 0 && length >= 0 && start <= whole && length <= whole - start;
}

int64_t bytes_of(const Reads& reads, int64_t request) {
  int64_t total = 0;
  for (auto view = reads.bounds[request]; view < reads.bounds[request + 1]; ++view)
    total += reads.lengths[view];
  return total;
}

// What is left of the views when `done` bytes of them are filled.
std::span<iovec> after(std::span<iovec> views, size_t done) {
  while (!views.empty() && done >= views.front().iov_len) {
    done -= views.front().iov_len;
    views = views.subspan(1);
  }
  if (!views.empty()) {
    views.front().iov_base = static_cast<char*>(views.front().iov_base) + done;
    views.front().iov_len -= done;
  }
  return views;
}

// Reads into the views until `needed` bytes have come; 0 or an errno. Short reads go on from the
// last multiple of the alignment.
int fill(const Source& source, std::span<iovec> views, int64_t offset, int64_t needed,
         int64_t& came) {
  for (int attempts = 0; came < needed && attempts < ATTEMPTS;) {
    const int count = static_cast<int>(std::min(views.size(), MAX_VIEWS));
    int64_t got = preadv(source.fd, views.data(), count, offset + came);
    if (got < 0 && errno != EINTR && errno != EAGAIN) return errno;
    if (got < 0) got = 0;
    if (came + got < needed) got -= got % source.offset_alignment;
    attempts = got ? 0 : attempts + 1;
    came += got;
    views = after(views, static_cast<size_t>(got));
  }
  return 0;
}

}  // namespace

const char* Reads::fault() const {
  const size_t n = offsets.size(), bundles = bundle_starts.size();
  if (bounds.size() != n + 1 || starts.size() != lengths.size() ||
      !ascends_to(bounds, starts.size()))
    return "bounds do not part the views among the requests";
  for (const int64_t offset : offsets)
    if (offset < 0) return "an offset below zero";
  for (size_t view = 0; view < starts.size(); ++view)
    if (starts[view] == SPARE ? !inside(0, lengths[view], spare_bytes)
                              : !inside(starts[view], lengths[view], memory_bytes))
      return "a view beyond the memory";
  for (size_t k = 0; k < n; ++k) {
    int64_t end = offsets[k];
    for (int64_t view = bounds[k]; view < bounds[k + 1]; ++view)
      if (__builtin_add_overflow(end, lengths[static_cast<size_t>(view)], &end))
        return "a read beyond any file";
    if (end > INT64_MAX / 2) return "a read beyond any file";
  }
  if (bundle_bounds.empty() && !bundles) return nullptr;
  if (bundle_bounds.size() != n + 1 || expected.size() != bundles ||
      !ascends_to(bundle_bounds, bundles))
    return "bounds do not part the bundles among the requests";
  for (const int64_t start : bundle_starts)
    if (!inside(start, stride, memory_bytes)) return "a bundle beyond the memory";
  return nullptr;
}

iovec Reads::view(int64_t index) const {
  const auto at = static_cast<size_t>(index);
  return {starts[at] == SPARE ? spare : memory + starts[at], static_cast<size_t>(lengths[at])};
}

std::optional<int64_t> Batch::take() {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (failure_ || next_ == reads.count()) return std::nullopt;
  return next_++;
}

void Batch::finish(const std::optional<Failure>& failure) {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (failure && !failure_) {
    failure_ = failure;
    unfinished_ -= reads.count() - next_;  // those will not be taken
  }
  if (--unfinished_ != 0) return;
  finished = now();
  done_.notify_all();
}

std::optional<Failure> Batch::wait() {
  std::unique_lock<std::mutex> guard(mutex_);
  done_.wait(guard, [this] { return unfinished_ == 0; });
  return failure_;
}

bool aligned(const Source& source, const Reads& reads, int64_t request) {
  int64_t together = reads.offsets[request];
  uint64_t addresses = 0;
  for (auto view = reads.bounds[request]; view < reads.bounds[request + 1]; ++view) {
    together |= reads.lengths[view];
    addresses |= reinterpret_cast<uintptr_t>(reads.view(view).iov_base);
  }
  return together % source.offset_alignment == 0 &&
         addresses % static_cast<uint64_t>(source.memory_alignment) == 0;
}

std::vector<iovec> views_of(const Reads& reads, int64_t request) {
  std::vector<iovec> views;
  views.reserve(static_cast<size_t>(reads.bounds[request + 1] - reads.bounds[request]));
  for (auto view = reads.bounds[request]; view < reads.bounds[request + 1]; ++view)
    views.push_back(reads.view(view));
  return views;
}

std::optional<Failure> check(const Reads& reads, int64_t request) {
  if (reads.bundle_bounds.empty()) return std::nullopt;
  for (auto k = reads.bundle_bounds[request]; k < reads.bundle_bounds[request + 1]; ++k) {
    const uint64_t found = kernels().xxh3_64(reads.memory + reads.bundle_starts[k],
                                             static_cast<uint64_t>(reads.stride));
    if (found != reads.expected[k]) return Failure{Kind::damaged, request, 0, 0, k, found};
  }
  return std::nullopt;
}

Widened::Widened(const Source& source, const Reads& reads, int64_t request)
    : needed(bytes_of(reads, request)),
      skipped(reads.offsets[request] % source.offset_alignment),
      spare(reads.spare) {
  const int64_t unit = source.offset_alignment;
  length = (skipped + needed + unit - 1) / unit * unit;
  offset = reads.offsets[request] - skipped;
  // Not aligned_alloc: that of glibc often does not find again what of it has been freed.
  size_t room = static_cast<size_t>(length + source.memory_alignment);
  block.reset(static_cast<uint8_t*>(std::malloc(room)));
  void* start = block.get();
  memory = static_cast<uint8_t*>(std::align(static_cast<size_t>(source.memory_alignment),
                                            static_cast<size_t>(length), start, room));
  if (!memory) throw std::bad_alloc();
}

void Widened::copy_to(const std::vector<iovec>& views) const {
  const uint8_t* from = memory + skipped;
  for (const iovec& view : views) {
    if (view.iov_len && view.iov_base != spare)  // of no memory, it is null
      std::memcpy(view.iov_base, from, view.iov_len);
    from += view.iov_len;
  }
}

std::optional<Failure> serve(const Source& source, Batch& batch, int64_t request) try {
  const Reads& reads = batch.reads;
  std::vector<iovec> views = views_of(reads, request);
  int64_t needed = bytes_of(reads, request), came = 0;
  int error;
  if (aligned(source, reads, request)) {
    error = fill(source, views, reads.offsets[request], needed, came);
    batch.bytes_read += came;
  } else {
    const Widened wide(source, reads, request);
    iovec whole{wide.memory, static_cast<size_t>(wide.length)};
    error = fill(source, {&whole, 1}, wide.offset, wide.skipped + needed, came);
    batch.bytes_read += came;
    came = std::clamp<int64_t>(came - wide.skipped, 0, needed);
    if (came == needed) wide.copy_to(views);
  }
  if (error) return Failure{Kind::failed, request, error, came, 0, 0};
  if (came < needed) return Failure{Kind::ended, request, 0, came, 0, 0};
  return check(reads, request);
} catch (const std::bad_alloc&) {
  return Failure{Kind::failed, request, ENOMEM, 0, 0, 0};
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

}  // namespace bundlefmt
