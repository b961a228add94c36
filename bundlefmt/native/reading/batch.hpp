// A batch of reads: what is asked for, and how it went. Engines serve it, request by request.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace bundlefmt {

constexpr int ATTEMPTS = 8;  // of what brings nothing and names no error that lasts

// A file to read, and the alignment that its offsets, lengths and memory need (1 when any will do).
struct Source {
  int fd;
  int64_t offset_alignment;
  int64_t memory_alignment;
};

constexpr int64_t SPARE = -1;  // where a view starts whose bytes nobody wants

// Request k reads from offsets[k] on into the views bounds[k] .. bounds[k + 1] - 1, each a piece of
// `memory`, or of `spare`, which all of them share since nobody looks at it. Once it has come, its
// bundles, of `stride` bytes each, are hashed.
struct Reads {
  uint8_t* memory = nullptr;
  int64_t memory_bytes = 0;
  uint8_t* spare = nullptr;
  int64_t spare_bytes = 0;
  std::vector<int64_t> offsets, bounds, starts, lengths;
  std::vector<int64_t> bundle_bounds, bundle_starts;  // empty when nothing is to be checked
  int64_t stride = 0;
  std::vector<uint64_t> expected;

  int64_t count() const { return static_cast<int64_t>(offsets.size()); }
  iovec view(int64_t index) const;
  // Why these reads cannot be; nullptr when they can. Nothing else keeps reads within the memory.
  const char* fault() const;
};

enum class Kind { failed, ended, damaged };

struct Failure {
  Kind kind;
  int64_t request;
  int error;       // errno, of a read that failed
  int64_t came;    // bytes of the request that are there
  int64_t bundle;  // that is damaged, counted over the batch
  uint64_t found;  // its xxh3-64
};

class Batch {
 public:
  explicit Batch(Reads asked) : reads(std::move(asked)), latencies(reads.offsets.size()) {
    unfinished_ = reads.count();
  }

  const Reads reads;
  std::vector<int64_t> latencies;  // ns per request, from the moment it was taken up
  std::atomic<int64_t> bytes_read{0};
  std::atomic<int64_t> finished{0};  // ns on the monotonic clock, once the last one is

  // The next request to serve; none when all are handed out or one has failed.
  std::optional<int64_t> take();
  // Every request that was taken is finished, once.
  void finish(const std::optional<Failure>& failure);
  // Returns when nothing of the batch is in flight: the first failure, if any.
  std::optional<Failure> wait();

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  int64_t next_ = 0;
  int64_t unfinished_;  // that will still be taken, or are being served
  std::optional<Failure> failure_;
};

// Reads one request and checks it; for engines that have a thread to spare. Throws nothing.
std::optional<Failure> serve(const Source& source, Batch& batch, int64_t request);

// Memory of its own for a request that the source cannot read as it stands: aligned, and as wide
// as it has to be. Throws std::bad_alloc.
struct Widened {
  Widened(const Source& source, const Reads& reads, int64_t request);
  void copy_to(const std::vector<iovec>& views) const;

  struct Free {
    void operator()(uint8_t* freed) const { std::free(freed); }
  };
  int64_t needed, skipped;  // bytes of the request, and those read before them
  int64_t offset, length;   // of the read
  std::unique_ptr<uint8_t, Free> block;
  uint8_t* memory;  // the aligned part of it
  const uint8_t* spare;  // which is left as it is
};

// Whether a request can be read as it stands, into its own views.
bool aligned(const Source& source, const Reads& reads, int64_t request);

std::vector<iovec> views_of(const Reads& reads, int64_t request);

std::optional<Failure> check(const Reads& reads, int64_t request);

int64_t now();  // ns

}  // namespace bundlefmt
