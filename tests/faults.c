// Preloaded, it takes the place of preadv and lets the next `times` calls meet a fault.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <sys/uio.h>

static atomic_int left, error, most;

// The next `times` calls fail with `number`, or, where that is 0, bring `bytes` at most.
void stumble(int times, int number, int bytes) {
  error = number;
  most = bytes;
  left = times;
}

ssize_t preadv(int fd, const struct iovec* views, int count, off_t offset) {
  ssize_t (*real)(int, const struct iovec*, int, off_t) = dlsym(RTLD_NEXT, "preadv");
  if (atomic_fetch_sub(&left, 1) <= 0) {
    left = 0;
    return real(fd, views, count, offset);
  }
  if (error) {
    errno = error;
    return -1;
  }
  struct iovec first = views[0];
  if (first.iov_len > (size_t)most) first.iov_len = (size_t)most;
  return most ? real(fd, &first, 1, offset) : 0;
}
