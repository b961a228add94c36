// Preloaded, it stands between the native core and the system: the next reads, the ring, memory or
// threads meet a fault.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef URING
#include <liburing.h>
#endif

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_int passing, left, error, most;
static void* filled;
static size_t filled_bytes;

// After `first` reads, the next `times` fail with `number` or, where that is 0, bring `bytes` at
// most; what a ring had already brought of `memory` is wiped.
void stumble(int first, int times, int number, int bytes, void* memory, size_t memory_bytes) {
  error = number;
  most = bytes;
  filled = memory;
  filled_bytes = memory_bytes;
  left = times;
  passing = first;
}

static int counts_down(atomic_int* count) {
  if (atomic_fetch_sub(count, 1) > 0) return 1;
  *count = 0;
  return 0;
}

static int stumbles(void) { return !counts_down(&passing) && counts_down(&left); }

static atomic_int gate;

// The next read waits until a byte can be read from `fd`.
void hold(int fd) { gate = fd; }

static void pass_gate(void) {
  char byte;
  const int fd = atomic_exchange(&gate, 0);
  if (fd && read(fd, &byte, 1) != 1) _exit(1);
}

ssize_t preadv(int fd, const struct iovec* views, int count, off_t offset) {
  pass_gate();
  if (!stumbles()) return REAL(preadv)(fd, views, count, offset);
  if (error) {
    errno = error;
    return -1;
  }
  const ssize_t got = REAL(preadv)(fd, views, count, offset);
  if (got <= most) return got;
  for (size_t kept = (size_t)most; count--; ++views) {  // the rest has not come
    const size_t stays = kept < views->iov_len ? kept : views->iov_len;
    memset((char*)views->iov_base + stays, 0, views->iov_len - stays);
    kept -= stays;
  }
  return most;
}

static atomic_int ring_left, ring_error, ring_takes;

// The ring's next `times` calls fail with `number`; with `takes`, it takes the reads on all the
// same.
void break_ring(int times, int number, int takes) {
  ring_error = number;
  ring_takes = takes;
  ring_left = times;
}

#ifdef URING
int io_uring_submit_and_wait(struct io_uring* ring, unsigned count) {
  pass_gate();
  if (counts_down(&ring_left)) {
    if (ring_takes) io_uring_submit(ring);
    return -ring_error;
  }
  const int submitted = REAL(io_uring_submit_and_wait)(ring, count);
  unsigned head;
  struct io_uring_cqe* entry;
  io_uring_for_each_cqe(ring, head, entry) {
    if (!stumbles()) continue;
    memset(filled, 0, filled_bytes);
    if (error || entry->res > most) entry->res = error ? -error : most;
  }
  return submitted;
}
#endif

static atomic_size_t forbidden;

// No memory of exactly that many bytes is to be had; 0 ends it.
void forbid(size_t bytes) { forbidden = bytes; }

void* __libc_malloc(size_t bytes);

void* malloc(size_t bytes) {
  if (!bytes || bytes != forbidden) return __libc_malloc(bytes);
  errno = ENOMEM;
  return NULL;
}

static atomic_int threads_left = -1;

// After that many threads, one is refused.
void refuse_threads(int after) { threads_left = after; }

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*work)(void*),
                   void* argument) {
  if (threads_left >= 0 && atomic_fetch_sub(&threads_left, 1) == 0) return EAGAIN;
  return REAL(pthread_create)(thread, attributes, work, argument);
}
