// One thread owns the ring: it fills it up to its depth, and checks what comes out of it.
#include "engine.hpp"
#include "ring.hpp"

#if !defined(BUNDLEFMT_URING)

#include <stdexcept>

namespace bundlefmt {
std::unique_ptr<Engine> uring_engine(const Source&, int, std::span<uint8_t>) {
  throw std::runtime_error("built with headers older than Linux 5.6");
}
}  // namespace bundlefmt

#else

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <future>
#include <new>
#include <thread>
#include <utility>

#include "queue.hpp"

namespace bundlefmt {
namespace {

constexpr int64_t MAX_VIEWS = 1024;  // IOV_MAX on Linux
constexpr std::chrono::milliseconds PAUSE{1};  // between looks at a ring that cannot be waited for
constexpr size_t PIECE = size_t{1} << 30;  // the most that the kernel registers as one buffer
constexpr size_t SHARE = 8;  // one in so many of the reads in flight has to come before a look
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
    std::promise<void> ready;
    thread_ = std::thread([this, &ready] { work(ready); });
    try {
      ready.get_future().get();
    } catch (...) {
      thread_.join();
      throw;
    }
  }
  ~Uring() override { close(); }

  void submit(std::shared_ptr<Batch> batch) override { queue_.push(std::move(batch)); }

  void close() override {
    queue_.close();
    if (thread_.joinable()) thread_.join();
  }

 private:
  // Throws std::runtime_error. The thread that reads does this, as a ring demands.
  void open() {
    ring_.emplace(static_cast<unsigned>(flights_.size()));
    registered_ = ring_->register_file(source_.fd);
    std::vector<iovec> pieces;
    for (size_t at = 0; at < memory_.size(); at += PIECE)
      pieces.push_back({memory_.data() + at, std::min(PIECE, memory_.size() - at)});
    // Where it is refused, the memory is read into like any other.
    if (pieces.empty() || !ring_->register_buffers(pieces)) memory_ = {};
  }

  // The registered buffer that a view lies in; -1 if it lies in none, or in two.
  int piece_of(const iovec& view) const {
    const auto at = reinterpret_cast<uintptr_t>(view.iov_base) -
                    reinterpret_cast<uintptr_t>(memory_.data());
    if (at >= memory_.size() || view.iov_len > memory_.size() - at) return -1;
    if (at / PIECE != (at + view.iov_len - 1) / PIECE) return -1;
    return static_cast<int>(at / PIECE);
  }

  void work(std::promise<void>& ready) {
    try {
      open();
    } catch (...) {
      return ready.set_exception(std::current_exception());
    }
    ready.set_value();
    for (int refusals = 0;;) {
      refill(free_.size() == flights_.size());
      if (free_.size() == flights_.size()) break;  // closed, and nothing on its way
      const size_t in_flight = flights_.size() - free_.size();
      // To wake for every read costs as much as the read.
      const size_t least = std::max(in_flight / SHARE, size_t{1});
      const int submitted = ring_->submit(static_cast<unsigned>(least));
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
    ring_.reset();
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
    io_uring_sqe& entry = ring_->next();
    entry.fd = registered_ ? 0 : source_.fd;
    entry.flags = registered_ ? IOSQE_FIXED_FILE : 0;
    entry.off =
        static_cast<uint64_t>(wide ? flight.widened->offset : reads.offsets[flight.turn.request]);
    entry.user_data = static_cast<uint64_t>(index);
    if (wide || flight.views.size() == 1) {
      const iovec into = wide ? iovec{flight.widened->memory,
                                      static_cast<size_t>(flight.widened->length)}
                              : flight.views[0];
      const int piece = piece_of(into);
      entry.opcode = piece >= 0 ? IORING_OP_READ_FIXED : IORING_OP_READ;
      entry.buf_index = static_cast<uint16_t>(std::max(piece, 0));
      entry.addr = reinterpret_cast<uintptr_t>(into.iov_base);
      entry.len = static_cast<uint32_t>(into.iov_len);
    } else {
      entry.opcode = IORING_OP_READV;
      entry.addr = reinterpret_cast<uintptr_t>(flight.views.data());
      entry.len = static_cast<uint32_t>(flight.views.size());
    }
  }

  // Takes what has come out of the ring. With `refilled`, the device reads on while that is checked.
  void land(bool refilled) {
    ring_->complete([this](const io_uring_cqe& completion) {
      const auto index = static_cast<size_t>(completion.user_data);
      landed_.emplace_back(std::move(flights_[index]), completion.res);
      free_.push_back(static_cast<int>(index));
    });
    if (refilled) {
      refill(false);
      if (ring_->unsent()) ring_->submit(0);  // what it refuses is offered again
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
    return flights_.size() - free_.size() > ring_->unsent();
  }

  // Lands at least one of those. It has to come: nobody can take its memory back from the kernel.
  void await() {
    const size_t waiting = free_.size();
    for (;;) {
      land(false);
      if (free_.size() != waiting) return;
      if (ring_->wait()) std::this_thread::sleep_for(PAUSE);
    }
  }

  // The ring itself failed. What the kernel has taken on still lands, and would after the ring is
  // closed; all else that was or will be asked for is read without it.
  void give_up() {
    while (accepted()) await();
    ring_.reset();
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
  std::optional<Ring> ring_;
  bool registered_ = false;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Engine> uring_engine(const Source& source, int depth, std::span<uint8_t> memory) {
  return std::make_unique<Uring>(source, depth, memory);
}

}  // namespace bundlefmt

#endif
