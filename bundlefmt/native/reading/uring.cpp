// One thread owns the ring: it fills it up to its depth, and checks what comes out of it.
#include "engine.hpp"

#if !defined(BUNDLEFMT_URING)

#include <stdexcept>

namespace bundlefmt {
std::unique_ptr<Engine> uring_engine(const Source&, int, std::span<uint8_t>) {
  throw std::runtime_error("built without liburing");
}
}  // namespace bundlefmt

#else

#include <liburing.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <future>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "queue.hpp"

namespace bundlefmt {
namespace {

constexpr int64_t MAX_VIEWS = 1024;  // IOV_MAX on Linux
constexpr std::chrono::milliseconds PAUSE{1};  // between looks at a ring that cannot be waited for
constexpr size_t PIECE = size_t{1} << 30;  // the most that the kernel registers as one buffer
constexpr int64_t MOST_WIDENED = 16 << 20;  // bytes of reads that are wider than what is wanted

// A request on its way.
struct Flight {
  Turn turn;
  std::vector<iovec> views;
  std::optional<Widened> widened;  // what is read in their place
  int64_t start;
  int64_t needed;
};

class Uring : public Engine {
 public:
  Uring(const Source& source, int depth, std::span<uint8_t> memory)
      : source_(source), memory_(memory), flights_(static_cast<size_t>(depth)) {
    for (int i = depth; i-- > 0;) free_.push_back(i);
    landed_.reserve(flights_.size());
    std::promise<int> ready;
    thread_ = std::thread([this, &ready] { work(ready); });
    const int error = ready.get_future().get();
    if (error) {
      thread_.join();
      throw std::runtime_error(std::string("io_uring: ") + std::strerror(error));
    }
  }
  ~Uring() override { close(); }

  void submit(std::shared_ptr<Batch> batch) override { queue_.push(std::move(batch)); }

  void close() override {
    queue_.close();
    if (!thread_.joinable()) return;
    if (queue_.ours())
      thread_.join();
    else
      thread_.detach();  // a child process does not have it
  }

 private:
  // The thread that reads sets the ring up, since the kernel can save more when one thread does
  // all; older kernels do not know that, and get a plain ring.
  int open() {
    const auto depth = static_cast<unsigned>(flights_.size());
    int error = -EINVAL;
#if defined(IORING_SETUP_SINGLE_ISSUER) && defined(IORING_SETUP_DEFER_TASKRUN)
    error = io_uring_queue_init(depth, &ring_,
                                IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
#endif
    if (error) error = io_uring_queue_init(depth, &ring_, 0);
    if (error) return -error;
    registered_ = io_uring_register_files(&ring_, &source_.fd, 1) == 0;
    std::vector<iovec> pieces;
    for (size_t at = 0; at < memory_.size(); at += PIECE)
      pieces.push_back({memory_.data() + at, std::min(PIECE, memory_.size() - at)});
    // Refused where the process may not pin as much: it is then read into like any other memory.
    if (pieces.empty() || io_uring_register_buffers(&ring_, pieces.data(),
                                                    static_cast<unsigned>(pieces.size())) != 0)
      memory_ = {};
    return 0;
  }

  // The registered buffer that a view lies in; -1 if it lies in none, or in two.
  int piece_of(const iovec& view) const {
    const auto at = reinterpret_cast<uintptr_t>(view.iov_base) -
                    reinterpret_cast<uintptr_t>(memory_.data());
    if (at >= memory_.size() || view.iov_len > memory_.size() - at) return -1;
    if (at / PIECE != (at + view.iov_len - 1) / PIECE) return -1;
    return static_cast<int>(at / PIECE);
  }

  void work(std::promise<int>& ready) {
    const int error = open();
    ready.set_value(error);
    if (error) return;
    for (int refusals = 0;;) {
      refill(free_.size() == flights_.size());
      if (free_.size() == flights_.size()) break;  // closed, and nothing on its way
      const int submitted = io_uring_submit_and_wait(&ring_, 1);
      if (submitted >= 0 || submitted == -EINTR) {
        land(true);
        refusals = 0;
      } else if ((submitted != -EAGAIN && submitted != -EBUSY) || ++refusals == ATTEMPTS) {
        return give_up();
      } else if (accepted()) {  // what lands makes room
        await();
        refusals = 0;
      }
    }
    io_uring_queue_exit(&ring_);
  }

  // Takes on as many requests as there is room for; with `wait`, at least one, unless closed.
  void refill(bool wait) {
    while (!free_.empty()) {
      auto turn = postponed_ ? std::exchange(postponed_, std::nullopt)
                             : queue_.pop(wait && free_.size() == flights_.size());
      if (!turn) break;
      if (widened_ >= MOST_WIDENED && !aligned(source_, turn->batch->reads, turn->request)) {
        postponed_ = std::move(turn);  // until others have given their memory back
        break;
      }
      launch(std::move(*turn));
    }
  }

  void launch(Turn turn) {
    const Reads& reads = turn.batch->reads;
    const bool wide = !aligned(source_, reads, turn.request);
    std::vector<iovec> views;
    std::optional<Widened> widened;
    bool fits = wide || reads.bounds[turn.request + 1] - reads.bounds[turn.request] <= MAX_VIEWS;
    try {
      if (fits) views = views_of(reads, turn.request);
      if (wide) widened.emplace(source_, reads, turn.request);
    } catch (const std::bad_alloc&) {
      fits = false;
    }
    if (!fits) {
      const int64_t start = now();
      return finish(turn, start, serve(source_, *turn.batch, turn.request));
    }
    const int index = free_.back();
    free_.pop_back();
    Flight& flight = flights_[static_cast<size_t>(index)];
    flight = {std::move(turn), std::move(views), std::move(widened), now(), 0};
    if (wide) widened_ += flight.widened->length;
    for (const iovec& view : flight.views) flight.needed += static_cast<int64_t>(view.iov_len);
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);  // there are as many as flights
    const auto offset =
        static_cast<uint64_t>(wide ? flight.widened->offset : reads.offsets[flight.turn.request]);
    const int fd = registered_ ? 0 : source_.fd;
    if (wide || flight.views.size() == 1) {
      const iovec into = wide ? iovec{flight.widened->memory,
                                      static_cast<size_t>(flight.widened->length)}
                              : flight.views[0];
      const auto length = static_cast<unsigned>(into.iov_len);
      if (const int piece = piece_of(into); piece >= 0)
        io_uring_prep_read_fixed(entry, fd, into.iov_base, length, offset, piece);
      else
        io_uring_prep_read(entry, fd, into.iov_base, length, offset);
    } else {
      io_uring_prep_readv(entry, fd, flight.views.data(),
                          static_cast<unsigned>(flight.views.size()), offset);
    }
    if (registered_) entry->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(entry, static_cast<uint64_t>(index));
  }

