// Work cut into tasks for XLA's thread pool.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnets {

namespace ffi = xla::ffi;

inline Index Cut(Index total, Index part, Index parts) { return total * part / parts; }

inline Index DivideUp(Index a, Index b) { return (a + b - 1) / b; }

// How long an idle thread spins, waiting for more work, before it sleeps. Waking it would take as long, which is longer
// than many kernels take for a single image.
constexpr std::chrono::microseconds kPatience{40};

// Whether `ready` becomes true within kPatience.
template <class Ready>
bool LookOut(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!ready()) {
    if (std::chrono::steady_clock::now() > end) return false;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return true;
}

// A call of Parallel. Its tasks are cut into one share per thread, and a thread begins with the share that it had last
// time: what it wrote in one call is in its own cache when the next call reads it. Then it helps with other shares.
class Work {
 public:
  Work(Index tasks, Index threads, const std::function<void(Index)>& body)
      : tasks_(tasks), full_(tasks >= threads), body_(&body), shares_(std::min(tasks, threads)) {
    const Index count = shares_.size();
    for (Index i = 0; i < count; ++i) shares_[i].next = Cut(tasks, i, count), shares_[i].end = Cut(tasks, i + 1, count);
  }

  // Runs the tasks that no other thread has begun. Once all are taken it does not touch `body`, which may be gone.
  void Help() {
    const Index count = shares_.size(), own = Join();
    for (Index i = 0; i < count; ++i) {
      Share& share = shares_[(own + i) % count];
      for (Index task; (task = share.next++) < share.end;) {
        (*body_)(task);
        if (++done_ == tasks_) {
          std::lock_guard<std::mutex> lock(mutex_);
          all_done_.notify_all();
        }
      }
    }
  }

  // Waits only for tasks that a thread is already running, so a busy pool cannot block it.
  void Wait() {
    if (LookOut([this] { return done_ == tasks_; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == tasks_; });
  }

 private:
  struct alignas(64) Share {
    std::atomic<Index> next{0};
    Index end = 0;
    std::atomic<bool> taken{false};
  };

  // The share that this thread begins with.
  Index Join() {
    static thread_local Index last = 0;
    const Index count = shares_.size();
    for (Index i = 0; i < count; ++i) {
      const Index share = (last + i) % count;
      if (shares_[share].taken.exchange(true)) continue;
      if (full_) last = share;
      return share;
    }
    return 0;
  }

  const Index tasks_;
  const bool full_;  // there is a share for every thread
  const std::function<void(Index)>* body_;
  std::vector<Share> shares_;
  std::atomic<Index> done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// The newest work, for threads of the pool that have finished theirs.
class Newest {
 public:
  static Newest& Instance() {
    static auto* newest = new Newest;
    return *newest;
  }

  // Publishes `work`; returns how many threads are waiting for it.
  Index Set(const std::shared_ptr<Work>& work) {
    std::lock_guard<std::mutex> lock(mutex_);
    work_ = work;
    ++number_;
    return waiting_;
  }

  // Helps with `work`, then with whatever follows soon.
  void HelpFrom(std::shared_ptr<Work> work) {
    while (work) {
      const Index number = number_;
      work->Help();
      ++waiting_;
      const bool more = LookOut([&] { return number_ != number; });
      --waiting_;
      work.reset();
      if (!more && number_ == number) return;  // else this thread was counted on just as it was leaving
      std::lock_guard<std::mutex> lock(mutex_);
      work = work_;
    }
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Work> work_;
  std::atomic<Index> number_{0}, waiting_{0};
};

// The pool's threads, of which a runner of XLA programs may have none: then 1.
inline Index Threads(const ffi::ThreadPool& pool) { return std::max<Index>(1, pool.num_threads()); }

// body(0) ... body(tasks - 1), on the pool's threads and this one.
inline void Parallel(ffi::ThreadPool& pool, Index tasks, const std::function<void(Index)>& body) {
  auto work = std::make_shared<Work>(tasks, Threads(pool), body);
  const Index waiting = tasks > 1 ? Newest::Instance().Set(work) : 0;
  const Index helpers = std::min(tasks, Threads(pool)) - 1;
  for (Index i = waiting; i < helpers; ++i) pool.Schedule([work] { Newest::Instance().HelpFrom(work); });
  work->Help();
  work->Wait();
}

// Floats aligned to a cache line: a vector that straddles two lines takes twice as long to read.
struct FreeFloats {
  static constexpr std::align_val_t kLine{64};
  void operator()(float* p) const { ::operator delete[](p, kLine); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

// `size` floats, uninitialised.
inline Floats NewFloats(Index size) {
  return Floats(static_cast<float*>(::operator new[](size * sizeof(float), FreeFloats::kLine)));
}

inline Floats NewZeros(Index size) {
  Floats floats = NewFloats(size);
  std::fill_n(floats.get(), size, 0.f);
  return floats;
}

// A thread's memory for one task, kept for the next; its contents are undefined.
template <int SLOT>
float* Scratch(Index size) {
  static thread_local Floats memory;
  static thread_local Index have = 0;
  if (size > have) {
    memory = NewFloats(size);
    have = size;
  }
  return memory.get();
}

// Memory for the duration of a call, reused from earlier calls: new memory costs a page fault every 4 KiB. Memory kept
// and in use together never exceeds the peak in use.
class Memory {
 public:
  Memory() = default;
  explicit Memory(Index size) : size_(size) {
    std::lock_guard<std::mutex> lock(Mutex());
    auto& [in_use, most, kept, unused] = Kept();
    auto found = unused.lower_bound(size);
    if (found != unused.end() && found->first <= 2 * size) {
      size_ = found->first;
      data_ = std::move(found->second);
      kept -= size_;
      unused.erase(found);
    } else {
      while (!unused.empty() && in_use + kept + size > std::max(most, in_use + size)) {
        kept -= unused.begin()->first;
        unused.erase(unused.begin());
      }
      data_ = NewFloats(size);
    }
    in_use += size_;
    most = std::max(most, in_use);
  }
  Memory(Memory&& other) = default;
  Memory& operator=(Memory&& other) = default;
  ~Memory() {
    if (!data_) return;
    std::lock_guard<std::mutex> lock(Mutex());
    auto& [in_use, most, kept, unused] = Kept();
    in_use -= size_;
    kept += size_;
    unused.emplace(size_, std::move(data_));
  }

  explicit operator bool() const { return data_ != nullptr; }
  float& operator[](Index i) const { return data_[i]; }

 private:
  struct Pool {
    Index in_use = 0, most = 0, kept = 0;  // floats
    std::multimap<Index, Floats> unused;
  };

  static std::mutex& Mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static Pool& Kept() {
    static auto* pool = new Pool;
    return *pool;
  }

  Index size_ = 0;
  Floats data_;
};

}  // namespace jaxnets
