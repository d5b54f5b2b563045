// XLA's large buffers, kept from one call to the next.
//
// XLA's CPU client allocates a call's working memory from the C library and frees it after the call. The C library
// returns memory of that size to the system, and the next call pays for every page fault again: a fifth of a training
// step, a third of an evaluation. So XLA's allocation functions are replaced, only in its own table of imported
// functions, by ones that keep large blocks. Blocks kept and in use together never exceed the peak in use, and blocks
// that are not soon reused are released.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#if defined(__linux__) && defined(__GLIBC__) && defined(__LP64__)
#define JAXNETS_KEEPS_BUFFERS 1
#include <pthread.h>
#include <sys/mman.h>

#include "imports.h"
#endif

namespace jaxnets {

#if defined(JAXNETS_KEEPS_BUFFERS)

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kFaultBytesPerMicrosecond = 8 << 10;
constexpr uint64_t kForgotten = 256;  // calls of Give until an unused block is released
constexpr size_t kLeastKept = 2 * kHugePage;  // the C library keeps smaller blocks itself

class Buffers {
 public:
  struct Bytes {
    size_t used, held, most_used;
  };

  static Buffers& Instance() {
    static auto* buffers = new Buffers;  // never destroyed: memory is freed up to the very end
    return *buffers;
  }

  // At least `size` bytes of memory, aligned to kHugePage, or null if the system gives none.
  void* Take(size_t size) {
    size = (size + kHugePage - 1) / kHugePage * kHugePage;
    std::unique_lock<std::mutex> lock(mutex_);
    Block* block = Unused(size);
    if (!block && InUse(size)) block = WaitFor(size, lock);
    if (!block) block = New(size);
    if (!block) return nullptr;
    block->used = true;
    bytes_.used += block->size;
    bytes_.most_used = std::max(bytes_.most_used, bytes_.used);
    return reinterpret_cast<void*>(block->address);
  }

  // The size of the block at `pointer`, or 0 for memory not allocated here.
  size_t Size(void* pointer) {
    if (!MayOwn(pointer)) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.find(reinterpret_cast<uintptr_t>(pointer));
    return found == blocks_.end() ? 0 : found->second.size;
  }

  // Frees the block at `pointer` for reuse; false if it was not allocated here.
  bool Give(void* pointer) {
    if (!MayOwn(pointer)) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == blocks_.end()) return false;
    found->second.used = false;
    found->second.freed = ++clock_;
    bytes_.used -= found->second.size;
    ReleaseOldest(kForgotten);  // a block of a program that is no longer called
    given_.notify_all();
    return true;
  }

  Bytes Count() {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

 private:
  struct Block {
    uintptr_t address;
    size_t size;
    bool used;
    uint64_t freed;  // when, in calls of Give
  };

  Buffers() {
    // A forked child starts with the lock released.
    pthread_atfork([] { Instance().mutex_.lock(); }, [] { Instance().mutex_.unlock(); },
                   [] { Instance().mutex_.unlock(); });
  }

  // Takes no lock: XLA frees many small blocks, which lie elsewhere or are not so aligned.
  bool MayOwn(void* pointer) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    return address % kHugePage == 0 && address >= first_ && address < last_;
  }

  // Not too large: a long-lived buffer must not occupy the block of a whole step.
  static bool Fits(const Block& block, size_t size) { return block.size >= size && block.size <= 2 * size; }

  bool InUse(size_t size) const {
    return std::any_of(blocks_.begin(), blocks_.end(),
                       [&](const auto& entry) { return entry.second.used && Fits(entry.second, size); });
  }

  // The smallest unused block that fits.
  Block* Unused(size_t size) {
    Block* best = nullptr;
    for (auto& [address, block] : blocks_) {
      if (block.used || !Fits(block, size)) continue;
      if (!best || block.size < best->size) best = &block;
    }
    return best;
  }

  // XLA reports a call as done shortly before it frees the call's memory. Waits for that, for about as long as page
  // faults in new memory would take.
  Block* WaitFor(size_t size, std::unique_lock<std::mutex>& lock) {
    Block* block = nullptr;
    given_.wait_for(lock, std::chrono::microseconds(size / kFaultBytesPerMicrosecond),
                    [&] { return (block = Unused(size)); });
    return block;
  }

  Block* New(size_t size) {
    const size_t most = std::max(bytes_.most_used, bytes_.used + size);
    while (bytes_.held + size > most && ReleaseOldest()) {
    }
    void* mapped;
    do {
      mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    } while (mapped == MAP_FAILED && ReleaseOldest());
    if (mapped == MAP_FAILED) return nullptr;
    const auto start = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t address = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (address > start) munmap(mapped, address - start);
    const uintptr_t end = start + size + kHugePage;
    if (end > address + size) munmap(reinterpret_cast<void*>(address + size), end - address - size);
    madvise(reinterpret_cast<void*>(address), size, MADV_HUGEPAGE);
    bytes_.held += size;
    first_ = std::min<uintptr_t>(first_, address);
    last_ = std::max<uintptr_t>(last_, address + size);
    return &(blocks_[address] = {address, size, false, 0});
  }

  // Returns the longest unused block to the system, if it has been unused for `age` calls of Give.
  bool ReleaseOldest(uint64_t age = 0) {
    auto oldest = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->second.used) continue;
      if (oldest == blocks_.end() || block->second.freed < oldest->second.freed) oldest = block;
    }
    if (oldest == blocks_.end() || oldest->second.freed + age > clock_) return false;
    munmap(reinterpret_cast<void*>(oldest->second.address), oldest->second.size);
    bytes_.held -= oldest->second.size;
    blocks_.erase(oldest);
    return true;
  }

  std::mutex mutex_;
  std::condition_variable given_;
  std::map<uintptr_t, Block> blocks_;
  Bytes bytes_{};
  uint64_t clock_ = 0;
  std::atomic<uintptr_t> first_{UINTPTR_MAX}, last_{0};  // all blocks lie in between
};

inline int KeptMemalign(void** memory, size_t alignment, size_t size) {
  if (size >= kLeastKept && alignment <= kHugePage) {
    if (void* taken = Buffers::Instance().Take(size)) {
      *memory = taken;
      return 0;
    }
  }
  return posix_memalign(memory, alignment, size);
}

inline void KeptFree(void* memory) {
  if (!Buffers::Instance().Give(memory)) free(memory);
}

inline void* KeptRealloc(void* memory, size_t size) {
  const size_t before = Buffers::Instance().Size(memory);
  if (!before) return realloc(memory, size);
  void* moved = malloc(size);
  if (!moved) return nullptr;
  memcpy(moved, memory, std::min(before, size));
  Buffers::Instance().Give(memory);
  return moved;
}

// Makes XLA, which is part of jaxlib, keep its large buffers; returns whether that worked.
inline bool KeepBuffers() {
  bool kept = false;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* kept) {
        if (!strstr(info->dlpi_name, "/jaxlib/")) return 0;
        const Imports imports(*info);
        const auto allocations = imports.Of("posix_memalign");
        if (allocations.empty()) return 0;
        // The freeing functions first: no block from here may reach the C library's.
        for (void** place : imports.Of("free"))
          if (!imports.Replace(place, reinterpret_cast<void*>(KeptFree))) return 0;
        for (void** place : imports.Of("realloc"))
          if (!imports.Replace(place, reinterpret_cast<void*>(KeptRealloc))) return 0;
        for (void** place : allocations)
          *static_cast<bool*>(kept) |= imports.Replace(place, reinterpret_cast<void*>(KeptMemalign));
        return 0;
      },
      &kept);
  return kept;
}

#endif

}  // namespace jaxnets
