#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__)
#include <pthread.h>
#endif

namespace pbsattn::cpu {
namespace {

struct Loop {
  const std::function<void(std::int64_t, int)>& body;
  std::int64_t items;
  std::atomic<std::int64_t> next = 0;

  void work(int thread) {
    for (std::int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) body(item, thread);
  }
};

class Threads {
 public:
  // Never destroyed: threads may still be needed by other static objects' destructors. A child of fork has none of its
  // parent's threads, and locks in whatever state they were, so it starts afresh and leaves the old ones alone.
  static Threads& instance() {
    static std::atomic<Threads*> threads = [] {
#if defined(__unix__)
      pthread_atfork(nullptr, nullptr, [] { threads = new Threads; });
#endif
      return new Threads;
    }();
    return *threads;
  }

  void run(int threads, Loop& loop) {
    const std::lock_guard one_loop_at_a_time(callers_);
    {
      const std::lock_guard lock(mutex_);
      grow(threads - 1);
      loop_ = &loop;
      wanted_ = std::min(threads - 1, workers_);
      running_ = wanted_;
      ++generation_;
    }
    start_.notify_all();
    loop.work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    loop_ = nullptr;
  }

 private:
  // Adds workers up to `count`. Where the system has no more threads, or no memory for one, those there are do the
  // work.
  void grow(int count) {
    try {
      for (; workers_ < count; ++workers_)
        std::thread([this, thread = workers_ + 1, seen = generation_] { serve(thread, seen); }).detach();
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
  }

  void serve(int thread, std::uint64_t seen) {
    std::unique_lock lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (thread > wanted_) continue;
      Loop* const loop = loop_;
      lock.unlock();
      loop->work(thread);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  int workers_ = 0;
  Loop* loop_ = nullptr;
  std::uint64_t generation_ = 0;
  int wanted_ = 0;   // workers 1 .. wanted_ take part in this generation's loop
  int running_ = 0;  // of which this many have not finished
};

}  // namespace

void parallel_for(int threads, std::int64_t items, const std::function<void(std::int64_t, int)>& body) {
  Loop loop{.body = body, .items = items};
  const int useful = static_cast<int>(std::min<std::int64_t>(threads, items));
  if (useful <= 1)
    loop.work(0);
  else
    Threads::instance().run(useful, loop);
}

}  // namespace pbsattn::cpu
