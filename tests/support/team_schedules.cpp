// Plays native/team.h under schedules drawn at random, all its threads in one: whenever one reads or writes something
// atomic, any other may go on in its place. So what happens depends on the seed alone, not on how many cores are free.
// Each sees what others wrote at once: wrong memory orders are not found. Ends with 1 and a line that says what went wrong.
//
// Usage: team_schedules NUM_SCHEDULES
#include <omp.h>
#include <sched.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <utility>
#include <vector>

static constexpr int MOST = 4, STACK_BYTES = 1 << 16;
static constexpr long MOST_POINTS = 2'000'000;

static std::mt19937 drawn;
static ucontext_t threads[MOST];
static std::vector<char> stacks[MOST];
static int current = 0, num_threads = 1;
static bool is_alive[MOST] = {true};
// How often a thread that could give way does not, and how likely each is to come next: some are late all the time.
static double keeps = 0, weights[MOST];
static long num_points = 0, schedule = 0;
static void (*region)(void*);
static void* region_data;

static long draw(long first, long last) { return std::uniform_int_distribution<long>(first, last)(drawn); }

[[noreturn]] static void fail(const char* problem) {
  printf("schedule %ld: %s\n", schedule, problem);
  exit(1);
}

static void go_on_with(int thread) {
  const int from = current;
  current = thread;
  if (thread != from) swapcontext(&threads[from], &threads[thread]);
}

static int draw_next() {
  double chances[MOST];
  for (int t = 0; t < num_threads; t++) chances[t] = is_alive[t] ? weights[t] : 0;
  return std::discrete_distribution<int>(chances, chances + num_threads)(drawn);
}

// Here any thread may go on.
static void point() {
  if (++num_points > MOST_POINTS) fail("it does not end");
  if (num_threads > 1 && std::uniform_real_distribution<>()(drawn) >= keeps) go_on_with(draw_next());
}

// A thread other than the first.
static void run_thread() {
  region(region_data);
  is_alive[current] = false;
  for (int t = 1; t < num_threads; t++)
    if (is_alive[t]) go_on_with(is_alive[0] ? draw_next() : t);
  go_on_with(0);
}

// What `#pragma omp parallel` calls; fewer threads than were asked for may come.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned asked, unsigned) {
  region = function;
  region_data = data;
  num_threads = draw(0, 3) ? asked : draw(1, asked);
  for (int t = 0; t < num_threads; t++) {
    is_alive[t] = true;
    weights[t] = draw(0, 2) ? 1 : 0.01;
    if (!t) continue;
    stacks[t].resize(STACK_BYTES);
    getcontext(&threads[t]);
    threads[t].uc_stack.ss_sp = stacks[t].data();
    threads[t].uc_stack.ss_size = STACK_BYTES;
    makecontext(&threads[t], run_thread, 0);
  }
  function(data);
  is_alive[0] = false;
  for (int t = 1; t < num_threads; t++)
    while (is_alive[t]) go_on_with(t);
  is_alive[0] = true;
  num_threads = 1;
}

extern "C" int omp_get_thread_num() noexcept { return current; }

// Others come at any point; to let the machine's other processes go first would take as long as they like.
extern "C" int sched_yield() noexcept { return 0; }

namespace std {
template <class T> class watched {
 public:
  watched() = default;
  watched(T value) : value_(value) {}
  T load(memory_order = memory_order_seq_cst) const { return point(), value_; }
  void store(T value, memory_order = memory_order_seq_cst) { point(), value_ = value; }
  T fetch_add(T more, memory_order = memory_order_seq_cst) { return point(), exchange(value_, value_ + more); }
  T fetch_sub(T less, memory_order = memory_order_seq_cst) { return point(), exchange(value_, value_ - less); }

 private:
  T value_;
};
}  // namespace std

#define atomic watched
#include "team.h"
#undef atomic

// Some parts to compute, each once, by threads that are told apart, while the call lasts.
struct Work {
  explicit Work(long count, long each) : each(each), times(count) {}

  void operator()(long first, long last, long thread) const {
    if (has_ended) fail("a part is computed after the call has ended");
    if (first < 0 || first >= last || last > (long)times.size()) fail("a part is none of the work's");
    if (last - first > each && (long)times.size() > each) fail("more parts at a time than asked for");
    if (thread < 0 || thread >= MOST || is_busy[thread]) fail("two threads have one number");
    is_busy[thread] = true;
    for (long i = first; i < last; i++) {
      point();
      times[i]++;
    }
    is_busy[thread] = false;
  }

  void end() {
    for (long i = 0; i < (long)times.size(); i++)
      if (times[i] != 1) fail(times[i] ? "a part is computed twice" : "a part is not computed");
    has_ended = true;
  }

  const long each;
  mutable std::vector<int> times;
  mutable bool is_busy[MOST] = {};
  bool has_ended = false;
};

static void play() {
  Team team(draw(2, MOST));
  std::vector<std::unique_ptr<Work>> all;  // kept, to notice those that are used too late
  const auto share = [&] {
    const long count = draw(0, 9), each = draw(1, 3);
    all.push_back(std::make_unique<Work>(count, each));
    team.share(count, each, *all.back());
    all.back()->end();
  };
  for (long regions = draw(1, 2); regions--;) {
    team.gather([&] {
      for (long calls = draw(1, 4); calls--;) share();
    });
    share();
  }
}

int main(int, char** arguments) {
  const long num_schedules = atol(arguments[1]);
  for (schedule = 0; schedule < num_schedules; schedule++) {
    drawn.seed(schedule);
    num_points = 0;
    keeps = std::vector<double>{0, 0.5, 0.9, 0.99}[draw(0, 3)];
    play();
  }
  printf("%ld schedules\n", num_schedules);
}
