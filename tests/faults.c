// Preloaded, it stands between the native core and the system: the next reads, the ring, memory or
// threads meet a fault.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef URING
#include <linux/io_uring.h>
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

static atomic_int ring_left, ring_error, ring_takes, setups_left, setup_error;

// The ring's next `times` submissions fail with `number`; with `takes`, it takes the reads on all
// the same.
void break_ring(int times, int number, int takes) {
  ring_error = number;
  ring_takes = takes;
  ring_left = times;
}

// The next `times` rings are refused with `number`.
void refuse_ring(int times, int number) {
  setup_error = number;
  setups_left = times;
}

#ifdef URING
static struct io_uring_params latest;
static char* counters;  // of the latest ring

// Spoils what the latest ring has brought and nobody has looked at.
static void spoil(void) {
  const unsigned end = __atomic_load_n((unsigned*)(counters + latest.cq_off.tail), __ATOMIC_ACQUIRE);
  for (unsigned at = *(unsigned*)(counters + latest.cq_off.head); at != end; ++at) {
    if (!stumbles()) continue;
    struct io_uring_cqe* entry = (struct io_uring_cqe*)(counters + latest.cq_off.cqes) +
                                 (at & *(unsigned*)(counters + latest.cq_off.ring_mask));
    memset(filled, 0, filled_bytes);
    if (error || entry->res > most) entry->res = error ? -error : most;
  }
}
#endif

long syscall(long number, ...) {
  long of[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; ++i) of[i] = va_arg(list, long);
  va_end(list);
  long (*const real)(long, ...) = REAL(syscall);
#ifdef URING
  if (number == SYS_io_uring_setup) {
    if (counts_down(&setups_left)) {
      errno = setup_error;
      return -1;
    }
    const int fd = (int)real(number, of[0], of[1]);
    if (fd < 0) return fd;
    latest = *(struct io_uring_params*)of[1];
    const size_t bytes = latest.cq_off.cqes + latest.cq_entries * sizeof(struct io_uring_cqe);
    counters = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
    return counters == MAP_FAILED ? -1 : fd;
  }
  if (number == SYS_io_uring_enter && of[2]) {
    const long sent = of[1];
    pass_gate();
    if (sent && counts_down(&ring_left)) {
      if (ring_takes) real(number, of[0], sent, 0L, 0L, NULL, 0L);
      errno = ring_error;
      return -1;
    }
    const long took = real(number, of[0], sent, of[2], of[3], NULL, 0L);
    const int failed = errno;
    spoil();
    errno = failed;
    return took;
  }
#endif
  return real(number, of[0], of[1], of[2], of[3], of[4], of[5]);
}

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
