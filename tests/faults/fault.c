/* Faults of a disk for real, by LD_PRELOAD: calls that fail, wait, or are the last of the process.

   FAULT="CALL PATH FIRST COUNT ACTION": of the calls of CALL (write, fsync or rename) on a file whose
   path holds PATH, those from the FIRST on, COUNT of them. ACTION is a number of errno to fail with,
   `sleepN` for N milliseconds more, `kill` for SIGKILL instead of the call, `half` for SIGKILL when
   half the bytes are written, or `after` for SIGKILL after the call. Read anew at every call. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static atomic_int seen;

/* Whether this call is to be disturbed, and how. */
static int disturbed(const char *call, const char *path, char *action) {
  char wanted_call[16], wanted_path[256];
  int first, count;
  const char *fault = getenv("FAULT");
  if (!fault || sscanf(fault, "%15s %255s %d %d %15s", wanted_call, wanted_path, &first, &count,
                       action) != 5)
    return 0;
  if (strcmp(call, wanted_call) || !strstr(path, wanted_path)) return 0;
  int number = ++seen;
  return number >= first && number < first + count;
}

static void path_of(int descriptor, char *path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, size - 1);
  path[length > 0 ? length : 0] = 0;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* Before the call: 1 if it must fail, with errno set. */
static int before(const char *action) {
  if (!strcmp(action, "kill")) die();
  if (!strncmp(action, "sleep", 5)) usleep(1000 * atoi(action + 5));
  else if ((errno = atoi(action))) return 1;
  return 0;
}

ssize_t write(int descriptor, const void *bytes, size_t size) {
  ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
  char path[4096], action[16] = "";
  path_of(descriptor, path, sizeof path);
  int hit = disturbed("write", path, action);
  if (hit) {
    if (!strcmp(action, "half")) {
      real(descriptor, bytes, size / 2);
      die();
    }
    if (before(action)) return -1;
  }
  ssize_t written = real(descriptor, bytes, size);
  if (hit && !strcmp(action, "after")) die();
  return written;
}

int fsync(int descriptor) {
  int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
  char path[4096], action[16] = "";
  path_of(descriptor, path, sizeof path);
  int hit = disturbed("fsync", path, action);
  if (hit && before(action)) return -1;
  int result = real(descriptor);
  if (hit && !strcmp(action, "after")) die();
  return result;
}

int rename(const char *from, const char *to) {
  int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
  char action[16] = "";
  int hit = disturbed("rename", to, action);
  if (hit && before(action)) return -1;
  int result = real(from, to);
  if (hit && !strcmp(action, "after")) die();
  return result;
}
