// The time of day jumps every half second, by up to four years either way, and falls back. To be preloaded.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static int ask(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  return real(clock, now);
}

static time_t jumped(time_t seconds) {
  static const long years[] = {0, -1, 4, -4, 2, 0, -2};
  struct timespec since;
  ask(CLOCK_MONOTONIC, &since);
  long halves = since.tv_sec * 2 + since.tv_nsec / 500000000;
  return seconds + years[halves % (sizeof(years) / sizeof(*years))] * 31536000L;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int status = ask(clock, now);
  if (!status && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec = jumped(now->tv_sec);
  return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec precise;
  (void)zone;
  int status = clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return status;
}

time_t time(time_t *seconds) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (seconds) *seconds = precise.tv_sec;
  return precise.tv_sec;
}
