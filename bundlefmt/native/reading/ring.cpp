#include "ring.hpp"

#if defined(BUNDLEFMT_URING)

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

// Names that came later than Linux 5.6.
#if !defined(IORING_SETUP_COOP_TASKRUN)
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#if !defined(IORING_SETUP_SINGLE_ISSUER)
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#if !defined(IORING_SETUP_DEFER_TASKRUN)
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

namespace bundlefmt {
namespace {

// The kernel saves work when one thread does all, and when it need not interrupt that thread.
// Older ones refuse flags that they do not know.
constexpr unsigned SETUPS[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                               IORING_SETUP_COOP_TASKRUN, 0};
constexpr unsigned NEEDED =
    IORING_FEAT_SINGLE_MMAP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_RW_CUR_POS;

[[noreturn]] void refuse(int error) {
  switch (error) {
    case ENOSYS: throw std::runtime_error("the kernel has none, or it is older than Linux 5.6");
    case EPERM:
    case EACCES:
      throw std::runtime_error("not permitted (seccomp, or the sysctl kernel.io_uring_disabled)");
    default: throw std::runtime_error(std::strerror(error));
  }
}

}  // namespace

Ring::Descriptor::~Descriptor() {
  if (number >= 0) close(number);
}

void Ring::Unmap::operator()(char* start) const { munmap(start, bytes); }

Ring::Mapping Ring::map(size_t bytes, unsigned long long offset) const {
  void* const start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                           ring_.number, static_cast<off_t>(offset));
  if (start == MAP_FAILED) refuse(errno);
  return {static_cast<char*>(start), Unmap{bytes}};
}

Ring::Ring(unsigned depth) {
  io_uring_params told;
  for (const unsigned flags : SETUPS) {
    told = {};
    told.flags = flags;
    ring_.number = static_cast<int>(syscall(SYS_io_uring_setup, depth, &told));
    if (ring_.number >= 0 || errno != EINVAL) break;
  }
  if (ring_.number < 0) refuse(errno);
  if ((told.features & NEEDED) != NEEDED) refuse(ENOSYS);
  counters_ = map(std::max(told.sq_off.array + told.sq_entries * sizeof(unsigned),
                           told.cq_off.cqes + told.cq_entries * sizeof(io_uring_cqe)),
                  IORING_OFF_SQ_RING);
  table_ = map(told.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
  const auto counter = [this](unsigned at) {
    return reinterpret_cast<unsigned*>(counters_.get() + at);
  };
  sent_ = counter(told.sq_off.head);
  offered_ = counter(told.sq_off.tail);
  entry_mask_ = *counter(told.sq_off.ring_mask);
  entries_ = reinterpret_cast<io_uring_sqe*>(table_.get());
  for (unsigned i = 0; i < told.sq_entries; ++i) counter(told.sq_off.array)[i] = i;
  came_ = counter(told.cq_off.tail);
  taken_ = counter(told.cq_off.head);
  completion_mask_ = *counter(told.cq_off.ring_mask);
  completions_ = reinterpret_cast<io_uring_cqe*>(counter(told.cq_off.cqes));
}

Ring::~Ring() {
  // A child process may hold the ring open for longer: that is not to keep memory pinned.
  if (pinned_) keep(IORING_UNREGISTER_BUFFERS, nullptr, 0);
}

bool Ring::keep(unsigned what, const void* list, size_t count) {
  return syscall(SYS_io_uring_register, ring_.number, what, list, count) == 0;
}

bool Ring::register_file(int fd) { return keep(IORING_REGISTER_FILES, &fd, 1); }

bool Ring::register_buffers(std::span<const iovec> buffers) {
  pinned_ = keep(IORING_REGISTER_BUFFERS, buffers.data(), buffers.size());
  return pinned_;
}

io_uring_sqe& Ring::next() {
  io_uring_sqe& entry = entries_[tail_++ & entry_mask_];
  std::memset(&entry, 0, sizeof entry);
  return entry;
}

int Ring::submit(unsigned least) {
  std::atomic_ref(*offered_).store(tail_, std::memory_order_release);
  return enter(unsent(), least);
}

int Ring::enter(unsigned count, unsigned least) {
  const long took = syscall(SYS_io_uring_enter, ring_.number, count, least,
                            least ? IORING_ENTER_GETEVENTS : 0, nullptr, 0);
  return static_cast<int>(took < 0 ? -errno : took);
}

}  // namespace bundlefmt

#endif
