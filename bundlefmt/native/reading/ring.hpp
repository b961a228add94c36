// The kernel's io_uring, through its own system calls (man 7 io_uring).
#pragma once

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif

// Linux 5.6 brought this macro, and with it the last of what is needed here.
#if defined(IORING_FEAT_RW_CUR_POS)
#define BUNDLEFMT_URING

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>

namespace bundlefmt {

// One thread opens a ring, and it alone may use it. Completions cannot overflow: there is room for
// twice as many as there may be entries under way.
class Ring {
 public:
  // For up to `depth` entries under way. Throws std::runtime_error where the kernel has no
  // io_uring, or does not let this process use it.
  explicit Ring(unsigned depth);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring();

  // Registers the file, as number 0. False where the kernel refuses.
  bool register_file(int fd);
  // Maps and pins the buffers, once and for all. False where the process may not pin as much.
  bool register_buffers(std::span<const iovec> buffers);

  // The next entry, all zero.
  io_uring_sqe& next();
  // Entries that the kernel has not taken yet.
  unsigned unsent() const {
    return tail_ - std::atomic_ref(*sent_).load(std::memory_order_acquire);
  }
  // Offers those to the kernel and waits for `least` completions: how many it took, or -errno.
  int submit(unsigned least);
  // Waits for a completion: 0 or -errno.
  int wait() { return enter(0, 1); }

  // Hands each completion that is there to `take`.
  template <typename Take>
  void complete(Take take) {
    const unsigned end = std::atomic_ref(*came_).load(std::memory_order_acquire);
    for (; head_ != end; ++head_) take(completions_[head_ & completion_mask_]);
    std::atomic_ref(*taken_).store(head_, std::memory_order_release);
  }

 private:
  class Descriptor {
   public:
    ~Descriptor();
    int number = -1;
  };
  struct Unmap {
    size_t bytes;
    void operator()(char* start) const;
  };
  using Mapping = std::unique_ptr<char, Unmap>;

  Mapping map(size_t bytes, unsigned long long offset) const;
  int enter(unsigned count, unsigned least);
  bool keep(unsigned what, const void* list, size_t count);

  Descriptor ring_;
  Mapping counters_, table_;
  bool pinned_ = false;
  // Submissions: what the kernel has taken (its own count), what it is offered.
  unsigned* sent_ = nullptr;
  unsigned* offered_ = nullptr;
  unsigned entry_mask_ = 0, tail_ = 0;
  io_uring_sqe* entries_ = nullptr;
  // Completions: what has come (its own count), what has been looked at.
  unsigned* came_ = nullptr;
  unsigned* taken_ = nullptr;
  unsigned completion_mask_ = 0, head_ = 0;
  const io_uring_cqe* completions_ = nullptr;
};

}  // namespace bundlefmt

#endif
