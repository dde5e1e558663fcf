// The threads that compute a call, or all calls of a tape, and how they share the work.
//
// OpenMP's own loops wait for every thread, also for one that another process keeps from its core. Here a thread that comes
// late finds nothing left to do, and is not waited for; only work that was begun is. A region lasts as long as a tape, so
// its calls need none of their own. S in bfloat16, two cores of a Zen 5 EPYC on one of which another process computes, in
// turns: first token after 0.21 s, now 0.07; 71 to 93 tokens/s, now 95 to 118. With both cores free 264 before and now.
#pragma once
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>

class Team {
 public:
  explicit Team(long size) : size_(size), shares_(new Share[size]) {}

  long size() const { return size_; }

  // So many of `count` parts at a time that no thread waits long for another's last ones.
  long slice(long count) const { return (count + 4 * size_ - 1) / (4 * size_); }

  // Passes 0..count-1 to body(first, last, thread), up to `each` at a time, and returns when all are done. The body may not
  // throw. thread: of those at work at one time no two have the same number.
  template <class Body> void share(long count, long each, const Body& body) {
    if (size_ == 1 || count <= each) {
      if (count) body(0, count, 0);
    } else if (gathered_) {
      lead(count, each, body);
    } else {
      gather([&] { lead(count, each, body); });
    }
  }

  // Calls `leader`, which may not throw; the other threads stand by meanwhile, for what it shares.
  template <class Leader> void gather(const Leader& leader) {
    if (size_ == 1) return leader();
    turn_.store(0);
#pragma omp parallel num_threads(size_)
    if (omp_get_thread_num() == 0) {
      gathered_ = true;
      leader();
      gathered_ = false;
      turn_.store(OVER);
    } else {
      follow(omp_get_thread_num());
    }
  }

 private:
  // What is left of a thread's part of the work: it begins there, and goes on with what is left of the others'.
  struct alignas(64) Share {
    std::atomic<long> next;
    long last;
  };

  template <class Body> void lead(long count, long each, const Body& body) {
    for (long t = 0; t < size_; t++) {
      shares_[t].next.store(count * t / size_, std::memory_order_relaxed);
      shares_[t].last = count * (t + 1) / size_;
    }
    each_ = each;
    body_ = &body;
    call_ = [](const void* any, long first, long last, long thread) { (*(const Body*)any)(first, last, thread); };
    turn_.fetch_add(1);
    work(0);
    // Either a thread sees that this turn is over, or it is seen to be at work.
    turn_.fetch_add(1);
    for (long spins = 0; at_work_.load();) wait(spins++);
  }

  void follow(long thread) {
    for (long spins = 0, seen = 0, turn; (turn = turn_.load(std::memory_order_acquire)) != OVER;) {
      if (turn % 2 == 0 || turn == seen) {
        wait(spins++);
        continue;
      }
      at_work_.fetch_add(1);
      seen = turn_.load();
      if (seen % 2) work(thread);
      at_work_.fetch_sub(1);
      spins = 0;
    }
  }

  void work(long thread) {
    for (long i = 0; i < size_; i++) {
      Share& share = shares_[(thread + i) % size_];
      while (share.next.load(std::memory_order_relaxed) < share.last) {
        const long first = share.next.fetch_add(each_, std::memory_order_relaxed);
        if (first < share.last) call_(body_, first, std::min(first + each_, share.last), thread);
      }
    }
  }

  // Where there are more threads than cores, one that only waits must let those go on that work.
  static void wait(long spins) {
    if (spins > SPINS)
      sched_yield();
#if defined(__x86_64__)
    else
      __builtin_ia32_pause();
#endif
  }

  static constexpr long OVER = -2, SPINS = 1000;  // of 60 ns on a Zen 5 EPYC

  const long size_;
  bool gathered_ = false;
  // What is shared in this turn.
  const std::unique_ptr<Share[]> shares_;
  long each_ = 0;
  const void* body_ = nullptr;
  void (*call_)(const void* body, long first, long last, long thread) = nullptr;
  alignas(64) std::atomic<long> turn_{0};     // odd while there is something to do
  alignas(64) std::atomic<long> at_work_{0};  // followers that may be looking at what is shared
};