  // Takes what has come out of the ring. With `refilled`, the device reads on while that is checked.
  void land(bool refilled) {
    unsigned head;
    io_uring_cqe* entry;
    io_uring_for_each_cqe(&ring_, head, entry) {
      const auto index = static_cast<int>(io_uring_cqe_get_data64(entry));
      landed_.emplace_back(std::move(flights_[static_cast<size_t>(index)]), entry->res);
      free_.push_back(index);
    }
    io_uring_cq_advance(&ring_, static_cast<unsigned>(landed_.size()));
    if (refilled) {
      refill(false);
      io_uring_submit(&ring_);  // what it refuses is offered again
    }
    for (const auto& [flight, result] : landed_) settle(flight, result);
    landed_.clear();
  }

  void settle(const Flight& flight, int result) {
    Batch& batch = *flight.turn.batch;
    const int64_t skipped = flight.widened ? flight.widened->skipped : 0;
    std::optional<Failure> failure;
    if (result >= skipped + flight.needed) {
      batch.bytes_read += result;
      if (flight.widened) flight.widened->copy_to(flight.views);
      failure = check(batch.reads, flight.turn.request);
    } else if (result >= 0 || result == -EINTR || result == -EAGAIN) {
      failure = serve(source_, batch, flight.turn.request);  // short: rare enough to read anew
    } else {
      failure = Failure{Kind::failed, flight.turn.request, -result, 0, 0, 0};
    }
    if (flight.widened) widened_ -= flight.widened->length;
    finish(flight.turn, flight.start, failure);
  }

  static void finish(const Turn& turn, int64_t start, const std::optional<Failure>& failure) {
    turn.batch->latencies[static_cast<size_t>(turn.request)] = now() - start;
    turn.batch->finish(failure);
  }

  // Whether the kernel has taken reads on that have not landed.
  bool accepted() const {
    return flights_.size() - free_.size() > io_uring_sq_ready(&ring_);
  }

  // Lands at least one of those. It has to come: nobody can take its memory back from the kernel.
  void await() {
    io_uring_cqe* entry;
    while (io_uring_wait_cqe(&ring_, &entry)) std::this_thread::sleep_for(PAUSE);
    land(false);
  }

  // The ring itself failed. What the kernel has taken on still lands, and would after the ring is
  // closed; all else that was or will be asked for is read without it.
  void give_up() {
    while (accepted()) await();
    io_uring_queue_exit(&ring_);
    for (Flight& flight : flights_)
      if (flight.turn.batch) {
        finish(flight.turn, flight.start,
               serve(source_, *flight.turn.batch, flight.turn.request));
        flight.turn.batch.reset();
      }
    while (const auto turn = postponed_ ? std::exchange(postponed_, std::nullopt)
                                        : queue_.pop(true)) {
      const int64_t start = now();
      finish(*turn, start, serve(source_, *turn->batch, turn->request));
    }
  }

  const Source source_;
  std::span<uint8_t> memory_;  // that is registered
  Queue queue_;
  std::vector<Flight> flights_;
  std::vector<int> free_;
  std::vector<std::pair<Flight, int>> landed_;  // with its result
  std::optional<Turn> postponed_;
  int64_t widened_ = 0;  // bytes of memory for wider reads
  io_uring ring_{};
  bool registered_ = false;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Engine> uring_engine(const Source& source, int depth, std::span<uint8_t> memory) {
  return std::make_unique<Uring>(source, depth, memory);
}

}  // namespace bundlefmt

#endif
