// Work cut into tasks for XLA's thread pool.

#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnets {

namespace ffi = xla::ffi;

// body(0) ... body(tasks - 1), on the pool's threads and this one.
inline void Parallel(ffi::ThreadPool& pool, Index tasks, const std::function<void(Index)>& body) {
  struct State {
    std::atomic<Index> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  // A thread that comes after the last task was taken must not touch `body`, which may be gone.
  auto work = [state, tasks, &body] {
    for (Index task; (task = state->next++) < tasks;) {
      body(task);
      if (++state->done == tasks) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  const Index helpers = std::min<Index>(tasks, pool.num_threads()) - 1;
  for (Index i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  // Only tasks that a thread is at work on are waited for: the pool being busy cannot block this.
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == tasks; });
}

// A thread's memory for one task, kept for the next: what it holds is undefined.
template <int SLOT>
float* Scratch(Index size) {
  static thread_local std::unique_ptr<float[]> memory;
  static thread_local Index have = 0;
  if (size > have) {
    memory.reset(new float[size]);
    have = size;
  }
  return memory.get();
}

// Memory for the length of a call, from those that earlier calls gave back: new memory costs a page fault every 4 KiB.
class Memory {
 public:
  Memory() = default;
  explicit Memory(Index size) : size_(size) {
    std::lock_guard<std::mutex> lock(Mutex());
    auto found = Unused().lower_bound(size);
    if (found == Unused().end() || found->first > 2 * size) {
      data_.reset(new float[size]);
    } else {
      size_ = found->first;
      data_ = std::move(found->second);
      Unused().erase(found);
    }
  }
  Memory(Memory&& other) = default;
  Memory& operator=(Memory&& other) = default;
  ~Memory() {
    if (!data_) return;
    std::lock_guard<std::mutex> lock(Mutex());
    if (Unused().size() < kKept) Unused().emplace(size_, std::move(data_));
  }

  float& operator[](Index i) const { return data_[i]; }

 private:
  static constexpr size_t kKept = 128;

  static std::mutex& Mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static std::multimap<Index, std::unique_ptr<float[]>>& Unused() {
    static auto* unused = new std::multimap<Index, std::unique_ptr<float[]>>;
    return *unused;
  }

  Index size_ = 0;
  std::unique_ptr<float[]> data_;
};

inline Index Cut(Index total, Index part, Index parts) { return total * part / parts; }

inline Index DivideUp(Index a, Index b) { return (a + b - 1) / b; }

}  // namespace jaxnets
