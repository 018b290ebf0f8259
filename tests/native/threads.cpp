// OpenMP's entry points on plain threads, for the thread sanitizer: it cannot see into libgomp, whose
// barrier it would report. Threads and a mutex it understands.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  int size;
  int waiting = 0;
  int round = 0;
  std::mutex mutex;
  std::condition_variable all_here;
};

thread_local Team* team = nullptr;
thread_local int number = 0;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned size, unsigned) {
  Team own{int(size)};
  auto work = [&](int i) {
    team = &own, number = i;
    body(data);
    team = nullptr, number = 0;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < own.size; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() {
  std::unique_lock lock(team->mutex);
  int round = team->round;
  if (++team->waiting == team->size) {
    team->waiting = 0;
    ++team->round;
    team->all_here.notify_all();
  }
  team->all_here.wait(lock, [&] { return team->round != round; });
}

int omp_get_num_threads() { return team ? team->size : 1; }
int omp_get_thread_num() { return number; }
}
