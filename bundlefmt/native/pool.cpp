#include "pool.hpp"

#include <unistd.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace bundlefmt {
namespace {

class Pool {
 public:
  // False when another call is under way.
  bool run(int parts, const std::function<void(int)>& part) {
    std::unique_lock<std::mutex> one(one_call_, std::try_to_lock);
    if (!one.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      while (static_cast<int>(threads_.size()) < parts - 1)
        threads_.emplace_back([this] { serve(); });
      part_ = &part;
      next_ = 0;
      parts_ = parts;
      unfinished_ = parts;
    }
    work_.notify_all();
    std::unique_lock<std::mutex> guard(mutex_);
    work_through(guard);
    done_.wait(guard, [this] { return unfinished_ == 0; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> guard(mutex_);
    for (;;) {
      work_.wait(guard, [this] { return next_ < parts_; });
      work_through(guard);
    }
  }

  void work_through(std::unique_lock<std::mutex>& guard) {
    while (next_ < parts_) {
      const int index = next_++;
      const auto* part = part_;
      guard.unlock();
      std::exception_ptr failure;
      try {
        (*part)(index);
      } catch (...) {  // no memory: for the caller to hear of, not the end of a thread
        failure = std::current_exception();
      }
      guard.lock();
      if (failure) failure_ = std::move(failure);
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  std::mutex one_call_;
  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* part_ = nullptr;
  int next_ = 0, parts_ = 0, unfinished_ = 0;
  std::exception_ptr failure_;
};

}  // namespace

void run_parts(int parts, const std::function<void(int)>& part) {
  // Never destroyed: its threads wait until the process ends.
  static Pool* const pool = new Pool;
  static const pid_t owner = getpid();
  if (parts > 1 && getpid() == owner && pool->run(parts, part)) return;
  for (int index = 0; index < parts; ++index) part(index);
}

}  // namespace bundlefmt
